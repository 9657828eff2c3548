"""The .beton file, FFCV 1.0.2's data format: our own writer and reader in numpy.

    header | one descriptor a field | table of metadata, one row a sample | ... | pages ... | allocation table

Everything is little-endian. JPEG bytes, pixels and arrays lie in pages; a pointer is an offset in the file. No sample
crosses the border of a page, a multiple of the page size, so a page can be cached on its own. The allocation table
gives the length of what a pointer points at. The header is written last: a file that was not finished says so.

Beside X.beton lies X.beton.json (the sidecar) with what the format has no place for: names of the classes, checksum,
source, files that were re-encoded or left out.
"""

import hashlib
import io
import json
import os
import warnings
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("count", "<u8"), ("allocations", "<u8")]
)
DESCRIPTOR = np.dtype([("kind", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
PICTURE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])  # packed: 13 bytes
JPEG, RAW = 0, 1  # PICTURE's modes
PAGE_SIZE = 1 << 23  # FFCV's default
LARGEST_PAGE = 1 << 31  # the header's page size is a uint32 and a power of two
LONGEST_SIDE = 65535


@dataclass(frozen=True)
class Field:
    """One column: `kind` is FFCV's type number, `shape` and `dtype` are those of an array (kind 4)."""

    kind: int
    shape: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def metadata(self) -> np.dtype:
        return {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: PICTURE, 4: np.dtype("<u8")}[self.kind]


FLOAT, INT, PICTURES = Field(0), Field(1), Field(2)


def vector(length: int) -> Field:
    """A field of float32 [length]."""
    return Field(4, (length,), "<f4")


class Picture(NamedTuple):
    """An image as it is stored: the bytes of a JPEG file, or (raw) height * width * 3 bytes of RGB."""

    data: bytes
    height: int
    width: int
    raw: bool


class Beton:
    """A .beton file, opened read-only; pickled by its path.

    count     number of samples, n
    fields    names of the columns
    sizes     int64 [n, 2] height and width
    labels    int64 [n] (classes), float32 [n, k] (numbers), or None
    nuisance  float32 [n, k] of generated data, or None
    info      the sidecar, {} if there is none (a warning says so)
    classes   names of the classes, from the sidecar, or None

    Takes files written by FFCV, too: an `image`, and a `label` that is an int, a float or an array. Raises
    FileNotFoundError or ValueError where the file is missing, not a .beton, unfinished, truncated or damaged.
    """

    path: Path
    count: int
    fields: list[str]
    sizes: np.ndarray
    labels: np.ndarray | None
    nuisance: np.ndarray | None
    info: dict[str, Any]
    classes: list[str] | None

    def __init__(self, path: str | Path) -> None:
        self._open(Path(path))
        if not self.info:
            warnings.warn(
                f"{self.path} has no {sidecar(self.path).name} beside it: its classes' names and checksum are unknown",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self._open(state["path"])  # without a second warning in every worker

    def _open(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: write it with `python -m simclr_ddp.write_dataset`")
        size = path.stat().st_size
        if size < HEADER.itemsize:
            raise ValueError(f"{path} is not a .beton file: it has only {size} bytes")
        self._bytes = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        header = self._bytes[: HEADER.itemsize].view(HEADER)[0]
        names, fields = self._read_descriptors(header)
        metadata = np.dtype([("", field.metadata) for field in fields], align=True)
        start = HEADER.itemsize + len(fields) * DESCRIPTOR.itemsize
        self.count, end = int(header["count"]), int(header["allocations"])
        if end == 0:
            raise self._damaged("was not finished")
        if end > size or start + self.count * metadata.itemsize > end or (size - end) % ALLOCATION.itemsize:
            raise self._damaged(f"is truncated: {size:,} bytes do not hold its tables")
        if self.count == 0:
            raise ValueError(f"{path} holds no images: write it again from a source that has some")
        rows = self._bytes[start : start + self.count * metadata.itemsize].view(metadata)
        allocations = self._bytes[end:].view(ALLOCATION)
        order = np.argsort(allocations["pointer"], kind="stable")
        self._pointers, self._sizes = allocations["pointer"][order], allocations["size"][order]
        if (self._pointers > end).any() or (self._sizes > end - self._pointers).any():
            raise self._damaged("is truncated: it points beyond its end")

        self.fields = names
        columns = {name: (field, rows[f"f{i}"]) for i, (name, field) in enumerate(zip(names, fields, strict=True))}
        if columns.get("image", (INT,))[0] != PICTURES:
            raise ValueError(f"{path} has no image field called `image`, only {', '.join(names)}: write it again")
        pictures = columns["image"][1]
        self.sizes = np.stack([pictures["height"], pictures["width"]], axis=1).astype(np.int64)
        self._mode = pictures["mode"].copy()
        self._pointer = pictures["pointer"].astype(np.int64)
        self._length = self._lengths(pictures["pointer"]).astype(np.int64)
        if (self._mode > RAW).any() or (self.sizes == 0).any():
            raise self._damaged("is damaged: an image has no size, or is neither JPEG nor raw")
        if (self._length != self.sizes.prod(axis=1) * 3)[self._mode == RAW].any():
            raise self._damaged("is damaged: a raw image is not height * width * 3 bytes long")
        self.labels = self._column(columns, "label")
        nuisance = self._column(columns, "nuisance")
        self.nuisance = None if nuisance is None or nuisance.dtype == np.int64 else nuisance
        self._tables = (self._bytes[:start], rows, self._bytes[end:])
        self._read_sidecar(size)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} {what}: copy or write it again")

    def undecodable(self, i: int, error: Exception) -> ValueError:
        """The sentence for a broken image i."""
        return ValueError(f"image {i} of {self.path} can't be decoded ({error}): write the file again")

    def _read_descriptors(self, header: np.void) -> tuple[list[str], list[Field]]:
        page_size, count = int(header["page_size"]), int(header["fields"])
        end = HEADER.itemsize + count * DESCRIPTOR.itemsize
        if header["version"] == 0:
            raise self._damaged("was not finished, or is no .beton file")
        if header["version"] != VERSION or page_size & (page_size - 1) or not page_size or not 0 < count < 256:
            raise ValueError(f"{self.path} is not a .beton file of FFCV's format {VERSION}: write it again")
        if end > len(self._bytes):
            raise self._damaged(f"is truncated: {len(self._bytes):,} bytes do not hold its descriptors")
        names, fields = [], []
        for row in self._bytes[HEADER.itemsize : end].view(DESCRIPTOR):
            name = row["name"].decode("ascii", "replace")
            names.append(name)
            try:
                fields.append(_field(int(row["kind"]), row["arguments"].tobytes()))
            except (KeyError, ValueError, TypeError):
                raise ValueError(
                    f"{self.path}: field `{name}` is of FFCV's type {row['kind']}, but only images, ints, floats and "
                    "arrays of numbers are read: write it again with these"
                ) from None
        return names, fields

    def _lengths(self, pointers: np.ndarray) -> np.ndarray:
        """uint64 [n]: how many bytes lie at each pointer."""
        place = np.searchsorted(self._pointers, pointers).clip(max=max(len(self._pointers) - 1, 0))
        if len(self._pointers) == 0 or (self._pointers[place] != pointers).any():
            raise self._damaged("is damaged: a sample is missing from its allocation table")
        return self._sizes[place]

    def _column(self, columns: Mapping[str, tuple[Field, np.ndarray]], name: str) -> np.ndarray | None:
        """int64 [n] of an int field, float32 [n, k] of a float or array field, None if there is no such field."""
        if name not in columns:
            return None
        field, values = columns[name]
        if field == PICTURES:
            raise ValueError(f"{self.path}: field `{name}` holds images: write it again with numbers")
        if field == INT:
            return values.astype(np.int64)
        if field == FLOAT:
            return values.astype(np.float32)[:, None]
        size = np.dtype(field.dtype).itemsize * int(np.prod(field.shape))
        if (self._lengths(values) != size).any():
            raise self._damaged(f"is damaged: not every `{name}` is {size} bytes long")
        found = np.empty((self.count, int(np.prod(field.shape))), np.float32)
        for i in range(0, self.count, 65536):  # in parts: the index is eight times as large as the data
            at = values[i : i + 65536, None].astype(np.int64) + np.arange(size)
            found[i : i + 65536] = self._bytes[at].view(field.dtype)
        return found

    def _read_sidecar(self, size: int) -> None:
        beside = sidecar(self.path)
        self.info, self.classes = {}, None
        if not beside.is_file():
            return
        try:
            self.info = json.loads(beside.read_text())
            self.classes = self.info.get("classes")
            fits = (self.info["count"], self.info["bytes"]) == (self.count, size)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{beside} is damaged: write the data set again, or remove this file") from None
        if not fits:
            raise ValueError(f"{beside} belongs to another file than {self.path}: copy both again, or remove it")
        if (
            self.classes
            and self.labels is not None
            and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes)
        ):
            raise ValueError(f"{beside} names {len(self.classes)} classes, but the labels go beyond: write both again")

    def fingerprint(self) -> str:
        """16 hex digits that identify the content: of the sidecar's checksum, else of header and tables."""
        if "sha256" in self.info:
            return str(self.info["sha256"])[:16]
        return hashlib.sha256(b"".join(part.tobytes() for part in self._tables)).hexdigest()[:16]

    def digest(self) -> str:
        """16 hex digits of the bytes that lie here: of all up to 64 MB, of larger files the size and 34 MB of them."""
        return quick_digest(self.path)

    def stored(self, i: int) -> Picture:
        """Image i as it is stored. Raises IndexError."""
        if not 0 <= i < self.count:
            raise IndexError(f"image {i} of {self.path}, which has {self.count}")
        start, (height, width) = int(self._pointer[i]), self.sizes[i].tolist()
        data = self._bytes[start : start + int(self._length[i])].tobytes()
        return Picture(data, height, width, bool(self._mode[i] == RAW))

    def jpeg(self, i: int) -> Image.Image:
        """Image i, of mode RGB; a colour JPEG is not decoded yet, so that `draft` and `load` are the caller's."""
        picture = self.stored(i)
        if picture.raw:
            return Image.frombytes("RGB", (picture.width, picture.height), picture.data)
        try:
            image: Image.Image = Image.open(io.BytesIO(picture.data))
            if image.size != (picture.width, picture.height):
                raise ValueError(f"it is {image.width} x {image.height}, not {picture.width} x {picture.height} pixels")
            return image if image.mode == "RGB" else image.convert("RGB")
        except Exception as error:  # Pillow raises almost anything at broken data
            raise self.undecodable(i, error) from error

    def image(self, i: int) -> np.ndarray:
        """Image i, decoded: uint8 [height, width, 3], RGB, writable. Raises ValueError if it can't be decoded."""
        picture = self.jpeg(i)
        try:
            return np.array(picture)
        except Exception as error:
            raise self.undecodable(i, error) from error


def quick_digest(path: Path, whole: int = 64 << 20, block: int = 1 << 16, blocks: int = 512) -> str:
    """16 hex digits of a file's bytes: of all where there are at most `whole`.

    Else of its size, its first and last MB, and `blocks` blocks spread evenly from end to end.
    """
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        if size <= whole:
            while chunk := file.read(1 << 20):
                found.update(chunk)
        else:
            starts = [size * i // blocks for i in range(blocks)]
            for start, length in [(0, 1 << 20), (size - (1 << 20), 1 << 20), *((start, block) for start in starts)]:
                found.update(os.pread(file.fileno(), length, start))
    return found.hexdigest()[:16]


def sidecar(path: Path) -> Path:
    """X.beton.json, beside X.beton."""
    return path.with_name(path.name + ".json")


def write(
    path: Path,
    samples: Iterable[Sequence[Any]],
    fields: Mapping[str, Field],
    capacity: int,
    info: dict[str, Any],
    *,
    overwrite: bool = False,
    page_size: int = PAGE_SIZE,
) -> None:
    """Write a .beton file and its sidecar; until both are whole and read back, nothing has the final name.

    samples    one tuple a sample, in the order of `fields`: a Picture, an int, a float, or an array of the field's
               shape. Only one is held in memory at a time; the tables (about 50 bytes a sample) are, too.
    capacity   an upper limit of the number of samples; their table lies before them in the file
    info       the sidecar's content; read after the last sample, so samples may still count into it. count, bytes and
               sha256 are added
    page_size  a power of two, doubled where a sample is larger. What fits into small pages fits into large ones, so
               nothing already written moves.

    Raises FileExistsError, ValueError if there is no sample or one is 2 GiB or larger, OSError if the disk is full.
    """
    assert page_size & (page_size - 1) == 0 and next(iter(fields)) == "image"
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another name, remove it, or say overwrite=true")
    metadata = np.dtype([("", field.metadata) for field in fields.values()], align=True)
    rows = np.zeros(capacity, metadata)
    allocations = array("Q")  # sample, pointer, size; sample, ...
    tables = HEADER.itemsize + len(fields) * DESCRIPTOR.itemsize
    with _partial(path) as partial, _partial(sidecar(path)) as partial_json:
        with partial.open("wb", buffering=1 << 20) as file:
            first = position = _up(tables + rows.nbytes, page_size)
            file.seek(first)
            checksum = count = 0
            for sample in samples:
                regions = _regions(sample, fields)
                size = sum(map(len, regions))
                while size > page_size:
                    page_size *= 2
                if page_size > LARGEST_PAGE:
                    raise ValueError(f"sample {count} has {size:,} bytes, but 2 GiB is the most: make it smaller")
                if position % page_size + size > page_size:
                    checksum, position = _pad(file, checksum, position, page_size)
                pointers = []
                for region in regions:
                    pointers.append(position)
                    allocations.extend((count, position, len(region)))
                    file.write(region)
                    checksum, position = zlib.crc32(region, checksum), position + len(region)
                rows[count] = _row(sample, fields, iter(pointers))
                count += 1
            if count == 0:
                raise ValueError(f"no image is left to write to {path}: check the source")
            checksum, position = _pad(file, checksum, position, page_size)
            file.write(np.frombuffer(allocations, "u8").astype("<u8").tobytes())
            file.seek(HEADER.itemsize)
            file.write(_descriptors(fields) + rows[:count].tobytes())
            _sync(file)
            file.seek(0)
            file.write(np.array((VERSION, len(fields), page_size, count, position), HEADER).tobytes())
            _sync(file)
        sha256, checksum_read = _digest(partial, first, position)
        if checksum_read != checksum:
            raise OSError(f"{partial} does not hold what was written: check the disk")
        info |= {"count": count, "bytes": partial.stat().st_size, "sha256": sha256}
        _check(partial, rows[:count])
        with partial_json.open("w") as text:
            json.dump(info, text, indent=1)
            _sync(text)
        if overwrite:
            path.unlink(missing_ok=True)  # first, so that at no time a file has another one's sidecar
        os.replace(partial_json, sidecar(path))
        os.replace(partial, path)
        _sync_folder(path.parent)


def _up(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size


def _pad(file: BinaryIO, checksum: int, position: int, page_size: int) -> tuple[int, int]:
    """Zeros to the end of the page; returns checksum and position after them."""
    end = _up(position, page_size)
    while position < end:
        zeros = bytes(min(end - position, 1 << 20))
        file.write(zeros)
        checksum, position = zlib.crc32(zeros, checksum), position + len(zeros)
    return checksum, position


def _regions(sample: Sequence[Any], fields: Mapping[str, Field]) -> list[bytes]:
    """What of a sample goes into the pages, in order."""
    regions = []
    for field, value in zip(fields.values(), sample, strict=True):
        if field == PICTURES:
            assert 0 < value.height <= LONGEST_SIDE and 0 < value.width <= LONGEST_SIDE
            assert not value.raw or len(value.data) == value.height * value.width * 3
            regions.append(value.data)
        elif field.kind == 4:
            values = np.asarray(value, field.dtype)
            assert values.shape == field.shape
            regions.append(values.tobytes())
    return regions


def _row(sample: Sequence[Any], fields: Mapping[str, Field], pointers: Iterator[int]) -> tuple[Any, ...]:
    """A sample's row of the metadata."""

    def cell(field: Field, value: Any) -> Any:
        if field == PICTURES:
            return RAW if value.raw else JPEG, value.width, value.height, next(pointers)
        return next(pointers) if field.kind == 4 else value

    return tuple(cell(field, value) for field, value in zip(fields.values(), sample, strict=True))


def _descriptors(fields: Mapping[str, Field]) -> bytes:
    rows = np.zeros(len(fields), DESCRIPTOR)
    for row, (name, field) in zip(rows, fields.items(), strict=True):
        assert len(name) <= 16
        row["kind"], row["name"] = field.kind, name.encode("ascii")
        if field.kind == 4:  # 32 sizes, the length of a JSON text, the text: numpy's `descr`
            text = json.dumps([["", field.dtype]]).encode()
            sizes = np.zeros(33, "<u8")
            sizes[: len(field.shape)], sizes[32] = field.shape, len(text)
            arguments = np.frombuffer(sizes.tobytes() + text, np.uint8)
            row["arguments"][: len(arguments)] = arguments
    return rows.tobytes()


def _field(kind: int, arguments: bytes) -> Field:
    """The field of a descriptor. Raises KeyError, ValueError or TypeError if it is not of a type that we read."""
    if kind != 4:
        return {0: FLOAT, 1: INT, 2: PICTURES}[kind]
    sizes = np.frombuffer(arguments, "<u8", 33).tolist()
    ((_, name),) = json.loads(arguments[264 : 264 + sizes[32]])
    if np.dtype(name).kind not in "iufb":
        raise ValueError(name)
    shape = tuple(size for size in sizes[:32] if size)
    if not 0 < int(np.prod(shape, dtype=np.float64)) < 1 << 20:
        raise ValueError(shape)
    return Field(4, shape, np.dtype(name).str)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, removed if the block did not rename it."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path, first: int, end: int) -> tuple[str, int]:
    """SHA-256 of the whole file, and CRC-32 of the bytes first .. end - 1."""
    sha256, checksum, position = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            inside = memoryview(chunk)[max(first - position, 0) : max(end - position, 0)]
            checksum, position = zlib.crc32(inside, checksum), position + len(chunk)
    return sha256.hexdigest(), checksum


def _check(path: Path, rows: np.ndarray) -> None:
    """Open a file just written as any reader would, compare its table, decode 64 of its images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = Beton(path)
    if written._tables[1].tobytes() != rows.tobytes():
        raise OSError(f"{path} does not hold the table that was written: check the disk")
    for i in np.linspace(0, written.count - 1, min(written.count, 64)).astype(int).tolist():
        written.image(i)

"""Reader and writer in numpy of .beton files, the data format of FFCV 1.0.2.

    header | one descriptor per field | table of metadata, one row per sample | ... | pages ... | allocation table

All numbers are little-endian. Pages hold JPEG bytes, pixels and arrays; a pointer is an offset in the file. No sample
crosses a page border (a multiple of the page size), so pages can be cached separately. The allocation table holds the
length of the data at each pointer. The header is written last, so an unfinished file can be recognised.

Between the last page and the allocation table our writer adds what the format lacks, the description: kind of labels,
names of the classes, and the SHA-256 of all bytes before it (JSON, its length as uint64, and MARK). FFCV skips it.

The sidecar X.beton.json next to X.beton is for people: source, checksum, and files that were re-encoded or skipped. It
also describes files of earlier versions, which have no description of their own. X.beton.names holds the names of the
image files, one per line, after a line with the fingerprint of X.beton; only what shows or lists images reads it.
"""

import hashlib
import io
import json
import os
import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from simclr_ddp.system import console, files
from simclr_ddp.system.console import printable

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
MARK = b"simclr01"  # last bytes of a description
DESCRIBED = ("label_kind", "classes", "numbers", "nuisance")  # keys of the sidecar that the description repeats
BYTES_PER_PIXEL = 16  # needed at most by a decoder, for a progressive JPEG


@dataclass(frozen=True)
class Field:
    """A column of the file: `kind` is FFCV's type number, `shape` and `dtype` describe arrays (kind 4)."""

    kind: int
    shape: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def metadata(self) -> np.dtype:
        return {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: PICTURE, 4: np.dtype("<u8")}[self.kind]


FLOAT, INT, PICTURES = Field(0), Field(1), Field(2)


def vector(length: int) -> Field:
    """Return a field of float32 [length]."""
    return Field(4, (length,), "<f4")


class Picture(NamedTuple):
    """A stored image: the bytes of a JPEG file, or (raw) height * width * 3 bytes of RGB."""

    data: bytes
    height: int
    width: int
    raw: bool


class Beton:
    """A .beton file, opened read-only; it is pickled as its path.

    count     number of samples, n
    fields    names of the columns
    sizes     int64 [n, 2] height and width
    labels    int64 [n] (classes), float32 [n, k] (numbers), or None
    nuisance  float32 [n, k] of generated data, or None
    info      the sidecar; {} if there is none
    classes   names of the classes in composed Unicode (NFC), or None if neither the file nor a sidecar holds them
    numbers   names of the numbers in a label, or None

    Files written by FFCV are supported, with an `image` and a `label` that is an int, a float or an array. Raises
    FileNotFoundError or ValueError if the file is missing, not a .beton file, unfinished, truncated or damaged.
    """

    path: Path
    count: int
    fields: list[str]
    sizes: np.ndarray
    labels: np.ndarray | None
    nuisance: np.ndarray | None
    info: dict[str, Any]
    classes: list[str] | None
    numbers: list[str] | None

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        if fault := files.not_a_file(path):
            raise FileNotFoundError(f"{path} {fault}; write it with `python -m simclr_ddp.write_dataset`")
        size = path.stat().st_size
        if size < HEADER.itemsize:
            raise ValueError(f"{path} is not a .beton file: it has only {size} bytes; write it again")
        self._bytes = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        header = self._bytes[: HEADER.itemsize].view(HEADER)[0]
        names, fields = self._read_descriptors(header)
        metadata = np.dtype([("", field.metadata) for field in fields], align=True)
        start = HEADER.itemsize + len(fields) * DESCRIPTOR.itemsize
        self.count, end = int(header["count"]), int(header["allocations"])
        if end == 0:
            raise self._damaged("was not finished")
        if end > size or start + self.count * metadata.itemsize > end or (size - end) % ALLOCATION.itemsize:
            raise self._damaged(f"is truncated: its tables don't fit into {size:,} bytes")
        if self.count == 0:
            raise ValueError(f"{path} contains no images; write it again from a source with images")
        rows = self._bytes[start : start + self.count * metadata.itemsize].view(metadata)
        allocations = self._bytes[end:].view(ALLOCATION)
        order = np.argsort(allocations["pointer"], kind="stable")
        self._pointers, self._sizes = allocations["pointer"][order], allocations["size"][order]
        if (self._pointers > end).any() or (self._sizes > end - self._pointers).any():
            raise self._damaged("is truncated: it has pointers beyond its end")

        self.fields = names
        columns = {name: (field, rows[f"f{i}"]) for i, (name, field) in enumerate(zip(names, fields, strict=True))}
        if columns.get("image", (INT,))[0] != PICTURES:
            raise ValueError(f"{path} has no image field `image`, only {', '.join(names)}; write it again")
        pictures = columns["image"][1]
        self.sizes = np.stack([pictures["height"], pictures["width"]], axis=1).astype(np.int64)
        self._mode = pictures["mode"].copy()
        self._pointer = pictures["pointer"].astype(np.int64)
        self.length = self._lengths(pictures["pointer"]).astype(np.int64)
        if (self._mode > RAW).any() or (self.sizes == 0).any():
            raise self._damaged("is damaged: an image has size 0, or is neither JPEG nor raw")
        if (self.length != self.sizes.prod(axis=1) * 3)[self._mode == RAW].any():
            raise self._damaged("is damaged: a raw image is not height * width * 3 bytes long")
        self.labels = self._column(columns, "label")
        nuisance = self._column(columns, "nuisance")
        self.nuisance = None if nuisance is None or nuisance.dtype == np.int64 else nuisance
        self._tables = (self._bytes[:start], rows, self._bytes[end:])
        self._read_description(start + rows.nbytes, end)
        self._read_sidecar(size)

    def __reduce__(self) -> tuple[Any, ...]:
        return Beton, (self.path,)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} {what}; copy or write it again")

    def undecodable(self, i: int, error: Exception) -> ValueError:
        """Return the error for an image i that can't be decoded. Raises MemoryError if that is the cause."""
        if isinstance(error, MemoryError):
            raise error
        check_memory(int(self.sizes[i].prod()))
        return ValueError(f"image {i} of {self.path} can't be decoded ({error}); write the file again")

    def _read_descriptors(self, header: np.void) -> tuple[list[str], list[Field]]:
        page_size, count = int(header["page_size"]), int(header["fields"])
        end = HEADER.itemsize + count * DESCRIPTOR.itemsize
        if header["version"] == 0:
            raise self._damaged("was not finished, or is not a .beton file")
        if header["version"] != VERSION or page_size & (page_size - 1) or not page_size or not 0 < count < 256:
            raise ValueError(f"{self.path} is not a .beton file of FFCV's format {VERSION}; write it again")
        if end > len(self._bytes):
            raise self._damaged(f"is truncated: its descriptors don't fit into {len(self._bytes):,} bytes")
        names, fields = [], []
        for row in self._bytes[HEADER.itemsize : end].view(DESCRIPTOR):
            name = row["name"].decode("ascii", "replace")
            names.append(name)
            try:
                fields.append(_field(int(row["kind"]), row["arguments"].tobytes()))
            except (KeyError, ValueError, TypeError):
                raise ValueError(
                    f"{self.path}: field `{name}` has FFCV's type {row['kind']}, but only images, ints, floats and "
                    "arrays of numbers are supported; write it again with these"
                ) from None
        return names, fields

    def _lengths(self, pointers: np.ndarray) -> np.ndarray:
        """Number of bytes at each pointer, uint64 [n]."""
        place = np.searchsorted(self._pointers, pointers).clip(max=max(len(self._pointers) - 1, 0))
        if len(self._pointers) == 0 or (self._pointers[place] != pointers).any():
            raise self._damaged("is damaged: a sample is missing from its allocation table")
        return self._sizes[place]

    def _column(self, columns: Mapping[str, tuple[Field, np.ndarray]], name: str) -> np.ndarray | None:
        """Read an int field as int64 [n], a float or array field as float32 [n, k]; None without such a field."""
        if name not in columns:
            return None
        field, values = columns[name]
        if field == PICTURES:
            raise ValueError(f"{self.path}: field `{name}` contains images; write it again with numbers")
        if field == INT:
            return values.astype(np.int64)
        if field == FLOAT:
            return values.astype(np.float32)[:, None]
        size = np.dtype(field.dtype).itemsize * int(np.prod(field.shape))
        if (self._lengths(values) != size).any():
            raise self._damaged(f"is damaged: not every `{name}` is {size} bytes long")
        found = np.empty((self.count, int(np.prod(field.shape))), np.float32)
        for i in range(0, self.count, 65536):  # in blocks: the index is eight times as large as the data
            at = values[i : i + 65536, None].astype(np.int64) + np.arange(size)
            found[i : i + 65536] = self._bytes[at].view(field.dtype)
        return found

    def _read_description(self, start: int, end: int) -> None:
        """Read what our writer put before the allocation table at `end`, if it is there; `start` ends the tables."""
        self._described, self._content = end, ""
        self.classes = self.numbers = None
        trailer = self._bytes[max(end - 16, start) : end].tobytes()
        if len(trailer) < 16 or trailer[8:] != MARK:
            return
        self._described = end - 16 - int.from_bytes(trailer[:8], "little")
        try:
            if self._described < start:
                raise ValueError
            found = _json_object(self._bytes[self._described : end - 16].tobytes())
            self.classes, self.numbers = _names(found, "classes"), _names(found, "numbers")
            self._content = _checksum(found) or ""
        except ValueError:
            raise self._damaged("is damaged: the description before its allocation table can't be read") from None
        self._check_labels(str(self.path))

    def _read_sidecar(self, size: int) -> None:
        file = sidecar(self.path)
        self.info = {}
        if not file.is_file():
            return
        try:
            self.info = _json_object(file.read_bytes())
            classes, numbers = _names(self.info, "classes"), _names(self.info, "numbers")
            _checksum(self.info)
            fits = (self.info["count"], self.info["bytes"]) == (self.count, size)
        except (ValueError, KeyError) as error:
            why = f" ({error})" if type(error) is ValueError else ""
            raise ValueError(f"{file} is damaged{why}; write the data set again, or remove this file") from None
        if not fits:
            raise ValueError(f"{file} belongs to another file than {self.path}; copy both again, or remove it")
        if not self._content:
            self.classes, self.numbers = classes, numbers
            self._check_labels(str(file))

    def _check_labels(self, where: str) -> None:
        if self.classes is None or self.labels is None:
            return
        if not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(f"{where} names {len(self.classes)} classes, but labels go beyond; write it again")

    def fingerprint(self) -> str:
        """Identify the content by 16 hex digits, which depend neither on the path nor on the sidecar.

        They are of the SHA-256 in the file. A file of earlier versions or of another tool has none: then it is the
        SHA-256 of the complete file, which its sidecar holds or which is computed.
        """
        found = self._content or self.info.get("sha256")
        if not found:
            if len(self._bytes) > 1e9:
                console.say(f"{self.path} holds no checksum: computing one of its {len(self._bytes) / 1e9:,.0f} GB")
            found = self._digest(len(self._bytes))
        return str(found)[:16]

    def is_known_as(self, fingerprint: str) -> bool:
        """Whether this or an earlier version (of the tables, without a sidecar) gives the fingerprint."""
        if fingerprint == self.fingerprint():
            return True
        return fingerprint == hashlib.sha256(b"".join(table.tobytes() for table in self._tables)).hexdigest()[:16]

    def is_complete(self) -> bool | None:
        """Read the file and compare its checksum; None if neither the file nor a sidecar holds one."""
        if self._content:
            return self._digest(self._described) == self._content
        expected = self.info.get("sha256")
        return None if expected is None else self._digest(len(self._bytes)) == expected

    def _digest(self, end: int) -> str:
        return str(file_digest(self.path, end)[0].hexdigest())

    def names(self) -> list[str] | None:
        """Names of the image files, from X.beton.names; None without it. Raises ValueError if it is of another file."""
        file = names_file(self.path)
        if not file.is_file():
            return None
        first, *found = file.read_text("utf-8", errors="replace").removesuffix("\n").split("\n")
        if first != self.fingerprint() or len(found) != self.count:
            raise ValueError(f"{file} belongs to another file than {self.path}; copy both again, or remove it")
        return found

    def digest(self) -> str:
        """Hash the file's bytes to 16 hex digits: all up to 64 MB, else the size and 34 MB of them."""
        return quick_digest(self.path)

    def stored(self, i: int) -> Picture:
        """Return image i as it is stored. Raises IndexError."""
        if not 0 <= i < self.count:
            raise IndexError(f"image {i} of {self.path}, which has {self.count} images")
        start, (height, width) = int(self._pointer[i]), self.sizes[i].tolist()
        data = self._bytes[start : start + int(self.length[i])].tobytes()
        return Picture(data, height, width, bool(self._mode[i] == RAW))

    def jpeg(self, i: int) -> Image.Image:
        """Open image i in mode RGB; a colour JPEG is not decoded yet, so the caller may use `draft` and `load`."""
        picture = self.stored(i)
        if picture.raw:
            return Image.frombytes("RGB", (picture.width, picture.height), picture.data)
        try:
            image: Image.Image = JpegImageFile(io.BytesIO(picture.data))  # Image.open refuses very large ones
            if image.size != (picture.width, picture.height):
                raise ValueError(f"it is {image.width} x {image.height}, not {picture.width} x {picture.height} pixels")
            return image if image.mode == "RGB" else image.convert("RGB")
        except Exception as error:  # Pillow raises almost any exception for broken data
            raise self.undecodable(i, error) from error

    def image(self, i: int) -> np.ndarray:
        """Decode image i to writable RGB, uint8 [height, width, 3]. Raises ValueError if it can't be decoded."""
        picture = self.jpeg(i)
        try:
            return np.array(picture)
        except Exception as error:
            raise self.undecodable(i, error) from error


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError:
        raise ValueError("it is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _names(described: dict[str, Any], key: str) -> list[str] | None:
    """Return the list of names under that key, in the form in which names are compared, or None."""
    names = described.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its {key} are not a list of names")
    return [plain(name) for name in names] or None


def _checksum(described: dict[str, Any]) -> str | None:
    found = described.get("sha256")
    if found is not None and not (isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found)):
        raise ValueError("its sha256 is not 64 hexadecimal digits")
    return found


def plain(name: str) -> str:
    r"""Return a name in composed Unicode (NFC), with bytes that are not UTF-8 and control characters as \xe2."""
    return printable(unicodedata.normalize("NFC", name))


def check_memory(pixels: int) -> None:
    """Raise MemoryError if there is too little to decode an image with N pixels: decoders report broken data then."""
    np.empty(pixels * BYTES_PER_PIXEL, np.uint8)


def quick_digest(path: Path, limit: int = 64 << 20, block: int = 1 << 16, blocks: int = 512) -> str:
    """Hash a file to 16 hex digits; all of its bytes if there are at most `limit`.

    The hash of a larger file covers its size, its first and last MB, and `blocks` evenly spread blocks.
    """
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        if size <= limit:
            while chunk := file.read(1 << 20):
                found.update(chunk)
        else:
            starts = [size * i // blocks for i in range(blocks)]
            for start, length in [(0, 1 << 20), (size - (1 << 20), 1 << 20), *((start, block) for start in starts)]:
                found.update(os.pread(file.fileno(), length, start))
    return found.hexdigest()[:16]


def sidecar(path: Path) -> Path:
    """Return the path X.beton.json for X.beton."""
    return path.with_name(path.name + ".json")


def names_file(path: Path) -> Path:
    """Return the path X.beton.names for X.beton."""
    return path.with_name(path.name + ".names")


def write_names(path: Path, names: Iterable[str]) -> None:
    """Write the names of the image files of a .beton file, in its order; they hold no end of a line."""
    text = "\n".join([Beton(path).fingerprint(), *names]) + "\n"
    files.replace_atomically(names_file(path), lambda temporary: temporary.write_text(text, "utf-8"))


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
    """Write a .beton file and its sidecar; the final names appear only when both are complete and verified.

    samples    one tuple per sample, in the order of `fields`: a Picture, an int, a float, or an array of the field's
               shape. Memory holds one sample at a time, and the tables (about 50 bytes per sample).
    capacity   upper bound of the number of samples; their table precedes them in the file
    info       content of the sidecar; it is read after the last sample, so `samples` may still change it. count, bytes
               and sha256 are added
    page_size  a power of two, doubled for a larger sample. Samples that fit into small pages fit into large ones, so
               nothing already written moves.

    Raises FileExistsError, ValueError if there is no sample or one has 2 GiB or more, OSError if the disk is full.
    """
    assert page_size & (page_size - 1) == 0 and next(iter(fields)) == "image"
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, remove it, or set overwrite=true")
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
                regions = sample_regions(sample, fields)
                size = sum(map(len, regions))
                while size > page_size:
                    page_size *= 2
                if page_size > LARGEST_PAGE:
                    raise ValueError(f"sample {count} has {size:,} bytes, more than 2 GiB; make it smaller")
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
                raise ValueError(f"no image is left to write to {path}; check the source")
            checksum, position = _pad(file, checksum, position, page_size)
            pages_end, described = position, {key: info.get(key) for key in DESCRIBED} | {"sha256": "0" * 64}
            position += len(_description(described))
            header = np.array((VERSION, len(fields), page_size, count, position), HEADER).tobytes()
            file.seek(HEADER.itemsize)
            file.write(_descriptors(fields) + rows[:count].tobytes())
            sync_file(file)
            sha256, checksum_read = file_digest(partial, pages_end, first, header)
            described["sha256"] = sha256.hexdigest()
            tail = _description(described) + np.frombuffer(allocations, "u8").astype("<u8").tobytes()
            sha256.update(tail)
            file.seek(pages_end)
            file.write(tail)
            sync_file(file)
            file.seek(0)
            file.write(header)
            sync_file(file)
        if checksum_read != checksum:
            raise OSError(f"{partial} differs from what was written; check the disk")
        info |= {"count": count, "bytes": partial.stat().st_size, "sha256": sha256.hexdigest()}
        _check(partial, rows[:count], tail)
        with partial_json.open("w") as text:
            json.dump(info, text, indent=1)
            sync_file(text)
        if overwrite:
            path.unlink(missing_ok=True)  # first, so that a file never has another file's sidecar
        os.replace(partial_json, sidecar(path))
        os.replace(partial, path)
        files.sync(path.parent)


def _description(described: dict[str, Any]) -> bytes:
    """Bytes of the description, a multiple of 8, so that numbers after it stay aligned."""
    text = json.dumps(described).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return text + len(text).to_bytes(8, "little") + MARK


def _up(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size


def _pad(file: BinaryIO, checksum: int, position: int, page_size: int) -> tuple[int, int]:
    """Write zeros to the end of the page; return checksum and position after them."""
    end = _up(position, page_size)
    while position < end:
        zeros = bytes(min(end - position, 1 << 20))
        file.write(zeros)
        checksum, position = zlib.crc32(zeros, checksum), position + len(zeros)
    return checksum, position


def sample_regions(sample: Sequence[Any], fields: Mapping[str, Field]) -> list[bytes]:
    """Data of a sample that is stored in pages, in order."""
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
    """Metadata row of a sample."""

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
    """Parse the field of a descriptor. Raises KeyError, ValueError or TypeError for unsupported types."""
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
    """Yield a temporary name in the same folder; remove the file unless the block renamed it."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def sync_file(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def file_digest(path: Path, end: int, first: int = 0, header: bytes = b"") -> tuple[Any, int]:
    """SHA-256 of the bytes before `end`, the first replaced by `header`, and CRC-32 of bytes first .. end - 1."""
    sha256, checksum, position = hashlib.sha256(header), 0, len(header)
    with path.open("rb") as file:
        file.seek(position)
        while position < end and (chunk := file.read(min(end - position, 1 << 20))):
            sha256.update(chunk)
            inside = memoryview(chunk)[max(first - position, 0) :]
            checksum, position = zlib.crc32(inside, checksum), position + len(chunk)
    return sha256, checksum


def _check(path: Path, rows: np.ndarray, tail: bytes) -> None:
    """Open a file just written like any reader, compare its tables and decode 64 images."""
    written = Beton(path)
    if written._tables[1].tobytes() != rows.tobytes() or not tail.endswith(written._tables[2].tobytes()):
        raise OSError(f"{path} differs from the tables that were written; check the disk")
    for i in np.linspace(0, written.count - 1, min(written.count, 64)).astype(int).tolist():
        written.image(i)

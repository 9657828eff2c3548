"""Write a data set as one .beton file: from a folder of images, CIFAR-10, CIFAR-100, or the generated Spirograph set.

* A folder whose subfolders hold images: each subfolder is a class (sorted by name; deeper folders belong to their
  class; an empty class keeps its number). A folder that holds images itself: no labels. Both at once is an error. If
  all subfolders are called train, val, test or the like, the one of the chosen split is taken.
* `cifar10`, `cifar100`: downloaded into datasets/ if they are not there. Or the folder they were extracted to.
* `spirograph`: pictures, with the numbers that made them: four targets as labels, six nuisance numbers.

Images of a folder are written in a fixed shuffled order, so that neighbours in the file, which are read together, are
not of one class, and the first 1,000 are a fair sample. Links to files are followed, links to folders are not.

Every image is decoded in full before it is stored. JPEG bytes are stored unchanged if they are grey or three-channel,
whole and upright; everything else becomes an RGB JPEG, and is listed: EXIF orientation is applied, transparency laid
over white, 16-bit grey divided by 256, of an animation the first frame is taken.
"""

import io
import pickle
import re
import shutil
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from simclr_ddp import __version__, beton, cli, draws
from simclr_ddp.beton import Picture
from simclr_ddp.cli import say
from simclr_ddp.config import WriteDataset
from simclr_ddp.data import cores
from simclr_ddp.metrics import duration, progress

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled", "unlabelled"}
MODES = ("auto", "jpeg", "raw")
LISTED = 1000  # paths named in the sidecar for each reason of re-encoding; their number is always exact
PROBED = 256  # images that are converted first, to estimate space and time
ORIENTATION = 0x0112  # EXIF


class Stored(NamedTuple):
    """A picture ready to be stored, and why it is not the source's own bytes ("" if it is, or had none)."""

    picture: Picture
    why: str = ""


@dataclass
class Source:
    """What is to be written. `load(i)` converts image i, in any thread, and raises anything if it can't be decoded."""

    names: Sequence[str]
    load: Callable[[int], Stored]
    columns: dict[str, tuple[beton.Field, np.ndarray]] = field(default_factory=dict)  # label, nuisance: [n, ...]
    info: dict[str, Any] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    def command(c: WriteDataset) -> None:
        write_dataset(
            c.source,
            Path(c.out),
            split=c.split or None,
            on_error=c.on_error,
            quality=c.quality,
            mode=c.mode,
            images=c.images,
            overwrite=c.overwrite,
        )

    return cli.run(command, WriteDataset, "SOURCE OUT", __doc__ or "", argv)


def write_dataset(
    source: str,
    out: Path,
    *,
    split: str | None = None,
    on_error: str = "stop",
    quality: int = 90,
    mode: str = "auto",
    images: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> None:
    """Write `source` to `out` and its sidecar, reporting on the screen; see the module's text.

    split     of a named data set (None: train), or of a folder that holds folders called train, test or the like
    on_error  "stop" at an image that can't be decoded, or "skip" it and list it in the sidecar
    quality   of images that must be encoded as JPEG
    mode      "jpeg" or "raw" (lossless, large) for all; "auto" is JPEG for image files and raw for pixels that never
              were in a file (CIFAR, Spirograph)
    images    write only the first so many (Spirograph: how many to generate; 100,000 or, for test, 20,000)
    workers   threads that decode; None: one for each core that this process may use

    Raises ValueError or OSError (missing or empty source, bad image, existing file, too little space) in one sentence.
    After an error or interruption, nothing has the final name.
    """
    for name, value, choices in (("on_error", on_error, ("stop", "skip")), ("mode", mode, MODES)):
        if value not in choices:
            raise ValueError(f"{name}={value} is unknown: choose {' or '.join(choices)}")
    if out.suffix != ".beton":
        raise ValueError(f"{out} does not end in .beton: the arguments are SOURCE OUT.beton")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another name, remove it, or say overwrite=true")
    if images is not None and images < 1:
        raise ValueError(f"images={images} leaves nothing to write: take 1 or more, or leave it out")
    workers = workers or cores()
    pictures = find(source, split=split, quality=quality, mode=mode, images=images)
    count = min(images or len(pictures.names), len(pictures.names))
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in sorted(out.parent.glob(f"{out.name}*.partial-*")):
        say(f"note: {left} was left by a run that was killed or still goes on; remove it if none does")

    info: dict[str, Any] = {"tool": f"simclr_ddp {__version__}", "source": source, "split": split or "train"}
    info |= {"label_kind": "none", "classes": None, "numbers": None, "nuisance": None} | pictures.info
    stored = {"unchanged": 0, "encoded": 0, "raw": 0}
    converted: dict[str, dict[str, Any]] = {}  # why -> count and files
    skipped: list[list[str]] = []  # [file, why]
    info |= {"stored": stored, "converted": converted, "skipped": {"count": 0, "files": skipped}}

    def samples() -> Iterator[tuple[Any, ...]]:
        with closing(_in_threads(pictures, range(count), workers)) as futures:
            for i, future in enumerate(progress(futures, count)):
                try:
                    picture, why = future.result()
                except ValueError as error:
                    if on_error == "stop":
                        raise
                    skipped.append([pictures.names[i], str(error)])
                    info["skipped"]["count"] += 1
                    continue
                stored["raw" if picture.raw else "encoded" if why else "unchanged"] += 1
                if why:
                    entry = converted.setdefault(why, {"count": 0, "files": []})
                    entry["count"] += 1
                    entry["files"] += [pictures.names[i]] * (len(entry["files"]) < LISTED)
                yield picture, *(values[i] for _, values in pictures.columns.values())

    fields = {"image": beton.PICTURES} | {name: column for name, (column, _) in pictures.columns.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # as bad as Pillow's error at twice the size
        _estimate(pictures, count, out, workers, on_error)
        beton.write(out, samples(), fields, count, info, overwrite=overwrite)
    say(
        f"{out}: {info['count']:,} images, {info['bytes'] / 1e6:,.1f} MB, sha256 {info['sha256'][:16]}: "
        f"{stored['unchanged']:,} unchanged, {stored['encoded']:,} encoded as JPEG, {stored['raw']:,} raw, "
        f"{len(skipped):,} left out"
    )
    for why, entry in converted.items():
        say(f"  {entry['count']:,} converted ({why}), such as {entry['files'][0]}")
    for name, why in skipped[:10]:
        say(f"  left out {name}: {why}")
    if len(skipped) > 10:
        say(f"  left out {len(skipped) - 10:,} more, all in {beton.sidecar(out)}")


def find(source: str, *, split: str | None, quality: int, mode: str, images: int | None) -> Source:
    """The data set of that name, or in that folder. Nothing is decoded yet."""
    if source == "spirograph":
        split = split or "train"
        return _spirograph(split, images or (20_000 if split == "test" else 100_000), quality, mode)
    folder = Path(source)
    if source in CIFAR:
        folder = _download(CIFAR[source])
    if not folder.exists():
        raise FileNotFoundError(f"{source} is not there: give a folder of images, {', '.join(CIFAR)} or spirograph")
    if not folder.is_dir():
        raise NotADirectoryError(f"{source} is a file: give a folder of images, {', '.join(CIFAR)} or spirograph")
    for cifar in CIFAR.values():
        for place in (folder, folder / cifar.folder):
            if all((place / name).is_file() for name in (*cifar.train, *cifar.test, cifar.meta)):
                return _cifar(place, cifar, split or "train", quality, mode)
    return _folder(folder, split, quality, mode)


# --- a folder of images


def _folder(folder: Path, split: str | None, quality: int, mode: str) -> Source:
    subfolders = _subfolders(folder)
    if subfolders and {name.lower() for name in subfolders} <= SPLITS:
        split = split or "train"
        if split not in subfolders:
            raise ValueError(f"{folder} has no folder {split}: choose split={' or split='.join(subfolders)}")
        say(f"{folder} holds {', '.join(subfolders)}: taking {split}")
        folder = folder / split
        subfolders = _subfolders(folder)
    elif split is not None:
        raise ValueError(f"{folder} holds no folder {split}, so split={split} chooses nothing: leave split out")
    others, links = Counter[str](), list[str]()
    direct = _files(folder, others, links, deep=False)
    nested = {name: _files(folder / name, others, links, deep=True) for name in subfolders}
    labelled = any(nested.values())
    if direct and labelled:
        raise ValueError(
            f"{folder} holds images ({direct[0].name}) and folders of images ({next(n for n in nested if nested[n])}), "
            "so it is unclear whether it is labelled: move the former into a folder or all into one"
        )
    for link in links:
        say(f"note: {link} is a link to a folder, and not followed")
    if others:
        kinds = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in others.most_common(5))
        say(f"note: files of other kinds are ignored: {kinds}")
    for name, files in nested.items():
        if labelled and not files:
            say(f"note: class {name} has no images; it keeps its number")
    found = [(path, label) for label, files in enumerate(nested.values()) for path in files] if labelled else []
    found = found or [(path, 0) for path in direct]
    if not found:
        raise ValueError(
            f"{folder} holds no images ({', '.join(SUFFIXES)})"
            + (f", only links to folders such as {links[0]}, which are not followed" if links else "")
            + ": give another folder"
        )
    found = [found[i] for i in draws.permutation(0, 0, len(found))]
    paths = [path for path, _ in found]

    def load(i: int) -> Stored:
        try:
            return convert(paths[i].read_bytes(), quality, mode)
        except Exception as error:  # Pillow raises almost anything at broken data
            why = "it is in no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(
                f"{paths[i]} can't be decoded ({why}): mend it, remove it, or say on_error=skip"
            ) from error

    result = Source([str(path.relative_to(folder)) for path in paths], load)
    if labelled:
        result.columns["label"] = beton.INT, np.array([label for _, label in found], np.int64)
        result.info = {"label_kind": "classes", "classes": list(nested)}
        say(f"{folder}: {len(found):,} images of {len(nested):,} classes, {', '.join(list(nested)[:5])} ...")
    else:
        say(f"{folder}: {len(found):,} images without labels")
    result.info |= {"ignored": dict(others), "links_not_followed": links}
    return result


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; neither hidden ones nor links."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not _hidden(p))


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def _files(folder: Path, others: Counter[str], links: list[str], *, deep: bool) -> list[Path]:
    """The image files of a folder, sorted; counts the other files and names linked folders on the way."""
    found, folders = [], []
    for path in sorted(folder.iterdir()):
        if _hidden(path):
            continue
        if path.is_dir():
            if path.is_symlink():
                links.append(str(path))
            elif deep:
                folders.append(path)
        elif path.suffix.lower() in SUFFIXES:
            found.append(path)
        else:
            others[path.suffix.lower()] += 1
    return found + [path for inner in folders for path in _files(inner, others, links, deep=True)]


def convert(data: bytes, quality: int, mode: str) -> Stored:
    """An image file as it is stored. Raises anything (Pillow does) if it can't be decoded in full."""
    image: Image.Image = Image.open(io.BytesIO(data))
    jpeg = image.format in ("JPEG", "MPO")  # MPO: JPEGs one after the other, of which every decoder shows the first
    why = [] if jpeg else [str(image.format)]
    if not jpeg and getattr(image, "n_frames", 1) > 1:
        why.append("first of its frames")
    image.load()
    if max(image.size) > beton.LONGEST_SIDE:
        raise ValueError(f"it is {image.width} x {image.height} pixels, more than {beton.LONGEST_SIDE} on a side")
    if jpeg and not _has_end(data):
        raise ValueError("the JPEG is truncated: it has no end marker")
    try:
        turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # an EXIF block that nobody can read turns nothing
        turned = False
    if jpeg and image.mode in ("L", "RGB") and not turned and mode != "raw":
        return Stored(Picture(data, image.height, image.width, raw=False))
    if turned:
        why.append("EXIF orientation")
        image = ImageOps.exif_transpose(image)
    if image.mode not in ("L", "RGB"):
        why.append(image.mode)
    if _transparent(image):
        why.append("transparency over white")
    return Stored(_encode(_rgb(image), quality, raw=mode == "raw"), ", ".join(why))


_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)  # not stuffing, nor a restart marker, nor a fill byte


def _has_end(data: bytes) -> bool:
    """Does the JPEG reach its end marker? Pillow takes zeros after the break of a download for grey pixels."""
    if data.endswith(b"\xff\xd9"):  # nearly always
        return True
    position = 2
    while marker := _MARKER.search(data, position):
        if marker[1] == b"\xd9":
            return True
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return False


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _rgb(image: Image.Image) -> Image.Image:
    """Any picture in mode RGB, transparency over white, 16-bit grey divided by 256."""
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its 32-bit pixels have no known range; save it with 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its floating-point pixels have no known range; save it with 8 or 16 bits")
    if _transparent(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def _encode(rgb: Image.Image, quality: int, *, raw: bool) -> Picture:
    if raw:
        return Picture(rgb.tobytes(), rgb.height, rgb.width, raw=True)
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=quality)
    return Picture(buffer.getvalue(), rgb.height, rgb.width, raw=False)


# --- CIFAR


class Cifar(NamedTuple):
    """The files of CIFAR-10 or -100 as their authors publish them."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    classes: str


CIFAR = {
    "cifar10": Cifar(
        "CIFAR10",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": Cifar("CIFAR100", "cifar-100-python", ("train",), ("test",), "meta", "fine_labels", "fine_label_names"),
}


def _download(cifar: Cifar) -> Path:
    """The extracted folder under datasets/, downloaded and checked by torchvision if it is not there or not whole."""
    from torchvision import datasets  # slow to import, and only needed here
    from torchvision.datasets.utils import check_integrity, download_url

    known = getattr(datasets, cifar.name)
    folder = Path("datasets") / cifar.folder
    checksums = [*known.train_list, *known.test_list, (known.meta["filename"], known.meta["md5"])]
    if not all(check_integrity(folder / name, md5) for name, md5 in checksums):
        say(f"downloading {known.url} to datasets/")
        try:
            download_url(known.url, "datasets", filename=known.filename, md5=known.tgz_md5)
            with tarfile.open(Path("datasets") / known.filename) as archive:
                for name, _ in checksums:  # these alone: no path in it can lead out of the folder
                    file = archive.extractfile(f"{cifar.folder}/{name}")
                    assert file is not None
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(file.read())
        except Exception as error:
            raise OSError(
                f"{known.url} can't be downloaded ({error}): fetch and extract it elsewhere, and give its folder "
                f"{cifar.folder} as SOURCE"
            ) from error
    return folder


def _cifar(folder: Path, cifar: Cifar, split: str, quality: int, mode: str) -> Source:
    if split not in ("train", "test"):
        raise ValueError(f"split={split} is unknown to {cifar.name}: choose train or test")
    meta = _unpickle(folder / cifar.meta)
    classes = meta.get(cifar.classes)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{folder / cifar.meta} names no classes: extract the archive again")
    parts, labels = [], []
    for name in getattr(cifar, split):
        batch = _unpickle(folder / name)
        pixels, numbers = getattr(batch.get("data"), "pixels", None), batch.get(cifar.labels)
        if (
            not isinstance(pixels, np.ndarray)
            or not isinstance(numbers, list)
            or pixels.shape != (len(numbers), 3072)
            or not all(type(number) is int and 0 <= number < len(classes) for number in numbers)
        ):
            raise ValueError(
                f"{folder / name} does not hold {cifar.name}'s images and labels: extract the archive again"
            )
        parts.append(pixels)
        labels += numbers
    pictures = np.concatenate(parts).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [n, 32, 32, 3]
    say(f"{folder}: {len(pictures):,} images of {len(classes)} classes")

    def load(i: int) -> Stored:
        return Stored(_encode(Image.fromarray(np.ascontiguousarray(pictures[i])), quality, raw=mode != "jpeg"))

    return Source(
        [f"{split}/{i}" for i in range(len(pictures))],
        load,
        {"label": (beton.INT, np.array(labels, np.int64))},
        {"label_kind": "classes", "classes": classes},
    )


class _Dtype:
    """Stands in for numpy.dtype while a CIFAR file is unpickled."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands in for numpy.ndarray: bytes only, so no pickle can make numpy believe in another type or size."""

    pixels: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.code != "u1" or fortran:
            raise pickle.UnpicklingError("an array is not of bytes in C order")
        self.pixels = np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, np.uint8).reshape(shape)


class _Unpickler(pickle.Unpickler):
    """Knows what a CIFAR file holds, dicts, lists, strings, numbers and arrays of bytes, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how Python 3 pickles bytes for Python 2
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[module, name]


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
        if not isinstance(content, dict):
            raise TypeError("it holds no dict")
    except OSError:
        raise
    except Exception as error:  # broken pickles raise almost anything
        raise ValueError(f"{path} is no file of CIFAR's ({error}): extract the archive again") from error
    return content


# --- Spirograph


def _spirograph(split: str, count: int, quality: int, mode: str) -> Source:
    import torch  # only needed here

    from simclr_ddp import spirograph

    numbers = spirograph.numbers(count, split)
    part, lock = 256, threading.Lock()
    rendered: dict[int, np.ndarray] = {}  # part -> uint8 [256, 32, 32, 3], of the last parts asked for

    def load(i: int) -> Stored:
        with lock:
            if i // part not in rendered:
                while len(rendered) > 2:
                    del rendered[min(rendered)]
                views = spirograph.render(torch.from_numpy(numbers[i // part * part :][:part]))
                rendered[i // part] = (views * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
            pixels = rendered[i // part][i % part]
        return Stored(_encode(Image.fromarray(pixels), quality, raw=mode != "jpeg"))

    return Source(
        [f"{split}/{i}" for i in range(count)],
        load,
        {"label": (beton.vector(4), numbers[:, :4]), "nuisance": (beton.vector(6), numbers[:, 4:])},
        {
            "label_kind": "numbers",
            "numbers": list(spirograph.TARGETS),
            "nuisance": list(spirograph.NUISANCES),
        },
    )


# --- threads, estimate, progress


def _in_threads(source: Source, which: Sequence[int], workers: int) -> Generator[Future[Stored], None, None]:
    """Finished conversions in order, a few ahead of the reader: memory stays bounded."""
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Stored]] = deque()
    try:
        for i in which:
            waiting.append(pool.submit(source.load, i))
            if len(waiting) > 4 * workers:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)


def _estimate(source: Source, count: int, out: Path, workers: int, on_error: str) -> None:
    """Convert a few images, print how large and slow all will be, and raise OSError if the disk is too small."""
    which = range(min(count, PROBED))  # as good as any: no source is in an order that matters
    start, sizes = time.perf_counter(), []
    for future in _in_threads(source, which, workers):
        try:
            sizes.append(len(future.result().picture.data))
        except ValueError:
            if on_error == "stop":
                raise
    seconds = (time.perf_counter() - start) / len(which) * count
    beside = sum(column.metadata.itemsize + values[:1].nbytes + 24 for column, values in source.columns.values()) + 40
    mean, spread = (np.mean(sizes), np.std(sizes) / len(sizes) ** 0.5) if sizes else (0.0, 0.0)
    if len(which) == count:
        spread = 0.0
    page = max(beton.PAGE_SIZE, 1 << (int(max(sizes, default=1)) - 1).bit_length())
    lost = 1 + mean / page  # half an image at the end of each page, in the mean; rounded up
    need = int((mean + 3 * spread + beside) * count * lost) + 2 * page
    free = shutil.disk_usage(out.parent).free
    say(
        f"about {need / 1e6:,.0f} MB and {duration(seconds)} for {count:,} images with {workers} threads "
        f"({free / 1e6:,.0f} MB are free)"
    )
    if need > free:
        raise OSError(
            f"{out.parent} has {free / 1e6:,.0f} MB free, but about {need / 1e6:,.0f} MB are needed: use another disk"
        )


if __name__ == "__main__":
    sys.exit(main())

"""Write a data set as one .beton file."""

import shutil
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simclr_ddp import __version__
from simclr_ddp.data import beton, jpeg_damage
from simclr_ddp.data.convert import LARGE, MAX_PIXELS, MODES, Source, Storage, Stored
from simclr_ddp.data.deep_pixels import Range, TooBright
from simclr_ddp.data.items import Items
from simclr_ddp.data.sources import find
from simclr_ddp.system.console import duration, printable, progress, say, warn
from simclr_ddp.system.machine import cores

ON_ERROR = ("stop", "skip", "keep")
LISTED = 1000  # largest number of paths listed in the sidecar per reason of re-encoding; counts are exact
PROBED = 256  # images that are converted first to estimate space and time


def write_dataset(
    source: str | Path | Items,
    out: str | Path,
    *,
    split: str | None = None,
    on_error: str = "stop",
    quality: int = 90,
    mode: str = "auto",
    white: float | None = None,
    max_pixels: int = MAX_PIXELS,
    images: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> None:
    """Write `source` to `out`, its sidecar and its file of names, and print progress; see the command write_dataset.

    source    a folder of images, a name (cifar10, cifar100, spirograph), or a map-style data set whose items are PIL
              images or (PIL image, class), which are read in threads; workers=1 reads one after the other
    split     split of a named data set (None: train), or of a folder with subfolders such as train and test
    on_error  "stop" if an image is damaged or can't be decoded, after all such images are named;
              "skip" them and list them in the sidecar; or "keep" and list damaged JPEGs that can be decoded
    quality   JPEG quality of images that must be encoded
    mode      "jpeg" or "raw" (lossless, large) for all; "auto" is JPEG for image files and raw for pixels that were
              never in a file (CIFAR, Spirograph, items of a data set in Python)
    white     value to store as white of pixels with more than 8 bits; None: the largest of the file's format or, if the
              first images use less than a quarter of it, of the bits in use
    max_pixels  largest number of pixels of an image
    images    write only the first N images (Spirograph: N to generate, 100,000 by default or 20,000 for test)
    workers   decoding threads; None: one per core that this process may use

    Raises ValueError or OSError (missing or empty source, bad image, existing file, too little space
    or memory). After an error or interruption no incomplete .beton file has the final name; the names of the images
    are written last.
    """
    for name, value, choices in (("on_error", on_error, ON_ERROR), ("mode", mode, MODES)):
        if value not in choices:
            raise ValueError(f"{name}={value}: unknown value; choose {' or '.join(choices)}")
    out = Path(out)
    if out.suffix != ".beton":
        raise ValueError(f"out={out}: does not end in .beton; the arguments are SOURCE OUT.beton")
    if out.exists() and not overwrite:
        raise FileExistsError(f"out={out}: exists; choose another name, remove it, or set overwrite=true")
    if images is not None and images < 1:
        raise ValueError(f"images={images}: must be at least 1; leave it out to write all images")
    workers = workers or cores()
    if on_error == "keep" and mode == "raw":
        raise ValueError(
            "on_error=keep: mode=raw would hide the damage of the images; choose mode=auto, or on_error=skip"
        )
    if why_not := jpeg_damage.unavailable():
        warn(
            f"damaged JPEGs are not recognised, as Pillow's decoder can't be called ({why_not}); install Pillow's wheel"
        )
    storage = Storage(quality, mode, white, max_pixels, keep_damaged=on_error == "keep")
    pictures = find(source, split=split, storage=storage, images=images)
    count = min(images or len(pictures.names), len(pictures.names))
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in sorted(out.parent.glob(f"{out.name}*.partial-*")):
        say(f"note: {left} belongs to a run that is still writing or was killed; remove it in the latter case")

    info: dict[str, Any] = {"tool": f"simclr_ddp {__version__}", "source": _name(source), "split": split or "train"}
    info |= {"label_kind": "none", "classes": None, "numbers": None, "nuisance": None} | pictures.info
    record = _Record()
    info |= record.info

    def samples() -> Iterator[tuple[Any, ...]]:
        refused: ValueError | None = None  # the first error that stops the command, after all images are examined
        with closing(_in_threads(pictures, range(count), workers)) as futures:
            for i, future in enumerate(progress(futures, count)):
                try:
                    converted = future.result()
                except TooBright:
                    raise  # not the image is wrong, but the option
                except ValueError as error:
                    record.list("skipped", pictures.names[i], printable(str(error)))
                    if on_error != "skip" and not refused:
                        refused = error
                        warn(f"{error}. The rest is examined to list all such images; nothing is written")
                    continue
                record.add(pictures.names[i], converted)
                if not refused:
                    yield converted.picture, *(values[i] for _, values in pictures.columns.values())
        if refused:
            raise record.refusal(count) or refused

    fields = {"image": beton.PICTURES} | {name: column for name, (column, _) in pictures.columns.items()}
    try:
        with _any_size():
            ranges = _estimate(pictures, count, out, workers)
            if storage.white is None and ranges and all(found.dim for found, _ in ranges):
                (usual, own, storage.white, _), name = max(ranges)
                warn(
                    f"the first {len(ranges):,} images with more than 8 bits have values up to {usual:g} of {own:g} "
                    f"({name}): white={storage.white:g} is used; set white={own:g} to use the complete range"
                )
                _estimate(pictures, count, out, workers)
            beton.names_file(out).unlink(missing_ok=True)  # of a file that is overwritten
            beton.write(out, samples(), fields, count, info, overwrite=overwrite)
            beton.write_names(out, record.names)
    except MemoryError as error:
        raise OSError(
            f"out of memory ({str(error) or _name(source)}); free some, or raise the limit of this process or job"
        ) from error
    stored = record.info["stored"]
    say(
        f"{out}: {info['count']:,} images, {info['bytes'] / 1e6:,.1f} MB, sha256 {info['sha256'][:16]}: "
        f"{stored['unchanged']:,} unchanged, {stored['encoded']:,} encoded as JPEG, {stored['raw']:,} raw, "
        f"{info['skipped']['count']:,} left out"
    )
    record.print(beton.sidecar(out))


def _name(source: str | Path | Items) -> str:
    return printable(str(source)) if isinstance(source, str | Path) else type(source).__name__


class _Record:
    """What happened to the images, for the sidecar (`info`) and the screen."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {
            "stored": {"unchanged": 0, "encoded": 0, "raw": 0},
            "converted": {},  # why -> count and files
            "skipped": {"count": 0, "files": []},  # [file, why]
            "damaged": {"count": 0, "files": []},  # [file, what is wrong], of those that are stored
        }
        self.names: list[str] = []  # of the images that are stored
        self._dim: list[tuple[Range, str]] = []
        self._flat: list[tuple[Range, str]] = []
        self._large: list[tuple[int, float, str]] = []  # (pixels, seconds, file)

    def list(self, what: str, name: str, why: str) -> None:
        """Add an image to those that were skipped or damaged."""
        self.info[what]["count"] += 1
        self.info[what]["files"].append([name, why])

    def add(self, name: str, stored: Stored) -> None:
        """Add an image that is stored."""
        picture, why = stored.picture, stored.why
        self.names.append(name)
        self.info["stored"]["raw" if picture.raw else "encoded" if why else "unchanged"] += 1
        if why:
            entry = self.info["converted"].setdefault(why, {"count": 0, "files": []})
            entry["count"] += 1
            entry["files"] += [name] * (len(entry["files"]) < LISTED)
        if stored.damage:
            self.list("damaged", name, stored.damage)
        if stored.range and stored.range.dim:
            self._dim.append((stored.range, name))
        if stored.range and stored.range.flat:
            self._flat.append((stored.range, name))
        if stored.seconds:
            self._large.append((picture.width * picture.height, stored.seconds, name))

    def refusal(self, count: int) -> ValueError | None:
        """Print all images that can't be stored and return the error of the command, if they are several."""
        files = self.info["skipped"]["files"]
        if len(files) < 2:
            return None
        for _, why in files:
            say(f"  {why}")
        return ValueError(
            f"{len(files):,} of {count:,} images can't be stored: those above; replace them, or set on_error=skip to "
            "leave them out"
        )

    def print(self, sidecar: Path) -> None:
        for why, entry in self.info["converted"].items():
            say(f"  {entry['count']:,} converted ({why}), such as {entry['files'][0]}")
        for what, words in (("skipped", "left out"), ("damaged", "damaged, but kept:")):
            files = self.info[what]["files"]
            for name, why in files[:10]:
                say(f"  {words} {name}: {why}")
            if len(files) > 10:
                say(f"  {words} {len(files) - 10:,} more, all in {sidecar}")
        if self._dim:
            (usual, white, better, _), name = max(self._dim)
            warn(
                f"{len(self._dim):,} images with more than 8 bits use less than a quarter of their range and are "
                f"stored dark: the brightest is {name}, with values up to {usual:.6g} of {white:.6g}; set "
                f"white={better:g} if that is the range of all, else scale them before"
            )
        if self._flat:
            found, name = max(self._flat)
            warn(
                f"{len(self._flat):,} images with more than 8 bits use less than a quarter of their range and are "
                f"stored with little contrast: {name} has values from {found.low:.6g} to {found.usual:.6g} of "
                f"{found.white:.6g}; subtract the smallest and scale them before"
            )
        if self._large:
            pixels, seconds, name = max(self._large)
            warn(
                f"{len(self._large):,} images have more than {LARGE:,} pixels: every view of {name} costs "
                f"{pixels * 3 / 1e6:,.0f} MB and {seconds:.1f} s ({pixels:,} pixels); reduce them if that is too much"
            )


@contextmanager
def _any_size() -> Iterator[None]:
    """Switch off Pillow's limit of pixels, which has no option; `convert` applies that of max_pixels."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _in_threads(source: Source, which: Sequence[int], workers: int) -> Generator[Future[Stored], None, None]:
    """Yield conversions in order, a few ahead of the reader, so that memory stays bounded."""
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


def _estimate(source: Source, count: int, out: Path, workers: int) -> list[tuple[Range, str]]:
    """Convert a few images, print the estimated size and time, and raise OSError if the disk is too small.

    Returns the ranges of images with more than 8 bits, with their names.
    """
    which = range(min(count, PROBED))  # representative, since no source has a meaningful order
    start, sizes, ranges = time.perf_counter(), [], []
    for i, future in enumerate(_in_threads(source, which, workers)):
        try:
            stored = future.result()
            sizes.append(len(stored.picture.data))
            ranges += [(stored.range, source.names[i])] if stored.range else []
        except TooBright:
            raise
        except ValueError:
            pass  # found again, and reported, when it is to be written
    seconds = (time.perf_counter() - start) / len(which) * count
    rest = sum(column.metadata.itemsize + values[:1].nbytes + 24 for column, values in source.columns.values()) + 40
    mean, spread = (np.mean(sizes), np.std(sizes) / len(sizes) ** 0.5) if sizes else (0.0, 0.0)
    if len(which) == count:
        spread = 0.0
    page = max(beton.PAGE_SIZE, 1 << (int(max(sizes, default=1)) - 1).bit_length())
    lost = 1 + mean / page  # half an image at the end of each page on average; rounded up
    need = int((mean + 3 * spread + rest) * count * lost) + 2 * page
    free = shutil.disk_usage(out.parent).free
    say(
        f"about {need / 1e6:,.0f} MB and {duration(seconds)} for {count:,} images with {workers} threads "
        f"({free / 1e6:,.0f} MB are free)"
    )
    if need > free:
        raise OSError(
            f"{out.parent} has {free / 1e6:,.0f} MB free, but about {need / 1e6:,.0f} MB are needed; use another disk"
        )
    return ranges

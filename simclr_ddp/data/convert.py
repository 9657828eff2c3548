"""Conversion of one image: JPEG bytes are kept where FFCV decodes them correctly, other images are re-encoded."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from simclr_ddp.data import beton, deep_pixels
from simclr_ddp.data.beton import Picture
from simclr_ddp.data.deep_pixels import Range, Refused
from simclr_ddp.data.jpeg_damage import damage, unavailable
from simclr_ddp.system.console import printable
from simclr_ddp.system.files import not_a_file

MODES = ("auto", "jpeg", "raw")
ORIENTATION = 0x0112  # EXIF
LONGEST_JPEG = 65500  # libjpeg's limit of a side
MAX_PIXELS = 100_000_000  # default of max_pixels
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # modes of Pillow for more than 8 bits
LARGE = 25_000_000  # pixels of an image whose cost is shown


@dataclass
class Storage:
    """How images are stored; the options of write_dataset explain each. `white` may change until they are written."""

    quality: int = 90
    mode: str = "auto"
    white: float | None = None
    max_pixels: int = MAX_PIXELS
    keep_damaged: bool = False


class Stored(NamedTuple):
    """A picture to store, and what the user should know about it.

    why      why its bytes differ from the source ("" if they don't, or there were none)
    damage   what is wrong with a damaged JPEG that is kept, or ""
    range    of the values, if they have more than 8 bits
    seconds  needed to decode a very large picture, else 0
    """

    picture: Picture
    why: str = ""
    damage: str = ""
    range: Range | None = None
    seconds: float = 0.0


@dataclass
class Source:
    """A data set to write. `load(i)` converts image i in any thread; it raises any exception for broken images."""

    names: Sequence[str]
    load: Callable[[int], Stored]
    columns: dict[str, tuple[beton.Field, np.ndarray]] = field(default_factory=dict)  # label, nuisance: [n, ...]
    info: dict[str, Any] = field(default_factory=dict)


def convert_file(path: Path, storage: Storage) -> Stored:
    """Convert an image file. Raises ValueError with its name if it can't be stored.

    A MemoryError, or OSError of a disk that fails, is no fault of the image.
    """
    name = printable(str(path))
    if fault := not_a_file(path):
        raise ValueError(f"{name} {fault}; remove it, or set on_error=skip")
    size, largest = path.stat().st_size, beton.BYTES_PER_PIXEL * storage.max_pixels
    if size > largest:
        raise ValueError(
            f"{name} has {size:,} bytes, more than {largest:,}, the largest size for max_pixels={storage.max_pixels}; "
            "remove it, set on_error=skip, or set a larger max_pixels"
        )
    try:
        data = path.read_bytes()
    except PermissionError as error:
        raise ValueError(f"{name} can't be read ({error.strerror}); change that, or set on_error=skip") from error
    except OSError as error:
        raise OSError(f"{name} can't be read ({error.strerror}): check its disk") from error
    try:
        return convert(data, storage)
    except MemoryError as error:
        raise MemoryError(f"{name}: {str(error) or 'too large'}") from error
    except Refused as error:
        raise type(error)(f"{name} {error}") from error
    except Exception as error:  # Pillow raises almost any exception for broken data
        why = "its format is unknown to Pillow" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name} can't be decoded ({why}); fix it, remove it, or set on_error=skip") from error


def convert(data: bytes, storage: Storage) -> Stored:
    """Convert an image file for storage. Raises Refused, or any exception (from Pillow) if it can't be decoded."""
    image: Image.Image = Image.open(io.BytesIO(data))
    jpeg = image.format in ("JPEG", "MPO")  # MPO: consecutive JPEGs, of which decoders show the first
    why = [] if jpeg else [str(image.format)]
    pixels = image.width * image.height
    if pixels > storage.max_pixels:
        raise Refused(
            f"has {image.width:,} x {image.height:,} = {pixels:,} pixels, more than max_pixels={storage.max_pixels}; "
            f"reduce it, set on_error=skip, or set max_pixels={pixels} to admit it"
        )
    if not jpeg and getattr(image, "n_frames", 1) > 1:
        why.append("first of its frames")
    try:
        deep = deep_pixels.read(image, data)
        image.load()
    except Exception:
        beton.check_memory(pixels)
        raise
    raw = storage.mode == "raw"
    longest = beton.LONGEST_SIDE if raw else LONGEST_JPEG
    if max(image.size) > longest:
        way_out = "" if raw else f"set mode=raw (at most {beton.LONGEST_SIDE:,}), "
        raise Refused(
            f"has {image.width:,} x {image.height:,} pixels, but a {'side' if raw else 'side of a JPEG'} has at most "
            f"{longest:,}; {way_out}reduce it, or set on_error=skip"
        )
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # an unreadable EXIF block means no rotation
        orientation = 1
    turned = orientation in range(2, 9)
    found = damage(data) if jpeg and not unavailable() else ""
    unchanged = jpeg and image.mode in ("L", "RGB") and not turned and not raw
    if found and not (storage.keep_damaged and unchanged):
        way_out = ", or on_error=keep to store it as it is" if unchanged else "; re-encoding would hide the damage"
        raise Refused(f"is a damaged JPEG ({found}); replace it, set on_error=skip to leave it out{way_out}")
    if unchanged:
        return _timed(Stored(Picture(data, image.height, image.width, raw=False), damage=found))
    if turned:
        why.append("EXIF orientation")
    if image.mode not in ("L", "RGB"):
        why.append(image.mode)
    found_range = None
    if deep is not None:
        image, found_range = deep_pixels.to_8_bits(deep, storage.white, image.info.get("transparency"))
        image.getexif()[ORIENTATION] = orientation
        why.append(f"white={found_range.white:g}")
    if turned:
        image = ImageOps.exif_transpose(image)
    if _transparent(image):
        why.append("transparency over white")
    return _timed(Stored(encode(rgb(image), storage.quality, raw=raw), ", ".join(why), range=found_range))


def _timed(stored: Stored) -> Stored:
    """Measure how long it takes to decode a very large picture."""
    picture = stored.picture
    if picture.width * picture.height <= LARGE or picture.raw:
        return stored
    begin = time.perf_counter()
    JpegImageFile(io.BytesIO(picture.data)).load()
    return stored._replace(seconds=time.perf_counter() - begin)


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: transparent pixels over white."""
    if _transparent(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def encode(image: Image.Image, quality: int, *, raw: bool) -> Picture:
    """Store an RGB image as it is, or as JPEG."""
    if raw:
        return Picture(image.tobytes(), image.height, image.width, raw=True)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Picture(buffer.getvalue(), image.height, image.width, raw=False)

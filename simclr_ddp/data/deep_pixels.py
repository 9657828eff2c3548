"""Images with more than 8 bits per channel: their values as they are in the file, and their conversion to 8 bits.

Pillow has no mode for colours of 16 bits and returns their high bytes, which are nearly black if a camera with 10 or 12
bits has written the file. Here the low bytes are read as well: as the high bytes of the opposite byte order.
"""

import io
import math
import sys
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

USUAL = 0.999  # fraction of the pixels that decides about the range, so that a few defect pixels don't
OTHER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # byte order -> the opposite
SWAPPED = {f"{mode};16{order}": f"{mode};16{OTHER[order]}" for mode in ("RGB", "RGBX", "RGBA") for order in OTHER}
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
SIGNED, FLOAT = 2, 3


class Deep(NamedTuple):
    """Pixels with more than 8 bits: values [H, W] or [H, W, 3 or 4], and the value of white, 0 if it is unknown."""

    values: np.ndarray
    white: int


class Range(NamedTuple):
    """Largest usual value of an image, value stored as white, white of the bits in use, and smallest usual value."""

    usual: float
    white: float
    better: float
    low: float = 0.0

    @property
    def dim(self) -> bool:
        """Whether less than a quarter of the range is used."""
        return self.usual < (self.white + 1) / 4 if self.white > 255 else self.usual < self.white / 4

    @property
    def flat(self) -> bool:
        """Whether less than a quarter of the range is used, which does not begin at 0."""
        return 0 < self.usual - self.low < self.white / 4 and not self.dim


class Refused(ValueError):
    """An image that can be decoded, but not stored; the message continues a sentence that begins with its name."""


class TooBright(Refused):
    """An image with many values above the white that was set."""


def read(image: Any, data: bytes) -> Deep | None:
    """Read the values of an image that Pillow has opened from `data` but not loaded; None if it has 8 bits.

    Raises any exception (from Pillow) for broken data.
    """
    codec, _, offset, arguments = image.tile[0] if image.tile else ("", None, 0, "")
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    if image.format == "PPM" and codec == "ppm" and arguments[1] > 255:  # Pillow would scale it, colours to 8 bits
        shape = (image.height, image.width) if image.mode == "I" else (image.height, image.width, 3)
        image.load()  # raises an error if data are missing
        return Deep(np.frombuffer(data, ">u2", math.prod(shape), offset).reshape(shape), arguments[1])
    if image.mode.startswith(("I", "F")):
        white = _tiff_white(image) if image.format == "TIFF" else 65535 * (image.mode != "F")
        values = np.asarray(image)
        inverted = white and image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0
        return Deep(white - values if inverted else values, white)
    if arguments[0] in SWAPPED:
        low = _decode_as(SWAPPED[arguments[0]], data)
        return Deep(np.asarray(image).astype(np.uint16) << 8 | low, 65535)
    if arguments[0] == "LA;16B":  # four bytes per pixel: two of grey, two of opacity
        image.load()
        four = _decode_as("RGBA", data).astype(np.uint16)
        high, low = four[..., 0::2], four[..., 1::2]
        return Deep((high << 8 | low)[..., [0, 0, 0, 1]], 65535)
    return None


def _decode_as(rawmode: str, data: bytes) -> np.ndarray:
    """Decode an image as if its pixels had another layout."""
    image: Any = Image.open(io.BytesIO(data))
    for i, tile in enumerate(image.tile):
        arguments = (rawmode, *tile[3][1:]) if isinstance(tile[3], tuple) else rawmode
        image.tile[i] = type(tile)(*tile[:3], arguments) if hasattr(tile, "args") else (*tile[:3], arguments)
    return np.asarray(image)


def _tiff_white(image: Any) -> int:
    bits, kind = image.tag_v2.get(BITS, (16,))[0], image.tag_v2.get(SAMPLE_FORMAT, (1,))[0]
    return 0 if bits > 16 or kind == FLOAT else 2 ** (bits - (kind == SIGNED)) - 1


def to_8_bits(deep: Deep, white: float | None, transparent: Any) -> tuple[Image.Image, Range]:
    """Scale the values so that 0 is black and `white` (None: that of the file) becomes 255.

    transparent  value or colour that is transparent, or None

    Raises Refused if the range is unknown, and TooBright if it does not contain the values.
    """
    values = deep.values
    colours = values[..., :3] if values.ndim == 3 else values
    integers = colours.dtype.kind != "f"
    low, high = colours.min(), colours.max()
    span = f"values from {low:g} to {high:g}"
    if not np.isfinite(low) or not np.isfinite(high) or low < 0:
        raise Refused(f"has pixels with {span}; save it without negative and infinite values and NaN")
    usual = float(np.quantile(colours, USUAL, method="higher"))
    least = float(np.quantile(colours, 1 - USUAL, method="lower"))
    better = max(255, (1 << int(usual).bit_length()) - 1) if integers else usual  # all of the bits in use
    white = white or deep.white
    if not white:
        raise Refused(f"has 32-bit pixels with {span} and no known range; set white to the value of white")
    if usual > white:
        raise TooBright(f"has pixels with {span}, more than white={white:g}; set white={better:g}")
    scaled = np.floor(colours / ((white + 1) / 256)) if integers else np.rint(colours / (white / 255))
    eight = scaled.clip(0, 255).astype(np.uint8)
    if values.ndim == 3 and values.shape[2] == 4:
        eight = np.dstack([eight, (values[..., 3] >> 8).astype(np.uint8)])
    elif transparent is not None:
        equal = values == np.asarray(transparent)
        eight = np.dstack([eight, np.where(equal.all(-1) if values.ndim == 3 else equal, 0, 255).astype(np.uint8)])
    return Image.fromarray(eight), Range(usual, white, better, least)

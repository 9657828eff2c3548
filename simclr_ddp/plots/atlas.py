"""The atlas: one HTML page of a map of images, to zoom, search and walk from neighbour to neighbour.

The page holds everything it shows and opens from file:// without network. atlas.html is its frame, atlas.js its script.
"""

import html
import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from io import BytesIO
from string import Template
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

COLUMNS = 32  # pictures per side of a sheet
SIDES = ((3_000, 64), (12_000, 40), (1 << 62, 32))  # most images with pictures of that many pixels per side
QUALITY = ((12_000, 85), (1 << 62, 60))  # most images with that JPEG quality
POLICY = "default-src 'none'; img-src data:; style-src '{style}'; script-src '{script}'"


class Groups(NamedTuple):
    """Colours by group, such as classes or clusters."""

    title: str
    names: Sequence[str]
    values: np.ndarray  # int64 [n], positions in names
    searchable: bool = False  # whether a search looks into the names


class Scores(NamedTuple):
    """Colours by a number per image."""

    title: str
    values: np.ndarray  # float [n]


def picture_side(count: int, largest: int) -> int:
    """Pixels per side of the pictures of `count` images that have at most `largest`.

    They are a multiple of 8, the block of JPEG, so that neighbours on a sheet do not run into each other.
    """
    return min(_first(SIDES, count), -(-largest // 8) * 8)


def page(
    maps: dict[str, np.ndarray],
    pictures: np.ndarray,
    colourings: Sequence[Groups | Scores],
    neighbours: np.ndarray,
    cosines: np.ndarray,
    *,
    numbers: np.ndarray,
    names: Sequence[str] | None,
    title: str,
    subtitle: str,
) -> str:
    """Return the HTML of an atlas of n images.

    maps        title -> points, float [n, 2]
    pictures    uint8 [n, side, side, 3], side from picture_side
    colourings  what points can be coloured by; the first is shown at the start
    neighbours  int64 [n, k], nearest first
    cosines     float [n, k], those of the neighbours
    numbers     int64 [n], positions of the images in their file
    names       their file names, if known
    """
    count = len(pictures)
    quality = _first(QUALITY, count)
    data = {
        "maps": [{"name": name, "points": _base64(_placed(points))} for name, points in maps.items()],
        "side": pictures.shape[1],
        "columns": COLUMNS,
        "sheets": [
            _sheet(pictures[first : first + COLUMNS * COLUMNS], quality) for first in range(0, count, COLUMNS * COLUMNS)
        ],
        "colourings": [_groups(given) if isinstance(given, Groups) else _scores(given) for given in colourings],
        "neighbours": _base64(neighbours.astype("<u4" if count > 65535 else "<u2")),
        "cosines": _base64(_steps(cosines, -1, 1)),
        "numbers": numbers.tolist(),
        "names": None if names is None else list(names),
    }
    frame, script = ((files("simclr_ddp.plots") / f"atlas.{kind}").read_text("utf-8") for kind in ("html", "js"))
    searched = [given.title for given in colourings if isinstance(given, Groups) and given.searchable]
    style = frame[frame.index("<style>") + 7 : frame.index("</style>")]
    filled = {
        "policy": POLICY.format(style=_integrity(style), script=_integrity(script)),
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "searchable": ", ".join([*["file name"] * (names is not None), *searched, "number"]),
        "data": json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        "script": script,
    }
    return Template(frame).substitute(filled)


def _first(limits: Sequence[tuple[int, int]], count: int) -> int:
    return next(value for most, value in limits if count <= most)


def _placed(points: np.ndarray) -> np.ndarray:
    """Scale points to uint16, in the middle of a square, so that both axes have one scale."""
    low, high = points.min(0), points.max(0)
    return _steps(points - (low + high) / 2, -(high - low).max() / 2, (high - low).max() / 2)


def _steps(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers from low to high as uint16 steps of the range."""
    return np.clip(np.rint((values - low) * (65535 / ((high - low) or 1))), 0, 65535).astype("<u2")


def _groups(given: Groups) -> dict[str, Any]:
    values = _base64(given.values.astype("<u2"))
    return {"title": given.title, "names": list(given.names), "values": values, "searchable": given.searchable}


def _scores(given: Scores) -> dict[str, Any]:
    low, high = float(given.values.min()), float(given.values.max())
    return {"title": given.title, "low": low, "high": high, "values": _base64(_steps(given.values, low, high))}


def _sheet(pictures: np.ndarray, quality: int) -> str:
    """A data URI of a JPEG with COLUMNS pictures per row."""
    count, side = pictures.shape[:2]
    rows = -(-count // COLUMNS)
    cells = np.zeros((rows * COLUMNS, side, side, 3), np.uint8)
    cells[:count] = pictures
    sheet = cells.reshape(rows, COLUMNS, side, side, 3).swapaxes(1, 2).reshape(rows * side, COLUMNS * side, 3)
    encoded = BytesIO()
    Image.fromarray(sheet).save(encoded, "JPEG", quality=quality, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{b64encode(encoded.getvalue()).decode()}"


def _base64(array: np.ndarray) -> str:
    return b64encode(array.tobytes()).decode()


def _integrity(text: str) -> str:
    """The hash by which a Content-Security-Policy allows a text."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"

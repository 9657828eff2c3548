"""Files of figures: PNG, small enough for a README, or SVG and PDF for papers."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from simclr_ddp.plots.fonts import fit_fonts
from simclr_ddp.system import console, files

WIDTH = 9  # width of every figure in inches: 900 pixels, the width of a README
LIMIT = 300_000  # largest size of a file in bytes


def save(figure: Figure, path: Path, photographs: bool = False) -> None:
    """Write the figure as the suffix of the path says, and print a message; equal figures give equal bytes.

    A PNG above LIMIT is reduced to 256 colours, and if that is not enough to fewer pixels; `photographs` keep their
    colours and lose only pixels.
    """
    fit_fonts(figure)
    data = b""
    for data in [_drawing(figure, path.suffix)] if path.suffix != ".png" else _versions(figure, photographs):
        if len(data) < LIMIT:
            break
    write(data, path)


def write(data: bytes, path: Path) -> None:
    """Write a file of plots and print a message."""
    files.replace_atomically(path, lambda temporary: temporary.write_bytes(data))
    size = f"{len(data) / 1000:,.0f} KB" if len(data) < 1e6 else f"{len(data) / 1e6:,.1f} MB"
    console.say(f"plotted {path} ({size})")


def _drawing(figure: Figure, suffix: str) -> bytes:
    """The figure as .svg or .pdf, without the date; neither needs fonts of the reader."""
    buffer, date = BytesIO(), {".svg": "Date", ".pdf": "CreationDate"}[suffix]
    with matplotlib.rc_context({"svg.hashsalt": "simclr_ddp", "pdf.fonttype": 42}):  # 42: TrueType, as journals ask
        figure.savefig(buffer, format=suffix[1:], dpi=200, metadata={date: None})
    return buffer.getvalue()


def _versions(figure: Figure, photographs: bool) -> Iterator[bytes]:
    """Yield the figure as PNG files of decreasing quality."""
    for dpi in (100, 90, 80, 70, 60, 50, 40, 30, 20):
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": 0})
        with Image.open(buffer) as opened:
            picture = opened.convert("RGB")
        for version in (picture,) if photographs else (picture, picture.quantize(256)):
            encoded = BytesIO()
            version.save(encoded, "PNG", optimize=True)
            yield encoded.getvalue()

"""Figures as PNG files that are small enough for a README."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from simclr_ddp import checkpoint, cli

WIDTH = 9  # inches of every figure: 900 pixels, the width of a README
LIMIT = 300_000  # bytes


def save(figure: Figure, path: Path, photographs: bool = False) -> None:
    """Write the figure and print the line that says so; the same figure gives the same bytes.

    Where all its colours take more than LIMIT it gets 256 of them, and where that is too much fewer pixels as
    well; `photographs` lose pixels only, since what they show is to be judged.
    """
    data = b""
    for data in _versions(figure, photographs):
        if len(data) < LIMIT:
            break
    checkpoint.replace_atomically(path, lambda temporary: temporary.write_bytes(data))
    cli.say(f"drew {path} ({len(data) / 1000:,.0f} KB)")


def _versions(figure: Figure, photographs: bool) -> Iterator[bytes]:
    """It as PNG files, the best first."""
    for dpi in (100, 90, 80, 70, 60, 50, 40, 30, 20):
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": 0})
        with Image.open(buffer) as opened:
            picture = opened.convert("RGB")
        for version in (picture,) if photographs else (picture, picture.quantize(256)):
            encoded = BytesIO()
            version.save(encoded, "PNG", optimize=True)
            yield encoded.getvalue()

"""A three-dimensional map that turns once around its vertical axis, as an animated GIF."""

from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from simclr_ddp.plots.fonts import fit_fonts
from simclr_ddp.plots.maps import Colouring, Map

FRAMES = 40
MILLISECONDS = 100  # per frame
SIDE = 4.2  # inches, at 100 pixels


def turning(drawn: Map, colours: Colouring, subtitle: str) -> bytes:
    """Return the GIF of a map with points [n, 3]; equal maps give equal bytes."""
    figure = Figure(figsize=(SIDE, SIDE))
    figure.suptitle(f"{drawn.title}\n{subtitle}", parse_math=False, fontsize=7)
    fit_fonts(figure)
    axis: Any = figure.add_axes((0, 0, 1, 0.94), projection="3d")
    size = float(np.clip(16_000 / len(drawn.points), 2, 30))
    axis.scatter(*drawn.points.T, s=size, c=colours.rgba, alpha=1, linewidths=0)
    axis.set_box_aspect(None, zoom=1.3)
    axis.set_axis_off()
    frames = []
    for i in range(FRAMES):
        axis.view_init(elev=20, azim=360 * i / FRAMES)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=100, pil_kwargs={"compress_level": 0})
        frames.append(Image.open(buffer).convert("RGB"))
    palette = frames[0].quantize(64)  # one for all frames, which keeps the file small
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    encoded = BytesIO()
    first.save(encoded, "GIF", save_all=True, append_images=rest, duration=MILLISECONDS, loop=0)
    return encoded.getvalue()

"""Strips of nearest neighbours: an image, and the images whose representations are nearest."""

import numpy as np
from matplotlib.figure import Figure

from simclr_ddp.plots.png import WIDTH

SAME, OTHER, UNKNOWN = "#0072b2", "#d55e00", "grey"  # frames; colour-blind safe (Okabe and Ito 2008)


def strips(
    pictures: np.ndarray, cosines: np.ndarray, classes: np.ndarray | None, names: list[str], title: str
) -> Figure:
    """Plot one row per image, with its neighbours, nearest first.

    pictures  float [rows, 1 + k, H, W, 3] in [0, 1]: the image, then its neighbours
    cosines   float [rows, k], of image and neighbour
    classes   int64 [rows, 1 + k], positions in names; None: unknown

    The frame of a neighbour of the same class is solid, that of one of another class is dashed and of another colour.
    """
    rows, columns = pictures.shape[:2]
    side = WIDTH / columns  # of a cell, in inches, which has a line of text above the picture
    head, row_height = 0.65, side + 0.2
    height = head + rows * row_height
    figure = Figure(figsize=(WIDTH, height))  # places are computed here: constrained layout takes seconds
    note = "" if classes is None else "\nsolid blue frame: same class; dashed orange frame: another class"
    figure.suptitle(f"{title}{note}", parse_math=False, fontsize=10, y=1 - 0.08 / height, va="top")
    for row in range(rows):
        bottom = height - head - (row + 1) * row_height + 0.05 * side
        for column in range(columns):
            left = (column + 0.05) * side
            axis = figure.add_axes((left / WIDTH, bottom / height, 0.9 * side / WIDTH, 0.9 * side / height))
            axis.imshow(pictures[row, column], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            text = f"{cosines[row, column - 1]:.2f}" if column else "image"
            colour, style, width = UNKNOWN, "solid", 1.0
            if classes is not None:
                own = classes[row, column] == classes[row, 0]
                if not column:
                    text = names[classes[row, 0]][:12]
                else:
                    colour, style, width = (SAME, "solid", 3.0) if own else (OTHER, "dashed", 3.0)
            axis.set_title(text, fontsize=8, pad=3, parse_math=False)
            for spine in axis.spines.values():
                spine.set(edgecolor=colour, linestyle=style, linewidth=width)
    return figure

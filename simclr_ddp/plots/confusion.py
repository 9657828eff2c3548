"""Confusion matrix: what the images of each class are taken for."""

import numpy as np
from matplotlib.figure import Figure

from simclr_ddp.plots.png import WIDTH

NAMED = 40  # most classes whose names fit on the axes
NUMBERED = 20  # most classes whose percentages fit into the cells


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: list[str], title: str) -> Figure:
    """Plot the share of each class's images that is predicted as each class, labels and predictions int64 [n]."""
    count = len(classes)
    shares = matrix(labels, predictions, count)
    figure = Figure(figsize=(WIDTH, WIDTH * 0.86), layout="constrained")
    right = f"{(labels == predictions).mean():.1%} of {len(labels):,} images are right"
    figure.suptitle(f"{title}\n{right}", parse_math=False)
    axis = figure.add_subplot()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the class's images", format="{x:.0%}")
    axis.set(xlabel="predicted class", ylabel="class")
    if count <= NAMED:
        names = [name if len(name) <= 18 else f"{name[:17]}…" for name in classes]
        axis.set_xticks(range(count), names, rotation=90, parse_math=False)
        axis.set_yticks(range(count), names, parse_math=False)
    if count <= NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.5 else "black"
                axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=9)
    return figure


def matrix(labels: np.ndarray, predictions: np.ndarray, count: int) -> np.ndarray:
    """Shares float64 [count, count], row: class, column: prediction; a class without images has a row of NaN."""
    found = np.bincount(labels * count + predictions, minlength=count * count).reshape(count, count)
    with np.errstate(invalid="ignore"):
        return found / found.sum(1, keepdims=True)

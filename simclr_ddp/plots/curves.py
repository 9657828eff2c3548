"""The curves of a run: loss, accuracy and learning rate against the epoch."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from simclr_ddp.figures import WIDTH

PANELS = {
    "loss": "loss",
    "contrastive_top1": "contrastive top-1",
    "probe_top1": "online probe, top-1",
    "learning_rate": "learning rate",
}
PERCENT = ("contrastive_top1", "probe_top1")
SMOOTHED = 60  # points from which on a curve gets its moving average
WINDOW = 0.04  # of that average, as a share of the run


def curves(lines: list[dict[str, Any]], title: str, untrained_loss: float | None) -> Figure:
    """A panel for each of PANELS that the lines of metrics have."""
    shown = [key for key in PANELS if any(key in line for line in lines)]
    columns = 2 if len(shown) % 2 == 0 else len(shown)
    rows = len(shown) // columns
    figure = Figure(figsize=(WIDTH, 2.9 * rows + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axis, key in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=True):
        epoch, value = np.array([(line["epoch"], line[key]) for line in lines if key in line], float).T
        last = _draw(axis, epoch, value, smooth=key != "learning_rate" and len(value) >= SMOOTHED)
        if key == "loss" and untrained_loss is not None:
            axis.axhline(untrained_loss, color="grey", linestyle=":", label="no learning: log(2N - 1)")
            axis.legend(fontsize=9, frameon=False)
        if key in PERCENT:
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        note = f"peak {value.max():.3g}" if key == "learning_rate" else f"ends at {last:.3f}"
        axis.set_title(PANELS[key], loc="left", fontsize=11)
        axis.set_title(f"ends at {last:.1%}" if key in PERCENT else note, loc="right", fontsize=9)
        axis.set(xlabel="epoch", ylabel="top-1" if key in PERCENT else PANELS[key], xlim=(0, lines[-1]["epoch"]))
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=lines[-1]["epoch"] >= 4))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw(axis: Axes, epoch: np.ndarray, value: np.ndarray, smooth: bool) -> float:
    """The curve, under its moving average if asked for; returns the last value of what lies above."""
    if not smooth:
        axis.plot(epoch, value, marker="." if len(value) < 40 else "", color="tab:blue", clip_on=False)
        return float(value[-1])
    window = round(WINDOW * len(value))
    mean = np.convolve(value, np.full(window, 1 / window), "valid")
    first = window // 2
    axis.plot(epoch, value, color="tab:blue", alpha=0.3, linewidth=0.8)
    axis.plot(epoch[first : first + len(mean)], mean, color="tab:blue", linewidth=2)
    return float(mean[-1])

"""Plots of the loss, accuracy and learning rate of a run, or of several, against the epoch."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from simclr_ddp.plots.png import WIDTH

PANELS = {
    "loss": "loss",
    "contrastive_top1": "contrastive top-1",
    "probe_top1": "online probe, top-1",
    "monitor_knn_top1": "kNN, top-1",
    "monitor_neighbour_overlap": "overlap of neighbours",
    "monitor_rankme": "RankMe",
    "monitor_lidar": "LiDAR",
    "monitor_alpha_req": "alpha-ReQ",
    "monitor_alignment": "alignment",
    "monitor_uniformity": "uniformity",
    "learning_rate": "learning rate",
}
PERCENT = ("contrastive_top1", "probe_top1", "monitor_knn_top1", "monitor_neighbour_overlap")
SMOOTHED = 60  # smallest number of points for which a moving average is drawn
WINDOW = 0.04  # window of the moving average, as a fraction of the run
# Okabe and Ito 2008: colours that people with colour vision deficiencies can tell apart; yellow is left out, as it is
# too light for lines. Seven colours and five dash patterns give 35 different lines.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))


def curves(lines: list[dict[str, Any]], title: str, untrained_loss: float | None) -> Figure:
    """Plot a panel for each key of PANELS that occurs in the lines of metrics."""
    figure, panels = _panels([lines], title)
    for key, axis in panels.items():
        epoch, value = _points(lines, key)
        last = _draw(axis, epoch, value, smooth=_smooth(key, value))
        if key == "loss" and untrained_loss is not None:
            axis.axhline(untrained_loss, color="grey", linestyle=":", label="no learning: log(2N - 1)")
            axis.legend(fontsize=9, frameon=False)
        note = f"peak {value.max():.3g}" if key == "learning_rate" else f"ends at {last:.3f}"
        axis.set_title(f"ends at {last:.1%}" if key in PERCENT else note, loc="right", fontsize=9)
    return figure


def comparison(runs: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """Plot the curves of several runs, name -> lines of metrics, in one panel for each key of PANELS.

    A colour and a dash pattern distinguish each run, so that the picture is also clear without colours.
    """
    figure, panels = _panels(list(runs.values()), title)
    for key, axis in panels.items():
        for i, lines in enumerate(runs.values()):
            epoch, value = _points(lines, key)
            if not len(value):
                continue
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.6}
            smooth = _smooth(key, value)
            axis.plot(*(_average(epoch, value) if smooth else (epoch, value)), **style)
    styles = [(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i in range(len(runs))]
    handles = [Line2D([], [], color=colour, linestyle=dash, linewidth=1.6) for colour, dash in styles]
    legend = figure.legend(handles, map(str, range(len(runs))), loc="outside lower center", ncols=3, frameon=False)
    for text, name in zip(legend.get_texts(), runs, strict=True):
        text.set(text=name, parse_math=False)
    return figure


def _panels(runs: list[list[dict[str, Any]]], title: str) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a labelled panel for each key of PANELS that a run has."""
    shown = [key for key in PANELS if any(key in line for lines in runs for line in lines)]
    columns = 3 if len(shown) == 3 else min(len(shown), 2)
    rows, last = -(-len(shown) // columns), max(lines[-1]["epoch"] for lines in runs)
    figure = Figure(figsize=(WIDTH, 2.9 * rows + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(shown) :]:
        axis.remove()
    panels = dict(zip(shown, axes[: len(shown)], strict=True))
    for key, axis in panels.items():
        if key in PERCENT:
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set_title(PANELS[key], loc="left", fontsize=11)
        axis.set(xlabel="epoch", ylabel="top-1" if key.endswith("top1") else PANELS[key], xlim=(0, last))
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=last >= 4))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _points(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    epoch, value = np.array([(line["epoch"], line[key]) for line in lines if key in line], float).reshape(-1, 2).T
    return epoch, value


def _smooth(key: str, value: np.ndarray) -> bool:
    return key != "learning_rate" and len(value) >= SMOOTHED


def _average(epoch: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving average over WINDOW of the run, with the epochs in the middle of the windows."""
    window = round(WINDOW * len(value))
    mean = np.convolve(value, np.full(window, 1 / window), "valid")
    first = window // 2
    return epoch[first : first + len(mean)], mean


def _draw(axis: Axes, epoch: np.ndarray, value: np.ndarray, smooth: bool) -> float:
    """Draw a curve, with its moving average if `smooth`; return the last value of the average or curve."""
    if not smooth:
        axis.plot(epoch, value, marker="." if len(value) < 40 else "", color="tab:blue", clip_on=False)
        return float(value[-1])
    middle, mean = _average(epoch, value)
    axis.plot(epoch, value, color="tab:blue", alpha=0.3, linewidth=0.8)
    axis.plot(middle, mean, color="tab:blue", linewidth=2)
    return float(mean[-1])

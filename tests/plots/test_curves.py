import json
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from simclr_ddp.plots.curves import COLOURS, DASHES, PANELS, comparison, curves
from tests.support.processes import ROOT


def metrics(count: int, **more: float) -> list[dict[str, Any]]:
    loss = 5 + np.exp(-np.arange(count) / 10) + np.random.default_rng(0).normal(size=count) / 10
    return [
        {
            "step": i + 1,
            "epoch": (i + 1) / 20,
            "loss": loss[i],
            "contrastive_top1": 0.25,
            "learning_rate": 0.1 * i,
            **more,
        }
        for i in range(count)
    ]


def panels(figure: Figure) -> dict[str, Any]:
    figure.canvas.draw()
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


@pytest.mark.parametrize("count", [1, 30, 59])
def test_a_panel_for_each_metric(count: int) -> None:
    lines = metrics(count)
    figure = curves(lines, "run, step 9", None)
    found = panels(figure)
    assert list(found) == ["loss", "contrastive top-1", "learning rate"] and figure.get_suptitle() == "run, step 9"
    (line,) = found["loss"].lines
    np.testing.assert_array_equal(line.get_ydata(), [values["loss"] for values in lines])
    np.testing.assert_array_equal(line.get_xdata(), [values["epoch"] for values in lines])
    assert found["contrastive top-1"].get_title(loc="right") == "ends at 25.0%"
    assert all(axis.get_xlabel() == "epoch" and axis.get_ylabel() for axis in found.values())


def test_metrics_of_some_lines_only_and_the_loss_of_no_learning() -> None:
    lines = metrics(59)
    for i in (19, 39, 58):
        lines[i]["probe_top1"] = i / 100
    found = panels(curves(lines, "run", 5.5))
    assert list(found) == ["loss", "contrastive top-1", "online probe, top-1", "learning rate"]
    np.testing.assert_array_equal(
        found["online probe, top-1"].lines[0].get_xydata(), [[1, 0.19], [2, 0.39], [2.95, 0.58]]
    )
    assert found["loss"].lines[1].get_ydata() == [5.5, 5.5]
    assert found["learning rate"].get_title(loc="right") == "peak 5.8"


def test_the_panels_of_a_monitored_run() -> None:
    names = ("knn_top1", "neighbour_overlap", "rankme", "lidar", "alpha_req", "alignment", "uniformity")
    lines = metrics(59, probe_top1=0.5)
    for i in (19, 58):
        lines[i] |= {f"monitor_{name}": 0.1 * i for name in names}
    found = panels(curves(lines, "run", None))
    assert len(found) == 11 and list(found)[3] == "kNN, top-1" and list(found)[-1] == "learning rate"
    np.testing.assert_allclose(found["LiDAR"].lines[0].get_xydata(), [[1, 1.9], [2.95, 5.8]])


def test_many_points_get_a_moving_average() -> None:
    lines = metrics(500)
    raw, mean = panels(curves(lines, "run", None))["loss"].lines
    assert len(raw.get_ydata()) == 500
    loss, epoch = np.array([[line["loss"], line["epoch"]] for line in lines]).T
    for i, (x, y) in enumerate(mean.get_xydata()):
        assert y == pytest.approx(loss[i : i + 20].mean()) and abs(x - epoch[i : i + 20].mean()) <= epoch[0]


def test_the_curves_of_a_real_run() -> None:
    text = (ROOT / "benchmarks" / "results" / "cifar10_cpu" / "seed0" / "metrics.jsonl").read_text()
    found = panels(curves([json.loads(line) for line in text.splitlines()], "cifar10_cpu", 6.0))
    assert len(found) == 4 and len(found["loss"].lines) == 3


def test_several_runs_in_one_picture_differ_in_colour_and_dashes() -> None:
    assert len(set(zip(COLOURS * 5, DASHES * 7, strict=True))) == 35
    runs = {f"run{i}": metrics(30 + 40 * i) for i in range(8)}
    runs["_probed"] = metrics(20, probe_top1=0.5)
    figure = comparison(runs, "9 runs")
    found = panels(figure)
    keys = ("loss", "contrastive_top1", "probe_top1", "learning_rate")
    assert list(found) == [PANELS[key] for key in keys]
    lines = found["loss"].lines
    colours = [line.get_color() for line in lines]
    assert colours == [*COLOURS, *COLOURS[:2]] and lines[0].get_linestyle() != lines[7].get_linestyle()
    np.testing.assert_array_equal(lines[0].get_ydata(), [values["loss"] for values in runs["run0"]])
    loss = np.array([values["loss"] for values in runs["run1"]])  # 70 points: a moving average of 3
    np.testing.assert_allclose(lines[1].get_ydata(), [loss[i : i + 3].mean() for i in range(68)])
    (probe,) = found["online probe, top-1"].lines
    assert probe.get_color() == colours[8] and set(probe.get_ydata()) == {0.5}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    assert [handle.get_color() for handle in legend.legend_handles] == colours  # type: ignore[union-attr]
    assert all(axis.get_xlim() == (0, 15.5) for axis in found.values())

import json
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from simclr_ddp.curves import curves
from tests.processes import ROOT


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

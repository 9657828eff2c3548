import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import label_free
from benchmarks.label_free import EXPECTED, RUNS, correlations, kendall, spearman
from tests.support.output import only_error


@pytest.mark.parametrize("levels", [4, 1000])
def test_rank_correlations_equal_those_of_scipy(levels: int) -> None:
    """With many equal values and with few."""
    x, y = np.random.default_rng(0).integers(0, levels, (2, 40, 11)).astype(float)
    for i in range(40):
        assert spearman(x, y)[i] == pytest.approx(stats.spearmanr(x[i], y[i])[0])
        assert kendall(x, y)[i] == pytest.approx(stats.kendalltau(x[i], y[i])[0])
    assert spearman(x[0], np.ones(11)) == kendall(np.ones(11), x[0]) == 0


def test_the_interval_is_that_of_resampled_runs() -> None:
    x = np.arange(16.0)
    found = correlations(x, x + np.random.default_rng(1).normal(size=16) * 4)
    for value, low, high in found.values():
        assert -1 <= low < value < high <= 1
    assert found["spearman"] != correlations(x, -x)["spearman"] == [-1, -1, -1]


def make_run(folder: Path, accuracy: float, metric: float) -> None:
    folder.mkdir(parents=True)
    (folder / "encoder.safetensors").touch()
    lines = [{"step": i, "epoch": i / 20, "loss": 5 - metric * (i > 18), "contrastive_top1": 0.1} for i in range(1, 21)]
    lines[-1] |= {key: metric for key in EXPECTED if key.startswith("monitor_")} | {"probe_top1": accuracy}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_finished_runs_are_reported_and_failed_ones_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without training: the runs are written here, and one is missing."""
    accuracies = {}
    for i, name in enumerate(RUNS):
        folder = label_free.run_dir({"--runs": str(tmp_path)}, name)
        assert folder.parent == tmp_path and folder.name not in accuracies
        accuracies[folder.name] = 0.3 + 0.01 * i
        if name != "rate x 3":
            make_run(folder, accuracies[folder.name], metric=i / 10)
    monkeypatch.setattr(label_free, "linear_top1", lambda folder: [accuracies[folder.name]])
    monkeypatch.setattr(label_free, "train_and_evaluate", lambda *given: "error: step 3: it diverges")
    arguments = [f"--runs={tmp_path}", "--out", str(tmp_path / "out"), "data.train=spirograph"]
    assert label_free.main(arguments) == 0
    page = (tmp_path / "out" / "README.md").read_text()
    assert "15 runs, linear accuracy" in page and "Left out: rate x 3, error: step 3: it diverges" in page
    assert "| rankme |  | + | +1.00 [+1.00, +1.00] | +1.00 [+1.00, +1.00] |" in page
    assert "| loss |  | - | -1.00" in page and "| probe_top1 | yes | + | +1.00" in page
    assert page.splitlines()[-3].startswith("| base | 0.3 |") and (tmp_path / "out" / "scatter.png").exists()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["runs"]["temperature 0.1"]["options"] == {"loss.temperature": 0.1} and len(found["runs"]) == 15
    assert found["runs"]["base"]["loss"] == 5  # mean of the last two lines
    monkeypatch.setattr(label_free, "train_and_evaluate", lambda *given: pytest.fail("no time was left"))
    assert label_free.main([*arguments, "--minutes=0.0000001"]) == 2
    assert "--minutes 0.0000001: 1 runs are left; the same command continues" in only_error(capfd)

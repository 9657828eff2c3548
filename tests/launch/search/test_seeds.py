"""The best of a grid with several seeds."""

from pathlib import Path

import optuna
from optuna.trial import TrialState

from launch.search import report
from launch.search.plan import Sweep, make_plan

PROBES = {  # of seeds 0, 1, 2
    "cosine": (0.50, 0.51, 0.99),
    "laplacian": (0.70, 0.72, 0.74),
    "gaussian": (0.98, None, None),  # its other seeds failed
}


def test_the_best_settings_have_the_best_mean_and_no_lucky_seed(tmp_path: Path) -> None:
    grid = {"loss.kernel": list(PROBES), "seed": [0, 1, 2]}
    plan = make_plan(Sweep(name="s", sweep_dir=str(tmp_path), grid=grid))
    study = optuna.create_study(direction="maximize")
    for number in range(plan.count):
        trial, (labels, _) = plan.trial(number), plan.drawn(number)
        value = PROBES[labels["loss.kernel"]][labels["seed"]]
        trial.state, trial.values = (TrialState.FAIL, None) if value is None else (TrialState.COMPLETE, [value])
        trial.datetime_complete = trial.datetime_start
        study.add_trial(trial)
    found = report.write(study, plan, "probe_top1", final=True)
    assert found is not None and found.shown == "0.7200 ± 0.0200 over 3 seeds"
    assert plan.drawn(found.trial.number)[0]["loss.kernel"] == "laplacian"
    text = (tmp_path / "report.md").read_text()
    assert f"Best: trial {found.trial.number}, probe_top1 0.7200 ± 0.0200 over 3 seeds" in text
    rows = [line for line in text.splitlines() if (line.startswith("| ") and "seeds" in line) or "| 0.98" in line]
    assert rows[:2] == ["| laplacian | 0.7200 ± 0.0200 over 3 seeds |", "| cosine | 0.6667 ± 0.2801 over 3 seeds |"]
    assert "kernel: laplacian" in (tmp_path / "best.yaml").read_text()

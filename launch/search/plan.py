"""The settings of a sweep, and what they make of each of its trials."""

import io
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.space import Axis, Dimension, cell, cells, label_of, parse_grid, parse_space, sample
from simclr_ddp import cli, config, run
from simclr_ddp.config import Pretrain, option
from simclr_ddp.data import open_dataset
from simclr_ddp.pretrain import make_objective

DIRECTIONS = {"probe_top1": "MAXIMIZE", "contrastive_top1": "MAXIMIZE", "loss": "MINIMIZE"}


@dataclass
class Sweep:
    name: str = option("sweep", "of the sweep; a config file's name by default")
    config: str = option("", "pretraining config that every trial begins with; empty: the Spirograph defaults")
    set: dict[str, Any] = option({}, "options of all trials, over that config, for example set.optim.epochs=20")
    space: dict[str, Any] = option(
        {}, "random search: key: {log | uniform: [low, high]} or {choice: [...]}, {when: ...}"
    )
    grid: dict[str, Any] = option(
        {}, "instead: key: [values], or axis: {name: {key: value, ...}, ...}; all combinations"
    )
    metric: str = option("probe_top1", "what makes a trial good, at its last whole epoch", tuple(DIRECTIONS))
    trials: int = option(20, "of a random search in all; more go on with a finished one", low=1)
    seed: int = option(0, "of what the trials draw", low=0, high=2**63 - 1)
    pruner: str = option(
        "median", "ends trials early: median, successive halving, or none", ("median", "halving", "none")
    )
    grace_epochs: int = option(5, "epochs before a trial can be ended early; halving: its first rung", low=1)
    startup_trials: int = option(5, "median: trials that finish before any is ended early", low=1)
    reduction: int = option(2, "halving: one trial of so many goes on to so many times the epochs", low=2)
    at_once: int = option(0, "trials side by side; 0: one a device, or one; of SLURM jobs all", low=0)
    devices: list[str] = option([], "CUDA devices to share out, for example [0, 1]; empty: all that there are")
    slurm: str = option("", "config of launch.slurm: trials are its jobs; empty: processes of this machine")
    sweep_dir: str = option("", "output; empty: runs/sweep/<name>")
    storage: str = option("", "Optuna's journal, which several sweeps may share; empty: SWEEP_DIR/optuna.journal")


@dataclass(frozen=True)
class Plan:
    """What the trials are."""

    name: str
    sweep_dir: Path
    layers: list[tuple[str, dict[str, Any]]]  # of all trials
    fixed: dict[str, Any]  # {dotted key: value} that they make
    space: list[Dimension]
    axes: list[Axis]
    seed: int
    count: int

    def drawn(self, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """({name: label}, {key: value}) of the trial: what is recorded, and what is run."""
        if self.axes:
            return cell(self.axes, number)
        values = sample(self.space, self.fixed, self.seed, number)
        return {key: label_of(value) for key, value in values.items()}, values

    def settings(self, number: int, **own: Any) -> Pretrain:
        """own: options of this trial's alone"""
        return config.build(Pretrain, [*self.layers, (f"trial {number}", self.drawn(number)[1] | own)])

    def run_dir(self, number: int) -> Path:
        return self.sweep_dir / "trials" / f"{number:04d}"

    @property
    def names(self) -> list[str]:
        return [axis.name for axis in self.axes] or [d.key for d in self.space]


def make_plan(settings: Sweep) -> Plan:
    """Raises ValueError for a key or value that pretrain does not take."""
    if "/" in settings.name:
        raise ValueError(f"name={settings.name}: a name without / is wanted, sweep_dir=... says where it goes")
    if bool(settings.space) == bool(settings.grid):
        what = (
            "both: one of them is wanted" if settings.space else "missing: one of them says what the trials differ in"
        )
        raise ValueError(f"space and grid are {what}")
    for key in ("name", "run_dir"):
        if key in settings.set:
            raise ValueError(
                f"set.{key}: {key} of each trial is chosen by the sweep, sweep_dir=... says where they lie"
            )
    layers = [(settings.config, config.read_yaml(settings.config))] if settings.config else []
    layers.append(("set", settings.set))
    fixed = config.dotted(config.build(Pretrain, layers))
    space, axes = parse_space(settings.space), parse_grid(settings.grid)
    for d in space:
        for key, values in d.when.items():
            other = next((o for o in space if o.key == key), None)
            possible = other.values if other and other.kind == "choice" else [] if other else [fixed[key]]
            if possible and not any(value in values for value in possible):
                raise ValueError(f"space.{d.key}.when.{key}={values} never holds: {key} is one of {possible}")
    sweep_dir = Path(settings.sweep_dir or f"runs/sweep/{settings.name}")
    count = cells(axes) if axes else settings.trials
    return Plan(settings.name, sweep_dir, layers, fixed, space, axes, settings.seed, count)


def check(settings: Sweep, plan: Plan) -> None:
    """ValueError for what would fail later: a trial that can't start, or one without the metric."""
    counted: dict[str, Any] = {}
    most = 0
    for number in range(plan.count):
        try:
            trial = plan.settings(number)
            make_objective(trial)
            source = trial.data.train
            if source not in counted:
                counted[source] = open_dataset(source, "train")
            with redirect_stderr(io.StringIO()):  # its warnings are for the trial's log
                planned = run.make_plan(trial, counted[source])
        except (ValueError, OSError) as error:
            raise ValueError(f"trial {number} ({shown(plan.drawn(number)[0])}): {error}") from error
        epochs = planned.total_steps // planned.steps_per_epoch
        most = max(most, epochs)
        why = ""
        if not epochs:
            why = f"its {planned.total_steps} steps are no whole epoch of {planned.steps_per_epoch}"
        elif settings.metric == "probe_top1" and not trial.probe.enabled:
            why = "probe.enabled=false; set.probe.enabled=true makes it, metric=contrastive_top1 does without"
        elif settings.metric == "probe_top1" and not counted[source].class_count:
            why = f"data.train={source} has no classes; metric=contrastive_top1 does without"
        if why:
            raise ValueError(f"trial {number} would not have metric={settings.metric}: {why}")
    if plan.space and settings.pruner != "none" and settings.grace_epochs >= most:
        raise ValueError(
            f"grace_epochs={settings.grace_epochs}: no trial has more than {most} epochs, so none could end "
            "early: fewer, or pruner=none"
        )
    varied = {key for number in range(plan.count) for key in plan.drawn(number)[1]}
    scale = sorted(key for key in varied if key.startswith("loss.") or key == "optim.global_batch_size")
    if settings.metric == "loss" and scale:
        cli.warn(f"metric=loss can't be compared between values of {', '.join(scale)}: metric=probe_top1 can")


def shown(labels: dict[str, Any]) -> str:
    return ", ".join(f"{name}={label}" for name, label in labels.items())

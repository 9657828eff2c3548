"""The settings of a sweep, and the trials that follow from them."""

import io
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from launch.cluster import preflight
from launch.search.space import Axis, Dimension, cell, cells, label_of, parse_grid, parse_space, sample
from simclr_ddp.config import options, recipes
from simclr_ddp.config.options import option
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.system import console

# Of the monitor's metrics, those of which more, or less, is better: alpha-ReQ is best near 1, and an encoder that maps
# all images to one point has the best alignment and overlap.
DIRECTIONS = {"probe_top1": "maximize", "contrastive_top1": "maximize", "loss": "minimize"}
DIRECTIONS |= dict.fromkeys(
    ("monitor_knn_top1", "monitor_rankme", "monitor_effective_rank", "monitor_participation_ratio", "monitor_lidar"),
    "maximize",
)
DIRECTIONS |= {"monitor_uniformity": "minimize"}


@dataclass
class Sweep:
    name: str = option("sweep", "name of the sweep; by default the name of the config file")
    config: str = option(
        "",
        "pretraining config of all trials, a file or the name of an included one; empty is the Spirograph defaults",
        path=True,
    )
    set: dict[str, Any] = option({}, "options of all trials that override the config, for example set.optim.epochs=20")
    space: dict[str, Any] = option(
        {}, "random search: {key: {log | uniform: [low, high]}} or {key: {choice: [...]}}, optionally with {when: ...}"
    )
    grid: dict[str, Any] = option(
        {}, "or all combinations of {key: [values]} and of {axis: {name: {key: value, ...}, ...}}"
    )
    metric: str = option("probe_top1", "metric that is optimised, at the last complete epoch", tuple(DIRECTIONS))
    trials: int = option(20, "number of trials of a random search; increase it to continue a finished one", low=1)
    seed: int = option(0, "seed of the values that trials draw", low=0, high=2**63 - 1)
    pruner: str = option(
        "median", "ends trials early: by median, successive halving, or none", ("median", "halving", "none")
    )
    grace_epochs: int = option(5, "epochs before a trial can be ended early; halving: its first rung", low=1)
    startup_trials: int = option(5, "median: trials that finish before any is ended early", low=1)
    reduction: int = option(2, "halving: one in N trials continues, to N times the epochs", low=2)
    at_once: int = option(0, "trials that run at the same time; 0 is one per device, or one; all SLURM jobs", low=0)
    devices: list[str] = option([], "CUDA devices for the trials, for example [0, 1]; empty is all")
    slurm: str = option(
        "",
        "config of launch.slurm (a file, or the name of an included one) to run trials as its jobs; empty is processes",
        path=True,
    )
    sweep_dir: str = option("", "output; empty is runs/sweep/<name>", path=True)
    retry: str = option("", "failed: run the trials that failed again", ("", "failed"))
    storage: str = option("", "Optuna's journal, which sweeps may share; empty is SWEEP_DIR/optuna.journal", path=True)


@dataclass(frozen=True)
class Plan:
    """The trials."""

    name: str
    sweep_dir: Path
    layers: list[tuple[str, dict[str, Any]]]  # of all trials
    fixed: dict[str, Any]  # {dotted key: value} that results from them
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

    def trial(self, number: int) -> FrozenTrial:
        """The trial as Optuna records it when it begins."""
        labels, choices = self.drawn(number)[0], CategoricalDistribution
        kinds: dict[str, BaseDistribution] = {axis.name: choices(list(axis.places)) for axis in self.axes}
        for d in self.space:
            number_of = IntDistribution if d.integer else FloatDistribution
            if d.kind == "choice":
                kinds[d.key] = choices([label_of(v) for v in d.values])
            else:
                kinds[d.key] = number_of(d.values[0], d.values[1], log=d.kind == "log")
        used = {name: kinds[name] for name in labels}
        attributes = {"number": number}  # Optuna's own number of a trial that is run again is another
        return create_trial(state=TrialState.RUNNING, params=labels, distributions=used, user_attrs=attributes)

    def settings(self, number: int, **own: Any) -> Pretrain:
        """own: more options of this trial"""
        return options.build(Pretrain, [*self.layers, (f"trial {number}", self.drawn(number)[1] | own)])

    def run_dir(self, number: int) -> Path:
        return self.sweep_dir / "trials" / f"{number:04d}"

    @property
    def names(self) -> list[str]:
        return [axis.name for axis in self.axes] or [d.key for d in self.space]


def make_plan(settings: Sweep) -> Plan:
    """Raises ValueError for a key or value that pretrain does not accept."""
    if "/" in settings.name:
        raise ValueError(f"name={settings.name}: it must not contain /; set sweep_dir=... to choose the folder")
    if bool(settings.space) == bool(settings.grid):
        raise ValueError(f"space and grid are {'both' if settings.grid else 'not'} set; set one of them")
    for key in ("name", "run_dir"):
        if key in settings.set:
            raise ValueError(f"set.{key}: the sweep chooses it for each trial; set sweep_dir=... to choose the folder")
    config = recipes.find(settings.config)
    layers = [(config, options.read_yaml(config))] if config else []
    layers.append(("set", settings.set))
    fixed = options.dotted(options.build(Pretrain, layers))
    space, axes = parse_space(settings.space), parse_grid(settings.grid)
    for d in space:
        for key, values in d.when.items():
            other = next((o for o in space if o.key == key), None)
            possible = other.values if other and other.kind == "choice" else [] if other else [fixed[key]]
            if possible and not any(value in values for value in possible):
                raise ValueError(f"space.{d.key}.when.{key}={values}: it never holds; {key} is one of {possible}")
    sweep_dir = Path(settings.sweep_dir or f"runs/sweep/{settings.name}")
    count = cells(axes) if axes else settings.trials
    return Plan(settings.name, sweep_dir, layers, fixed, space, axes, settings.seed, count)


def check(settings: Sweep, plan: Plan, ranks: int = 1) -> None:
    """ValueError for what would fail later: a trial that can't start on its ranks, or one without the metric."""
    datasets: dict[str, Any] = {}
    varied: set[str] = set()
    most = 0
    for number in range(plan.count):
        labels, values = plan.drawn(number)
        varied |= values.keys()
        try:
            trial = plan.settings(number)
            with redirect_stderr(io.StringIO()):  # its warnings belong in the trial's log
                planned = preflight.check(trial, ranks, datasets)
        except (ValueError, OSError) as error:
            raise ValueError(f"trial {number} ({shown(labels)}): {error}") from error
        epochs = planned.total_steps // planned.steps_per_epoch
        most = max(most, epochs)
        why = ""
        if not epochs:
            why = f"its {planned.total_steps} steps are not one epoch of {planned.steps_per_epoch}; train for longer"
        elif settings.metric == "probe_top1" and not trial.probe.enabled:
            why = "probe.enabled=false; set.probe.enabled=true, or metric=contrastive_top1"
        elif settings.metric == "probe_top1" and not datasets[trial.data.train].class_count:
            why = f"data.train={trial.data.train} has no classes; set metric=contrastive_top1"
        elif settings.metric.startswith("monitor_"):
            why = _unmonitored(settings.metric, trial, epochs, datasets[trial.data.train].has_classes)
        if why:
            raise ValueError(f"metric={settings.metric}: trial {number} would not have it, as {why}")
    if plan.space and settings.pruner != "none" and settings.grace_epochs >= most:
        raise ValueError(
            f"grace_epochs={settings.grace_epochs}: trials have at most {most} epochs, so none could end early; "
            "decrease it, or set pruner=none"
        )
    scale = sorted(key for key in varied if key.startswith("loss.") or key == "optim.global_batch_size")
    if settings.metric == "loss" and scale:
        console.warn(f"metric=loss: not comparable between values of {', '.join(scale)}; set metric=probe_top1")


def _unmonitored(metric: str, trial: Pretrain, epochs: int, has_classes: bool) -> str:
    """Why a trial would not have this metric of the monitor at the end of an epoch, and what to do; or ""."""
    every, steps = trial.monitor.every_epochs, trial.optim.steps
    if not every:
        return "monitor.every_epochs=0; set.monitor.every_epochs=1"
    if steps and every > epochs:
        return f"monitor.every_epochs={every} and it ends in epoch {epochs + 1}; measure more often"
    if metric == "monitor_lidar" and not trial.monitor.views:
        return "monitor.views=0; set.monitor.views=10"
    if metric == "monitor_knn_top1" and not has_classes:
        return f"data.train={trial.data.train} has no classes; set metric=monitor_rankme"
    return ""


def shown(labels: dict[str, Any]) -> str:
    return ", ".join(f"{name}={label}" for name, label in labels.items())

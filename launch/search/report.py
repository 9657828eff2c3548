"""What a sweep leaves behind: trials.csv, best.yaml, report.md and its figures."""

import csv
import inspect
import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from launch.plan import Plan
from simclr_ddp import checkpoint, cli, config
from simclr_ddp.figures import WIDTH, save

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "ended early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "not done",
}
LEAST = 8  # finished trials that importances take
GOOD = 0.25  # of them, the share that counts as good
SHOWN = 10  # rows of the report's table
# Of their lines in the parallel coordinates.
STYLES = {TrialState.COMPLETE: ".-", TrialState.PRUNED: ".--", TrialState.FAIL: ".:"}
ALPHA = {TrialState.COMPLETE: 0.8, TrialState.PRUNED: 0.25, TrialState.FAIL: 0.25}
UNUSED = -0.12  # where the parallel coordinates show a key that plays no part in a trial


def write(study: optuna.Study, plan: Plan, metric: str, last: bool = False) -> FrozenTrial | None:
    """Write all of it, the figures and the report only if this is the `last` time; returns the best trial."""
    trials, folder = study.get_trials(deepcopy=False), plan.sweep_dir
    write_text(folder / "trials.csv", table(trials, plan, metric))
    found = best(study)
    if found is not None:
        write_text(folder / "best.yaml", best_config(found, plan, metric))
    if last:
        figures = {"history": history(trials, study, metric), "parallel": parallel(trials, plan, study, metric)}
        weights, why_not = importances(study, metric)
        figures["importances"] = bars(weights, metric) if weights else None
        for name, figure in figures.items():
            if figure is not None:
                save(figure, folder / f"{name}.png")
            else:
                (folder / f"{name}.png").unlink(missing_ok=True)
        if why_not:
            cli.say(why_not)
        drawn = [name for name, figure in figures.items() if figure is not None]
        write_text(folder / "report.md", report(trials, found, plan, metric, drawn, why_not))
        cli.say(f"all trials: {folder}/trials.csv, the best ten: {folder}/report.md")
        if found is not None:
            cli.say(f"best: trial {found.number}, {metric} {found.value:.4f}: pretrain {folder}/best.yaml")
    return found


def best(study: optuna.Study) -> FrozenTrial | None:
    """The finished trial of the best value, the first of equals."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = 1 if _minimised(study) else -1
    return min(done, key=lambda t: (sign * _value(t), t.number), default=None)


def best_config(trial: FrozenTrial, plan: Plan, metric: str) -> str:
    head = f"# Trial {trial.number} of the sweep {plan.name}: {metric} {trial.value:.6g}.\n#\n"
    command = f"# Command: python -m simclr_ddp.pretrain {plan.sweep_dir}/best.yaml\n"
    settings = plan.settings(trial.number, name=f"{plan.name}-best", run_dir="")
    return f"{head}{command}{config.to_yaml(settings)}"


def table(trials: list[FrozenTrial], plan: Plan, metric: str) -> str:
    """A line a trial, as CSV; keys that play no part in a trial are empty."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["trial", "state", metric, "epochs", *plan.names, "run_dir", "error"])
    for t in trials:
        labels = plan.drawn(t.number)[0]
        values = [labels.get(name, "") for name in plan.names]
        shown = "" if t.state == TrialState.FAIL or not t.intermediate_values else _value(t)
        error = t.user_attrs.get("error", "")
        lines.writerow([t.number, STATES[t.state], shown, t.last_step or 0, *values, plan.run_dir(t.number), error])
    return text.getvalue()


def report(
    trials: list[FrozenTrial], found: FrozenTrial | None, plan: Plan, metric: str, figures: list[str], note: str
) -> str:
    """Markdown: how many trials ended how, the best of them, the figures, and a note on one that is not there."""
    counts = {name: sum(t.state == state for t in trials) for state, name in STATES.items()}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    lines = [f"# Sweep {plan.name}", "", f"{len(trials)} of {plan.count} trials begun: {told}.", ""]
    if found is not None:
        lines += [f"Best: trial {found.number}, {metric} {found.value:.4f} (`best.yaml`).", ""]
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    sign = 1 if metric == "loss" else -1
    columns = ["trial", metric, *plan.names]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for t in sorted(done, key=lambda t: (sign * _value(t), t.number))[:SHOWN]:
        labels = plan.drawn(t.number)[0]
        cells = [str(t.number), f"{_value(t):.4f}", *(str(labels.get(name, "")) for name in plan.names)]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [t for t in trials if t.state == TrialState.FAIL]
    if failed:
        lines += ["", "Failed:", "", *(f"- trial {t.number}: {t.user_attrs.get('error', '')}" for t in failed)]
    lines += ["", *(f"![{name}]({name}.png)" for name in figures)]
    lines += ["", f"{note[0].upper()}{note[1:]}."] if note else []
    return "\n".join(lines) + "\n"


def history(trials: list[FrozenTrial], study: optuna.Study, metric: str) -> Figure:
    """Every trial's last value by its number, and the best so far."""
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    axis = figure.subplots()
    styles = {TrialState.COMPLETE: ("o", "tab:blue"), TrialState.PRUNED: ("v", "lightgrey")}
    for state, (marker, colour) in styles.items():
        some = [t for t in trials if t.state == state and t.intermediate_values]
        if some:
            x, y = [t.number for t in some], [_value(t) for t in some]
            axis.scatter(x, y, marker=marker, color=colour, label=STATES[state], zorder=2)
    for i, t in enumerate(t for t in trials if t.state == TrialState.FAIL):
        axis.axvline(t.number, color="tab:red", alpha=0.3, label="failed" if not i else None)
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    if done:
        running = (np.minimum if _minimised(study) else np.maximum).accumulate([_value(t) for t in done])
        axis.step([t.number for t in done], running, where="post", color="tab:orange", label="best so far", zorder=1)
    _finish(axis, "optimisation history")
    axis.set(xlabel="trial", ylabel=metric)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9, frameon=False)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure


def importances(study: optuna.Study, metric: str) -> tuple[dict[str, float], str]:
    """(how much each key decides whether a finished trial is among the good ones, why there is no such thing).

    One of the two is empty. Before its version 5 Optuna leaves out keys that play no part in some trials.
    """
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < LEAST:
        return {}, f"no importances: they take {LEAST} finished trials, of which there are {len(done)}"
    if len({t.value for t in done}) < 2:
        return {}, f"no importances: all finished trials have the same {metric}"
    known = inspect.signature(PedAnovaImportanceEvaluator).parameters
    share: dict[str, Any] = {"target_quantile" if "target_quantile" in known else "baseline_quantile": GOOD}  # 4.0-4.6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that few trials have
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(**share))
    weights = {key: weight for key, weight in found.items() if math.isfinite(weight)}
    return weights, "" if weights else "no importances: the finished trials differ in no key that all of them have"


def bars(weights: dict[str, float], metric: str) -> Figure:
    figure = Figure(figsize=(WIDTH, 1 + 0.4 * len(weights)), layout="constrained")
    axis = figure.subplots()
    names = sorted(weights, key=lambda name: (weights[name], name))
    axis.barh(names, [weights[name] for name in names], color="tab:blue")
    _finish(axis, f"importance for a {metric} among the best quarter of the finished trials")
    axis.set(xlabel="share (PED-ANOVA)")
    return figure


def parallel(trials: list[FrozenTrial], plan: Plan, study: optuna.Study, metric: str) -> Figure | None:
    """A line a trial through its value of each key, coloured by its metric, the best on top.

    Those that ended early or failed are faded, and coloured by the last that they reported, on the scale of the
    finished ones.
    """
    some = [t for t in trials if t.state in STYLES and math.isfinite(_value(t))]
    silent = sum(t.state == TrialState.FAIL for t in trials) - sum(t.state == TrialState.FAIL for t in some)
    if not some:
        return None
    figure = Figure(figsize=(max(WIDTH, 1.6 * (len(plan.names) + 1)), 4.5), layout="constrained")
    axis = figure.subplots()
    values = np.array([_value(t) for t in some])
    scale = [_value(t) for t in some if t.state == TrialState.COMPLETE] or values
    norm, colours = Normalize(min(scale), max(scale), clip=True), "viridis_r" if _minimised(study) else "viridis"
    drawn = [plan.drawn(t.number)[0] for t in some]
    columns = [_scale(name, drawn, plan) for name in plan.names]
    heights = np.column_stack([[place(labels) for labels in drawn] for place, _ in columns])
    worst_first = np.argsort(-values if _minimised(study) else values)
    for i in sorted(worst_first, key=lambda i: some[i].state == TrialState.COMPLETE):
        colour, state = colormaps[colours](norm(values[i])), some[i].state
        axis.plot(range(len(columns)), heights[i], STYLES[state], color=colour, alpha=ALPHA[state], label=STATES[state])
    for x, (_, ticks) in enumerate(columns):
        axis.axvline(x, color="black", linewidth=0.8, zorder=0)
        for height, text in ticks:
            axis.annotate(text, (x, height), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
    if (heights == UNUSED).any():
        axis.axhline(UNUSED, color="grey", linestyle=":", linewidth=0.8, zorder=0)
        axis.annotate("plays no part", (-0.05, UNUSED), fontsize=8, ha="right", va="center")
    axis.set_xticks(range(len(columns)), [name.replace(".", ".\n") for name in plan.names], fontsize=9)
    axis.set_yticks([])
    found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if len(found) > 1:
        axis.legend(found.values(), found, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    _finish(axis, f"trials; {silent} that failed without a value are not drawn" if silent else "trials")
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    figure.colorbar(ScalarMappable(norm, colours), ax=axis, label=metric)
    return figure


def _scale(name: str, drawn: list[dict[str, Any]], plan: Plan) -> tuple[Any, list[tuple[float, str]]]:
    """(labels of a trial -> height in [0, 1] on the key's axis, [(height, text)])"""
    d = next((d for d in plan.space if d.key == name and d.kind != "choice"), None)
    if d is not None:
        low, high = (math.log(v) if d.kind == "log" else v for v in d.values)

        def height(labels: dict[str, Any]) -> float:
            if name not in labels:
                return UNUSED
            value = math.log(labels[name]) if d.kind == "log" else labels[name]
            return (value - low) / (high - low)

        shares = (0, 0.25, 0.5, 0.75, 1)
        middle = [low + share * (high - low) for share in shares]
        return height, [
            (s, f"{math.exp(v) if d.kind == 'log' else v:.2g}") for s, v in zip(shares, middle, strict=True)
        ]
    found = {str(labels[name]): labels[name] for labels in drawn if name in labels}
    numbers = all(isinstance(v, int | float) for v in found.values())
    names = sorted(found, key=(lambda text: found[text]) if numbers else None)
    places = {text: i / max(1, len(names) - 1) for i, text in enumerate(names)}
    return lambda labels: places[str(labels[name])] if name in labels else UNUSED, [
        (at, text) for text, at in places.items()
    ]


def _finish(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=11)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _minimised(study: optuna.Study) -> bool:
    return study.direction == optuna.study.StudyDirection.MINIMIZE


def _value(trial: FrozenTrial) -> float:
    """Of a finished trial its value, of another the last that it reported."""
    value = trial.value
    if value is None and trial.last_step is not None:
        value = trial.intermediate_values[trial.last_step]
    return float("nan") if value is None else value


def write_text(path: Path, text: str) -> None:
    checkpoint.replace_atomically(path, lambda temporary: temporary.write_text(text))

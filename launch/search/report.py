"""What a sweep leaves on disk: trials.csv, best.yaml, report.md, and its plots, which Optuna draws."""

import csv
import inspect
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from matplotlib import pyplot, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots

from launch.search.journal import records
from launch.search.plan import DIRECTIONS, Plan
from launch.search.results import write_text
from launch.search.seeds import Setting, best, best_first
from simclr_ddp.config import options
from simclr_ddp.plots.png import WIDTH, save
from simclr_ddp.system import console

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "ended early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "not done",
}
LEAST = 8  # finished trials that importances need
GOOD = 0.25  # share of them that counts as good
SHOWN = 10  # rows of the report's table


def write(study: optuna.Study, plan: Plan, metric: str, final: bool = False) -> Setting | None:
    """Write trials.csv and best.yaml and, if `final`, the report and its plots; returns the best settings."""
    trials, folder = records(study), plan.sweep_dir
    write_text(folder / "trials.csv", table(trials, plan, metric))
    found = best(trials, plan, metric)
    if found is not None:
        write_text(folder / "best.yaml", best_config(found, plan, metric))
    if final:
        weights, why_not = importances(study, metric)
        figures = {
            "history": drawn_by_optuna(plots.plot_optimization_history, study, target_name=metric),
            "curves": drawn_by_optuna(plots.plot_intermediate_values, study),
            "parallel": None,
            "importances": None,
        }
        if found is not None:
            figures["parallel"] = drawn_by_optuna(plots.plot_parallel_coordinate, study, target_name=metric)
        if weights:
            options = {"evaluator": _evaluator(), "params": list(weights), "target_name": metric}
            figures["importances"] = drawn_by_optuna(plots.plot_param_importances, study, **options)
        else:
            console.say(why_not)
        for name, figure in figures.items():
            if figure is not None:
                save(figure, folder / f"{name}.png")
            else:
                (folder / f"{name}.png").unlink(missing_ok=True)
        drawn = [name for name, figure in figures.items() if figure is not None]
        write_text(folder / "report.md", report(trials, found, plan, metric, drawn, why_not))
        console.say(f"all trials: {folder}/trials.csv, the best {SHOWN}: {folder}/report.md")
        if found is not None:
            console.say(f"best: trial {found.trial.number}, {metric} {found.shown}; its config: {folder}/best.yaml")
    return found


def best_config(found: Setting, plan: Plan, metric: str) -> str:
    number = found.trial.number
    head = f"# Trial {number} of the sweep {plan.name}: {metric} {found.shown}.\n#\n"
    command = f"# Command: python -m simclr_ddp.pretrain {plan.sweep_dir}/best.yaml\n"
    return head + command + options.to_yaml(plan.settings(number, name=f"{plan.name}-best", run_dir=""))


def table(trials: list[FrozenTrial], plan: Plan, metric: str) -> str:
    """One line per trial, as CSV; keys that a trial lacks are empty."""
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
    trials: list[FrozenTrial], found: Setting | None, plan: Plan, metric: str, plots: list[str], note: str
) -> str:
    """Markdown: how many trials ended how, the best of them, the plots, and a note about one that is missing."""
    counts = {name: sum(t.state == state for t in trials) for state, name in STATES.items()}
    ended = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    lines = [f"# Sweep {plan.name}", "", f"{len(trials)} of {plan.count} trials begun: {ended}.", ""]
    if found is not None:
        lines += [f"Best: trial {found.trial.number}, {metric} {found.shown} (`best.yaml`).", ""]
        lines += _means(trials, plan, metric)
    columns = ["trial", metric, *plan.names]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for t in _best_first([t for t in trials if t.state == TrialState.COMPLETE], metric)[:SHOWN]:
        labels = plan.drawn(t.number)[0]
        cells = [str(t.number), f"{_value(t):.4f}", *(str(labels.get(name, "")) for name in plan.names)]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [t for t in trials if t.state == TrialState.FAIL]
    if failed:
        lines += ["", "Failed:", "", *(f"- trial {t.number}: {t.user_attrs.get('error', '')}" for t in failed)]
    lines += ["", *(f"![{name}]({name}.png)" for name in plots)]
    lines += ["", f"{note[0].upper()}{note[1:]}."] if note else []
    return "\n".join(lines) + "\n"


def _means(trials: list[FrozenTrial], plan: Plan, metric: str) -> list[str]:
    """A table of the best settings, if several seeds share them."""
    settings = best_first(trials, plan, metric)
    if all(len(s.values) == 1 for s in settings):
        return []
    names = [name for name in plan.names if name != "seed"]
    lines = [f"| {' | '.join([*names, f'mean {metric}'])} |", "|---" * (len(names) + 1) + "|"]
    for s in settings[:SHOWN]:
        labels = plan.drawn(s.trial.number)[0]
        lines.append(f"| {' | '.join([*(str(labels.get(name, '')) for name in names), s.shown])} |")
    return [*lines, ""]


def importances(study: optuna.Study, metric: str) -> tuple[dict[str, float], str]:
    """(how much each key decides whether a finished trial is among the good ones, why that is not known).

    One of the two is empty. Before version 5 Optuna leaves out keys that some trials lack.
    """
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < LEAST:
        return {}, f"no importances: they need {LEAST} finished trials, and there are {len(done)}"
    if len({t.value for t in done}) < 2:
        return {}, f"no importances: all finished trials have the same {metric}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about keys that few trials have
        found = get_param_importances(study, evaluator=_evaluator())
    weights = {key: weight for key, weight in found.items() if math.isfinite(weight)}
    return weights, "" if weights else "no importances: the finished trials differ in no key that all of them have"


def _evaluator() -> PedAnovaImportanceEvaluator:
    known = inspect.signature(PedAnovaImportanceEvaluator).parameters
    share: dict[str, Any] = {"target_quantile" if "target_quantile" in known else "baseline_quantile": GOOD}  # 4.0-4.6
    return PedAnovaImportanceEvaluator(**share)


def drawn_by_optuna(plot: Callable[..., Axes], study: optuna.Study, **options: Any) -> Figure:
    """A plot of optuna.visualization, without its changes to matplotlib's settings."""
    with rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these plots are marked as experimental
        axes = plot(study, **options)
        figure, legend = axes.figure, axes.get_legend()
        assert isinstance(figure, Figure)
        pyplot.close(figure)
    if legend is not None and len(legend.get_texts()) > 20:  # one per trial
        legend.remove()
    figure.set_size_inches(WIDTH, 4)
    if plot is plots.plot_parallel_coordinate:
        figure.subplots_adjust(bottom=0.35)  # a constrained layout fails on its twin axes
    else:
        figure.set_layout_engine("constrained")
    return figure


def _best_first(trials: list[FrozenTrial], metric: str) -> list[FrozenTrial]:
    sign = 1 if DIRECTIONS[metric] == "minimize" else -1
    return sorted(trials, key=lambda t: (sign * _value(t), t.number))


def _value(trial: FrozenTrial) -> float:
    """The value of a finished trial; of another the last that it reported."""
    value = trial.value
    if value is None and trial.last_step is not None:
        value = trial.intermediate_values[trial.last_step]
    return float("nan") if value is None else value

"""Compare runs in a table: `python -m launch.summary RUN... [rows=loss.kernel columns=optim.epochs out=DIR]`

RUN is a run directory, or a folder that holds some, such as that of a sweep. Prints a Markdown table by the settings in
which the runs differ, with mean ± standard deviation where runs of several seeds share a cell; with out=DIR also writes
summary.md, summary.csv (one line per run) and summary.png. Runs that are unfinished or damaged are left out of the
table and listed below it.

Of the evaluations of a run, only those of its last step on its test images count, and only evaluations on the same
images with the same settings are compared. All others are listed below the table.
"""

import csv
import difflib
import io
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from launch.search.results import SETTINGS, epoch_values, run_error, write_text
from launch.search.space import OWN, label_of
from simclr_ddp.config import command, options, schema
from simclr_ddp.config.options import option
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.evaluation.report import metrics
from simclr_ddp.plots.png import WIDTH, save
from simclr_ddp.runs import evaluations
from simclr_ddp.runs.evaluations import Evaluation
from simclr_ddp.runs.metrics import complete_lines
from simclr_ddp.system import console
from simclr_ddp.system.errors import one_line

MAIN = {"top1", "mse"}  # the metrics that are shown of an evaluation that has one, or else all
LINEAR = ("linear_top1", "linear_mse")
TRAINING = ("probe_top1", "contrastive_top1", "loss", "images_per_second")  # in metrics.jsonl
MONITORED = "monitor_"  # beginning of the others there, of runs with a monitor


@dataclass
class Summary:
    rows: str = option(
        "", "keys of the rows, separated by commas; empty is those in which the runs differ, without columns and seed"
    )
    columns: str = option("", "keys of the columns; empty is, if several keys differ, the one with the fewest values")
    value: str = option(
        "",
        "metric in the cells: linear_top1, linear_mse, knn_top1 and so on of the compared evaluations, or "
        f"{', '.join(TRAINING)}, or monitor_rankme and so on of monitored runs; empty is the first that every run has",
    )
    evaluation: str = option(
        "",
        "part of the name of the evaluations to compare: their data or protocol, such as knn; empty is those that most "
        "runs have",
    )
    out: str = option("", "folder for summary.md, summary.csv and summary.png; empty is to print only", path=True)


@dataclass
class Run:
    """The content of a run directory."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)  # dotted keys
    values: dict[str, float] = field(default_factory=dict)
    epoch: float = 0.0
    fault: str = ""  # why it is left out of the table
    evaluations: list[Evaluation] = field(default_factory=list)  # of its last step on its test images
    measured: str = ""  # name of data and protocol of the evaluation in `values`
    left_out: list[str] = field(default_factory=list)  # evaluations that aren't shown, with the reasons


@dataclass
class Pivot:
    value: str
    rows: list[str]  # keys
    columns: list[str]
    cells: dict[tuple, dict[tuple, list[Run]]]  # of finished runs, by the values of those keys
    mixed: list[str]  # other keys, except the seed, in which runs of a cell differ


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    folders = [a for a in arguments if not a.startswith("-") and not command.is_option(a, Summary)]
    rest = [a for a in arguments if a not in folders]
    return command.run(lambda settings: summarise(settings, folders), Summary, "RUN...", __doc__ or "", rest)


def summarise(settings: Summary, folders: list[str]) -> None:
    runs = [read_run(folder, settings.evaluation) for folder in find_runs(folders)]
    choose_evaluations(runs, settings.evaluation)
    table = pivot(runs, settings)
    text = markdown(table, runs)
    console.say(text)
    if settings.out:
        out = Path(settings.out)
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (("summary.md", text + "\n"), ("summary.csv", lines(runs))):
            write_text(out / name, content)
            console.say(f"wrote {out / name}")
        if table.cells:
            save(chart(table), out / "summary.png")


def find_runs(folders: list[str]) -> list[Path]:
    """The given run directories, and those in the other given folders. Raises ValueError if there are none."""
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: not a folder; give run directories, or folders that hold some")
        names = () if _is_run(folder) else ("config.yaml", SETTINGS)
        inside = {path.parent for name in names for path in folder.glob(f"**/{name}")}
        inside = {run for run in inside if not inside & set(run.parents)}  # without the copies that jobs keep in runs
        found |= dict.fromkeys(sorted(inside) or [folder])
    if not found:
        raise ValueError("no runs given; write python -m launch.summary runs/a runs/b, or the folder of a sweep")
    return list(found)


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", SETTINGS, "metrics.jsonl"))


def read_run(folder: Path, evaluation: str = "") -> Run:
    """Everything that can be read of a run; what can't be read is its fault.

    evaluation  part of the name of evaluations that count even if they are on other test images than the run's
    """
    from simclr_ddp.runs import directory  # here, since it imports torch

    found, faults = Run(folder), []
    try:
        if not (folder / "config.yaml").exists() and (folder / SETTINGS).exists():  # a trial that has not begun
            settings = options.build(Pretrain, [(str(folder / SETTINGS), options.read_yaml(folder / SETTINGS))])
        else:
            settings = directory.read_settings(folder)
        found.settings = {k: label_of(v) for k, v in options.dotted(settings).items()}
    except (ValueError, OSError) as error:
        faults.append(f"damaged: {one_line(error)}")
    file, step = folder / "metrics.jsonl", 0
    try:
        written, torn = complete_lines(file)  # read once: a run that trains appends to it
        if torn:
            faults.append(f"damaged: {torn} lines of metrics.jsonl can't be read")
        found.values, found.epoch = _values(written), max((line["epoch"] for line in written), default=0.0)
        step = max((line["step"] for line in written), default=0)
        infinite = [f"{name} is {value}" for name, value in found.values.items() if not math.isfinite(value)]
    except (ValueError, OverflowError, OSError, KeyError, TypeError, AttributeError) as error:
        faults.append(f"damaged: {type(error).__name__} {error} in metrics.jsonl")
    else:
        if found.settings and not _finished(found, step):
            why = run_error(folder)
            faults.append(f"not finished: epoch {found.epoch:.2f} of {_length(found)}{f', {why}' if why else ''}")
        faults += infinite
    if found.settings:
        train, test = found.settings["data.train"], "" if evaluation else found.settings["data.test"]
        try:
            found.evaluations, found.left_out = evaluations.of_run(folder, step=step, train=train, test=test)
        except (ValueError, OSError) as error:
            faults.append(f"damaged: {one_line(error)}")
    found.fault = "; ".join(faults)
    return found


def choose_evaluations(runs: list[Run], wanted: str) -> None:
    """Take the metrics of one data set and protocol.

    It is one that has an accuracy or error, if there is such a one, and that most runs have; of equals a linear
    evaluation, then the one measured last.
    """
    runs = [r for r in runs if not r.fault]
    having: dict[str, list[Evaluation]] = {}
    for evaluation in (e for r in runs for e in r.evaluations if wanted in e.measured):
        having.setdefault(evaluation.key, []).append(evaluation)

    def rank(key: str) -> tuple[bool, int, bool, int]:
        files = {e.path.parent: e.path.stat().st_mtime_ns for e in having[key]}
        first = having[key][0]
        return not MAIN.isdisjoint(first.trained), len(files), first.name == "linear", max(files.values())

    chosen = max(having, key=rank, default="")
    for r in runs:
        for evaluation in r.evaluations:
            if evaluation.key == chosen:
                r.measured = evaluation.measured
                found = metrics(evaluation.trained)
                shown = MAIN & found.keys() or found.keys()
                r.values |= {f"{evaluation.name}_{k}": value for k, value in found.items() if k in shown}
            else:
                way = f"evaluation={evaluation.measured} shows it"
                r.left_out.append(f"{evaluation.path}: other images or settings than those shown; {way}")


def pivot(runs: list[Run], settings: Summary) -> Pivot:
    """The finished runs by the keys in which they differ. Raises ValueError for a key that is not an option."""
    finished = [r for r in runs if not r.fault]
    known = options.options(Pretrain)
    asked = {name: [k.strip() for k in text.split(",") if k.strip()] for name, text in vars(settings).items()}
    for key in asked["rows"] + asked["columns"]:
        if key not in known:
            _refuse(key, runs)
    deciding = schema.result_keys(Pretrain())
    differing = {
        key: found
        for key in known
        if key not in (*OWN, "seed") and key in deciding
        if len(found := {r.settings[key] for r in runs if r.settings}) > 1
    }
    columns, rows = asked["columns"], asked["rows"]
    left = [key for key in differing if key not in rows + columns]
    if not columns and not rows and len(left) > 1:
        fewest = min(left, key=lambda key: len(differing[key]))
        if len(differing[fewest]) <= 6:
            columns = [fewest]
    rows = rows or [key for key in left if key not in columns]
    names = value_names(runs)
    has = [name for name in names if finished and all(name in r.values for r in finished)]
    value = settings.value or (has[0] if has else "loss")
    if value not in names:
        near = difflib.get_close_matches(value, names, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"
        raise ValueError(f"value={value}: unknown value; {hint}")
    cells: dict[tuple, dict[tuple, list[Run]]] = {}
    for r in finished:
        row = tuple(r.settings[key] for key in rows)
        cells.setdefault(row, {}).setdefault(tuple(r.settings[key] for key in columns), []).append(r)
    shared = [some for cell in cells.values() for some in cell.values()]
    mixed = [key for key in differing if any(len({r.settings[key] for r in some}) > 1 for some in shared)]
    return Pivot(value, rows, columns, cells, mixed)


def value_names(runs: list[Run]) -> list[str]:
    """Names of the metrics that a cell can show: first those of evaluations, linear ones before all others."""
    other = dict.fromkeys(name for r in runs for name in r.values if name not in (*LINEAR, *TRAINING))
    monitored = [name for name in other if name.startswith(MONITORED)]
    return [*LINEAR, *(name for name in other if name not in monitored), *TRAINING, *monitored]


def _refuse(key: str, runs: list[Run]) -> None:
    """ValueError for a key that is not an option, such as an axis of a grid: similar options, and keys that differ."""
    keys = ", ".join(_differing(runs))
    try:
        options.checked(Pretrain, "rows or columns", key, None)
    except ValueError as error:
        raise ValueError(f"{error}{f'; the runs differ in {keys}' if keys else ''}") from None


def _differing(runs: list[Run]) -> list[str]:
    settings = [r.settings for r in runs if r.settings]
    return [k for k in (settings or [{}])[0] if k not in OWN and len({s[k] for s in settings}) > 1]


def markdown(table: Pivot, runs: list[Run]) -> str:
    columns = _sorted({column for cell in table.cells.values() for column in cell})
    by = " by " + ", ".join(table.rows + table.columns) if table.rows + table.columns else ""
    text = [f"{table.value}{by}; {sum(not r.fault for r in runs)} of {len(runs)} runs", ""]
    finished = [r for r in runs if not r.fault]
    if table.value not in TRAINING and not table.value.startswith(MONITORED):
        text += [*_about_evaluation(finished), ""]
    if table.cells:
        head = [*(table.rows or ["runs"]), *(_name(table.columns, column) or table.value for column in columns)]
        text += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in _sorted(table.cells):
        shown = [cell(table.cells[row].get(column, []), table.value) for column in columns]
        text.append(f"| {' | '.join([*([str(v) for v in row] or ['all']), *shown])} |")
    if table.mixed:
        keys = ",".join(table.mixed)
        text += ["", f"Runs of a cell also differ in {', '.join(table.mixed)}; rows={keys} shows them."]
    names = value_names(runs)
    for name in names[: names.index(table.value)]:
        if count := sum(name in r.values for r in finished):
            text += ["", f"{name} is known of {count} of {len(finished)} runs; value={name} shows it."]
    left_out = [f"{r.folder}: {r.fault}" for r in runs if r.fault] + [line for r in runs for line in r.left_out]
    if left_out:
        text += ["", "Left out:", "", *(f"- {line}" for line in left_out)]
    return "\n".join(text)


def _about_evaluation(runs: list[Run]) -> list[str]:
    """What the evaluation measured that the table shows."""
    shown = [e for r in runs for e in r.evaluations if e.measured == r.measured]
    if not shown:
        return ["no evaluation of the last step on the test images"]
    record = shown[0].record
    test, protocol = record["test"], evaluations.protocol(record)
    settings = ", ".join(f"{k}={'run' if k == 'size' and not v else v}" for k, v in protocol.items())
    return [f"Measured on {test['images']:,} images of {test['source']} ({shown[0].measured}): {settings}."]


def cell(runs: list[Run], value: str) -> str:
    """Mean ± standard deviation (number of runs), or the value of a single run."""
    numbers = [r.values[value] for r in runs if value in r.values]
    without = f" ({len(runs) - len(numbers)} without)" if len(numbers) < len(runs) else ""
    if len(numbers) < 2:
        return f"{numbers[0]:.4g}{without}" if numbers else without.strip()
    return f"{statistics.mean(numbers):.4g} ± {statistics.stdev(numbers):.2g} ({len(numbers)}){without}"


def lines(runs: list[Run]) -> str:
    """One line per run, as CSV: the settings in which they differ, all values, and its fault."""
    keys, names = _differing(runs), value_names(runs)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", *keys, "epoch", *names, "evaluation", "fault"])
    for r in runs:
        known = [r.settings.get(key, "") for key in keys]
        values = (r.values.get(name, "") for name in names)
        table.writerow([r.folder, *known, r.epoch, *values, r.measured, r.fault])
    return text.getvalue()


def chart(table: Pivot) -> Figure:
    """One line per row of the table, with a dot per column and a bar for the standard deviation."""
    rows = _sorted(table.cells)
    figure = Figure(figsize=(WIDTH, min(40, 1.2 + 0.35 * len(rows))), layout="constrained")
    axis = figure.subplots()
    columns = _sorted({column for found in table.cells.values() for column in found})
    for i, column in enumerate(columns):
        shift = 0.12 * (i - (len(columns) - 1) / 2)
        found = [(y, [r.values[table.value] for r in table.cells[row].get(column, []) if table.value in r.values])
                 for y, row in enumerate(rows)]  # fmt: skip
        points = [(statistics.mean(v), y + shift, statistics.stdev(v) if len(v) > 1 else 0) for y, v in found if v]
        if points:
            x, height, deviation = zip(*points, strict=True)
            axis.errorbar(x, height, xerr=deviation, fmt="o", capsize=3, label=_name(table.columns, column) or None)
    axis.set_yticks(range(len(rows)), [", ".join(map(str, row)) or "all" for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel=table.value, ylabel=", ".join(table.rows))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if table.columns:
        axis.legend(fontsize=9, frameon=False)
    return figure


def _values(written: list[dict[str, Any]]) -> dict[str, float]:
    """Those of the last complete epoch, or of the last line without one."""
    found: dict[str, float] = {}
    monitored = sorted({name for line in written for name in line if name.startswith(MONITORED)})
    for name in (*TRAINING, *monitored):
        epochs = epoch_values(written, name)
        having = [line[name] for line in written if name in line]
        if having:
            found[name] = epochs[max(epochs)] if epochs else having[-1]
    return found


def _finished(found: Run, step: int) -> bool:
    steps, epochs = found.settings["optim.steps"], found.settings["optim.epochs"]
    return step >= steps if steps else found.epoch >= epochs - 1e-9


def _length(found: Run) -> str:
    steps = found.settings["optim.steps"]
    return f"a run of {steps} steps" if steps else str(found.settings["optim.epochs"])


def _name(keys: list[str], values: tuple) -> str:
    return ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))


def _sorted(found: Any) -> list[tuple]:
    """Numbers in ascending order, then texts."""
    return sorted(
        found, key=lambda row: [(isinstance(v, str), v if isinstance(v, int | float) else 0, str(v)) for v in row]
    )


if __name__ == "__main__":
    sys.exit(main())

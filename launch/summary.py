"""Runs side by side: `python -m launch.summary RUN... [rows=loss.kernel columns=optim.epochs value=probe_top1 out=DIR]`

RUN is a run directory, or a folder that holds some, such as that of a sweep. Prints a table of the settings in which
they differ, mean ± deviation where runs of several seeds share a cell, as Markdown; with out=DIR writes summary.md,
summary.csv (a line a run) and summary.png. Runs that have not finished, or are damaged, count in no mean; they are
listed below the table.
"""

import csv
import io
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from launch.space import label_of
from launch.trials import SETTINGS, epoch_values, run_error
from simclr_ddp import checkpoint, cli, config, run
from simclr_ddp.config import Pretrain, option
from simclr_ddp.figures import WIDTH, save
from simclr_ddp.metrics import read_metrics

VALUES = ("linear_top1", "linear_mse", "probe_top1", "contrastive_top1", "loss", "images_per_second")  # the first is it
OWN = ("name", "run_dir")


@dataclass
class Summary:
    rows: str = option(
        "", "keys, with commas between them; empty: all in which the runs differ, but the columns and seed"
    )
    columns: str = option("", "keys; empty: of several in which the runs differ the one with the fewest values")
    value: str = option("", "of a cell; empty: the first of these that a run has", ("", *VALUES))
    out: str = option("", "folder for summary.md, summary.csv and summary.png; empty: only printed")


@dataclass
class Run:
    """What a run directory says."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)  # dotted keys
    values: dict[str, float] = field(default_factory=dict)
    epoch: float = 0.0
    fault: str = ""  # why it counts in no mean


@dataclass
class Pivot:
    value: str
    rows: list[str]  # keys
    columns: list[str]
    cells: dict[tuple, dict[tuple, list[Run]]]  # of finished runs, by the values of those keys
    mixed: list[str]  # other keys, the seed apart, in which runs of a cell differ


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    folders = [a for a in arguments if not a.startswith("-") and "=" not in a]
    rest = [a for a in arguments if a not in folders]
    return cli.run(lambda settings: summarise(settings, folders), Summary, "RUN...", __doc__ or "", rest)


def summarise(settings: Summary, folders: list[str]) -> None:
    runs = [read_run(folder) for folder in find_runs(folders)]
    table = pivot(runs, settings)
    text = markdown(table, runs)
    cli.say(text)
    if settings.out:
        out = Path(settings.out)
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (("summary.md", text + "\n"), ("summary.csv", lines(runs))):
            _write_text(out / name, content)
            cli.say(f"wrote {out / name}")
        if table.cells:
            save(chart(table), out / "summary.png")


def find_runs(folders: list[str]) -> list[Path]:
    """The run directories that are named, and those in folders that are none. Raises ValueError if there are none."""
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: run directories, or folders that hold some, are wanted")
        names = () if _is_run(folder) else ("config.yaml", SETTINGS)
        inside = {path.parent for name in names for path in folder.glob(f"**/{name}")}
        inside = {run for run in inside if not inside & set(run.parents)}  # a job keeps copies in its run directory
        found |= dict.fromkeys(sorted(inside) or [folder])
    if not found:
        raise ValueError("no runs are named: python -m launch.summary runs/a runs/b, or the folder of a sweep")
    return list(found)


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", SETTINGS, "metrics.jsonl"))


def read_run(folder: Path) -> Run:
    """Whatever can be read of it; what can't is its fault."""
    found, faults = Run(folder), []
    try:
        if not (folder / "config.yaml").exists() and (folder / SETTINGS).exists():  # a trial that has not begun
            settings = config.build(Pretrain, [(str(folder / SETTINGS), config.read_yaml(folder / SETTINGS))])
        else:
            settings = run.read_settings(folder)
        found.settings = {k: label_of(v) for k, v in config.dotted(settings).items()}
    except (ValueError, OSError) as error:
        faults.append(f"damaged: {' '.join(str(error).split())}")
    file = folder / "metrics.jsonl"
    written = read_metrics(file) if file.exists() else []
    if file.exists() and (torn := len(file.read_bytes().splitlines()) - len(written)):
        faults.append(f"damaged: {torn} lines of metrics.jsonl can't be read")
    try:
        found.values, found.epoch = _values(written), max((line["epoch"] for line in written), default=0.0)
        found.values |= _evaluation(folder / "linear_eval.json")
        step = max((line["step"] for line in written), default=0)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        faults.append(f"damaged: {type(error).__name__} {error} in metrics.jsonl or linear_eval.json")
    else:
        if found.settings and not _finished(found, step):
            said = run_error(folder)
            faults.append(f"not finished: epoch {found.epoch:.2f} of {_length(found)}{f', {said}' if said else ''}")
    found.fault = "; ".join(faults)
    return found


def pivot(runs: list[Run], settings: Summary) -> Pivot:
    """The finished runs by the keys in which they differ. Raises ValueError for a key that is no option."""
    whole = [r for r in runs if not r.fault]
    known = config.options(Pretrain)
    asked = {name: [k.strip() for k in text.split(",") if k.strip()] for name, text in vars(settings).items()}
    for key in asked["rows"] + asked["columns"]:
        if key not in known:
            _refuse(key, runs)
    deciding = config.result_keys(Pretrain())
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
    has = [name for name in VALUES if any(name in r.values for r in whole)]
    value = settings.value or (has[0] if has else "loss")
    cells: dict[tuple, dict[tuple, list[Run]]] = {}
    for r in whole:
        row = tuple(r.settings[key] for key in rows)
        cells.setdefault(row, {}).setdefault(tuple(r.settings[key] for key in columns), []).append(r)
    shared = [some for cell in cells.values() for some in cell.values()]
    mixed = [key for key in differing if any(len({r.settings[key] for r in some}) > 1 for some in shared)]
    return Pivot(value, rows, columns, cells, mixed)


def _refuse(key: str, runs: list[Run]) -> None:
    """ValueError for a key that is no option: which is near, and which there are, as an axis of a grid is none."""
    keys = ", ".join(_differing(runs))
    try:
        config.checked(Pretrain, "rows or columns", key, None)
    except ValueError as error:
        raise ValueError(f"{error}{f'; the runs differ in {keys}' if keys else ''}") from None


def _differing(runs: list[Run]) -> list[str]:
    settings = [r.settings for r in runs if r.settings]
    return [k for k in (settings or [{}])[0] if k not in OWN and len({s[k] for s in settings}) > 1]


def markdown(table: Pivot, runs: list[Run]) -> str:
    columns = _sorted({column for cell in table.cells.values() for column in cell})
    by = " by " + ", ".join(table.rows + table.columns) if table.rows + table.columns else ""
    text = [f"{table.value}{by}; {sum(not r.fault for r in runs)} of {len(runs)} runs", ""]
    if table.cells:
        head = [*(table.rows or ["runs"]), *(_name(table.columns, column) or table.value for column in columns)]
        text += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in _sorted(table.cells):
        shown = [cell(table.cells[row].get(column, []), table.value) for column in columns]
        text.append(f"| {' | '.join([*([str(v) for v in row] or ['all']), *shown])} |")
    if table.mixed:
        text += [
            "",
            f"Runs of a cell differ in {', '.join(table.mixed)}, too: rows={','.join(table.mixed)} shows them.",
        ]
    faulty = [r for r in runs if r.fault]
    if faulty:
        text += ["", "In no mean:", "", *(f"- {r.folder}: {r.fault}" for r in faulty)]
    return "\n".join(text)


def cell(runs: list[Run], value: str) -> str:
    """Mean ± deviation and, where it is not one, the number of runs."""
    numbers = [r.values[value] for r in runs if value in r.values]
    without = f" ({len(runs) - len(numbers)} without)" if len(numbers) < len(runs) else ""
    if len(numbers) < 2:
        return f"{numbers[0]:.4g}{without}" if numbers else without.strip()
    return f"{statistics.mean(numbers):.4g} ± {statistics.stdev(numbers):.2g} ({len(numbers)}){without}"


def lines(runs: list[Run]) -> str:
    """A line a run, as CSV: the settings in which they differ, every value, and what is wrong with it."""
    keys = _differing(runs)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", *keys, "epoch", *VALUES, "fault"])
    for r in runs:
        known = [r.settings.get(key, "") for key in keys]
        table.writerow([r.folder, *known, r.epoch, *(r.values.get(name, "") for name in VALUES), r.fault])
    return text.getvalue()


def chart(table: Pivot) -> Figure:
    """A row of the table a line, a dot for each column, its deviation as a bar."""
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


def _write_text(path: Path, text: str) -> None:
    checkpoint.replace_atomically(path, lambda temporary: temporary.write_text(text))


def _values(written: list[dict[str, Any]]) -> dict[str, float]:
    """The last whole epoch's, or the last line's where there is none."""
    found: dict[str, float] = {}
    for name in VALUES:
        epochs = epoch_values(written, name)
        having = [line[name] for line in written if name in line]
        if having:
            found[name] = epochs[max(epochs)] if epochs else having[-1]
    return found


def _evaluation(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    trained = json.loads(path.read_text())["results"]["trained"]
    return {f"linear_{name}": trained[name] for name in ("top1", "mse") if name in trained}


def _finished(found: Run, step: int) -> bool:
    steps, epochs = found.settings["optim.steps"], found.settings["optim.epochs"]
    return step >= steps if steps else found.epoch >= epochs - 1e-9


def _length(found: Run) -> str:
    steps = found.settings["optim.steps"]
    return f"a run of {steps} steps" if steps else str(found.settings["optim.epochs"])


def _name(keys: list[str], values: tuple) -> str:
    return ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))


def _sorted(found: Any) -> list[tuple]:
    """By number where they are numbers, else by text."""
    return sorted(
        found, key=lambda row: [(isinstance(v, str), v if isinstance(v, int | float) else 0, str(v)) for v in row]
    )


if __name__ == "__main__":
    sys.exit(main())

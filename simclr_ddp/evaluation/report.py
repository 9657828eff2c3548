"""A report of evaluations: columns are groups of runs, rows are metrics; as Markdown and LaTeX.

`build` gathers everything in one dictionary of plain values, which report.json holds; both texts are written from it
alone. A column is a run, or a group of runs of several seeds, with mean and deviation over them.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from simclr_ddp.evaluation import comparison
from simclr_ddp.evaluation.significance import mean_and_deviation
from simclr_ddp.runs import evaluations
from simclr_ddp.runs.evaluations import Evaluation

# What results hold besides metrics: how a model was fitted.
FITTING = ("strength", "iterations", "gradient", "converged", "features")
TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "mse": "mean squared error",
    "rankme": "RankMe",
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "alpha_req": "alpha-ReQ",
    "lidar": "LiDAR",
}
POINTS = " points"
PERCENT = re.compile(r"top\d+|mean_per_class|.*_top\d+")


class Group(NamedTuple):
    """A column of the report."""

    name: str
    runs: list[str]
    evaluations: list[list[Evaluation]]  # of each run


def metrics(results: dict[str, Any]) -> dict[str, float]:
    """Numbers in the results of one encoder that are metrics; those of a mapping are named mse_of.radius and so on."""
    found: dict[str, float] = {}
    for key, value in results.items():
        if key in FITTING or key.endswith(("_seconds", "_interval")) or key.startswith("validation"):
            continue
        if isinstance(value, dict):
            found |= {f"{key}.{name}": number for name, number in metrics(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[key] = float(value)
    return found


def build(groups: list[Group], notes: list[str]) -> dict[str, Any]:
    """Everything that the report says, as plain values; `notes` are sentences about what is missing."""
    first: dict[str, Evaluation] = {}
    for group in groups:
        for of_run in group.evaluations:
            for evaluation in of_run:
                first.setdefault(evaluation.key, evaluation)
    compared, faults = comparison.compare([(g.name, g.evaluations) for g in groups], metrics)
    order = sorted(first, key=lambda key: (first[key].name != "linear", first[key].measured))
    return {
        "columns": [{"name": g.name, "runs": g.runs} for g in groups],
        "evaluations": [_section(key, first[key], groups) for key in order],
        "comparisons": compared,
        "notes": [*notes, *faults],
    }


def _section(key: str, example: Evaluation, groups: list[Group]) -> dict[str, Any]:
    """All metrics of one protocol on one data set."""
    having = [[next((e for e in of_run if e.key == key), None) for of_run in g.evaluations] for g in groups]
    found = [[e for e in column if e is not None] for column in having]
    names = dict.fromkeys(name for column in found for e in column for name in metrics(e.trained))
    baseline = {name: value for e in found for one in e for name, value in _baseline(one).items()}
    return {
        "protocol": example.name,
        "data": describe_data(example.record),
        "settings": evaluations.protocol(example.record),
        "metrics": {name: [_cell(name, column) for column in found] for name in names},
        "predict_the_mean": baseline,
        "seconds": [_mean([e.record.get("seconds") for e in column]) for column in found],
    }


def describe_data(record: dict[str, Any]) -> str:
    """Name, split and size of the measured images."""
    test = record["test"]
    return f"{test['images']:,} {test.get('split', 'test')} images of {test['source'].rpartition('/')[2]}"


def _baseline(evaluation: Evaluation) -> dict[str, float]:
    return metrics(evaluation.record["results"].get("predict_the_mean", {}))


def _cell(name: str, column: list[Evaluation]) -> dict[str, Any] | None:
    """A metric of a group: its value, or mean and deviation, with that of the random encoder."""
    values = [metrics(e.trained)[name] for e in column if name in metrics(e.trained)]
    if not values:
        return None
    random = [metrics(e.record["results"].get("random", {})).get(name) for e in column]
    mean, deviation = mean_and_deviation(values)
    interval = column[0].trained.get(f"{name}_interval") if len(values) == 1 else None
    return {
        "values": values,
        "mean": mean,
        "deviation": None if math.isnan(deviation) else deviation,
        "interval": list(interval) if interval else None,
        "random": _mean(random),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def number(name: str, value: float) -> str:
    """A metric as it is printed: accuracies in percent."""
    return f"{value:.2%}" if PERCENT.fullmatch(name) else f"{value:.5g}"


def title(name: str) -> str:
    head, _, component = name.partition(".")
    text = TITLES.get(head.removesuffix("_of"), head.removesuffix("_of").replace("_", " "))
    return f"{text}, {component}" if component else text


def _value(name: str, cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    text = number(name, cell["mean"])
    if cell["interval"]:
        return f"{text} ({number(name, cell['interval'][0])} .. {number(name, cell['interval'][1])})"
    if cell["deviation"] is not None:
        return f"{text} ± {number(name, cell['deviation'])} ({len(cell['values'])})"
    return text


def _table(report: dict[str, Any], section: dict[str, Any]) -> list[list[str]]:
    """Rows of texts, the first of which is the head. Random encoders that are all equal have one column at the end."""
    every = section["metrics"].values()
    of_column = [[cells[i] and cells[i]["random"] for cells in every] for i in range(len(report["columns"]))]
    random = [any(value is not None for value in values) for values in of_column]
    shared = all(random) and all(values == of_column[0] for values in of_column)
    baseline = section["predict_the_mean"]
    rows = [["", *_beside([c["name"] for c in report["columns"]], ["random encoder"] * len(random), random, shared)]]
    for name, cells in section["metrics"].items():
        untrained = [None if cell is None else cell["random"] for cell in cells]
        texts = ["" if value is None else number(name, value) for value in untrained]
        rows.append([title(name), *_beside([_value(name, cell) for cell in cells], texts, random, shared)])
    seconds = ["" if value is None else f"{value:.1f}" for value in section["seconds"]]
    rows.append(["seconds", *_beside(seconds, [""] * len(random), random, shared)])
    if baseline:
        of_baseline = [number(name, baseline[name]) if name in baseline else "" for name in section["metrics"]]
        rows = [[*row, text] for row, text in zip(rows, ["predict the mean", *of_baseline, ""], strict=True)]
    return rows


def _beside(trained: list[str], random: list[str], shown: list[bool], shared: bool) -> list[str]:
    """Texts of the trained encoders, each followed by that of its random encoder, if it has one."""
    if shared:
        return [*trained, random[0]]
    pairs = zip(trained, random, shown, strict=True)
    return [text for one, other, has in pairs for text in ([one, other] if has else [one])]


def _comparisons(report: dict[str, Any]) -> list[list[str]]:
    rows = [["", "first", "second", "difference", "95 % interval", "p", "test"]]
    for c in report["comparisons"]:
        ends = " .. ".join(_difference(c["metric"], end).removesuffix(POINTS) for end in c["interval"])
        only = f", {c['only_a']} and {c['only_b']} images only one is right" if "only_a" in c else ""
        rows.append(
            [
                f"{c['protocol']}, {title(c['metric'])}, {c['data']}",
                f"{c['a']}: {number(c['metric'], c['mean_a'])}",
                f"{c['b']}: {number(c['metric'], c['mean_b'])}",
                _difference(c["metric"], c["difference"]),
                f"{ends}{POINTS if PERCENT.fullmatch(c['metric']) else ''}",
                f"{c['p']:.2g}",
                f"{c['test']}{only}",
            ]
        )
    return rows


def _difference(name: str, value: float) -> str:
    return f"{100 * value:+.2f}{POINTS}" if PERCENT.fullmatch(name) else f"{value:+.4g}"


def _settings(section: dict[str, Any]) -> str:
    found = ", ".join(f"{k}={'run' if k == 'size' and not v else v}" for k, v in section["settings"].items())
    return f"Settings: {found}." if found else ""


EXPLANATION = (
    "An interval in brackets is for 95 % and covers the choice of the images; a mean ± standard deviation (n) is over "
    "n runs. The random encoder is untrained and has the same architecture."
)
COMPARED = (
    "Differences are first minus second. Tests on the same images do not cover the variation between training runs; "
    "Welch's intervals are over the runs of both columns. No p-value is corrected for the number of comparisons."
)


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    text = [f"# Evaluation of {_list([c['name'] for c in report['columns']])}", "", EXPLANATION]
    for column in report["columns"]:
        if column["runs"] != [column["name"]]:
            text += ["", f"{column['name']}: {', '.join(column['runs'])}"]
    for section in report["evaluations"]:
        text += ["", f"## {section['protocol']}, {section['data']}", "", *_grid(_table(report, section))]
        text += ["", _settings(section)] if _settings(section) else []
    if report["comparisons"]:
        text += ["", "## Comparisons", "", *_grid(_comparisons(report)), "", COMPARED]
    if report["notes"]:
        text += ["", "## Notes", "", *(f"- {note}" for note in report["notes"])]
    return "\n".join(text) + "\n"


def _list(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _grid(rows: list[list[str]]) -> list[str]:
    """A Markdown table with columns of equal width, so that it reads well on a terminal."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def latex(report: dict[str, Any]) -> str:
    """The report as LaTeX tables, to be read by \\input; no package is needed."""
    text = ["% written by python -m simclr_ddp.evaluate", f"% {EXPLANATION}"]
    for section in report["evaluations"]:
        caption = f"{section['protocol']}, {section['data']}. {_settings(section)}"
        text += _tabular(_table(report, section), caption.strip())
    if report["comparisons"]:
        text += _tabular(_comparisons(report), COMPARED)
    return "\n".join(text) + "\n"


def _tabular(rows: list[list[str]], caption: str) -> list[str]:
    lines: Callable[[list[str]], str] = lambda row: " & ".join(map(escape, row)) + r" \\"  # noqa: E731
    return [
        "",
        r"\begin{table}",
        rf"\caption{{{escape(caption)}}}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}",
        r"\hline",
        lines(rows[0]),
        r"\hline",
        *map(lines, rows[1:]),
        r"\hline",
        r"\end{tabular}",
        r"\end{table}",
    ]


ESCAPES = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "\n": " ",
}


def escape(text: str) -> str:
    """Text in which LaTeX finds no command."""
    return "".join(ESCAPES.get(character, character) for character in text)

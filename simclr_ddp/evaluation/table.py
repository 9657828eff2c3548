"""Tables of evaluations, with one column per encoder or baseline."""

from collections.abc import Callable
from typing import Any

from simclr_ddp.data.dataset import Dataset
from simclr_ddp.evaluation import logistic
from simclr_ddp.evaluation.labels import absent_classes


def objective(convention: str, train: Dataset) -> str:
    """Description of the minimised objective."""
    loss = "cross-entropy" if train.has_classes else "squared error (mean of an image's numbers)"
    return logistic.CONVENTIONS[convention].format(loss=loss)


def headline(name: str, metrics: dict[str, Any]) -> str:
    """One line with the main metric of an encoder, printed as soon as it is known."""
    if metrics.get("validation_mean_per_class") is not None:
        return f"{name} encoder: test mean per class {metrics['mean_per_class']:.2%}"
    if "top1" in metrics:
        return f"{name} encoder: test top-1 {metrics['top1']:.2%}"
    return f"{name} encoder: test MSE {metrics['mse']:.5f}"


Row = tuple[str, list[str]]  # title, and a cell for each column
TITLES = {"trained": "trained", "random": "random encoder", "predict_the_mean": "predict the mean"}
PERCENT, NUMBER = "{:.2%}".format, "{:.5f}".format


def table(results: dict[str, dict[str, Any]], train: Dataset, test: Dataset, convention: str) -> str:
    """Format the metrics of a linear evaluation as a table with one column per encoder or baseline."""
    columns = list(results.values())
    rows = [_row(columns, f"strength ({convention})", "strength", "{:.3g}".format)]
    if train.has_classes:
        for title, metric in (("top-1", "top1"), ("mean per class", "mean_per_class")):
            rows.append(_row(columns, f"validation {title}", f"validation_{metric}", PERCENT))
        rows += _accuracies(columns)
    else:
        rows += [
            _row(columns, "validation MSE", "validation_mse", NUMBER),
            _row(columns, "test MSE", "mse", NUMBER),
            _row(columns, "  95 % interval", "mse_interval", lambda ends: f"{ends[0]:.5f} .. {ends[1]:.5f}"),
            *[(f"test MSE, {n}", [NUMBER(c["mse_of"][n]) for c in columns]) for n in columns[0]["mse_of"]],
        ]
    rows += [
        _row(columns, "relative gradient", "gradient", "{:.1e}".format),
        _row(columns, "seconds, forward", "forward_seconds", "{:.1f}".format),
        _row(columns, "seconds, solving", "solve_seconds", "{:.1f}".format),
    ]
    how = f"standardised features; minimum of {objective(convention, train)}, bias not penalised"
    return "\n".join([*_lines(results, rows), *_class_notes(train, test), f"({how})"])


def knn_table(results: dict[str, dict[str, Any]], train: Dataset, test: Dataset, how: str) -> str:
    """Format the metrics of k nearest neighbours as a table with one column per encoder."""
    columns = list(results.values())
    rows = [
        *_accuracies(columns),
        _row(columns, "seconds, forward", "forward_seconds", "{:.1f}".format),
        _row(columns, "seconds, neighbours", "neighbour_seconds", "{:.1f}".format),
    ]
    return "\n".join([*_lines(results, rows), *_class_notes(train, test), f"({how})"])


def transformations_table(results: dict[str, dict[str, Any]], chance: dict[str, float]) -> str:
    """Accuracy of each task from h and z, from h of an untrained encoder, and that of the most frequent answer."""
    columns = ("chance", "from h", "from z", "h, random encoder")
    lines = ["  ".join(["transformation".ljust(16), *(title.rjust(18) for title in columns)])]
    for task, share in chance.items():
        found = (share, *(results[name][f"{task}_{v}_top1"] for name, v in (("trained", "h"), ("trained", "z"))))
        cells = (*found, results["random"][f"{task}_h_top1"])
        lines.append("  ".join([task.ljust(16), *(PERCENT(cell).rjust(18) for cell in cells)]))
    return "\n".join(lines)


def _row(columns: list[dict[str, Any]], title: str, key: str, write: Callable[[Any], str]) -> Row:
    return title, ["" if c.get(key) is None else write(c[key]) for c in columns]


def _accuracies(columns: list[dict[str, Any]]) -> list[Row]:
    return [
        _row(columns, "test top-1", "top1", PERCENT),
        _row(columns, "  95 % interval", "top1_interval", lambda ends: f"{100 * ends[0]:.2f} .. {ends[1]:.2%}"),
        _row(columns, "test top-5", "top5", PERCENT),
        _row(columns, "test mean per class", "mean_per_class", PERCENT),
    ]


def _lines(results: dict[str, Any], rows: list[Row]) -> list[str]:
    rows = [("", [TITLES[name] for name in results]), *((title, cells) for title, cells in rows if any(cells))]
    width = max(len(title) for title, _ in rows)
    return ["  ".join([title.ljust(width), *(cell.rjust(18) for cell in cells)]).rstrip() for title, cells in rows]


def _class_notes(train: Dataset, test: Dataset) -> list[str]:
    if not train.has_classes:
        return []
    notes = []
    if train.class_count <= 5:
        notes.append(f"(no top-5: with {train.class_count} classes it is always 100 %)")
    absent = absent_classes(train, test)
    if absent:
        names = f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
        notes.append(
            f"(no test images of {len(absent)} of {train.class_count} classes, which count in no mean: {names})"
        )
    return notes

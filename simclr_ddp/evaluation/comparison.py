"""Comparisons of runs by their evaluations: on the same images for two runs, over the runs for two groups."""

from collections.abc import Callable
from typing import Any

import numpy as np

from simclr_ddp.evaluation import significance
from simclr_ddp.runs import evaluations
from simclr_ddp.runs.evaluations import Evaluation

Column = tuple[str, list[list[Evaluation]]]  # name, evaluations of each of its runs
TESTS = {
    "top1": "McNemar's exact test; bootstrap of the same images",
    "mse": "permutation and bootstrap of the same images",
    "welch": "Welch's t-test over runs",
}


def compare(
    columns: list[Column], metrics: Callable[[dict[str, Any]], dict[str, float]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare the first column with each other one; return what was found, and sentences on what can't be compared.

    metrics  numbers that are metrics, from the results of an encoder

    Two runs are compared on the same images, two groups of at least two runs by the metrics of each run. Only
    evaluations with equal images, protocol and settings are compared.
    """
    found: list[dict[str, Any]] = []
    faults: list[str] = []
    (name_a, of_a), *others = columns
    for name_b, of_b in others:
        shared = [e for e in of_a[0] if all(any(x.key == e.key for x in run) for run in (*of_a, *of_b))]
        before = len(found) + len(faults)
        for example in shared:
            runs_a, runs_b = ([next(e for e in run if e.key == example.key) for run in of] for of in (of_a, of_b))
            about = {"protocol": example.name, "data": _images(example), "a": name_a, "b": name_b}
            try:
                if len(runs_a) == len(runs_b) == 1:
                    rows = _paired(runs_a[0], runs_b[0])
                elif min(len(runs_a), len(runs_b)) > 1:
                    rows = _groups(runs_a, runs_b, metrics)
                else:
                    raise ValueError("one is a single run, and a deviation needs two; give runs of more seeds")
            except ValueError as error:
                faults.append(f"{example.name} of {name_a} and {name_b}: {error}")
            else:
                found += [about | row for row in rows]
        if len(found) + len(faults) == before:
            faults.append(_nothing_shared(columns[0], (name_b, of_b)))
    return found, list(dict.fromkeys(faults))


def _images(evaluation: Evaluation) -> str:
    return str(evaluation.record["test"]["source"]).rpartition("/")[2]


def _nothing_shared(a: Column, b: Column) -> str:
    """Why two columns have no evaluation in common: what each has."""

    def names(column: Column) -> str:
        every = [{e.measured for e in run} for run in column[1]]
        return ", ".join(sorted(set.intersection(*every))) or "none"

    return (
        f"{a[0]} and {b[0]} have no evaluation with accuracy or error of the same images with the same settings: "
        f"{a[0]} has {names(a)}, and "
        f"{b[0]} has {names(b)}; evaluate both alike, for example with protocols=linear"
    )


def _paired(a: Evaluation, b: Evaluation) -> list[dict[str, Any]]:
    """Compare two runs on the same images. Raises ValueError if their results per image are missing or differ."""
    if not {"top1", "mse"} & a.trained.keys():
        return []
    one, other = _per_image(a), _per_image(b)
    error = "squared_error" in one
    if one.keys() != other.keys() or not (error or np.array_equal(one["labels"], other["labels"])):
        raise ValueError(f"{a.path} and {b.path} have different labels per image; evaluate both again")
    metric = "mse" if error else "top1"
    of_a, of_b = (
        found["squared_error"] if error else found["predictions"] == found["labels"] for found in (one, other)
    )
    if len(of_a) != len(of_b):
        raise ValueError(f"{a.path} and {b.path} measured {len(of_a)} and {len(of_b)} images; evaluate both again")
    result = (significance.errors if error else significance.accuracies)(of_a, of_b)
    row = {
        "metric": metric,
        "test": TESTS[metric],
        "mean_a": float(of_a.mean()),
        "mean_b": float(of_b.mean()),
        "images": len(of_a),
    }
    only = {} if error else dict(zip(("only_a", "only_b"), significance.discordant(of_a, of_b), strict=True))
    return [row | only | _plain(result)]


def _per_image(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Labels and predictions int64 [n], or squared_error float64 [n]. Raises ValueError for anything else."""
    found = evaluations.read_arrays(evaluation.path)
    names = ("squared_error",) if "squared_error" in found else ("labels", "predictions")
    arrays = {name: found[name] for name in names if name in found}
    shapes = {values.shape for values in arrays.values()}
    if len(arrays) < len(names) or len(shapes) != 1 or len(shapes.pop()) != 1:
        raise ValueError(f"{evaluation.path.with_suffix('.npz')} has no {' and '.join(names)} [n]; evaluate again")
    if not all(values.dtype.kind in "iuf" and np.isfinite(values).all() for values in arrays.values()):
        raise ValueError(f"{evaluation.path.with_suffix('.npz')} has values that are no finite numbers; evaluate again")
    return arrays


def _groups(
    runs_a: list[Evaluation], runs_b: list[Evaluation], metrics: Callable[[dict[str, Any]], dict[str, float]]
) -> list[dict[str, Any]]:
    """Compare the metrics of two groups of runs."""
    of_a, of_b = ([metrics(e.trained) for e in runs] for runs in (runs_a, runs_b))
    rows = []
    for name in of_a[0]:
        if all(name in of_run for of_run in (*of_a, *of_b)):
            a, b = ([of_run[name] for of_run in of] for of in (of_a, of_b))
            result = significance.welch(a, b)
            means = {"mean_a": float(np.mean(a)), "mean_b": float(np.mean(b))}
            rows.append({"metric": name, "test": TESTS["welch"]} | means | _plain(result))
    return rows


def _plain(result: significance.Paired | significance.Welch) -> dict[str, Any]:
    return {"difference": result.difference, "interval": list(result.interval), "p": result.p}

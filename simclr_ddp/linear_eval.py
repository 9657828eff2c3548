"""Linear evaluation: `python -m simclr_ddp.linear_eval RUN_DIR_OR_CHECKPOINT key=value ...`

How well a linear model reads the labels from the frozen representation: multinomial logistic regression where the
labels are classes, ridge regression where they are numbers. The strength of its penalty is chosen on a part of the
training images; the model is then fitted to all of them, and the test images are used once. Beside it stand an
untrained encoder of the same kind and, for numbers, the mean of the training labels.

Representations are those of the evaluation view, one per image, by default in float32; the linear model is solved in
float64. Under torchrun all ranks share the forward passes, with the same result. Writes linear_eval.json into the
run directory, or beside the file that was given.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_ddp import checkpoint, cli, config, distributed, logistic, spirograph
from simclr_ddp.config import LinearEval
from simclr_ddp.data import Dataset, open_dataset
from simclr_ddp.draws import holdout
from simclr_ddp.model import Encoder
from simclr_ddp.representations import Loaded, load_encoder, random_encoder, representations
from simclr_ddp.runtime import Runtime, describe, setup


def main(argv: list[str] | None = None) -> int:
    return cli.run(linear_eval, LinearEval, "RUN", __doc__ or "", argv)


def linear_eval(settings: LinearEval) -> int:
    """Evaluate what `settings.run` names, print the table and write linear_eval.json; returns the exit status."""
    begin = time.perf_counter()
    runtime = setup(settings.device, settings.precision, settings.threads)
    try:
        loaded = load_encoder(settings.run)
        train, test = open_data(settings, loaded)
        held = held_out(settings, train)
        if not os.access(loaded.folder, os.W_OK):
            raise ValueError(
                f"{loaded.folder} can't be written, and linear_eval.json goes there: give a copy of the run"
            )
        at = "" if loaded.step is None else f" of step {loaded.step}"
        cli.say(
            f"{loaded.file}{at}: {loaded.spec.arch} x {loaded.spec.width:g}, {train.count:,} + {test.count:,} images"
        )

        encoders = {"trained": loaded.encoder}
        if settings.random_encoder:
            encoders["random"] = random_encoder(loaded.spec, settings.seed)
        features = {
            name: forward(encoder, loaded, train, test, settings, runtime, name) for name, encoder in encoders.items()
        }
        hardware = describe(runtime)
    finally:
        distributed.stop()
    if not distributed.is_main():  # solving may take longer than any rank would wait
        return 0

    results = {
        name: evaluate(x_train, x_test, train, test, held, settings, runtime, name) | {"forward_seconds": seconds}
        for name, (x_train, x_test, seconds) in features.items()
    }
    if not train.has_classes:
        results["predict_the_mean"] = predict_the_mean(train, test)
    record = {
        "run": settings.run,
        "file": str(loaded.file),
        "step": loaded.step,
        "encoder": loaded.spec._asdict(),
        "settings": config.plain(settings),
        "train": about(train),
        "test": about(test),
        "validation_images": int(held.sum()) if len(settings.l2) > 1 else 0,
        "results": results,
        "runtime": hardware,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    path = loaded.folder / "linear_eval.json"
    checkpoint.replace_atomically(path, lambda temporary: temporary.write_text(json.dumps(record, indent=1) + "\n"))
    cli.say(f"\n{table(results, train)}\n\nwritten to {path}")
    return 0


def open_data(settings: LinearEval, loaded: Loaded) -> tuple[Dataset, Dataset]:
    """Training and test images, labelled alike; ValueError in one sentence where they are not."""
    sources = {}
    for split in ("train", "test"):
        sources[split] = getattr(settings, split) or loaded.settings.get(f"data.{split}", "")
        if not sources[split]:
            where = (
                "is empty in the settings of the run" if loaded.settings else "is not known without the run's settings"
            )
            raise ValueError(f"data.{split} {where}: {split}=FILE.beton gives the {split} images")
    train, test = open_dataset(sources["train"], "train"), open_dataset(sources["test"], "test")
    for split, dataset in (("train", train), ("test", test)):
        if dataset.labels is None:
            raise ValueError(
                f"{split}={dataset.source} has no labels, and there is nothing to evaluate without: "
                f"{split}=FILE.beton gives labelled images"
            )
        if not np.isfinite(dataset.labels).all() or (dataset.has_classes and dataset.labels.min() < 0):
            raise ValueError(
                f"{split}={dataset.source} has labels that are negative or not finite: write it again with classes "
                "from 0, or with numbers"
            )
    assert train.labels is not None and test.labels is not None
    if train.labels.shape[1:] != test.labels.shape[1:]:
        raise ValueError(
            f"train={train.source} has {_kind(train)} for labels, but test={test.source} has {_kind(test)}: "
            "give two files of one data set"
        )
    if train.has_classes:
        _check_classes(train, test)
    if train.fingerprint == test.fingerprint:
        cli.warn(f"the test images are the training images, {train.source}: the figures say nothing of new images")
    return train, test


def _kind(dataset: Dataset) -> str:
    assert dataset.labels is not None
    return "classes" if dataset.has_classes else f"{dataset.labels.shape[1]} numbers"


def _check_classes(train: Dataset, test: Dataset) -> None:
    assert train.labels is not None and test.labels is not None
    if train.classes and test.classes and train.classes != test.classes:
        first = next(i for i in range(test.class_count) if train.classes[i : i + 1] != test.classes[i : i + 1])
        here, there = (" ".join(names[first : first + 1]) or "missing" for names in (train.classes, test.classes))
        raise ValueError(
            f"class {first} is {here} in train={train.source} and {there} in test={test.source}: "
            "write both with the same class folders (an empty one keeps its number)"
        )
    known = np.unique(train.labels)
    unknown = np.setdiff1d(test.labels, known)
    if len(unknown):
        name = f" ({test.classes[unknown[0]]})" if test.classes else ""
        raise ValueError(
            f"test={test.source} holds class {unknown[0]}{name}, of which train={train.source} has no image: "
            "give training images of every class"
        )
    if len(known) < 2:
        raise ValueError(f"train={train.source} holds one class only: images of at least two are wanted")


def held_out(settings: LinearEval, train: Dataset) -> np.ndarray:
    """bool [n]: the training images that choose the strength."""
    if not settings.l2:
        raise ValueError("l2=[] leaves no strength to choose: for example l2=[1e-6,1e-4,1e-2]")
    held = holdout(settings.seed, train.count, settings.validation_fraction)
    if len(settings.l2) > 1 and not 0 < held.sum() < train.count:
        raise ValueError(
            f"validation_fraction={settings.validation_fraction:g} of {train.count} training images chooses l2 on "
            f"{held.sum()} of them and fits to {(~held).sum()}: 0.1 is usual, and a single l2=[...] needs no choice"
        )
    return held


def forward(
    encoder: Encoder,
    loaded: Loaded,
    train: Dataset,
    test: Dataset,
    settings: LinearEval,
    runtime: Runtime,
    name: str,
) -> tuple[Tensor, Tensor, float]:
    """Representations [n, D] of training and test images on rank 0, and the seconds they took."""
    begin = time.perf_counter()
    x_train, x_test = (
        representations(
            encoder,
            dataset,
            loaded.spec,
            runtime,
            batch_size=settings.batch_size,
            workers=settings.workers,
            loader=settings.loader,
            title=f"{name} encoder, {split}",
        )
        for split, dataset in (("train", train), ("test", test))
    )
    return x_train, x_test, round(time.perf_counter() - begin, 3)


def evaluate(
    x_train: Tensor,
    x_test: Tensor,
    train: Dataset,
    test: Dataset,
    held: np.ndarray,
    settings: LinearEval,
    runtime: Runtime,
    name: str,
) -> dict[str, Any]:
    """Every figure of one encoder, from its representations [n, D]."""
    if not (x_train.isfinite().all() and x_test.isfinite().all()):
        raise ValueError(f"the {name} encoder gives representations that are not finite: take an earlier checkpoint")
    begin = time.perf_counter()
    x_train, x_test = x_train.to(runtime.device, torch.float64), x_test.to(runtime.device, torch.float64)
    standardize(x_train, x_test)
    y_train, y_test = (_labels(dataset, runtime.device) for dataset in (train, test))
    solution, tried = logistic.choose(
        x_train,
        y_train,
        torch.from_numpy(held).to(runtime.device),
        settings.l2,
        classes=train.class_count,
        tolerance=settings.tolerance,
        max_iterations=settings.max_iterations,
        report=lambda t: cli.say(f"{name} encoder: l2={t.l2:g}  validation {t.score:.4f}  {t.iterations} iterations"),
    )
    seconds = time.perf_counter() - begin
    fits: list[logistic.Tried | logistic.Solution] = [*tried, solution]
    for fit in fits:
        if not fit.converged:
            cli.warn(
                f"{name} encoder, l2={fit.l2:g}: L-BFGS stopped after {fit.iterations} iterations at a gradient of "
                f"{fit.gradient:.1e}, above tolerance={settings.tolerance:g}: raise max_iterations, or l2"
            )
    if len(settings.l2) > 1 and solution.l2 in (min(settings.l2), max(settings.l2)):
        cli.warn(f"{name} encoder: l2={solution.l2:g} is at the end of those tried: l2=[...] can reach further")
    score = "top1" if train.has_classes else "mse"
    return figures(solution.predict(x_test), y_test, test) | {
        "l2": solution.l2,
        "validation": [{score if k == "score" else k: v for k, v in t._asdict().items()} for t in tried],
        "iterations": solution.iterations,
        "gradient": solution.gradient,
        "converged": solution.converged,
        "features": x_train.shape[1],
        "solve_seconds": round(seconds, 3),
    }


def standardize(x_train: Tensor, x_test: Tensor) -> None:
    """In place: every feature to mean 0 and variance 1 over the training images; constant ones to 0.

    A feature that varies by less than the rounding of float32 is constant: dividing by it would make noise of it.
    """
    mean, std = x_train.mean(0), x_train.std(0, correction=0)
    size = (mean.square() + std.square()).sqrt()
    scale = torch.where(std > 1e-5 * size, 1 / std, 0)
    for x in (x_train, x_test):
        x.sub_(mean).mul_(scale)


def _labels(dataset: Dataset, device: torch.device) -> Tensor:
    labels = torch.from_numpy(dataset.labels).to(device)
    return labels if dataset.has_classes else labels.double()


def figures(prediction: Tensor, labels: Tensor, dataset: Dataset) -> dict[str, Any]:
    """What is reported: top-1 and top-5 as shares, or the mean squared error, in all and of each number."""
    if dataset.has_classes:
        five = prediction.shape[1] >= 5
        top5 = logistic.top_k(prediction, labels, 5) if five else None
        return {"top1": logistic.top_k(prediction, labels, 1), "top5": top5}
    errors = logistic.squared_errors(prediction, labels)
    return {"mse": errors.mean().item(), "mse_of": dict(zip(number_names(dataset), errors.tolist(), strict=True))}


def number_names(dataset: Dataset) -> list[str]:
    """Names of the label's numbers: the generated set's, those in the file's sidecar, or their positions."""
    assert dataset.labels is not None
    count = dataset.labels.shape[1]
    names = list(spirograph.TARGETS) if dataset.images is None else dataset.images.info.get("numbers") or []
    return names if len(names) == count else [f"number {i}" for i in range(count)]


def predict_the_mean(train: Dataset, test: Dataset) -> dict[str, Any]:
    """The errors of a model that knows nothing of the image."""
    device = torch.device("cpu")
    labels = _labels(test, device)
    return figures(_labels(train, device).mean(0).expand_as(labels), labels, test)


def about(dataset: Dataset) -> dict[str, Any]:
    return {
        "source": dataset.source,
        "fingerprint": dataset.fingerprint,
        "images": dataset.count,
        "labels": _kind(dataset),
        "classes": dataset.class_count or None,
    }


def table(results: dict[str, dict[str, Any]], train: Dataset) -> str:
    """The figures, one column for each encoder or baseline."""
    titles = {"trained": "trained", "random": "random encoder", "predict_the_mean": "predict the mean"}
    rows: list[tuple[str, list[str]]] = [("test images", [titles[name] for name in results])]
    columns = list(results.values())
    if train.has_classes:
        rows.append(("top-1", [f"{c['top1']:.2%}" for c in columns]))
        if train.class_count >= 5:
            rows.append(("top-5", [f"{c['top5']:.2%}" for c in columns]))
    else:
        rows.append(("MSE, mean", [f"{c['mse']:.5f}" for c in columns]))
        rows += [(f"MSE, {name}", [f"{c['mse_of'][name]:.5f}" for c in columns]) for name in columns[0]["mse_of"]]
    rows.append(("l2", [f"{c['l2']:g}" if "l2" in c else "" for c in columns]))
    width = max(len(title) for title, _ in rows)
    lines = ["  ".join([title.ljust(width), *(cell.rjust(16) for cell in cells)]).rstrip() for title, cells in rows]
    if train.has_classes and train.class_count < 5:
        lines.append(f"(no top-5: with {train.class_count} classes it is always right)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

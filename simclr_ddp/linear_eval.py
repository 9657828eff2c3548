"""Linear evaluation: `python -m simclr_ddp.linear_eval RUN_DIR_OR_CHECKPOINT key=value ...`

How well a linear model reads the labels from the frozen representation: multinomial logistic regression where the
labels are classes, ridge regression where they are numbers. Features are standardised. The strength of the penalty is
chosen along a path of 45, from strong to weak, on a part of the training images; the model is then fitted to all of
them, and the test images are used once. Beside it stand an untrained encoder of the same kind and, for numbers, the
mean of the training labels. (Chen et al. 2020, appendix B.8; `convention` says what a strength means.)

Representations are those of the evaluation view, one per image, by default in float32; the linear model is solved in
float64. Under torchrun all ranks share the forward passes, with the same result, and rank 0 solves. Writes
linear_eval.json into the run directory, or beside the file that was given.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr_ddp import checkpoint, cli, config, distributed, logistic, scores
from simclr_ddp.config import LinearEval
from simclr_ddp.data import Dataset, describe_loader, usable_workers
from simclr_ddp.draws import holdout
from simclr_ddp.labelled import about, labels_of, number_names, open_labelled
from simclr_ddp.model import Encoder
from simclr_ddp.representations import Loaded, load_encoder, random_encoder, representations
from simclr_ddp.runtime import Runtime, describe, setup

DEFINITIONS = {
    "features": "mean 0 and variance 1 over all training images",
    "strength": "of the penalty, in the objective above; l2 is the same in mean of losses + l2 * |W|^2",
    "top1_interval": "95 %, Wilson, over the test images",
    "mse_interval": "95 %, normal approximation, over the test images",
    "mean_per_class": "mean over the classes of the share of right predictions among their images",
    "gradient": "Euclidean norm of the objective's gradient, divided by that at zero weights",
}


def main(argv: list[str] | None = None) -> int:
    return cli.run(linear_eval, LinearEval, "RUN", __doc__ or "", argv)


def linear_eval(settings: LinearEval) -> int:
    """Evaluate what `settings.run` names, print the table and write linear_eval.json; returns the exit status."""
    begin = time.perf_counter()
    runtime = setup(settings.device, settings.precision, settings.threads)
    try:
        loaded = load_encoder(settings.run)
        if settings.size:  # encoders trained on small views see more in larger images (Touvron et al. 2019)
            loaded = loaded._replace(spec=loaded.spec._replace(size=settings.size))
        train, test = open_labelled({"train": settings.train, "test": settings.test}, loaded)
        held = held_out(settings, train)
        if not os.access(loaded.folder, os.W_OK):
            raise ValueError(
                f"{loaded.folder} can't be written, and linear_eval.json goes there: give a copy of the run"
            )
        at = "" if loaded.step is None else f" of step {loaded.step}"
        cli.say(
            f"{loaded.file}{at}: {loaded.spec.arch} x {loaded.spec.width:g}, {train.count:,} + {test.count:,} images"
        )

        if train.images is not None and train.numbers is None:
            workers = usable_workers(settings.workers, distributed.local_world_size())
            line = describe_loader(train.images, settings.loader, workers, settings.batch_size, 1, loaded.spec.size)
            cli.say(line)

        encoders = {"trained": loaded.encoder}
        if settings.random_encoder:
            encoders["random"] = random_encoder(loaded.spec, settings.seed)
        results: dict[str, dict[str, Any]] = {}
        for name, encoder in encoders.items():  # one after the other: features may fill half of the memory
            x_train, x_test, seconds = forward(encoder, loaded, train, test, settings, runtime, name)
            with distributed.while_main_works():
                if distributed.is_main():
                    figures = evaluate(x_train, x_test, train, test, held, settings, runtime.device, name)
                    results[name] = figures | {"forward_seconds": seconds}
                del x_train, x_test
        hardware = describe(runtime)
    finally:
        distributed.stop()
    if not distributed.is_main():
        return 0

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
        "validation_images": int(held.sum()) if len(settings.strengths) != 1 else 0,
        "objective": objective(settings.convention, train),
        "definitions": DEFINITIONS,
        "results": results,
        "runtime": hardware,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    path = loaded.folder / "linear_eval.json"
    checkpoint.replace_atomically(path, lambda temporary: temporary.write_text(json.dumps(record, indent=1) + "\n"))
    cli.say(f"\n{table(results, train, settings.convention)}\n\nwritten to {path}")
    return 0


def held_out(settings: LinearEval, train: Dataset) -> np.ndarray:
    """bool [n]: the training images that choose the strength."""
    if settings.convention == "C" and any(s < 1e-100 for s in settings.strengths):
        raise ValueError(
            f"strengths={settings.strengths} with convention=C holds a penalty without bound: C is the weight of the "
            "images, and greater than 0"
        )
    held = holdout(settings.seed, train.count, settings.validation_fraction)
    if len(settings.strengths) != 1 and not 0 < held.sum() < train.count:
        raise ValueError(
            f"validation_fraction={settings.validation_fraction:g} of {train.count} training images chooses the "
            f"strength on {held.sum()} of them and fits to {(~held).sum()}: 0.1 is usual, and a single "
            "strengths=[...] needs no choice"
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


class Fitted(NamedTuple):
    """What is known of an encoder before its test images are looked at."""

    strength: float
    solution: logistic.Solution  # of all training images, standardised by
    mean: Tensor  # [D] float64: these means of their features
    factor: Tensor  # [D] float64: and factors
    tried: list[logistic.Tried]


def evaluate(
    x_train: Tensor,
    x_test: Tensor,
    train: Dataset,
    test: Dataset,
    held: np.ndarray,
    settings: LinearEval,
    device: torch.device,
    name: str,
) -> dict[str, Any]:
    """Every figure of one encoder, from its representations [n, D], which are overwritten."""
    if not (logistic.finite(x_train) and logistic.finite(x_test)):
        raise ValueError(f"the {name} encoder gives representations that are not finite: take an earlier checkpoint")
    begin = time.perf_counter()
    fitted = fit(x_train.to(device), train, held, settings, name)
    result = judge(fitted, x_test.to(device), test)
    warn_of(fitted, settings, name)
    score = "top1" if train.has_classes else "mse"
    tried = [{score if k == "score" else k: v for k, v in t._asdict().items()} for t in fitted.tried]
    return result | {
        "strength": fitted.strength,
        f"validation_{score}": next((t[score] for t in tried if t["strength"] == fitted.strength), None),
        "validation": tried,
        "iterations": fitted.solution.iterations,
        "gradient": fitted.solution.gradient,
        "converged": fitted.solution.converged,
        "features": x_train.shape[1],
        "solve_seconds": round(time.perf_counter() - begin, 3),
    }


def fit(x: Tensor, train: Dataset, held: np.ndarray, settings: LinearEval, name: str) -> Fitted:
    """Standardise the representations [n, D] of the training images in place, choose the strength, fit to them all.

    Of the test images nothing is known here. Means and variances are those of all training images, also while some
    are held out: a strength then means the same in both fits, and no label is in them.
    """
    mean, factor = logistic.standardization(x)
    logistic.standardize_(x, mean, factor)
    strengths = settings.strengths or logistic.strengths_of(settings.convention)
    strength, solution, tried = logistic.choose(
        x,
        labels_of(train, x.device),
        torch.from_numpy(held).to(x.device),
        strengths,
        settings.convention,
        classes=train.class_count,
        tolerance=settings.tolerance,
        max_iterations=settings.max_iterations,
        report=_progress(f"{name} encoder", len(strengths)),
    )
    return Fitted(strength, solution, mean, factor, tried)


def judge(fitted: Fitted, x: Tensor, test: Dataset) -> dict[str, Any]:
    """The figures of the test images: the only use of their representations [n, D] and labels."""
    logistic.standardize_(x, fitted.mean, fitted.factor)
    labels, rows = labels_of(test, x.device), torch.arange(len(x), device=x.device)
    if test.has_classes:
        ranks = logistic.label_ranks(fitted.solution, x, labels, rows)
        return class_figures(ranks.cpu(), labels.cpu(), len(fitted.solution.bias))
    return number_figures(logistic.predict(fitted.solution, x, rows), labels, test)


def _progress(title: str, count: int) -> Callable[[logistic.Tried], None]:
    """Says how far the search for the strength is: a line every ten seconds, and one at its end."""
    last, done = time.perf_counter(), 0

    def report(tried: logistic.Tried) -> None:
        nonlocal last, done
        now, done = time.perf_counter(), done + 1
        if now - last > 10 or done == count:
            last = now
            cli.say(
                f"{title}: {done} of {count} strengths, at {tried.strength:.3g} a validation score of "
                f"{tried.score:.4f} after {tried.iterations} iterations"
            )

    return report


def warn_of(fitted: Fitted, settings: LinearEval, name: str) -> None:
    """One line where L-BFGS did not reach the tolerance, and one where the best strength is the last of the path."""
    fits: list[logistic.Tried | logistic.Solution] = [*fitted.tried, fitted.solution]
    short = [f.gradient for f in fits if not f.converged]
    if short:
        last = "" if fitted.solution.converged else ", with that to all training images"
        cli.warn(
            f"{name} encoder: L-BFGS stopped above tolerance={settings.tolerance:g} in {len(short)} of {len(fits)} "
            f"fits{last}, at a relative gradient of up to {max(short):.1e}: raise max_iterations or tolerance"
        )
    ends = [t.strength for t in (*fitted.tried[:1], *fitted.tried[-1:])]
    if fitted.strength in ends:
        end = ("strongest", "weakest")[ends.index(fitted.strength)]
        cli.warn(
            f"{name} encoder: the best strength, {fitted.strength:g}, is the {end} penalty of those tried: "
            "strengths=[...] can reach further"
        )


def class_figures(ranks: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    """Shares of right predictions, in [0, 1], from the rank of each image's class: int64 [n], [n]."""
    top1 = scores.share(ranks == 0)
    return {
        "top1": top1,
        "top1_interval": scores.wilson(top1, len(ranks)),
        "top5": scores.share(ranks < 5) if classes > 5 else None,
        "mean_per_class": scores.mean_per_class(ranks == 0, labels),
    }


def number_figures(prediction: Tensor, labels: Tensor, dataset: Dataset) -> dict[str, Any]:
    """The mean squared error, in all and of each number: [n, K], [n, K]."""
    errors = scores.squared_errors(prediction, labels)
    return {
        "mse": errors.mean().item(),
        "mse_interval": scores.mean_interval((prediction - labels).square().mean(1)),
        "mse_of": dict(zip(number_names(dataset), errors.tolist(), strict=True)),
    }


def predict_the_mean(train: Dataset, test: Dataset) -> dict[str, Any]:
    """The errors of a model that knows nothing of the image."""
    device = torch.device("cpu")
    labels = labels_of(test, device)
    return number_figures(labels_of(train, device).mean(0).expand_as(labels), labels, test)


def objective(convention: str, train: Dataset) -> str:
    """The formula that was minimised, in words and letters."""
    loss = "cross-entropy" if train.has_classes else "squared error (mean of an image's numbers)"
    return logistic.CONVENTIONS[convention].format(loss=loss)


def table(results: dict[str, dict[str, Any]], train: Dataset, convention: str) -> str:
    """The figures, one column for each encoder or baseline."""
    titles = {"trained": "trained", "random": "random encoder", "predict_the_mean": "predict the mean"}
    columns = list(results.values())

    def row(title: str, key: str, write: Callable[[Any], str]) -> tuple[str, list[str]]:
        return title, ["" if c.get(key) is None else write(c[key]) for c in columns]

    percent, number = "{:.2%}".format, "{:.5f}".format
    rows = [("", [titles[name] for name in results]), row(f"strength ({convention})", "strength", "{:.3g}".format)]
    if train.has_classes:
        rows += [
            row("validation top-1", "validation_top1", percent),
            row("test top-1", "top1", percent),
            row("  95 % interval", "top1_interval", lambda ends: f"{100 * ends[0]:.2f} .. {ends[1]:.2%}"),
            row("test top-5", "top5", percent),
            row("test mean per class", "mean_per_class", percent),
        ]
    else:
        rows += [
            row("validation MSE", "validation_mse", number),
            row("test MSE", "mse", number),
            row("  95 % interval", "mse_interval", lambda ends: f"{ends[0]:.5f} .. {ends[1]:.5f}"),
            *[(f"test MSE, {n}", [number(c["mse_of"][n]) for c in columns]) for n in columns[0]["mse_of"]],
        ]
    rows += [
        row("relative gradient", "gradient", "{:.1e}".format),
        row("seconds, forward", "forward_seconds", "{:.1f}".format),
        row("seconds, solving", "solve_seconds", "{:.1f}".format),
    ]
    rows = [(title, cells) for title, cells in rows if any(cells)]
    width = max(len(title) for title, _ in rows)
    lines = ["  ".join([title.ljust(width), *(cell.rjust(18) for cell in cells)]).rstrip() for title, cells in rows]
    if train.has_classes and train.class_count <= 5:
        lines.append(f"(no top-5: with {train.class_count} classes it is always right)")
    lines.append(f"(standardised features; minimum of {objective(convention, train)}, the bias free)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

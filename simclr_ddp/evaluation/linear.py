"""Linear evaluation: choose a strength on held-out training images, fit to all of them, score on test images."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr_ddp.data.dataset import Dataset
from simclr_ddp.data.draws import holdout
from simclr_ddp.evaluation import logistic, scores
from simclr_ddp.evaluation.chunks import Features
from simclr_ddp.evaluation.labels import labels_of, number_names
from simclr_ddp.evaluation.shared_cross_entropy import Helpers, Shared
from simclr_ddp.system import console


class Protocol(NamedTuple):
    """Settings of the linear model; the options of simclr_ddp.linear_eval explain each."""

    convention: str = "C"
    strengths: Sequence[float] = ()
    validation_fraction: float = 0.1
    seed: int = 0
    tolerance: float = 1e-6
    max_iterations: int = 1000
    metric: str = "top1"

    @property
    def path(self) -> Sequence[float]:
        """The strengths to choose from."""
        return self.strengths or logistic.strengths_of(self.convention)


def held_out(protocol: Protocol, train: Dataset, validation: Dataset | None = None) -> np.ndarray:
    """Mask [n] of the training images that are held out to choose the strength: those of `validation`, if given."""
    if protocol.convention == "C" and any(s < 1e-100 for s in protocol.strengths):
        raise ValueError(
            f"strengths={list(protocol.strengths)}: with convention=C a strength of 0 is an unbounded penalty; C is "
            "the weight of the images and must be above 0"
        )
    if protocol.metric != "top1" and not (train.has_classes and len(protocol.path) > 1):
        why = "there is a single strength" if train.has_classes else f"the labels of train={train.source} are numbers"
        raise ValueError(f"metric={protocol.metric}: has no effect, since {why}; leave it out")
    if validation is not None:
        if protocol.validation_fraction != Protocol().validation_fraction:
            raise ValueError(
                f"validation_fraction={protocol.validation_fraction:g}: has no effect, since "
                f"validation={validation.source} chooses the strength; leave one of them out"
            )
        return np.repeat([False, True], [train.count, validation.count])
    held = holdout(protocol.seed, train.count, protocol.validation_fraction)
    if len(protocol.strengths) != 1 and not 0 < held.sum() < train.count:
        raise ValueError(
            f"validation_fraction={protocol.validation_fraction:g}: of {train.count} training images, {held.sum()} "
            f"choose the strength and {(~held).sum()} are fitted; use a value such as 0.1, or a single strengths=[...]"
        )
    return held


class Fitted(NamedTuple):
    """Linear model of an encoder, before any test image is used."""

    strength: float
    solution: logistic.Solution  # fitted to all training images
    features: Features  # of them, standardised
    candidates: list[logistic.Candidate]


def evaluate(
    x_train: Tensor,
    x_test: Tensor,
    train: Dataset,
    test: Dataset,
    held: np.ndarray,
    protocol: Protocol,
    device: torch.device,
    name: str,
    *,
    validation: Dataset | None = None,
    helpers: Helpers | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Compute all metrics of one encoder, and the results per test image, from representations [n, D].

    validation  images whose representations follow those of `train`, of which they are a part
    helpers     other ranks that sum over the training images with this one
    """
    if not (logistic.finite(x_train) and logistic.finite(x_test)):
        raise ValueError(f"representations of the {name} encoder are not finite; use an earlier checkpoint")
    begin = time.perf_counter()
    sets = [train] if validation is None else [train, validation]
    fitted = fit(x_train.to(device), sets, held, protocol, name, helpers)
    result, arrays = score(fitted, x_test.to(device), test)
    warn_about_fit(fitted, protocol, name)
    metric = protocol.metric if train.has_classes else "mse"
    tried = [{metric if k == "score" else k: v for k, v in c._asdict().items()} for c in fitted.candidates]
    result |= {
        "strength": fitted.strength,
        f"validation_{metric}": next((c[metric] for c in tried if c["strength"] == fitted.strength), None),
        "validation": tried,
        "iterations": fitted.solution.iterations,
        "gradient": fitted.solution.gradient,
        "converged": fitted.solution.converged,
        "features": x_train.shape[1],
        "solve_seconds": round(time.perf_counter() - begin, 3),
    }
    return result, arrays


def fit(
    x: Tensor, sets: list[Dataset], held: np.ndarray, protocol: Protocol, name: str, helpers: Helpers | None = None
) -> Fitted:
    """Standardise the training representations [n, D], choose the strength, and fit to all of them.

    sets  data sets of the images in this order, with the class numbers of the first

    Test images are not used. Means and variances are those of all training images, also while some are held out: a
    strength then means the same in both fits, and no labels enter them.
    """
    features = logistic.standardized(x)
    strengths = protocol.path
    labels, train = torch.cat([labels_of(dataset, x.device) for dataset in sets]), sets[0]
    shared = Shared(helpers, features, labels, train.class_count) if helpers and train.has_classes else None
    with console.Progress(len(strengths), unit="strengths", title=f"{name} encoder") as progress:

        def report(candidate: logistic.Candidate) -> None:
            words = f"validation score {candidate.score:.4f} at strength {candidate.strength:.3g}"
            progress.describe(f"{words} after {candidate.iterations} iterations")
            progress.advance()

        strength, solution, candidates = logistic.choose(
            features,
            labels,
            torch.from_numpy(held).to(x.device),
            strengths,
            protocol.convention,
            classes=train.class_count,
            tolerance=protocol.tolerance,
            max_iterations=protocol.max_iterations,
            metric=protocol.metric,
            report=report,
            select=shared.select if shared else None,
        )
    return Fitted(strength, solution, features, candidates)


def score(fitted: Fitted, x: Tensor, test: Dataset) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics on the test images, the only use of their representations [n, D] and labels, and results per image.

    The results per image are labels, predictions and ranks of the labels, int64 [n], or squared_error float64 [n], the
    mean over the numbers of an image.
    """
    features = Features(x, fitted.features.mean, fitted.features.factor)
    labels, rows = labels_of(test, x.device), torch.arange(len(x), device=x.device)
    if test.has_classes:
        classes = len(fitted.solution.bias)
        found = []
        for part, z in features.chunks(rows, classes):
            logits = fitted.solution.predict(z)
            found.append((scores.label_ranks(logits, labels[part]), logits.argmax(1)))
        ranks, predictions = (torch.cat(pieces).cpu() for pieces in zip(*found, strict=True))
        arrays = {"labels": labels.cpu().numpy(), "predictions": predictions.numpy(), "ranks": ranks.numpy()}
        return classification_metrics(ranks, labels.cpu(), classes), arrays
    prediction = logistic.predict(fitted.solution, features, rows)
    errors = (prediction - labels).square().mean(1)
    return regression_metrics(prediction, labels, test), {"squared_error": errors.cpu().numpy()}


def warn_about_fit(fitted: Fitted, protocol: Protocol, name: str) -> None:
    """Warn if L-BFGS did not reach the tolerance, and if the best strength is at an end of the path."""
    fits: list[logistic.Candidate | logistic.Solution] = [*fitted.candidates, fitted.solution]
    short = [f.gradient for f in fits if not f.converged]
    if short:
        last = "" if fitted.solution.converged else ", including the fit to all training images"
        console.warn(
            f"{name} encoder: L-BFGS did not reach tolerance={protocol.tolerance:g} in {len(short)} of {len(fits)} "
            f"fits{last} (relative gradient up to {max(short):.1e}); raise max_iterations or tolerance"
        )
    ends = [t.strength for t in (*fitted.candidates[:1], *fitted.candidates[-1:])]
    if fitted.strength in ends:
        end = ("strongest", "weakest")[ends.index(fitted.strength)]
        console.warn(
            f"{name} encoder: the best strength, {fitted.strength:g}, is the {end} penalty on the path; "
            "extend the path with strengths=[...]"
        )


def classification_metrics(ranks: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    """Accuracies in [0, 1], from the rank of each image's class among the logits and the labels: int64 [n], [n]."""
    top1 = scores.accuracy(ranks == 0)
    return {
        "top1": top1,
        "top1_interval": scores.wilson(top1, len(ranks)),
        "top5": scores.accuracy(ranks < 5) if classes > 5 else None,
        "mean_per_class": scores.mean_per_class(ranks == 0, labels),
    }


def regression_metrics(prediction: Tensor, labels: Tensor, dataset: Dataset) -> dict[str, Any]:
    """Mean squared error, overall and of each number: [n, K], [n, K]."""
    errors = scores.squared_errors(prediction, labels)
    return {
        "mse": errors.mean().item(),
        "mse_interval": scores.mean_interval((prediction - labels).square().mean(1)),
        "mse_of": dict(zip(number_names(dataset), errors.tolist(), strict=True)),
    }


def predict_the_mean(sets: list[Dataset], test: Dataset) -> dict[str, Any]:
    """Metrics of the baseline that predicts the mean of the labels of the training sets."""
    device = torch.device("cpu")
    labels = labels_of(test, device)
    mean = torch.cat([labels_of(dataset, device) for dataset in sets]).mean(0)
    return regression_metrics(mean.expand_as(labels), labels, test)

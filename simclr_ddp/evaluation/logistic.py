"""Linear models on frozen representations: logistic regression by L-BFGS, ridge regression in closed form.

Both minimise mean loss + l2 * |W|^2 over W [D, K] and an unpenalised bias [K]; `ridge` converts the strengths of the
published conventions to this l2. The loss of a sample is its cross-entropy, or the squared error averaged over its
numbers.

Sums over samples are in float64, on any device and for features of any precision: rows are converted in chunks. Memory
holds a chunk and a few matrices [D, D] and [D, K] per strength; the features may be a memory-mapped file.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simclr_ddp.evaluation import scores
from simclr_ddp.evaluation.chunks import Features, chunk_rows, sum_over
from simclr_ddp.evaluation.cross_entropy import CrossEntropy
from simclr_ddp.evaluation.logistic_path import Solution, logistic_path

# Conventions differ in the literature. C: scikit-learn, and re-implementations of Chen et al. 2020 (B.8), who publish
# none; mean, without the factor 1/2: Foster et al. 2021.
CONVENTIONS = {
    "C": "1/2 |W|^2 + C * sum of {loss} over images",
    "mean": "mean of {loss} over images + strength * |W|^2",
}


class Candidate(NamedTuple):
    strength: float
    l2: float
    score: float  # on the held-out images: accuracy in [0, 1], or mean squared error
    iterations: int
    gradient: float
    converged: bool


def strengths_of(convention: str) -> list[float]:
    """Default path of 45 strengths: 11 decades in steps of a quarter, C from 1e-6 or l2 from 1e-10.

    The two ranges are equal for 50,000 images, where C = 1 is l2 = 1e-5.
    """
    first = {"C": -6, "mean": -10}[convention]
    return [10 ** (first + i / 4) for i in range(45)]


def ridge(convention: str, strength: float, n: int) -> float:
    """Convert a strength to the l2 at which mean loss + l2 * |W|^2 over n samples has the same minimum."""
    return 1 / (2 * strength * n) if convention == "C" else strength


def finite(x: Tensor) -> bool:
    return all(bool(piece.isfinite().all()) for piece in x.split(chunk_rows(x)))


def standardized(x: Tensor) -> Features:
    """Features of mean 0 and variance 1 over x [n, D]; constant ones are 0.

    A feature that varies by less than float32 rounding counts as constant: scaling it would amplify noise.
    """
    rows, plain = torch.arange(len(x), device=x.device), Features(x)
    mean = sum_over(z.sum(0) for _, z in plain.chunks(rows)) / len(x)
    std = (sum_over((z - mean).square().sum(0) for _, z in plain.chunks(rows)) / len(x)).sqrt()
    size = (mean.square() + std.square()).sqrt()
    return Features(x, mean, torch.where(std > 1e-5 * size, 1 / std, 0))


def choose(
    features: Features,
    labels: Tensor,
    held: Tensor,
    strengths: Sequence[float],
    convention: str,
    *,
    classes: int,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    metric: str = "top1",
    report: Callable[[Candidate], None] = lambda candidate: None,
    select: Callable[[Tensor], CrossEntropy] | None = None,
) -> tuple[float, Solution, list[Candidate]]:
    """Choose the strength that is best on the held-out samples, and fit a model with it to all samples.

    labels   [n] int64, or [n, K] float64 numbers with classes = 0
    held     [n] bool, the samples for scoring; ignored if there is only one strength
    metric   of classes, by which strengths are compared: top1 or mean_per_class
    report   called with every candidate
    select   cross-entropy over the samples [m], if it is not computed by this process alone

    Candidates are reported as they are fitted, and returned from the strongest penalty to the weakest; among equal
    scores the strongest penalty wins. Returns strength, model and candidates ([] without a choice).
    """
    everything = torch.arange(features.count, device=features.device)
    settings: dict[str, Any] = {
        "classes": classes,
        "tolerance": tolerance,
        "max_iterations": max_iterations,
        "select": select,
    }
    start: Solution | None = None
    chosen = strengths[0]
    found: list[tuple[Candidate, Solution]] = []
    if len(strengths) > 1:
        fitted, scored = everything[~held], everything[held]
        l2_of = {s: ridge(convention, s, len(fitted)) for s in strengths}
        for i, solution in _solved(features, labels, fitted, list(l2_of.values()), **settings):
            strength = list(l2_of)[i]
            if classes:
                correct = label_ranks(solution, features, labels, scored) == 0
                per_class = metric == "mean_per_class"
                score = scores.mean_per_class(correct, labels[scored]) if per_class else scores.accuracy(correct)
            else:
                score = scores.squared_errors(predict(solution, features, scored), labels[scored]).mean().item()
            found.append((Candidate(strength, l2_of[strength], score, *solution[2:]), solution))
            report(found[-1][0])
        found.sort(key=lambda pair: pair[0].l2, reverse=True)
        best, start = min(found, key=lambda pair: -pair[0].score if classes else pair[0].score)
        chosen = best.strength
    l2 = [ridge(convention, chosen, features.count)]
    (solution,) = solutions(features, labels, everything, l2, start=start, **settings)
    return chosen, solution, [candidate for candidate, _ in found]


def solutions(
    features: Features,
    labels: Tensor,
    rows: Tensor,
    l2: Sequence[float],
    *,
    classes: int,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    start: Solution | None = None,
    select: Callable[[Tensor], CrossEntropy] | None = None,
) -> list[Solution]:
    """Linear models of the rows' features and labels for each l2; the labels are those of `choose`.

    rows       [m] int64
    start      initial weights, zeros by default; closed forms need none
    """
    settings: dict[str, Any] = {
        "classes": classes,
        "tolerance": tolerance,
        "max_iterations": max_iterations,
        "start": start,
        "select": select,
    }
    found = dict(_solved(features, labels, rows, l2, **settings))
    return [found[i] for i in range(len(l2))]


def _solved(
    features: Features,
    labels: Tensor,
    rows: Tensor,
    l2: Sequence[float],
    *,
    classes: int,
    select: Callable[[Tensor], CrossEntropy] | None = None,
    **settings: Any,
) -> Iterator[tuple[int, Solution]]:
    """Yield (position in l2, linear model) in the order in which they are solved."""
    if classes:
        data = select(rows) if select else CrossEntropy(features, labels, rows, classes)
        return logistic_path(data, l2, **settings)
    return enumerate(_ridge_regressions(features, labels, rows, l2))


def predict(solution: Solution, features: Features, rows: Tensor) -> Tensor:
    """Predictions for the rows [m]: [m, K] float64."""
    return torch.cat([solution.predict(z) for _, z in features.chunks(rows)])


def label_ranks(solution: Solution, features: Features, labels: Tensor, rows: Tensor) -> Tensor:
    """Rank of the correct class in the prediction for each of the rows, int64 [m]; 0 is correct."""
    pieces = features.chunks(rows, solution.weight.shape[1])
    return torch.cat([scores.label_ranks(solution.predict(z), labels[part]) for part, z in pieces])


def _ridge_regressions(features: Features, targets: Tensor, rows: Tensor, l2: Sequence[float]) -> Iterator[Solution]:
    """Yield minima of mean squared error + l2 * |W|^2, in closed form from one decomposition of the covariance.

    targets  [n, K] float64

    The mean is over samples and components, as in torch's mse_loss. For collinear features without a penalty the
    solution has the smallest norm.
    """
    n, k = len(rows), targets.shape[1]
    mean, target_mean = sum_over(z.sum(0) for _, z in features.chunks(rows)) / n, targets[rows].mean(0)
    covariance = sum_over((z - mean).T @ (z - mean) for _, z in features.chunks(rows, features.width)) / n
    cross = sum_over((z - mean).T @ (targets[part] - target_mean) for part, z in features.chunks(rows)) / n
    values, vectors = torch.linalg.eigh(covariance)
    for strength in l2:
        spectrum = values.clamp_min(0) + strength * k
        lost = spectrum <= len(values) * torch.finfo(torch.float64).eps * spectrum.max()
        inverse = torch.where(lost, 0, 1 / spectrum.masked_fill(lost, 1))
        weight = vectors @ (inverse[:, None] * (vectors.T @ cross))
        gradient = covariance @ weight - cross + strength * k * weight
        reached = (gradient.norm() / cross.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
        yield Solution(weight, target_mean - mean @ weight, 0, reached, True)

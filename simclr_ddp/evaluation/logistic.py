"""Linear models on frozen representations: logistic regression by L-BFGS, ridge regression in closed form.

Both minimise mean loss + l2 * |W|^2 over W [D, K] and a free bias [K]; `ridge` turns the strengths of the published
conventions into this l2. The loss of a sample is its cross-entropy, or the squared error averaged over its numbers.

Everything is summed in float64, on any device, whatever the precision of the features: their rows are read in chunks,
each made float64 when its turn comes. Memory holds the features once, a chunk, and a few matrices [D, D] and [D, K].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from simclr_ddp import scores

# Where the literature splits. C: scikit-learn, and the range of C that re-implementations of Chen et al. 2020 (B.8)
# use, who publish no convention; Foster et al. 2021: the mean, without a half.
CONVENTIONS = {
    "C": "1/2 |W|^2 + C * sum of {loss} over images",
    "mean": "mean of {loss} over images + strength * |W|^2",
}

_HISTORY = 10
_RENEWAL = 50  # iterations; a product of the features with themselves costs several of them
_DECREASE, _SLOPE = 1e-4, 0.9  # strong Wolfe conditions: of the value, and of the slope
_CHUNK = {"cpu": 2**18, "cuda": 2**26}  # numbers: 2 MiB, which caches hold, and 512 MiB


class Solution(NamedTuple):
    weight: Tensor  # [D, K] float64
    bias: Tensor  # [K] float64
    iterations: int
    gradient: float  # Euclidean norm of the objective's gradient here, divided by that at zero weights
    converged: bool

    def predict(self, x: Tensor) -> Tensor:
        """[n, D] float64 -> [n, K]: logits, or the numbers themselves."""
        return torch.addmm(self.bias, x, self.weight)


class Tried(NamedTuple):
    strength: float
    l2: float
    score: float  # on the held-out images: top-1 in [0, 1], or mean squared error
    iterations: int
    gradient: float
    converged: bool


def strengths_of(convention: str) -> list[float]:
    """The 45 strengths from which to choose by default: 11 decades in quarters, C from 1e-6 or l2 from 1e-10 on.

    The same range at 50,000 images, where C = 1 is l2 = 1e-5.
    """
    first = {"C": -6, "mean": -10}[convention]
    return [10 ** (first + i / 4) for i in range(45)]


def ridge(convention: str, strength: float, n: int) -> float:
    """The l2 with which mean loss + l2 * |W|^2 over n samples has the minimum of the convention's objective."""
    return 1 / (2 * strength * n) if convention == "C" else strength


def chunks(x: Tensor, rows: Tensor, columns: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """x[rows] in pieces: (rows [b], features [b, D] float64). `columns`: how wide is what is made of them."""
    for part in rows.split(_chunk_rows(x, columns)):
        yield part, x[part].double()


def _chunk_rows(x: Tensor, columns: int = 1) -> int:
    return max(1, _CHUNK[x.device.type] // max(x.shape[1], columns))


def finite(x: Tensor) -> bool:
    return all(bool(piece.isfinite().all()) for piece in x.split(_chunk_rows(x)))


def standardization(x: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [D], [D]: the means of the features, and the factors that then give them variance 1; 0 for constant ones.

    A feature that varies by less than the rounding of float32 is constant: dividing by it would make noise of it.
    """
    rows = torch.arange(len(x), device=x.device)
    mean = sum_over(z.sum(0) for _, z in chunks(x, rows)) / len(x)
    std = (sum_over((z - mean).square().sum(0) for _, z in chunks(x, rows)) / len(x)).sqrt()
    size = (mean.square() + std.square()).sqrt()
    return mean, torch.where(std > 1e-5 * size, 1 / std, 0)


def standardize_(x: Tensor, mean: Tensor, factor: Tensor) -> None:
    """(x - mean) * factor, in place."""
    for piece in x.split(_chunk_rows(x)):
        piece.copy_((piece.double() - mean) * factor)


def sum_over(terms: Iterator[Tensor]) -> Tensor:
    """The sum of tensors of one shape, of which only two exist at a time."""
    total = next(terms).clone()
    for term in terms:
        total += term
    return total


def choose(
    x: Tensor,
    labels: Tensor,
    held: Tensor,
    strengths: Sequence[float],
    convention: str,
    *,
    classes: int,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    report: Callable[[Tried], None] = lambda tried: None,
) -> tuple[float, Solution, list[Tried]]:
    """The strength whose linear model does best on the held-out samples, and the model fitted with it to all of them.

    x        [n, D] float32 or float64
    labels   [n] int64, or [n, K] float64 numbers with classes = 0
    held     [n] bool: the samples that only judge; not looked at if there is one strength
    report   is told of every strength tried

    From the strongest penalty to the weakest, each starting from those before; of equals the strongest penalty
    wins. Returns also what was tried in that order ([] if there was no choice).
    """
    everything = torch.arange(len(x), device=x.device)
    fit = partial(solutions, x, labels, classes=classes, tolerance=tolerance, max_iterations=max_iterations)
    best: Solution | None = None
    chosen, least = strengths[0], float("inf")
    tried: list[Tried] = []
    if len(strengths) > 1:
        fitted, judged = everything[~held], everything[held]
        l2_of = {s: ridge(convention, s, len(fitted)) for s in strengths}
        ordered = sorted(l2_of, key=lambda s: l2_of[s], reverse=True)
        for strength, solution in zip(ordered, fit(fitted, [l2_of[s] for s in ordered]), strict=True):
            if classes:
                score = scores.share(label_ranks(solution, x, labels, judged) == 0)
            else:
                score = scores.squared_errors(predict(solution, x, judged), labels[judged]).mean().item()
            tried.append(Tried(strength, l2_of[strength], score, *solution[2:]))
            report(tried[-1])
            loss = -score if classes else score
            if best is None or loss < least:
                best, chosen, least = solution, strength, loss
    (solution,) = fit(everything, [ridge(convention, chosen, len(x))], start=best)
    return chosen, solution, tried


def solutions(
    x: Tensor,
    labels: Tensor,
    rows: Tensor,
    l2: Sequence[float],
    *,
    classes: int,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    start: Solution | None = None,
) -> Iterator[Solution]:
    """The linear models of x[rows] and labels[rows] for one l2 after the other, as `choose` takes them.

    rows       [m] int64
    start      where the first begins; zeros by default. Closed forms need no start
    """
    if classes:
        return _logistic_regressions(x, labels, rows, l2, classes, tolerance, max_iterations, start)
    return _ridge_regressions(x, labels, rows, l2)


def predict(solution: Solution, x: Tensor, rows: Tensor) -> Tensor:
    """[n, D], [m] -> [m, K] float64."""
    return torch.cat([solution.predict(z) for _, z in chunks(x, rows)])


def label_ranks(solution: Solution, x: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """int64 [m]: how many classes the model puts before the right one, for each of the rows."""
    pieces = chunks(x, rows, solution.weight.shape[1])
    return torch.cat([scores.label_ranks(solution.predict(z), labels[part]) for part, z in pieces])


def _ridge_regressions(x: Tensor, targets: Tensor, rows: Tensor, l2: Sequence[float]) -> Iterator[Solution]:
    """Minima of mean squared error + l2 * |W|^2, in closed form from one decomposition of the covariance.

    targets  [n, K] float64

    The mean is over samples and components, as in torch's mse_loss. Of collinear features without a penalty, the
    solution of the smallest norm.
    """
    n, k = len(rows), targets.shape[1]
    mean, target_mean = sum_over(z.sum(0) for _, z in chunks(x, rows)) / n, targets[rows].mean(0)
    covariance = sum_over((z - mean).T @ (z - mean) for _, z in chunks(x, rows, x.shape[1])) / n
    cross = sum_over((z - mean).T @ (targets[part] - target_mean) for part, z in chunks(x, rows)) / n
    values, vectors = torch.linalg.eigh(covariance)
    for strength in l2:
        spectrum = values.clamp_min(0) + strength * k
        lost = spectrum <= len(values) * torch.finfo(torch.float64).eps * spectrum.max()
        inverse = torch.where(lost, 0, 1 / spectrum.masked_fill(lost, 1))
        weight = vectors @ (inverse[:, None] * (vectors.T @ cross))
        gradient = covariance @ weight - cross + strength * k * weight
        reached = (gradient.norm() / cross.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
        yield Solution(weight, target_mean - mean @ weight, 0, reached, True)


def _logistic_regressions(
    x: Tensor,
    labels: Tensor,
    rows: Tensor,
    l2: Sequence[float],
    classes: int,
    tolerance: float,
    max_iterations: int,
    start: Solution | None,
) -> Iterator[Solution]:
    """Minima of mean cross-entropy + l2 * |W|^2, each found from those before.

    labels  [n] int64 below `classes`; a class without samples is allowed
    """
    data = _CrossEntropy(x, labels, rows, classes)
    w = torch.zeros(classes, x.shape[1] + 1, dtype=torch.float64, device=x.device)
    at_zero = data.value_and_gradient(w, 0.0)[1].norm().item()
    if start is not None:
        w = torch.cat([start.weight, start.bias[None]]).T.contiguous()
    before = w
    for i, strength in enumerate(l2):
        trend = 0.0  # on a path of falling l2, start where the line through the last two solutions leads
        if i > 1 and 0 < strength < l2[i - 1] < l2[i - 2]:
            trend = min(1.0, math.log(l2[i - 1] / strength) / math.log(l2[i - 2] / l2[i - 1]))
        before, first = w, w + trend * (w - before)
        w, iterations, norm = _lbfgs(data, strength, first, tolerance * at_zero, max_iterations)
        relative = norm / at_zero if at_zero else 0.0
        yield Solution(w[:, :-1].T, w[:, -1], iterations, relative, norm <= tolerance * at_zero)


class _CrossEntropy:
    """Of chosen samples: mean cross-entropy at w [K, D + 1], the bias last, and its derivatives.

    Classes come first in everything here: with few of them, products and softmax are then twice as fast on a CPU.
    """

    def __init__(self, x: Tensor, labels: Tensor, rows: Tensor, classes: int) -> None:
        self.x, self.labels, self.rows, self.classes = x, labels, rows, classes
        self.age = _RENEWAL  # iterations since the curvature was measured

    def value_and_gradient(self, w: Tensor, l2: float) -> tuple[float, Tensor]:
        """mean cross-entropy + l2 * |W|^2, and its gradient [K, D + 1]."""
        loss, gradient = w.new_zeros(()), torch.zeros_like(w)
        for part, z in chunks(self.x, self.rows, self.classes):
            own = self.labels[part][None]
            log_p = self._logits(w, z).log_softmax(0)
            loss -= log_p.gather(0, own).sum()
            residual = log_p.exp_()
            residual.scatter_(0, own, residual.gather(0, own) - 1)
            gradient[:, :-1].addmm_(residual, z)
            gradient[:, -1] += residual.sum(1)
        n = len(self.rows)
        gradient /= n
        gradient[:, :-1] += 2 * l2 * w[:, :-1]
        return (loss / n + l2 * w[:, :-1].square().sum()).item(), gradient

    def factor(self, w: Tensor, l2: float) -> Tensor:
        """Cholesky factor [D + 1, D + 1] of the Hessian, averaged over the classes; measured now and then.

        Exact at W = 0, but for the classes' coupling, to which the gradient is orthogonal. A trace of ridge keeps
        collinear features invertible.
        """
        if self.age >= _RENEWAL:
            self._curvature, self.age = self._averaged_hessian(w), 0
        penalty = torch.full_like(w[0], 2 * l2)
        penalty[-1] = 0
        trace = 1e-9 * self._curvature.diagonal().mean()
        return torch.linalg.cholesky(self._curvature + torch.diag(penalty + trace))

    def _averaged_hessian(self, w: Tensor) -> Tensor:
        d = w.shape[1] - 1
        hessian = w.new_zeros(d + 1, d + 1)
        for _, z in chunks(self.x, self.rows, max(d, self.classes)):
            weights = (1 - self._logits(w, z).softmax(0).square_().sum(0)) / (self.classes - 1)
            scaled = z * weights[:, None]
            hessian[:d, :d].addmm_(z.T, scaled)
            hessian[d, :d] += scaled.sum(0)
            hessian[d, d] += weights.sum()
        hessian[:d, d] = hessian[d, :d]
        return hessian / len(self.rows)

    @staticmethod
    def _logits(w: Tensor, z: Tensor) -> Tensor:
        """[K, b] of the features [b, D]."""
        return torch.addmm(w[:, -1:], w[:, :-1], z.T)


def _lbfgs(data: _CrossEntropy, l2: float, w: Tensor, enough: float, max_iterations: int) -> tuple[Tensor, int, float]:
    """(w, iterations, norm of the gradient there) from w to a gradient of norm `enough`, or after max_iterations.

    L-BFGS (Nocedal and Wright 2006, algorithm 7.4) with a strong Wolfe search, on all samples at once. Where the
    textbook has a multiple of the identity stands the inverse of `data.factor`: correlated features then cost few
    iterations.
    """
    function = partial(data.value_and_gradient, l2=l2)
    value, gradient = function(w)
    factor: Tensor | None = None
    history: list[tuple[Tensor, Tensor]] = []
    iterations = 0
    while gradient.norm() > enough and iterations < max_iterations:
        if factor is None or data.age >= _RENEWAL:
            factor = data.factor(w, l2)
        direction = _direction(gradient, history, factor)
        slope = (direction * gradient).sum().item()
        if not slope < 0:  # rounding: the gradient is as small as float64 makes it
            if not history:
                break
            history.clear()
            continue
        before, gradient_before = w, gradient
        w, value, gradient = _search(function, w, direction, value, slope)
        if torch.equal(w, before):
            break
        step, change = w - before, gradient - gradient_before
        if (change * step).sum() > 0:
            history = [*history, (step, change)][-_HISTORY:]
        iterations += 1
        data.age += 1
    return w, iterations, gradient.norm().item()


def _direction(gradient: Tensor, history: list[tuple[Tensor, Tensor]], factor: Tensor) -> Tensor:
    """-H g, [K, D + 1], by the two loops over the last (step, change of the gradient)."""
    q = gradient.clone()
    weights = []
    for step, change in reversed(history):
        weights.append((step * q).sum() / (step * change).sum())
        q -= weights[-1] * change
    q = torch.cholesky_solve(q.T, factor).T
    if history:
        step, change = history[-1]
        q *= (step * change).sum() / (change * torch.cholesky_solve(change.T, factor).T).sum()
    for (step, change), weight in zip(history, reversed(weights), strict=True):
        q += (weight - (change * q).sum() / (step * change).sum()) * step
    return -q


Function = Callable[[Tensor], tuple[float, Tensor]]  # w -> value and gradient


def _search(
    function: Function, w: Tensor, direction: Tensor, value_0: float, slope_0: float
) -> tuple[Tensor, float, Tensor]:
    """(w, value, gradient) of a point along the direction that meets the strong Wolfe conditions.

    value_0, slope_0  of the convex function at w, where it descends along the direction

    Bracketing and secants on the slope, which is monotone. Where it is still negative enough, convexity implies the
    decrease of the value, so that the search works where differences of values are lost in rounding.
    """
    low, low_slope, high, high_slope = 0.0, slope_0, float("inf"), 0.0
    t = 1.0
    for _ in range(60):
        trial = w + t * direction
        value, gradient = function(trial)
        slope = (gradient * direction).sum().item()
        if slope < _SLOPE * slope_0:
            low, low_slope = t, slope
        elif slope > -_SLOPE * slope_0:
            high, high_slope = t, slope
        elif slope <= _DECREASE * slope_0 or value <= value_0 + _DECREASE * t * slope_0:
            break
        else:
            high, high_slope = t, slope
        if high == float("inf"):
            t *= 4
        elif not high_slope > low_slope:
            break  # nothing but rounding is left
        else:
            secant = low - low_slope * (high - low) / (high_slope - low_slope)
            margin = 0.1 * (high - low)
            t = min(max(secant, low + margin), high - margin)
    return trial, value, gradient

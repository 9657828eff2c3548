"""Linear models on frozen representations, solved to a stated accuracy in float64, on any device.

Multinomial logistic regression by L-BFGS, ridge regression in closed form, and the choice of their strength on
held-out images. The objective is that of the evaluation of Foster et al. 2021: mean loss + l2 * ||W||^2, without a
half, the bias free. Chen et al. 2020 publish no convention for theirs; scikit-learn's C is 1 / (2 * n * l2).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_HISTORY = 10
_RENEWAL = 50  # iterations; a product of the features with themselves costs several of them
# Of the strong Wolfe conditions: decrease of the value and of the slope. A search along the line costs no product
# with the features here, so it may be more exact than the 0.9 that is usual for L-BFGS.
_DECREASE, _SLOPE = 1e-4, 0.5


class Solution(NamedTuple):
    weight: Tensor  # [D, K] float64
    bias: Tensor  # [K] float64
    l2: float
    iterations: int
    gradient: float  # largest entry of the objective's gradient at the solution, in magnitude
    converged: bool

    def predict(self, x: Tensor) -> Tensor:
        """[n, D] float64 -> [n, K]: logits, or the numbers themselves."""
        return torch.addmm(self.bias, x, self.weight)


class Tried(NamedTuple):
    l2: float
    score: float  # on the held-out images: top-1 in [0, 1], or mean squared error
    iterations: int
    gradient: float
    converged: bool


def logistic_regression(
    x: Tensor,
    labels: Tensor,
    classes: int,
    l2: float,
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
    start: Solution | None = None,
) -> Solution:
    """Minimise mean cross-entropy + l2 * ||W||^2 over W [D, K] and a free bias [K].

    x          [n, D] float64
    labels     [n] int64 below `classes`; a class without samples is allowed
    tolerance  stop where no entry of the gradient is larger
    start      where to begin; zeros by default

    L-BFGS (Nocedal and Wright 2006, algorithm 7.4) with a strong Wolfe search, on the whole batch. Where the textbook
    has a multiple of the identity stands the inverse of a Hessian averaged over the classes, renewed now and then:
    correlated features then cost few iterations. Returns what was reached, converged or not, after max_iterations.
    """
    assert x.dtype == torch.float64 and x.ndim == 2 and labels.shape == x.shape[:1]
    n = len(x)
    targets = (labels[:, None] == torch.arange(classes, device=x.device)).to(x)

    def logits_of(w: Tensor) -> Tensor:  # w [D + 1, K], the bias last
        return torch.addmm(w[-1], x, w[:-1])

    def gradient_of(w: Tensor, logits: Tensor) -> Tensor:
        residual = (logits.softmax(1) - targets) / n
        return torch.cat([torch.addmm(w[:-1], x.T, residual, beta=2 * l2), residual.sum(0, keepdim=True)])

    w = x.new_zeros(x.shape[1] + 1, classes)
    if start is not None:
        w = torch.cat([start.weight, start.bias[None]])
    logits = logits_of(w)
    gradient = gradient_of(w, logits)
    history: list[tuple[Tensor, Tensor]] = []
    iterations = 0
    while iterations < max_iterations:
        if gradient.abs().max() <= tolerance:
            logits = logits_of(w)  # they were updated by addition; the last word is said without its rounding
            gradient = gradient_of(w, logits)
            if gradient.abs().max() <= tolerance:
                break
        if iterations % _RENEWAL == 0:
            factor = _factor(x, logits, l2)
        direction = _direction(gradient, history, factor)
        if not (direction * gradient).sum() < 0:  # rounding: the gradient is as small as float64 makes it
            if not history:
                break
            history.clear()
            continue
        along = logits_of(direction)
        length = _search(_line(w, direction, logits, along, targets, l2))
        step = length * direction
        if torch.equal(w + step, w):
            break
        w, logits = w + step, logits + length * along
        before, gradient = gradient, gradient_of(w, logits)
        if ((gradient - before) * step).sum() > 0:
            history = [*history, (step, gradient - before)][-_HISTORY:]
        iterations += 1
    reached = gradient_of(w, logits_of(w)).abs().max().item()
    return Solution(w[:-1], w[-1], l2, iterations, reached, reached <= tolerance)


def _factor(x: Tensor, logits: Tensor, l2: float) -> Tensor:
    """Cholesky factor [D + 1, D + 1] of the Hessian, averaged over the classes.

    Exact at W = 0, but for the classes' coupling, to which the gradient is orthogonal. A trace of ridge keeps
    collinear features invertible.
    """
    weights = (1 - logits.softmax(1).square().sum(1)) / (logits.shape[1] - 1)
    scaled = x * (weights / len(x))[:, None]
    mean = scaled.sum(0, keepdim=True)
    hessian = torch.cat([torch.cat([x.T @ scaled, mean.T], 1), torch.cat([mean, weights.mean().view(1, 1)], 1)])
    ridge = torch.full_like(hessian[0], 2 * l2)
    ridge[-1] = 0
    return torch.linalg.cholesky(hessian + torch.diag(ridge + 1e-9 * hessian.diagonal().mean()))


def _direction(gradient: Tensor, history: list[tuple[Tensor, Tensor]], factor: Tensor) -> Tensor:
    """-H g by the two loops over the last (step, change of the gradient)."""
    q = gradient.clone()
    weights = []
    for step, change in reversed(history):
        weights.append((step * q).sum() / (step * change).sum())
        q -= weights[-1] * change
    q = torch.cholesky_solve(q, factor)
    if history:
        step, change = history[-1]
        q *= (step * change).sum() / (change * torch.cholesky_solve(change, factor)).sum()
    for (step, change), weight in zip(history, reversed(weights), strict=True):
        q += (weight - (change * q).sum() / (step * change).sum()) * step
    return -q


Line = Callable[[float], tuple[float, float]]  # length of the step -> value and slope


def _line(w: Tensor, direction: Tensor, logits: Tensor, along: Tensor, targets: Tensor, l2: float) -> Line:
    """The objective along a line, from the logits alone: no product with the features."""
    n = len(logits)
    squares = (w[:-1].square().sum(), (w[:-1] * direction[:-1]).sum(), direction[:-1].square().sum())
    ww, wd, dd = (s.item() for s in squares)

    def at(t: float) -> tuple[float, float]:
        log_p = (logits + t * along).log_softmax(1)
        value, slope = torch.stack([-(targets * log_p).sum(), ((log_p.exp() - targets) * along).sum()]).tolist()
        return value / n + l2 * (ww + 2 * t * wd + t * t * dd), slope / n + 2 * l2 * (wd + t * dd)

    return at


def _search(line: Line) -> float:
    """A length that meets the strong Wolfe conditions on a convex line that descends at 0.

    Bracketing and secants on the slope, which is monotone. Where it is still negative enough, convexity implies the
    decrease of the value, so that the search works where differences of values are lost in rounding.
    """
    value_0, slope_0 = line(0.0)
    low, low_slope, high, high_slope = 0.0, slope_0, float("inf"), 0.0
    t = 1.0
    for _ in range(60):
        value, slope = line(t)
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
    return t


def ridge_regression(x: Tensor, targets: Tensor, l2: float) -> Solution:
    """Minimise mean squared error + l2 * ||W||^2 over W [D, K] and a free bias [K], in closed form.

    x        [n, D] float64
    targets  [n, K] float64

    The mean is over samples and components, as in torch's mse_loss. Of collinear features without a penalty, the
    solution of the smallest norm.
    """
    assert x.dtype == targets.dtype == torch.float64 and x.ndim == targets.ndim == 2
    mean, target_mean = x.mean(0), targets.mean(0)
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    spectrum = values.clamp_min(0) + l2 * targets.shape[1]
    lost = spectrum <= len(values) * torch.finfo(torch.float64).eps * spectrum.max()
    inverse = torch.where(lost, 0, 1 / spectrum.masked_fill(lost, 1))
    weight = vectors @ (inverse[:, None] * (vectors.T @ (centred.T @ (targets - target_mean) / len(x))))
    bias = target_mean - mean @ weight
    residual = 2 * (torch.addmm(bias, x, weight) - targets) / targets.numel()
    gradient = torch.cat([torch.addmm(weight, x.T, residual, beta=2 * l2), residual.sum(0, keepdim=True)])
    return Solution(weight, bias, l2, 0, gradient.abs().max().item(), True)


def choose(
    x: Tensor,
    labels: Tensor,
    held: Tensor,
    strengths: Sequence[float],
    *,
    classes: int,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
    report: Callable[[Tried], None] = lambda tried: None,
) -> tuple[Solution, list[Tried]]:
    """The linear model of the strength that does best on the held-out samples, fitted again to all of them.

    x        [n, D] float64
    labels   [n] int64, or [n, K] float64 numbers with classes = 0
    held     [n] bool: the samples that only judge; not looked at if there is one strength
    report   is told of every strength tried

    From the strongest to the weakest, each starting at the solution before; of equals the strongest wins. Returns the
    solution, and what was tried in that order ([] if there was no choice).
    """

    def fit(x: Tensor, labels: Tensor, l2: float, start: Solution | None) -> Solution:
        if not classes:
            return ridge_regression(x, labels, l2)
        return logistic_regression(
            x, labels, classes, l2, tolerance=tolerance, max_iterations=max_iterations, start=start
        )

    best: Solution | None = None
    best_loss = float("inf")
    tried: list[Tried] = []
    if len(strengths) > 1:
        fitted, judged = (x[~held], labels[~held]), (x[held], labels[held])
        solution = None
        for l2 in sorted(strengths, reverse=True):
            solution = fit(*fitted, l2, solution)
            prediction = solution.predict(judged[0])
            score = top_k(prediction, judged[1], 1) if classes else squared_errors(prediction, judged[1]).mean().item()
            tried.append(Tried(l2, score, solution.iterations, solution.gradient, solution.converged))
            report(tried[-1])
            loss = -score if classes else score
            if best is None or loss < best_loss:
                best, best_loss = solution, loss
        del fitted, judged
    chosen = strengths[0] if best is None else best.l2
    return fit(x, labels, chosen, best), tried


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of rows whose label is among the k largest logits, in [0, 1]."""
    return (logits.topk(k, 1).indices == labels[:, None]).any(1).double().mean().item()


def squared_errors(prediction: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each component: [n, K], [n, K] -> [K]."""
    return (prediction - targets).square().mean(0)

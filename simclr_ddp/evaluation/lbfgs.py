"""L-BFGS as a generator: it asks for values and gradients, so that many problems can be evaluated together.

A generator yields (point, exact) and is sent (value, gradient) at that point. It minimises with fast evaluations
first. Where those end, it asks for an exact one, which certifies the gradient's norm, and continues with exact
evaluations if that norm is too large.
"""

import math
from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor


class Minimum(NamedTuple):
    point: Tensor
    iterations: int
    gradient: float  # Euclidean norm of the exact gradient


class Place(NamedTuple):
    """A point, and the function's value and gradient there."""

    point: Tensor
    value: float
    gradient: Tensor


Preconditioner = Callable[[Tensor], Tensor]  # product of an approximate inverse Hessian and w, [K, P] -> [K, P]
Minimization = Generator[tuple[Tensor, bool], tuple[float, Tensor], Minimum]
Search = Generator[tuple[Tensor, bool], tuple[float, Tensor], Place]

HISTORY = 10  # pairs of step and change of the gradient
_RENEWAL = 50  # iterations between updates of the preconditioner, each of which costs several iterations
_DECREASE, _SLOPE = 1e-4, 0.9  # strong Wolfe conditions on the value and on the slope
_PATIENCE = 30  # fast iterations without a smaller gradient, after which only rounding errors are left


def minimize(
    w: Tensor,
    precondition: Callable[[Tensor | None], Preconditioner],
    *,
    enough: float,
    fast_enough: float,
    max_iterations: int,
) -> Minimization:
    """Minimise a convex function of w [K, P] until the norm of its exact gradient is `enough`.

    precondition  returns a positive definite approximation of the inverse Hessian: called with None at first, and with
                  the current point after every 50 iterations
    fast_enough   norm of the gradient at which fast evaluations end

    This is Nocedal and Wright 2006, algorithm 7.4, with a strong Wolfe search. The preconditioner replaces the
    textbook's multiple of the identity, so correlated features need few iterations.
    """
    exact, iterations = False, 0
    at = Place(w, *(yield w, exact))
    least, improved = math.inf, 0
    inverse: Preconditioner | None = None
    history: list[tuple[Tensor, Tensor]] = []
    while True:
        norm = at.gradient.norm().item()
        if norm < least:
            least, improved = norm, iterations
        stalled = not exact and iterations >= improved + _PATIENCE
        if norm > (enough if exact else fast_enough) and iterations < max_iterations and not stalled:
            if inverse is None or (iterations and iterations % _RENEWAL == 0):
                inverse = precondition(None if inverse is None else at.point)
            found = yield from _next(at, history, inverse, exact)
            if found is None and history:
                history = []
                continue
            if found is not None:
                step, change = found.point - at.point, found.gradient - at.gradient
                if (change * step).sum() > 0:
                    history = [*history, (step, change)][-HISTORY:]
                at, iterations = found, iterations + 1
                continue
        if exact:
            return Minimum(at.point, iterations, norm)
        if stalled:
            history = []  # differences of rounded gradients
        exact = True
        at = Place(at.point, *(yield at.point, exact))


def _next(
    at: Place, history: list[tuple[Tensor, Tensor]], inverse: Preconditioner, exact: bool
) -> Generator[tuple[Tensor, bool], tuple[float, Tensor], Place | None]:
    """Search along the direction of L-BFGS; None if rounding errors leave no descent."""
    direction = _direction(at.gradient, history, inverse)
    slope = (direction * at.gradient).sum().item()
    if not slope < 0:
        return None
    found = yield from line_search(at, direction, slope, exact)
    moved = math.isfinite(found.value) and not torch.equal(found.point, at.point)
    return found if moved and bool(found.gradient.isfinite().all()) else None


def _direction(gradient: Tensor, history: list[tuple[Tensor, Tensor]], inverse: Preconditioner) -> Tensor:
    """Search direction -H g, [K, P], by the two-loop recursion over (step, change of the gradient)."""
    q = gradient.clone()
    weights = []
    for step, change in reversed(history):
        weights.append((step * q).sum() / (step * change).sum())
        q -= weights[-1] * change
    q = inverse(q)
    if history:
        step, change = history[-1]
        q *= (step * change).sum() / (change * inverse(change)).sum()
    for (step, change), weight in zip(history, reversed(weights), strict=True):
        q += (weight - (change * q).sum() / (step * change).sum()) * step
    return -q


def line_search(start: Place, direction: Tensor, slope_0: float, exact: bool) -> Search:
    """Find a place along the direction that meets the strong Wolfe conditions.

    slope_0  slope of the convex function at the start, negative

    The search brackets and takes secants of the slope, which is monotone. Where the slope is sufficiently negative,
    convexity implies the decrease of the value, so the search works where differences of values are lost to rounding.
    """
    low, low_slope, high, high_slope = 0.0, slope_0, math.inf, 0.0
    t = 1.0
    for _ in range(60):
        trial = start.point + t * direction
        value, gradient = yield trial, exact
        slope = (gradient * direction).sum().item()
        if slope < _SLOPE * slope_0:
            low, low_slope = t, slope
        elif slope > -_SLOPE * slope_0:
            high, high_slope = t, slope
        elif slope <= _DECREASE * slope_0 or value <= start.value + _DECREASE * t * slope_0:
            break
        else:
            high, high_slope = t, slope
        if high == math.inf:
            t *= 4
        elif not high_slope > low_slope:
            break  # only rounding errors are left
        else:
            secant = low - low_slope * (high - low) / (high_slope - low_slope)
            margin = 0.1 * (high - low)
            t = min(max(secant, low + margin), high - margin)
    return Place(trial, value, gradient)

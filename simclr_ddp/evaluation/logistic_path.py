"""Multinomial logistic regression at many strengths of the penalty, solved together.

The weights of several strengths are rows of one matrix, so a pass over the features serves all of them, in wide
products. First a few strengths far apart are solved, then those between them, each from a polynomial through the
nearest solutions. Products are in float32, chunks of them are summed in float64; the gradient at every solution is
computed again with float64 products, and where it is too large, L-BFGS continues with those.

L-BFGS is preconditioned by the Hessian averaged over the classes, which is cheap. After 100 iterations, which weak
penalties on collinear or almost separable features need, it becomes the complete Hessian where that is small enough.

Per pass and strength that is 4 n D K operations, and n D numbers read for all strengths.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from simclr_ddp.evaluation.cross_entropy import CrossEntropy
from simclr_ddp.evaluation.lbfgs import HISTORY, Minimization, Minimum, Preconditioner, minimize
from simclr_ddp.system.machine import available_bytes

_COUPLED = 6000  # largest number of weights of a model whose complete Hessian is computed
_COUPLED_BYTES = 2**31  # of their inverses, in float32, of the strengths that are solved at a time
_COLUMNS = 640  # strengths times classes per pass: wider products are not faster
_RIDGE = 2e-7  # relative to the norm of a Hessian
_FAST = 1e-6  # smallest tolerance for float32 products: their gradients are rounded to about a tenth of it
_MARGIN = 0.8  # they continue to this fraction of the tolerance
_NEAREST = 6  # most solutions that a polynomial goes through
_PATIENCE = 2  # averaged Hessians of a strength before the complete one
_NEAR = math.log(20)  # the curvature of a solution serves strengths up to this factor away


class Solution(NamedTuple):
    weight: Tensor  # [D, K] float64
    bias: Tensor  # [K] float64
    iterations: int
    gradient: float  # Euclidean norm of the objective's gradient at the solution, divided by that at zero weights
    converged: bool

    def predict(self, x: Tensor) -> Tensor:
        """Predict logits, or the numbers themselves: [n, D] float64 -> [n, K]."""
        return torch.addmm(self.bias, x, self.weight)


def logistic_path(
    data: CrossEntropy,
    l2: Sequence[float],
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    start: Solution | None = None,
) -> Iterator[tuple[int, Solution]]:
    """Minimise mean cross-entropy + l2 * |W|^2 for each l2; yield (position in l2, solution).

    start    initial weights of the first strengths, zeros by default

    Strengths are yielded as they are solved, which is not their order.
    """
    classes = data.classes
    zero = torch.zeros(classes, data.features + 1, dtype=torch.float64, device=data.device)
    at_zero = data.at(zero[None], [0.0], torch.float64)[1].norm().item()
    first = zero if start is None else torch.cat([start.weight, start.bias[None]]).T.contiguous()
    path = _Path(data, l2, first)
    for group in path.groups(_together_at_most(data.features, classes)):
        tasks = [
            minimize(
                path.start(i),
                path.preconditioner(i),
                enough=tolerance * at_zero,
                fast_enough=_MARGIN * max(tolerance, _FAST) * at_zero,
                max_iterations=max_iterations,
            )
            for i in group
        ]
        minima = _together(data, tasks, [path.l2[i] for i in group])
        path.known |= {i: minimum.point for i, minimum in zip(group, minima, strict=True)}
        for i, (w, iterations, norm) in zip(group, minima, strict=True):
            relative = norm / at_zero if at_zero else 0.0
            solution = Solution(w[:, :-1].T, w[:, -1], iterations, relative, norm <= tolerance * at_zero)
            yield from ((j, solution) for j, strength in enumerate(l2) if strength == path.l2[i])


def memory_fault(features: int, classes: int, strengths: int, device: torch.device) -> str:
    """An error message if solutions and the state of L-BFGS do not fit in free memory, or ""."""
    free = available_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    together = min(strengths, _together_at_most(features, classes))
    models = 2 * strengths + (2 * HISTORY + 6) * together
    needed = 8 * (models * classes + (together + strengths) * (features + 1)) * (features + 1)
    needed += 4 * (together + 6) * _coupled(features, classes) ** 2
    if free is None or needed <= free:
        return ""
    return (
        f"strengths: {strengths} of them with {features} features and {classes} classes need {needed / 2**30:.1f} "
        f"GiB, and {free / 2**30:.1f} GiB are free; give fewer strengths"
    )


def _coupled(features: int, classes: int) -> int:
    """Number of weights of a model, if its complete Hessian is small enough; else 0."""
    weights = (features + 1) * classes
    return weights if weights <= _COUPLED else 0


def _together_at_most(features: int, classes: int) -> int:
    """Number of strengths that are solved at a time."""
    weights = _coupled(features, classes)
    return max(1, min(_COLUMNS // classes, _COUPLED_BYTES // (4 * weights**2) if weights else _COLUMNS))


def _together(data: CrossEntropy, tasks: list[Minimization], l2: list[float]) -> list[Minimum]:
    """Run minimisations at once: a pass evaluates all that ask for the same precision, the fast ones first."""
    requests = {i: next(task) for i, task in enumerate(tasks)}
    minima: dict[int, Minimum] = {}
    while requests:
        exact = all(exact for _, exact in requests.values())
        asking = [i for i, request in requests.items() if request[1] == exact]
        points = torch.stack([requests[i][0] for i in asking])
        dtype = torch.float64 if exact else torch.float32
        values, gradients = data.at(points, [l2[i] for i in asking], dtype)
        for i, value, gradient in zip(asking, values, gradients, strict=True):
            try:
                requests[i] = tasks[i].send((value, gradient))
            except StopIteration as stop:
                minima[i] = stop.value
                del requests[i]
    return [minima[i] for i in range(len(tasks))]


def _centred(step: Tensor) -> Tensor:
    """Without the part that shifts all classes alike, which changes no prediction: [K, P]."""
    return step - step.mean(0)


def _split(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(indices), size):
        yield list(indices[first : first + size])


class _Path:
    """Order, initial weights and preconditioners of the strengths, from the solutions that are known."""

    def __init__(self, data: CrossEntropy, l2: Sequence[float], first: Tensor) -> None:
        self.data, self.first = data, first
        self.l2 = sorted(set(l2), reverse=True)
        weakest = max((-math.log(v) for v in self.l2 if v), default=0.0)
        self.position = [-math.log(v) if v else weakest + 7 for v in self.l2]  # no penalty: three decades further
        self.known: dict[int, Tensor] = {}
        self.order = 0  # number of solutions that a polynomial goes through
        self.curvatures: list[tuple[float, Tensor]] = []  # (position, averaged Hessian)

    def groups(self, size: int) -> Iterator[list[int]]:
        """Indices to solve together: some far apart, then the weakest penalty, then those between, level by level."""
        last = len(self.l2) - 1
        stride = 2 ** max(0, int(math.log2(last / 2))) if last > 1 else 1
        yield from _split(range(0, last, stride), size)
        if last >= 0:
            yield [last]
        while stride > 1:
            stride //= 2
            self.order = min(self.order + 2, _NEAREST)
            yield from _split([i for i in range(0, last, stride) if i not in self.known], size)

    def start(self, i: int) -> Tensor:
        """Initial weights: a polynomial of log l2 through the nearest solutions, if there are some on both sides.

        Between solutions far apart it is a line: weak penalties have almost the same solution.
        """
        if not self.known:
            return self.first
        nearest = sorted(self.known, key=lambda j: abs(self.position[j] - self.position[i]))
        if not min(self.known) < i < max(self.known):
            return self.known[nearest[0]]
        total = torch.zeros_like(self.first)
        for j in nearest[: self.order]:
            factor = 1.0
            for k in nearest[: self.order]:
                if k != j:
                    factor *= (self.position[i] - self.position[k]) / (self.position[j] - self.position[k])
            total += factor * self.known[j]
        return total

    def preconditioner(self, i: int) -> Callable[[Tensor | None], Preconditioner]:
        """The inverse of the averaged Hessian near the strength, then at a given point, then of the complete one there.

        The averaged one is exact at W = 0, except for the coupling of classes, to which the gradient is orthogonal.
        """
        called = 0

        def inverse(w: Tensor | None) -> Preconditioner:
            nonlocal called
            called += 1
            if w is not None and called > _PATIENCE and _coupled(self.data.features, self.data.classes):
                factor = self._factor(self.data.coupled_hessian(w), i, self.data.classes)
                complete = torch.cholesky_inverse(factor).float()
                return lambda q: _centred((complete @ q.flatten().float()).view_as(q).double())
            averaged = self._curvature(i) if w is None else self.data.averaged_hessian(w)
            matrix = torch.cholesky_inverse(self._factor(averaged, i, 1))
            return lambda q: q @ matrix

        return inverse

    def _factor(self, hessian: Tensor, i: int, classes: int) -> Tensor:
        """Cholesky factor of a Hessian [classes * (D + 1), same] with the penalty of strength i.

        A ridge above the rounding errors of float32 keeps collinear features invertible.
        """
        penalty = torch.full((classes, len(hessian) // classes), 2 * self.l2[i], dtype=torch.float64)
        penalty[:, -1] = 0
        diagonal = hessian.diagonal() + penalty.flatten().to(hessian.device)
        ridge = _RIDGE * hessian.norm().clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
        for _ in range(10):
            regular = hessian.clone()
            regular.diagonal().copy_(diagonal + ridge)
            factor, failed = torch.linalg.cholesky_ex(regular)
            if not failed:
                return factor
            ridge *= 100
        raise ValueError("logistic regression: features are too large; standardise them")

    def _curvature(self, i: int) -> Tensor:
        """Averaged Hessian of a solution that is not far, or of the initial weights."""
        if not self.known:
            if not self.curvatures:
                self.curvatures.append((math.inf, self.data.averaged_hessian(self.first)))
            return self.curvatures[0][1]
        position = self.position[i]
        near = min(self.curvatures, key=lambda c: abs(c[0] - position), default=None)
        if near is None or abs(near[0] - position) > _NEAR:
            j = min(self.known, key=lambda j: abs(self.position[j] - position))
            near = self.position[j], self.data.averaged_hessian(self.known[j])
            self.curvatures.append(near)
        return near[1]

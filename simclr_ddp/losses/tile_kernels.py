"""Kernels as they are computed on tiles of pairs: log2 k, and the slope that turns weights of log k into those of dots.

A kernel of squared distances has its gradient in a vector a from that in the dot products: with s_b the weights of a's
pairs (a, b), Σ s_b ∂(-½|a-b|²)/∂a = Σ s_b b - a Σ s_b. Kernels give s_b, and whoever adds them up does the rest.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LOG2_E, LN_2 = math.log2(math.e), math.log(2)
EXCLUDED = -1e30  # log2 k of an anchor's own image: its weight is 0, of which infinity would make a NaN

Slope = Callable[[Tensor], tuple[Tensor, ...]]


class Vectors(NamedTuple):
    """z [*, n, D], their squared norms [*, n], and what the gradient's products take in place of z [*, n, D]."""

    z: Tensor
    squares: Tensor
    factors: Tensor

    def part(self, where: slice) -> "Vectors":
        return Vectors(self.z[..., where, :], self.squares[..., where], self.factors[..., where, :])

    def half(self, index: int) -> "Vectors":
        """Of vectors [2, n, D/2]"""
        return Vectors(self.z[index], self.squares[index], self.factors[index])


class TileKernel(Protocol):
    """A kernel on tiles.

    of_squares  it is of squared distances, as the module has it: with the mean of all taken off, near vectors keep
                their digits in |a|² + |b|² - 2 a·b
    of_vectors  its slope turns weights into their part of the gradient in the rows [n, D] and in the columns [m, D]
    scale       factor of all slopes, left out of them
    keeps       a slope is one tile, in place of its weights, and fit to be kept
    """

    of_squares: bool
    of_vectors: bool
    scale: float
    keeps: bool

    def largest(self, radius: float) -> float:
        """Bound of |log2 k| for vectors no longer than `radius`."""
        ...

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        """log2 k in `out` [n, m], EXCLUDED on the diagonals `own`, and the slope: weights of log k [n, m] -> those of
        the dot products, (one tile,), in place where it can."""
        ...


class Cosine:
    """log k = scale a·b"""

    of_squares, of_vectors, keeps = False, False, True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def largest(self, radius: float) -> float:
        return self.scale * LOG2_E * radius**2

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        torch.addmm(out, rows.z, columns.z.mT, beta=0, alpha=self.scale * LOG2_E, out=out)
        fill_own(out, own, EXCLUDED)
        return out, lambda s: (s,)


class Power:
    """log k = -|a-b|^γ / τ. For γ < 2 distances count as at least √floor, and closer pairs have no gradient."""

    of_squares, of_vectors, keeps = True, False, True

    def __init__(self, temperature: float, gamma: float, floor: float) -> None:
        self.gamma, self.floor = gamma, floor if gamma < 2 else 0.0
        # x = unit |a-b|² and log2 k = -outer x^(γ/2); all in the unit, unless that leaves float32's exponents.
        exponent = 2 / gamma * math.log2(LOG2_E / temperature)
        self.unit, self.outer = (2**exponent, 1.0) if abs(exponent) < 60 else (1.0, LOG2_E / temperature)
        self.scale = gamma * self.unit * self.outer / LOG2_E  # d log k / d a·b = scale x^(γ/2 - 1)

    def largest(self, radius: float) -> float:
        x = self.unit * 4 * radius**2
        return self.outer * x ** (self.gamma / 2) if x < 1e9 else math.inf

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        factor = -self.unit * self.outer if self.gamma == 2 else self.unit
        return self.of(squared_distances(rows, columns, factor, out), own)

    def of(self, x: Tensor, own: Sequence[int]) -> tuple[Tensor, Slope]:
        """log2 k, in place of x = unit |a-b|² or, for γ = 2, of log2 k itself; and the slope."""
        if self.gamma == 2:
            fill_own(x, own, EXCLUDED)
            return x, lambda s: (s,)
        fill_own(x, own, self.unit)
        least = self.floor * self.unit
        near = None if surely(lambda: x.amin() > least, x) else x <= least  # hardly ever
        if near is not None:
            x.clamp_(min=least)
        if self.gamma == 1 and self.outer == 1:  # x^(γ/2 - 1) is -1 / log2 k, and needs no memory
            x.sqrt_().neg_()
            fill_own(x, own, EXCLUDED)
            return x, lambda s: (without(s.div_(x).neg_(), near),)
        power = x.pow(self.gamma / 2 - 1)
        x.mul_(power).mul_(-self.outer)
        fill_own(x, own, EXCLUDED)
        return x, lambda s: (without(s.mul_(power), near),)


class Mixture:
    """log k = log(w k₁ + (1-w) k₂), k₂ a Gaussian; of one distance, or of vectors [2, n, D/2], each of its half."""

    of_squares, of_vectors, scale = True, False, 1.0

    def __init__(self, first: Power, second: Power, weight: float, halves: bool) -> None:
        self.first, self.second, self.halves, self.keeps = first, second, halves, not halves
        self.log2_weights = math.log2(weight), math.log1p(-weight) * LOG2_E

    def largest(self, radius: float) -> float:
        """k is at most 1, and at least each of its parts."""
        parts = zip((self.first, self.second), self.log2_weights, strict=True)
        return min(part.largest(radius) - log2_weight for part, log2_weight in parts)

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        first, second, (of_first, of_second) = self.first, self.second, self.log2_weights
        if self.halves:
            log_first, slope = first.tile(rows.half(0), columns.half(0), own, torch.empty_like(out))
            second.tile(rows.half(1), columns.half(1), own, out)
        else:
            x = squared_distances(rows, columns, -second.unit * second.outer, out)
            alike = first.gamma == 2
            factor = first.unit * first.outer if alike else -first.unit
            log_first, slope = first.of(x * (factor / (second.unit * second.outer)), own)
            second.of(x, own)
        ahead = log_first.sub(out).add_(of_first - of_second)  # log2 of w k₁ / (1-w) k₂
        out.add_(_log2_of_1_plus_exp2(ahead)).add_(of_second)

        def slopes(s: Tensor) -> tuple[Tensor, ...]:
            in_first = ahead.mul_(LN_2).sigmoid_().mul_(s)
            in_second = s.sub_(in_first).mul_(second.scale)
            in_first = slope(in_first)[0].mul_(first.scale)
            return (torch.stack([in_first, in_second]) if self.halves else in_second.add_(in_first),)

        return out, slopes


def _log2_of_1_plus_exp2(x: Tensor) -> Tensor:
    """To an absolute 1e-7 in float32, five times as fast as softplus."""
    return x.abs().neg_().exp2_().add_(1).log2_().add_(x.clamp(min=0))


def squared_distances(rows: Vectors, columns: Vectors, factor: float, out: Tensor) -> Tensor:
    """factor |a-b|² [n, m]"""
    torch.add(rows.squares[:, None] * factor, columns.squares * factor, out=out)
    return out.addmm_(rows.z, columns.z.mT, alpha=-2 * factor)


def fill_own(pairs: Tensor, own: Sequence[int], value: float) -> None:
    for offset in own:
        pairs.diagonal(offset, -2, -1).fill_(value)


def can_ask(z: Tensor) -> bool:
    """Whether the host may test values: elsewhere than on the CPU it would wait for the device."""
    return z.device.type == "cpu"


def surely(test: Callable[[], Tensor], of: Tensor) -> bool:
    """Whether all of the test of `of` is true; False where the host can't ask."""
    return can_ask(of) and bool(test().all())


def without(s: Tensor, some: Tensor | None) -> Tensor:
    return s if some is None else s.masked_fill_(some, 0)

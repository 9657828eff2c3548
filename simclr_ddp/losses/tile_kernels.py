"""Kernels on tiles of pairs: log2 k, and the slope that turns weights of log k into weights of the dot products.

For a kernel of squared distances, the gradient in a vector a follows from that in the dot products: with weights s_b of
the pairs (a, b), Σ s_b ∂(-½|a-b|²)/∂a = Σ s_b b - a Σ s_b. Kernels return s_b, and the caller adds up the rest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LOG2_E, LN_2 = math.log2(math.e), math.log(2)
EXCLUDED = -1e30  # log2 k of pairs of one image: their weight is 0, and with -inf it would be NaN

Slope = Callable[[Tensor], tuple[Tensor, ...]]


class Vectors(NamedTuple):
    """Vectors z [*, n, D], their squared norms [*, n], and the factors of the gradient's products [*, n, D]."""

    z: Tensor
    squares: Tensor
    factors: Tensor

    def part(self, where: slice) -> "Vectors":
        return Vectors(self.z[..., where, :], self.squares[..., where], self.factors[..., where, :])

    def half(self, index: int) -> "Vectors":
        """Half `index` of vectors [2, n, D/2]."""
        return Vectors(self.z[index], self.squares[index], self.factors[index])


class TileKernel(Protocol):
    """A kernel on tiles.

    of_squares  whether it is a function of squared distances: subtracting the mean of all vectors then preserves the
                digits of |a|² + |b|² - 2 a·b for near vectors
    of_vectors  whether its slope turns weights into gradients of the rows [n, D] and of the columns [m, D]
    scale       factor of all slopes, not included in them
    keeps       whether a slope is one tile, written over its weights, that can be kept for the backward pass
    """

    of_squares: bool
    of_vectors: bool
    scale: float
    keeps: bool

    def largest(self, radius: float) -> float:
        """Upper bound of |log2 k| for vectors no longer than `radius`."""
        ...

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        """Write log2 k to `out` [n, m], EXCLUDED on the diagonals `own`; return it and the slope.

        The slope maps weights of log k [n, m] to weights of the dot products, (one tile,), in place where possible.
        """
        ...


class Cosine:
    """Cosine kernel: log k = scale a·b."""

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
    """Power kernel: log k = -|a-b|^γ / τ. For γ < 2 distances are at least √floor; closer pairs have no gradient."""

    of_squares, of_vectors, keeps = True, False, True

    def __init__(self, temperature: float, gamma: float, floor: float) -> None:
        self.gamma, self.floor = gamma, floor if gamma < 2 else 0.0
        # x = unit |a-b|² and log2 k = -outer x^(γ/2); outer is 1 unless the unit would leave float32's exponent range.
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
        """Return log2 k, written over x = unit |a-b|² (for γ = 2 x is log2 k), and the slope."""
        if self.gamma == 2:
            fill_own(x, own, EXCLUDED)
            return x, lambda s: (s,)
        fill_own(x, own, self.unit)
        least = self.floor * self.unit
        near = None if surely(lambda: x.amin() > least, x) else x <= least  # rare
        if near is not None:
            x.clamp_(min=least)
        if self.gamma == 1 and self.outer == 1:  # x^(γ/2 - 1) is -1 / log2 k and needs no memory
            x.sqrt_().neg_()
            fill_own(x, own, EXCLUDED)
            return x, lambda s: (without(s.div_(x).neg_(), near),)
        power = x.pow(self.gamma / 2 - 1)
        x.mul_(power).mul_(-self.outer)
        fill_own(x, own, EXCLUDED)
        return x, lambda s: (without(s.mul_(power), near),)


class Mixture:
    """Mixture: log k = log(w k₁ + (1-w) k₂), k₂ Gaussian; both of one distance, or each of one half [n, D/2]."""

    of_squares, of_vectors, scale = True, False, 1.0

    def __init__(self, first: Power, second: Power, weight: float, halves: bool) -> None:
        self.first, self.second, self.halves, self.keeps = first, second, halves, not halves
        self.log2_weights = math.log2(weight), math.log1p(-weight) * LOG2_E

    def largest(self, radius: float) -> float:
        """Upper bound of |log2 k|: k is at most 1 and at least each weighted component."""
        components = zip((self.first, self.second), self.log2_weights, strict=True)
        return min(kernel.largest(radius) - log2_weight for kernel, log2_weight in components)

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
    """log2(1 + 2^x), exact to 1e-7 in float32 and five times as fast as softplus."""
    return x.abs().neg_().exp2_().add_(1).log2_().add_(x.clamp(min=0))


def squared_distances(rows: Vectors, columns: Vectors, factor: float, out: Tensor) -> Tensor:
    """Write factor |a-b|² [n, m] to `out`."""
    torch.add(rows.squares[:, None] * factor, columns.squares * factor, out=out)
    return out.addmm_(rows.z, columns.z.mT, alpha=-2 * factor)


def fill_own(pairs: Tensor, own: Sequence[int], value: float) -> None:
    for offset in own:
        pairs.diagonal(offset, -2, -1).fill_(value)


def can_ask(z: Tensor) -> bool:
    """Whether values may be tested on the host: on other devices it would wait for the device."""
    return z.device.type == "cpu"


def surely(test: Callable[[], Tensor], of: Tensor) -> bool:
    """Whether the test of `of` is true everywhere; False where the host must not wait for the device."""
    return can_ask(of) and bool(test().all())


def without(s: Tensor, some: Tensor | None) -> Tensor:
    return s if some is None else s.masked_fill_(some, 0)


PRECISIONS = ("fp32", "bf16")
BACKENDS = ("tiled", "triton")


class Ranks(Protocol):
    """Collectives among ranks that share a batch, called in the same order on all; see `kernel_info_nce`."""

    index: int
    count: int

    def gather(self, z: Tensor) -> Tensor: ...
    def all_rows(self, local: Tensor) -> Tensor: ...
    def log_sum(self, values: Tensor) -> Tensor: ...
    def sum(self, values: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Problem:
    """Everything that determines the log-sums, except the vectors.

    kernel     the kernel on tiles
    plain      (z, z_all) -> log-sums [2B], in ordinary differentiable operations, for second derivatives
    first      position in z_all of row 0's image
    precision  of the gradient's products, weights times embeddings, in float32: "fp32", or "bf16", which rounds the
               operands and each tile's product. bf16 is twice as fast on processors with such instructions, with an
               error of 1e-4 to 5e-3 of the gradient's norm, largest for clustered embeddings. Kernels stay float32.
    ranks      if None, the gradient in z and z_all is that of this process. Else z_all holds the z of all ranks and
               is constant, and the gradient in z is that of the sum over ranks of their functions of the log-sums.
    backend    "tiled", or "triton" for the kernels of `simclr_ddp.losses.triton_log_sums`; ValueError where they don't
               apply. They are experimental: checked in Triton's interpreter, not measured on a GPU yet.
    radius     upper bound of the vectors' Euclidean norm; on a GPU it decides whether k are added without a shift,
               the CPU measures it
    """

    kernel: TileKernel
    plain: Callable[[Tensor, Tensor], Tensor]
    first: int
    precision: str
    ranks: Ranks | None
    backend: str = "tiled"
    radius: float = math.inf

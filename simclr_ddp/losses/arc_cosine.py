"""The arc-cosine kernels of Cho and Saul 2009 (degrees 0 to 2) on unit vectors.

With cos θ = 1 - τ(1 - a·b) = 1 - τ|a-b|²/2, 0 < τ <= 1, so that τ *multiplies* the cosine's distance from 1, and
φ = π - θ,

    order 1   J = π - θ                              = φ                               J' = 1
    order 2   J = sin θ + (π-θ) cos θ                = sin φ - φ cos φ                 J' = φ sin φ
    order 3   J = 3 sin θ cos θ + (π-θ)(1 + 2 cos²θ) = φ (2 + cos 2φ) - 1.5 sin 2φ     J' = 4 sin φ (sin φ - φ cos φ)

and dφ = d cos θ / sin φ. Towards φ = 0 (opposite vectors) J falls as φ, φ³/3, 4φ⁵/15. cos θ is kept EDGE away from ±1,
where the slope of θ is infinite. It is computed from the distance, since 1 - a·b loses its digits for near vectors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from simclr_ddp.losses.tile_kernels import EXCLUDED, Slope, Vectors, fill_own, squared_distances, surely, without

EDGE = 1e-6


def arccos(dot: Tensor, squared_distance: Tensor, temperature: float, order: int) -> Tensor:
    """Log of J from the squared distances of unit vectors; see the module docstring."""
    # Half angles, from 1 - cos θ and 1 + cos θ separately, so that neither end loses digits.
    below_one = temperature / 2 * squared_distance
    above_minus_one = (2 - below_one).clamp(EDGE, 2 - EDGE)
    below_one = below_one.clamp(EDGE, 2 - EDGE)
    phi = 2 * torch.atan2(above_minus_one.sqrt(), below_one.sqrt())
    return _angular(phi, order, temperature).log()


class ArcCosine:
    """The arc-cosine log-kernel on tiles (simclr_ddp.losses.tile_kernels.TileKernel)."""

    of_squares, of_vectors, keeps = True, False, True

    def __init__(self, temperature: float, order: int) -> None:
        self.temperature, self.order, self.scale = temperature, order, temperature

    def largest(self, radius: float) -> float:
        return 52.0  # 4φ⁵/15 where cos θ is EDGE from -1; J is at most 3π

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        below_one = squared_distances(rows, columns, self.temperature / 2, out)
        fill_own(below_one, own, 1)
        within = surely(lambda: _within(*below_one.aminmax()), below_one)
        ends = None if within else (below_one < EDGE) | (below_one > 2 - EDGE)
        if ends is not None:
            below_one.clamp_(EDGE, 2 - EDGE)
        above_minus_one = 2 - below_one
        sine = (below_one * above_minus_one).sqrt_()
        phi = torch.atan2(above_minus_one.sqrt_(), below_one.sqrt_()).mul_(2)
        value = _angular(phi, self.order, self.temperature)
        torch.log2(value, out=out)
        fill_own(out, own, EXCLUDED)
        if self.order == 1:
            slope = 1 / (phi * sine)
        else:
            slope = (phi if self.order == 2 else 4 * _angular(phi, 2, self.temperature)) / value
        return out, lambda s: (without(s.mul_(slope), ends),)


def _within(least: Tensor, most: Tensor) -> Tensor:
    return (least >= EDGE) & (most <= 2 - EDGE)


def _angular(phi: Tensor, order: int, temperature: float) -> Tensor:
    """Return J as a function of φ."""
    if order == 1:
        return phi
    closed = phi.sin() - phi * phi.cos() if order == 2 else phi * (2 + (2 * phi).cos()) - 1.5 * (2 * phi).sin()
    if temperature <= 0.5:  # cos θ >= 1 - 2τ, so φ >= π/2
        return closed
    if order == 2:
        series = phi.pow(3) * _polynomial(phi.square(), _ORDER_2)
    else:
        series = (2 * phi).pow(5) * _polynomial((2 * phi).square(), _ORDER_3)
    return torch.where(phi < 1.5, series, closed)


# Taylor coefficients of sin φ - φ cos φ in φ³, φ⁵, … and, in x = 2φ, of x (2 + cos x) / 2 - 1.5 sin x in x⁵, x⁷, …
# The leading terms of the closed forms cancel for small φ; for φ < 1.5 this many terms are exact in float64.
_ORDER_2 = tuple((-1) ** (k + 1) * 2 * k / math.factorial(2 * k + 1) for k in range(1, 13))
_ORDER_3 = tuple((-1) ** k * (k - 1) / math.factorial(2 * k + 1) for k in range(2, 16))


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    value = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value

"""Exponential kernel of p-norm distances: log k(a, b) = -‖a-b‖_p^γ / τ.

For p other than 2 no matrix product gives these distances: the D differences of a pair are computed in blocks that
fit the cache, and again in the backward pass. As in the 2-norm, for γ < 2 distances are clamped to at least `floor`,
and closer pairs have no gradient.

Tan et al. 2024 (arXiv 2303.15103) define it for any distance. With s = ‖u‖_p the gradient of s^γ is

    p = 1        γ s^(γ-1) sign(u)
    1 < p < inf  γ s^(γ-1) sign(u) (|u|/s)^(p-1)
    p = inf      γ s^(γ-1) sign(u_k) in coordinate k, the first one that maximises |u|
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from simclr_ddp.losses.tile_kernels import EXCLUDED, LOG2_E, Slope, Vectors, fill_own

BLOCK = 2**19  # numbers per block of differences: 2 MiB in float32
GPU_BLOCK = 2**25  # a GPU finishes smaller blocks before the next is launched


class PDistance:
    """Log-kernel of p-norm distances, on differences and on tiles (simclr_ddp.losses.tile_kernels.TileKernel).

    temperature  τ, which divides the power of the distance
    gamma        γ, above 0
    p            of the norm, from 1 to math.inf
    floor        smallest distance for γ < 2, above 0
    """

    of_squares, of_vectors, scale, keeps = False, True, 1.0, False

    def __init__(self, temperature: float, gamma: float, p: float, floor: float) -> None:
        self.temperature, self.gamma, self.p = temperature, gamma, p
        self.floor = floor if gamma < 2 else 0.0

    def __call__(self, differences: Tensor) -> Tensor:
        """Log-kernel [...] of differences [..., D], in ordinary differentiable operations."""
        return self._log_k(p_norm(differences, self.p))

    def between(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Log-kernels [n, m] of all pairs of [n, D] and [m, D], without a gradient, in blocks."""
        return self._log_k(self._lengths(rows, columns))

    def largest(self, radius: float) -> float:
        return math.inf  # adding unshifted exponentials saves nothing: differences dominate

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        lengths = self._lengths(rows.z, columns.z)
        torch.mul(self._log_k(lengths), LOG2_E, out=out)
        fill_own(out, own, EXCLUDED)

        def slope(weights: Tensor) -> tuple[Tensor, Tensor]:
            """Σ weight ∂log k / ∂row over the tile's pairs [n, D], and Σ weight ∂log k / ∂column [m, D]."""
            factor = lengths.clamp(min=self.floor).pow_(self.gamma - 1).mul_(-self.gamma / self.temperature)
            factor.masked_fill_(lengths <= self.floor, 0)  # also for equal vectors, which have no direction
            factor *= weights
            in_rows, in_columns = torch.empty_like(rows.z), torch.zeros_like(columns.z)
            for part in _row_blocks(rows.z, columns.z):
                block = self._directions(rows.z[part, None] - columns.z, lengths[part, :, None])
                block *= factor[part, :, None]
                torch.sum(block, 1, out=in_rows[part])
                in_columns -= block.sum(0)
            return in_rows, in_columns

        return out, slope

    def _log_k(self, lengths: Tensor) -> Tensor:
        if self.gamma < 2:
            lengths = lengths.clamp(min=self.floor)
        return -lengths.pow(self.gamma) / self.temperature

    def _lengths(self, rows: Tensor, columns: Tensor) -> Tensor:
        lengths = rows.new_empty(len(rows), len(columns))
        for part in _row_blocks(rows, columns):
            lengths[part] = p_norm(rows[part, None] - columns, self.p)
        return lengths

    def _directions(self, u: Tensor, lengths: Tensor) -> Tensor:
        """Gradient of the p-norm of differences [..., D] with lengths [..., 1], in place where possible."""
        if self.p == 1:
            return u.sign_()
        if self.p == math.inf:
            first = u.abs().argmax(-1, keepdim=True)
            return torch.zeros_like(u).scatter_(-1, first, u.gather(-1, first).sign_())
        u /= lengths.clamp(min=torch.finfo(u.dtype).tiny)
        return u if self.p == 2 else u.sign().mul_(u.abs_().pow_(self.p - 1))


def p_norm(u: Tensor, p: float) -> Tensor:
    """p-norm along the last dimension; at 0 its gradient is 0, for p = inf only the first maximum gets one."""
    if p == 1:
        return u.abs().sum(-1)
    size = u.abs()
    if p == math.inf:
        return size.gather(-1, size.argmax(-1, keepdim=True)).squeeze(-1)
    # Powers are relative to the largest coordinate, since powers of small numbers underflow in float32.
    largest = size.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    ratio = size / largest
    if p < 2 and ratio.requires_grad:  # a second derivative is infinite at 0, and would meet 0 (0·inf = NaN)
        none = ratio == 0
        powers = ratio.masked_fill(none, 1).pow(p).masked_fill(none, 0)
    else:
        powers = ratio.pow(p)
    total = powers.sum(-1)
    zero = total == 0  # there the root's slope is infinite
    return total.masked_fill(zero, 1).pow(1 / p).masked_fill(zero, 0) * largest.squeeze(-1)


def _row_blocks(rows: Tensor, columns: Tensor) -> Iterator[slice]:
    """Slices of rows whose differences from all columns fill one block."""
    block = BLOCK if rows.device.type == "cpu" else GPU_BLOCK
    length = max(1, block // max(1, columns.numel()))
    for start in range(0, len(rows), length):
        yield slice(start, min(start + length, len(rows)))

"""The exponential kernel of p-norm distances: log k(a, b) = -‖a-b‖_p^γ / τ.

No matrix product gives these distances for p other than 2: the differences themselves are gone through, D numbers a
pair, in blocks of which one fits the cache, and the backward pass goes through them again. As in the 2-norm, a distance
counts as at least `floor` for γ < 2, and pairs closer than that have no gradient.

Tan et al. 2024 (arXiv 2303.15103), whose exponential kernel takes any distance. With s = ‖u‖_p the gradient of s^γ is

    p = 1        γ s^(γ-1) sign(u)
    1 < p < inf  γ s^(γ-1) sign(u) (|u|/s)^(p-1)
    p = inf      γ s^(γ-1) sign(u_k) in coordinate k, the first of those in which |u| is largest
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from simclr_ddp.tile_kernels import EXCLUDED, LOG2_E, Slope, Vectors, fill_own

BLOCK = 2**19  # numbers of a block of differences: 2 MiB in float32
GPU_BLOCK = 2**25  # there a smaller one is done before the next is launched


class PDistance:
    """The log-kernel, of differences and of tiles (simclr_ddp.tile_kernels.TileKernel).

    temperature  τ, which divides the power of the distance
    gamma        γ, above 0
    p            from 1 to math.inf
    floor        least distance for γ < 2, above 0
    """

    of_squares, of_vectors, scale, keeps = False, True, 1.0, False

    def __init__(self, temperature: float, gamma: float, p: float, floor: float) -> None:
        self.temperature, self.gamma, self.p = temperature, gamma, p
        self.floor = floor if gamma < 2 else 0.0

    def __call__(self, differences: Tensor) -> Tensor:
        """[..., D] -> [...], in ordinary differentiable operations."""
        return self._log_k(p_norm(differences, self.p))

    def of_all(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Of each of [n, D] with each of [m, D] -> [n, m], without a gradient, in blocks."""
        return self._log_k(self._lengths(rows, columns))

    def largest(self, radius: float) -> float:
        return math.inf  # nothing is gained where exponentials are added as they are: differences take the time

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        lengths = self._lengths(rows.z, columns.z)
        torch.mul(self._log_k(lengths), LOG2_E, out=out)
        fill_own(out, own, EXCLUDED)

        def slope(weights: Tensor) -> tuple[Tensor, Tensor]:
            """Σ weight ∂log k / ∂row of the tile's pairs [n, D], and / ∂column [m, D]"""
            factor = lengths.clamp(min=self.floor).pow_(self.gamma - 1).mul_(-self.gamma / self.temperature)
            factor.masked_fill_(lengths <= self.floor, 0)  # of equal vectors as well: 0 has any direction
            factor *= weights
            in_rows, in_columns = torch.empty_like(rows.z), torch.zeros_like(columns.z)
            for part in _parts(rows.z, columns.z):
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
        for part in _parts(rows, columns):
            lengths[part] = p_norm(rows[part, None] - columns, self.p)
        return lengths

    def _directions(self, u: Tensor, lengths: Tensor) -> Tensor:
        """Gradient of the p-norm of differences [..., D] of these lengths [..., 1], in place where it can."""
        if self.p == 1:
            return u.sign_()
        if self.p == math.inf:
            first = u.abs().argmax(-1, keepdim=True)
            return torch.zeros_like(u).scatter_(-1, first, u.gather(-1, first).sign_())
        u /= lengths.clamp(min=torch.finfo(u.dtype).tiny)
        return u if self.p == 2 else u.sign().mul_(u.abs_().pow_(self.p - 1))


def p_norm(u: Tensor, p: float) -> Tensor:
    """[..., D] -> [...]; of two largest coordinates the maximum norm's gradient goes to the first, at 0 it is 0."""
    if p == 1:
        return u.abs().sum(-1)
    size = u.abs()
    if p == math.inf:
        return size.gather(-1, size.argmax(-1, keepdim=True)).squeeze(-1)
    # Relative to the largest coordinate: powers of small numbers are soon no numbers of float32.
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


def _parts(rows: Tensor, columns: Tensor) -> Iterator[slice]:
    """Runs of rows whose differences from all columns are a block."""
    block = BLOCK if rows.device.type == "cpu" else GPU_BLOCK
    length = max(1, block // max(1, columns.numel()))
    for start in range(0, len(rows), length):
        yield slice(start, min(start + length, len(rows)))

"""An alternative to `simclr_ddp.losses.tiled` for the cosine loss: each rank computes its rows against all columns.

A pair is not used for its row and its column, so there are three products of 2B x 2N pairs instead of two, and twice
the exponentials; in return the ranks exchange 4N numbers, and no gradient [2N, D] is summed over ranks. It exists only
for comparison.
"""

from typing import Any

import torch
from torch import Tensor, nn

from simclr_ddp.distributed import collectives
from simclr_ddp.losses import tiled, tiling
from simclr_ddp.losses.contrastive import normalize
from simclr_ddp.losses.tile_kernels import EXCLUDED, LOG2_E, fill_own


class RowsOnly(nn.Module):
    """The loss of `KernelInfoNCE` with the cosine, for temperatures at which no exponential of float32 overflows."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.scale = 1 / temperature

    def forward(self, y_a: Tensor, y_b: Tensor) -> Tensor:
        z = normalize(torch.stack([y_a, y_b]))
        z_all = torch.cat(collectives.all_gather(z), dim=1)
        first = collectives.local_slice(z_all.shape[1]).start
        positive = (self.scale * (z[0] * z[1]).sum(-1)).repeat(2)
        excess = _RowSums.apply(z, z_all, first, self.scale) - positive
        return torch.logaddexp(excess, torch.zeros_like(excess)).mean()


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, z_all: Tensor, first: int, scale: float) -> Tensor:
        rows, columns = z.flatten(0, 1), z_all.flatten(0, 1)
        tiles, sums = tiling.tiles(z.shape[1], z_all.shape[1], first, False), rows.new_zeros(len(rows))
        with tiled.buffers.lent(tiling.TILE**2, z) as buffer:
            for tile in tiles:
                sums[tile.rows] += _kernel(rows, columns, tile, scale, buffer).sum(1)
        ctx.save_for_backward(z, z_all, sums)
        ctx.tiles, ctx.scale = tiles, scale
        return sums.log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, z_all, sums = ctx.saved_tensors
        own = ctx.scale * gradients[0] / sums
        every = torch.cat(collectives.all_gather(own.view(2, -1)), dim=1).flatten()
        rows, columns = z.flatten(0, 1), z_all.flatten(0, 1)
        found = torch.zeros_like(rows)
        with tiled.buffers.lent(2 * tiling.TILE**2, z) as buffer:
            for tile in ctx.tiles:
                k = _kernel(rows, columns, tile, ctx.scale, buffer[: len(buffer) // 2])
                s = torch.mul(k, own[tile.rows, None], out=buffer[len(buffer) // 2 :][: k.numel()].view(k.shape))
                found[tile.rows].addmm_(s.addcmul_(k, every[tile.columns]), columns[tile.columns])
        return found.view(z.shape), None, None, None


def _kernel(rows: Tensor, columns: Tensor, tile: tiling.Tile, scale: float, buffer: Tensor) -> Tensor:
    a, b = rows[tile.rows], columns[tile.columns]
    out = buffer[: len(a) * len(b)].view(len(a), len(b))
    torch.addmm(out, a, b.T, beta=0, alpha=scale * LOG2_E, out=out)
    fill_own(out, tile.own, EXCLUDED)
    return out.exp2_()

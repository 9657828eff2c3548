"""Log-sums of a kernel over every anchor's negatives, computed tile by tile in memory that grows with N.

With kernel k, and the views of all images other than m's as negatives of m,

    log-sum   A_m = log Σ_{negatives j of m} k(z_m, z_j)
    gradient  Σ_m g_m ∂A_m = Σ_{pairs m, j} S_mj ∂log k(z_m, z_j)     S_mj = g_m exp(log k - A_m) + g_j exp(log k - A_j)

The forward pass keeps A and, for small batches, the tiles (at most 40 MiB per kernel, 256 MiB on a GPU; a mixture of
losses has two kernels); for larger batches the backward pass recomputes them. If the anchors are the complete batch,
each pair is in one tile, on or above the diagonal, which serves its row and its column. Ranks share the tiles evenly.

Tiles hold log2 k: exp2 is three times as fast as exp, and no slower when it underflows. If the lengths of the vectors
bound log2 k well within float32's exponent range, k itself is summed, with one exponential per pair. Otherwise, at low
temperatures, each row and each column is shifted by its maximum; a common shift for both would not be enough.

Nothing here makes the host wait for a GPU: decisions there depend on the objective instead of on values, or the work is
always done. On the CPU a test of values costs less than the pass over memory that it saves.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from simclr_ddp.losses.matmul import full_precision
from simclr_ddp.losses.tile_kernels import Problem, TileKernel, Vectors, can_ask, fill_own, surely
from simclr_ddp.losses.tiling import Tile, sizes_for, tiles

SAFE = 64.0  # largest |log2 k| for which k are added without a shift


@torch.no_grad()
def largest(
    z: Tensor, z_all: Tensor, first: int, of_tile: Callable[[Vectors, Vectors, Sequence[int]], Tensor]
) -> Tensor:
    """Largest log-kernel of each anchor over its negatives, [2B]; -inf without negatives. Arguments as in `log_sums`.

    of_tile  (rows, columns, own) -> log-kernels [n, m], with any values on the diagonals `own`
    """
    rows, columns = _vectors(z), _vectors(z_all)
    found = z.new_full((rows.z.shape[-2],), -math.inf)
    with full_precision(z.device.type):
        for tile in tiles(z.shape[-2], z_all.shape[-2], first, z is z_all, sizes=sizes_for(z.device)):
            log_k = of_tile(rows.part(tile.rows), columns.part(tile.columns), tile.own)
            fill_own(log_k, tile.own, -math.inf)
            for dim, where in ((1, tile.rows), (0, tile.columns))[: 1 + tile.mirrored]:
                torch.maximum(found[where], log_k.amax(dim), out=found[where])
    return found


# --- tiles ----------------------------------------------------------------------------------------------------------


def pairs(rows: Vectors, columns: Vectors, own: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Dot products and squared distances of a tile; 0 and 1 on the diagonals `own`."""
    dot = rows.z @ columns.z.mT
    squared_distance = (rows.squares[..., :, None] + columns.squares[..., None, :] - 2 * dot).clamp_(min=0)
    fill_own(dot, own, 0)
    fill_own(squared_distance, own, 1)
    return dot, squared_distance


# --- memory ---------------------------------------------------------------------------------------------------------


class Buffers(threading.local):
    """Reusable CPU buffers of a thread: mapping new memory page by page takes longer than the products of a tile.

    On other devices torch itself caches freed memory.
    """

    def __init__(self) -> None:
        self.idle: dict[str, Tensor] = {}

    def take(self, name: str, numbers: int, like: Tensor) -> Tensor:
        """Return uninitialised memory for that many numbers, with dtype and device of `like`."""
        found = self.idle.pop(name, None) if like.device.type == "cpu" else None
        if found is None or found.dtype != like.dtype or found.numel() < numbers or found.is_inference():
            found = like.new_empty(numbers)
        return found

    def give_back(self, name: str, buffer: Tensor) -> None:
        if buffer.device.type == "cpu":
            self.idle[name] = buffer

    @contextmanager
    def lent(self, numbers: int, like: Tensor) -> Iterator[Tensor]:
        buffer = self.take("lent", numbers, like)
        yield buffer[:numbers]
        self.give_back("lent", buffer)


buffers = Buffers()


# --- the two passes -------------------------------------------------------------------------------------------------


def centred(z: Tensor, z_all: Tensor, symmetric: bool, kernel: TileKernel) -> tuple[Tensor, Tensor]:
    """Subtract the mean of z_all from both if the kernel is invariant to it."""
    if not kernel.of_squares:
        return z, z_all
    centre = z_all.mean(dim=(-3, -2), keepdim=True)
    columns = z_all - centre
    return columns if symmetric else z - centre, columns


class Pairs:
    """The tiles of a problem and the vectors that they pair."""

    def __init__(self, z: Tensor, z_all: Tensor, symmetric: bool, problem: Problem) -> None:
        ranks = problem.ranks
        self.problem, self.symmetric = problem, symmetric or ranks is not None
        rows = z_all if ranks is not None else z
        self.z, self.z_all = centred(rows, z_all, self.symmetric, problem.kernel)
        self.batch, self.total = z.shape[-2], z_all.shape[-2]
        share = (ranks.index, ranks.count) if ranks is not None else (0, 1)
        first = 0 if self.symmetric else problem.first
        self.sizes = sizes_for(z.device)
        self.tiles = tiles(self.z.shape[-2], self.total, first, self.symmetric, *share, self.sizes)

    def local_rows(self, rows: Tensor) -> Tensor:
        """Select the rows of this process's anchors: [..., 2 * rows, D] -> [..., 2B, D]."""
        if self.problem.ranks is None:
            return rows
        local = slice(self.problem.first, self.problem.first + self.batch)
        return rows.unflatten(-2, (2, -1))[..., local, :].flatten(-3, -2)

    def log_sums(self, keep: bool) -> tuple[Tensor, Tensor | None]:
        """log2 of the sums of all rows over all ranks, and, if kept for the backward pass, the slopes times k."""
        kernel, ranks = self.problem.kernel, self.problem.ranks
        rows, columns = self._sides()
        direct, all_pairs = self._is_direct(rows, columns), sum(tile.area for tile in self.tiles)
        keep = keep and direct and kernel.keeps and all_pairs * self.z.element_size() <= self.sizes.kept
        kept = buffers.take("kept", all_pairs, self.z) if keep else None
        sums = self.z.new_full((rows.z.shape[-2],), 0 if direct else -math.inf)
        with self._scratch(2) as (out, scratch), full_precision(self.z.device.type):
            for tile, place in zip(self.tiles, _places(self.tiles, kept), strict=True):
                part, other = rows.part(tile.rows), columns.part(tile.columns)
                log_k, slope = kernel.tile(part, other, tile.own, _shaped(out, tile))
                sides = ((1, tile.rows), (0, tile.columns))[: 1 + tile.mirrored]
                if direct:
                    k = torch.exp2(log_k, out=_shaped(scratch, tile) if place is None else place)
                    for dim, where in sides:
                        sums[where].add_(k.sum(dim))  # `+=` would copy the result onto itself
                    if place is not None:
                        slope(k)
                    continue
                for dim, where in sides:
                    most = log_k.amax(dim, keepdim=True)
                    total = torch.sub(log_k, most, out=_shaped(scratch, tile)).exp2_().sum(dim)
                    torch.logaddexp2(sums[where], total.log2_().add_(most.view(-1)), out=sums[where])
        if ranks is not None:
            sums = ranks.sum(sums) if direct else ranks.log_sum(sums)
        return sums.log2_() if direct else sums, kept

    def gradients(
        self, sums: Tensor, upstream: Tensor, kept: Tensor | None, columns_too: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of Σ upstream · sums in the rows and, unless symmetric, in the columns if `columns_too`."""
        kernel, symmetric = self.problem.kernel, self.symmetric
        narrow = self.problem.precision == "bf16" and self.z_all.dtype == torch.float32
        centre = self.z_all.mean(dim=(-3, -2)) if narrow else None  # keeps digits that the common mean would take
        rows, columns = self._sides(centre, narrow)
        in_rows = _Gradient(self.z, kernel, centre)
        in_columns = in_rows if symmetric else _Gradient(self.z_all, kernel, centre)
        level = (upstream.abs() * kernel.scale).log2_() - sums
        factor = level.exp2().copysign_(upstream) if self._is_direct(rows, columns) else None
        signs = None if factor is not None or surely(lambda: upstream >= 0, upstream) else upstream.sign()
        with self._scratch(3) as scratch, full_precision(self.z.device.type):
            for tile, place in zip(self.tiles, _places(self.tiles, kept), strict=True):
                part, other = rows.part(tile.rows), columns.part(tile.columns)
                buffers_of_tile = [_shaped(b, tile) for b in scratch]
                found = self._slopes(tile, part, other, level, factor, signs, place, buffers_of_tile)
                both_count = tile.mirrored or (columns_too and not symmetric)
                if kernel.of_vectors:
                    in_rows.products[tile.rows].add_(found[0])
                    if both_count:
                        in_columns.products[tile.columns].add_(found[1])
                    continue
                (on_dots,) = found
                rounded = on_dots.bfloat16() if narrow else on_dots
                in_rows.add(tile.rows, on_dots, rounded, other.factors, -1)
                if both_count:
                    in_columns.add(tile.columns, on_dots, rounded.mT, part.factors, -2)
        total = in_rows.total()
        return total, total if symmetric else in_columns.total()

    def _slopes(
        self,
        tile: Tile,
        rows: Vectors,
        columns: Vectors,
        level: Tensor,
        factor: Tensor | None,
        signs: Tensor | None,
        place: Tensor | None,
        scratch: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Slope applied to the tile's weights S = signs 2^level k, or S = factor k if sums are direct."""
        kernel, (out, s, other) = self.problem.kernel, scratch
        if place is None:
            log_k, slope = kernel.tile(rows, columns, tile.own, out)
        if factor is None:
            torch.add(log_k, level[tile.rows, None], out=s).exp2_()
            if signs is not None:
                s *= signs[tile.rows, None]
            if self.symmetric:
                torch.add(log_k, level[tile.columns], out=other).exp2_()
                s = s.add_(other) if signs is None else s.addcmul_(other, signs[tile.columns])
            return slope(s)
        if place is None:
            place = torch.exp2(log_k, out=other)
            if kernel.keeps:
                slope(place)  # before the product, so that bits equal those of kept tiles
        torch.mul(place, factor[tile.rows, None], out=s)
        if self.symmetric:
            s.addcmul_(place, factor[tile.columns])
        return (s,) if kernel.keeps else slope(s)

    def _sides(self, centre: Tensor | None = None, narrow: bool = False) -> tuple[Vectors, Vectors]:
        rows = _vectors(self.z, centre, narrow)
        return rows, rows if self.symmetric else _vectors(self.z_all, centre, narrow)

    def _is_direct(self, rows: Vectors, columns: Vectors) -> bool:
        """Whether k can be summed without a shift; False for one image, which has no negatives."""
        if self.total == 1:
            return False
        radius = self.problem.radius
        if can_ask(self.z):
            radius = torch.maximum(rows.squares.max(), columns.squares.max()).sqrt().item()
        return self.problem.kernel.largest(radius) <= SAFE

    @contextmanager
    def _scratch(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        """Lend `count` buffers, each large enough for any tile."""
        numbers = max((tile.area for tile in self.tiles), default=0)
        with buffers.lent(count * numbers, self.z) as buffer:
            yield buffer.view(count, numbers).unbind()


class _Gradient:
    """Gradient of vectors, summed over tiles: Σ w (other - centre), and Σ w if `total` needs it."""

    def __init__(self, z: Tensor, kernel: TileKernel, centre: Tensor | None) -> None:
        self.z, self.centre, self.of_squares = z.flatten(-3, -2), centre, kernel.of_squares
        self.products = torch.zeros_like(self.z)
        self.weights = self.z.new_zeros(self.z.shape[:-1]) if kernel.of_squares or centre is not None else None

    def add(self, where: slice, on_dots: Tensor, rounded: Tensor, others: Tensor, dim: int) -> None:
        target = self.products[..., where, :]
        if rounded.dtype != target.dtype:
            target += rounded @ others
        elif rounded.ndim == 2:
            target.addmm_(rounded, others)
        else:
            target.baddbmm_(rounded, others)
        if self.weights is not None:
            self.weights[..., where].add_(on_dots.sum(dim))

    def total(self) -> Tensor:
        if self.centre is not None and self.weights is not None:
            self.products.addcmul_(self.weights[..., None], self.centre[..., None, :])
        if self.of_squares and self.weights is not None:
            self.products.addcmul_(self.weights[..., None], self.z, value=-1)
        return self.products


def _vectors(z: Tensor, centre: Tensor | None = None, narrow: bool = False) -> Vectors:
    flat = z.flatten(-3, -2)
    factors = flat if centre is None else flat - centre[..., None, :]
    return Vectors(flat, flat.square().sum(dim=-1), factors.bfloat16() if narrow else factors)


def _shaped(buffer: Tensor, tile: Tile) -> Tensor:
    return buffer[: tile.area].view(tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start)


def _places(tiles: list[Tile], kept: Tensor | None) -> Iterator[Tensor | None]:
    """Memory in which each tile is kept, or None."""
    start = 0
    for tile in tiles:
        yield None if kept is None else _shaped(kept[start:], tile)
        start += tile.area

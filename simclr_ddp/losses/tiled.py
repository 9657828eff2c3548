"""Log-sums of a kernel over every anchor's negatives, one tile of pairs at a time, in memory that grows with N.

With k the kernel, and negatives of m the views of the images other than m's,

    log-sum   A_m = log Σ_{negatives j of m} k(z_m, z_j)
    gradient  Σ_m g_m ∂A_m = Σ_{pairs m, j} S_mj ∂log k(z_m, z_j)     S_mj = g_m exp(log k - A_m) + g_j exp(log k - A_j)

The forward pass keeps A, and of small batches the tiles (40 MiB per kernel at most, 256 MiB on a GPU; a mixture of
losses has two kernels); of others the backward pass computes them again. Where the anchors are the whole batch, a pair
is in one tile, on or above the diagonal, which serves its row and its column. Ranks share these tiles out evenly.

Tiles hold log2 k: exp2 is three times as fast as exp, and no slower where it underflows. Where the lengths of the
vectors bound log2 k to a range well within float32's exponents, sums are of k itself, one exponential a pair. Else, at
low temperatures, each row and each column is taken relative to its own largest, which one shift for both can't replace.

Nothing here makes the host wait for a GPU: what a test of values would decide follows there from the objective, or is
done in any case. On the CPU such a test costs less than the pass over memory that it saves.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations, pairwise, product
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from simclr_ddp.products import full_precision
from simclr_ddp.tile_kernels import LOG2_E, TileKernel, Vectors, can_ask, fill_own, surely

PRECISIONS = ("fp32", "bf16")
BACKENDS = ("tiled", "triton")
SAFE = 64.0  # largest |log2 k| of any pair whose k are added as they are
TILE = 1024  # rows and columns: large enough that a call costs little beside its work, a few together fit the cache
TRIANGLE = 512  # of tiles on the diagonal, which are halved, since all of their pairs are computed twice
KEPT = 40 * 2**20  # so many bytes of tiles at most are kept for the backward pass


class Sizes(NamedTuple):
    """The three above, for one kind of device."""

    tile: int
    triangle: int
    kept: int


# A tile of 1,024 is done sooner than the host launches the next; these take 64 MiB in float32, of which up to three
# (arc-cosine and p-norm distances: about eight) exist at a time. Predicted from operations and bytes, not measured.
GPU = Sizes(4096, 2048, 256 * 2**20)


def sizes_for(device: torch.device) -> Sizes:
    return Sizes(TILE, TRIANGLE, KEPT) if device.type == "cpu" else GPU


class Ranks(Protocol):
    """What ranks that share one batch send each other; `simclr_ddp.info_nce` has it. All call in one order."""

    index: int
    count: int

    def gather(self, z: Tensor) -> Tensor: ...
    def all_rows(self, own: Tensor) -> Tensor: ...
    def log_sum(self, parts: Tensor) -> Tensor: ...
    def sum(self, values: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Problem:
    """All that determines the log-sums beside the vectors.

    kernel     of tiles
    plain      (z, z_all) -> log-sums [2B], in ordinary differentiable operations: for second derivatives
    first      position in z_all of row 0's image
    precision  of the gradient's products, weights times embeddings, for float32: "fp32", or "bf16", which rounds
               operands and each tile's product: twice as fast where the processor has such instructions, and off by
               1e-4 to 5e-3 of the gradient's norm, most where embeddings cluster. The kernels are float32 either way.
    ranks      None: the gradient in z and in z_all is this process's. Else z_all are all ranks' z, taken as constant,
               and the gradient in z is that of the sum over ranks of what each makes of its log-sums.
    backend    "tiled", or "triton": the kernels of `simclr_ddp.triton_log_sums`, ValueError where they can't do it.
               Experimental: checked through Triton's interpreter, not measured on a GPU yet.
    radius     bound of the vectors' Euclidean norm, by which it is decided on a GPU whether k are added as they are;
               the CPU measures it
    """

    kernel: TileKernel
    plain: Callable[[Tensor, Tensor], Tensor]
    first: int
    precision: str
    ranks: Ranks | None
    backend: str = "tiled"
    radius: float = math.inf


def log_sums(z: Tensor, z_all: Tensor, problem: Problem) -> Tensor:
    """Log of the sum of the kernel over each anchor's negatives, [2B]; very negative where there are none (N = 1).

    z      [*, 2, B, D]  the anchors' embeddings, float32 or float64
    z_all  [*, 2, N, D]  those of the whole batch; the same object as z: every pair is computed once

    Memory grows with N. Differentiable again, by the plain form and in its memory.
    """
    result: Tensor = _LogSums.apply(z, z.detach() if z is z_all else z_all, z is z_all, problem)
    return result


@torch.no_grad()
def largest(
    z: Tensor, z_all: Tensor, first: int, of_tile: Callable[[Vectors, Vectors, Sequence[int]], Tensor]
) -> Tensor:
    """The largest log-kernel of each anchor among its negatives, [2B]; -inf where there are none. As `log_sums`.

    of_tile  (rows, columns, own) -> log-kernels [n, m], anything on the diagonals `own`
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


class Tile(NamedTuple):
    """Pairs (row, column) of two runs of anchors and columns, each within one view; `own` are the diagonals of the
    pairs of one image; a `mirrored` tile's pairs stand for their mirror images as well."""

    rows: slice
    columns: slice
    own: list[int]
    mirrored: bool

    @property
    def area(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


Run = tuple[int, int, int]  # view, and images from and to


def tiles(
    batch: int,
    total: int,
    first: int,
    symmetric: bool,
    index: int = 0,
    count: int = 1,
    sizes: Sizes | None = None,
) -> list[Tile]:
    """The tiles of 2 * batch anchors against 2 * total columns; of `symmetric` ones the share of rank `index`.

    sizes  by default the CPU's

    Rank r computes the pairs of its own images, and those with the images of the half of the ranks that follow it, in
    a circle: all shares are equal. Of an even number the last of these is half-way round for both, who share its pairs.
    """
    sizes = sizes or sizes_for(torch.device("cpu"))
    if symmetric:
        starts = [total * rank // count for rank in range(count + 1)]
        chosen = _own(starts[index], starts[index + 1], sizes)
        for rows, columns in _following(starts, index):
            chosen += _cross(rows, columns, sizes.tile)
    else:
        chosen = _cross((0, batch), (0, total), sizes.tile)
    return [
        Tile(
            slice(v * batch + a, v * batch + b),
            slice(u * total + c, u * total + d),
            [offset for offset in {first + a - c} if -(b - a) < offset < d - c],
            symmetric and (v, a) != (u, c),
        )
        for (v, a, b), (u, c, d) in chosen
    ]


def _own(start: int, stop: int, sizes: Sizes) -> list[tuple[Run, Run]]:
    """The pairs of these images on and above the diagonal."""
    runs = [(view, a, b) for view in range(2) for a, b in _split(start, stop, sizes.tile)]
    return [*combinations(runs, 2), *(pair for run in runs for pair in _triangle(run, sizes.triangle))]


def _triangle(run: Run, most: int) -> list[tuple[Run, Run]]:
    """The pairs of a run with itself on and above its diagonal, in parts where that saves more than it costs."""
    view, start, stop = run
    if stop - start <= most:
        return [(run, run)]
    first, last = (view, start, (start + stop) // 2), (view, (start + stop) // 2, stop)
    return [*_triangle(first, most), (first, last), *_triangle(last, most)]


def _following(starts: list[int], index: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of images, rows and columns, whose pairs with other ranks' images are this rank's."""
    count = len(starts) - 1
    rows, after, end = (starts[index], starts[index + 1]), index + 1, index + 1 + (count - 1) // 2
    yield rows, (starts[after], starts[min(end, count)])
    yield rows, (0, starts[max(end - count, 0)])
    if count % 2 == 0:
        low, high = sorted((index, (index + count // 2) % count))
        middle = (starts[high] + starts[high + 1]) // 2
        if index == low:
            yield rows, (starts[high], middle)
        else:
            yield (middle, starts[high + 1]), (starts[low], starts[low + 1])


def _cross(rows: tuple[int, int], columns: tuple[int, int], tile: int) -> list[tuple[Run, Run]]:
    """All pairs of two ranges of images; few rows take more columns."""
    return [
        ((v, a, b), (u, c, d))
        for a, b in _split(*rows, tile)
        for c, d in _split(*columns, max(tile, tile * tile // (b - a)))
        for v, u in product(range(2), repeat=2)
    ]


def _split(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """A range in equal parts no longer than `most`."""
    parts = -(-(stop - start) // most)
    cuts = [start + (stop - start) * part // parts for part in range(parts)] + [stop]
    return list(pairwise(cuts))


def pairs(rows: Vectors, columns: Vectors, own: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Dot products and squared distances of a tile, harmless ones on the diagonals `own`."""
    dot = rows.z @ columns.z.mT
    squared_distance = (rows.squares[..., :, None] + columns.squares[..., None, :] - 2 * dot).clamp_(min=0)
    fill_own(dot, own, 0)
    fill_own(squared_distance, own, 1)
    return dot, squared_distance


# --- memory ---------------------------------------------------------------------------------------------------------


class _Buffers(threading.local):
    """A thread's buffers on the CPU, which live on: fresh memory comes page by page, and takes longer than the products
    of a tile. Elsewhere torch itself keeps what was freed."""

    def __init__(self) -> None:
        self.idle: dict[str, Tensor] = {}

    def take(self, name: str, numbers: int, like: Tensor) -> Tensor:
        """That many numbers of the kind of `like`, of any value."""
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


buffers = _Buffers()


# --- the two passes -------------------------------------------------------------------------------------------------


class _LogSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, z_all: Tensor, symmetric: bool, problem: Problem) -> Tensor:
        ctx.save_for_backward(z, z_all)
        ctx.symmetric, ctx.problem, ctx.kernels = symmetric, problem, _triton(z, problem)
        if ctx.kernels is not None:
            ctx.sums = ctx.kernels.forward(*_shifted(z, z_all, symmetric, problem.kernel), problem)
            return ctx.sums / LOG2_E
        work = _Pairs(z, z_all, symmetric, problem)
        sums, ctx.kept = work.log_sums(any(ctx.needs_input_grad))
        ctx.sums = sums
        return work.own(sums[:, None]).flatten() / LOG2_E

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        z, z_all = ctx.saved_tensors
        ranks = ctx.problem.ranks
        if torch.is_grad_enabled():
            columns = z if ctx.symmetric else z_all if ranks is None else ranks.gather(z)
            wanted = [t for t, needed in zip((z, z_all), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(ctx.problem.plain(z, columns), wanted, gradient, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None

        if ctx.kernels is not None:
            columns_too = ctx.needs_input_grad[1]
            shifted = _shifted(z, z_all, ctx.symmetric, ctx.problem.kernel)
            both = ctx.kernels.backward(*shifted, ctx.sums, gradient, ctx.problem, ctx.symmetric, columns_too)
            return *both, None, None
        if ranks is not None:
            gradient = ranks.all_rows(gradient.view(2, -1)).flatten()
        work = _Pairs(z, z_all, ctx.symmetric, ctx.problem)
        columns_too = ctx.needs_input_grad[1]
        rows, columns = work.gradients(ctx.sums, gradient, ctx.kept, columns_too)
        if ctx.kept is not None:  # the loss may live on; a second pass computes them again
            buffers.give_back("kept", ctx.kept)
            ctx.kept = None
        if ranks is not None:
            rows = ranks.sum(rows)
        return work.own(rows).view(z.shape), columns.view(z_all.shape) if ctx.needs_input_grad[1] else None, None, None


def _triton(z: Tensor, problem: Problem) -> ModuleType | None:
    """The Triton kernels if they were asked for; ValueError if they can't do it."""
    if problem.backend != "triton":
        return None
    if find_spec("triton") is None:
        raise ValueError("backend='triton', but Triton is not installed: 'tiled' computes the same without it")
    from simclr_ddp import triton_log_sums

    if not triton_log_sums.usable(z, problem.kernel):
        raise ValueError(
            f"backend='triton' has no kernel for {type(problem.kernel).__name__.lower()} in {z.dtype} of width "
            f"{z.shape[-1]} on {z.device.type}: 'tiled' computes the same"
        )
    return triton_log_sums


def _shifted(z: Tensor, z_all: Tensor, symmetric: bool, kernel: TileKernel) -> tuple[Tensor, Tensor]:
    """Both less the mean of all, if the kernel does not see it."""
    if not kernel.of_squares:
        return z, z_all
    centre = z_all.mean(dim=(-3, -2), keepdim=True)
    columns = z_all - centre
    return columns if symmetric else z - centre, columns


class _Pairs:
    """The tiles of a problem and what they are made of."""

    def __init__(self, z: Tensor, z_all: Tensor, symmetric: bool, problem: Problem) -> None:
        ranks = problem.ranks
        self.problem, self.symmetric = problem, symmetric or ranks is not None
        rows = z_all if ranks is not None else z
        self.z, self.z_all = _shifted(rows, z_all, self.symmetric, problem.kernel)
        self.batch, self.total = z.shape[-2], z_all.shape[-2]
        share = (ranks.index, ranks.count) if ranks is not None else (0, 1)
        first = 0 if self.symmetric else problem.first
        self.sizes = sizes_for(z.device)
        self.tiles = tiles(self.z.shape[-2], self.total, first, self.symmetric, *share, self.sizes)

    def own(self, rows: Tensor) -> Tensor:
        """[..., 2 * rows, D] -> those of this process's anchors, [..., 2B, D]"""
        if self.problem.ranks is None:
            return rows
        own = slice(self.problem.first, self.problem.first + self.batch)
        return rows.unflatten(-2, (2, -1))[..., own, :].flatten(-3, -2)

    def log_sums(self, keep: bool) -> tuple[Tensor, Tensor | None]:
        """log2 of the sums of all rows, over all ranks, and the tiles' slopes times k if they are kept for the
        backward pass."""
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
        """Those of Σ upstream · sums in the rows and, unless symmetric, the columns if wanted."""
        kernel, symmetric = self.problem.kernel, self.symmetric
        narrow = self.problem.precision == "bf16" and self.z_all.dtype == torch.float32
        centre = self.z_all.mean(dim=(-3, -2)) if narrow else None  # less is lost of what the vectors have in common
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
        """What the kernel's slope makes of the tile's weights S = signs 2^level k, or factor k if sums are direct."""
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
                slope(place)  # before it is multiplied, so that bits are those of what is kept
        torch.mul(place, factor[tile.rows, None], out=s)
        if self.symmetric:
            s.addcmul_(place, factor[tile.columns])
        return (s,) if kernel.keeps else slope(s)

    def _sides(self, centre: Tensor | None = None, narrow: bool = False) -> tuple[Vectors, Vectors]:
        rows = _vectors(self.z, centre, narrow)
        return rows, rows if self.symmetric else _vectors(self.z_all, centre, narrow)

    def _is_direct(self, rows: Vectors, columns: Vectors) -> bool:
        """Whether no sum of k needs a shift. One image has no sum."""
        if self.total == 1:
            return False
        radius = self.problem.radius
        if can_ask(self.z):
            radius = torch.maximum(rows.squares.max(), columns.squares.max()).sqrt().item()
        return self.problem.kernel.largest(radius) <= SAFE

    @contextmanager
    def _scratch(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        """So many buffers, each large enough for any tile."""
        numbers = max((tile.area for tile in self.tiles), default=0)
        with buffers.lent(count * numbers, self.z) as buffer:
            yield buffer.view(count, numbers).unbind()


class _Gradient:
    """Of some vectors, summed tile by tile: Σ w (other - centre), and Σ w where `total` needs it."""

    def __init__(self, z: Tensor, kernel: TileKernel, centre: Tensor | None) -> None:
        self.z, self.centre, self.of_squares = z.flatten(-3, -2), centre, kernel.of_squares
        self.products = torch.zeros_like(self.z)
        self.weights = self.z.new_zeros(self.z.shape[:-1]) if kernel.of_squares or centre is not None else None

    def add(self, where: slice, on_dots: Tensor, rounded: Tensor, others: Tensor, dim: int) -> None:
        own = self.products[..., where, :]
        if rounded.dtype != own.dtype:
            own += rounded @ others
        elif rounded.ndim == 2:
            own.addmm_(rounded, others)
        else:
            own.baddbmm_(rounded, others)
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
    """Where each tile is kept."""
    start = 0
    for tile in tiles:
        yield None if kept is None else _shaped(kept[start:], tile)
        start += tile.area

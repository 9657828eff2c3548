"""Log-sums of a kernel over every anchor's negatives, one tile of pairs at a time, in memory that grows with N.

With k the kernel, and negatives of m the views of the images other than m's,

    log-sum   A_m = log Σ_{negatives j of m} k(z_m, z_j)
    gradient  Σ_m g_m ∂A_m = Σ_{pairs m, j} S_mj ∂log k(z_m, z_j)     S_mj = g_m exp(log k - A_m) + g_j exp(log k - A_j)

The forward pass keeps A, and of small batches the tiles (40 MiB at most); of others the backward pass computes them
again. Where the anchors are the whole batch, a pair is in one tile, on or above the diagonal, which serves its row and
its column. Ranks share these tiles out evenly.

Tiles hold log2 k: exp2 is three times as fast as exp, and no slower where it underflows. Where the lengths of the
vectors bound log2 k to a range well within float32's exponents, sums are of k itself, one exponential a pair. Else, at
low temperatures, each row and each column is taken relative to its own largest, which one shift for both can't replace.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from simclr_ddp.products import full_precision

LogKernel = Callable[[Tensor, Tensor], Tensor]
Slope = Callable[[Tensor], tuple[Tensor, Tensor | None]]

PRECISIONS = ("fp32", "bf16")
BACKENDS = ("tiled", "triton")
LOG2_E = math.log2(math.e)
EXCLUDED = -1e30  # log2 k of an anchor's own image: its weight is 0, of which infinity would make a NaN
SAFE = 64.0  # largest |log2 k| of any pair whose k are added as they are
TILE = 1024  # rows, columns: large enough that a call costs little beside its work, a few together fit the cache
TRIANGLE = 512  # of tiles on the diagonal, which are halved, since all of their pairs are computed twice
KEPT = 10 * 2**20  # so many pairs at most are kept for the backward pass: 40 MiB in float32


class Ranks(Protocol):
    """What ranks that share one batch tell each other; `simclr_ddp.distributed` has it. All call in one order."""

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
               1e-4 to 3e-3 of the gradient's norm, most where embeddings cluster. The kernels are float32 either way.
    ranks      None: the gradient in z and in z_all is this process's. Else z_all are all ranks' z, taken as constant,
               and the gradient in z is that of the sum over ranks of what each makes of its log-sums.
    backend    "tiled", or "triton": the kernels of `simclr_ddp.triton_log_sums` where they can do it. Experimental:
               checked through Triton's interpreter, not measured on a GPU yet.
    """

    kernel: "TileKernel"
    plain: Callable[[Tensor, Tensor], Tensor]
    first: int
    precision: str
    ranks: Ranks | None
    backend: str = "tiled"


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
    z: Tensor, z_all: Tensor, first: int, of_tile: Callable[["Vectors", "Vectors", Sequence[int]], Tensor]
) -> Tensor:
    """The largest log-kernel of each anchor among its negatives, [2B]; -inf where there are none. As `log_sums`.

    of_tile  (rows, columns, own) -> log-kernels [n, m], anything on the diagonals `own`
    """
    rows, columns = _vectors(z), _vectors(z_all)
    found = z.new_full((rows.z.shape[-2],), -math.inf)
    with full_precision(z.device.type):
        for tile in tiles(z.shape[-2], z_all.shape[-2], first, z is z_all):
            log_k = of_tile(rows.part(tile.rows), columns.part(tile.columns), tile.own)
            _fill_own(log_k, tile.own, -math.inf)
            for dim, where in ((1, tile.rows), (0, tile.columns))[: 1 + tile.mirrored]:
                found[where] = torch.maximum(found[where], log_k.amax(dim))
    return found


# --- tiles ----------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Pairs (row, column) of two runs of anchors and columns, each within one view; `own` are the diagonals of the
    pairs of one image; a `mirrored` tile's pairs stand for their mirror images as well."""

    rows: slice
    columns: slice
    own: list[int]
    mirrored: bool


def tiles(batch: int, total: int, first: int, symmetric: bool, index: int = 0, count: int = 1) -> list[Tile]:
    """The tiles of 2 * batch anchors against 2 * total columns; of `symmetric` ones the share of rank `index`.

    2 * count runs, or a multiple, make a multiple of count pairs of runs: with enough images all shares are equal.
    """
    rows, columns = list(_runs(batch, count)), list(_runs(total, count))
    chosen = [(row, column) for row in rows for column in columns if not symmetric or row < column][index::count]
    if symmetric:
        chosen += [pair for run in rows[index::count] for pair in _triangle(run)]
    return [
        Tile(
            slice(v * batch + a, v * batch + b),
            slice(u * total + c, u * total + d),
            [offset for offset in {first + a - c} if -(b - a) < offset < d - c],
            symmetric and (v, a) != (u, c),
        )
        for (v, a, b), (u, c, d) in chosen
    ]


def _triangle(run: tuple[int, int, int]) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """The pairs of a run with itself on and above its diagonal, in parts where that saves more than it costs."""
    view, start, stop = run
    if stop - start <= TRIANGLE:
        return [(run, run)]
    first, last = (view, start, (start + stop) // 2), (view, (start + stop) // 2, stop)
    return [*_triangle(first), (first, last), *_triangle(last)]


def _runs(images: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(view, from, to) in equal lengths of at most TILE."""
    parts = min(-(-images // (TILE * count)) * count, images)
    for view in range(2):
        for part in range(parts):
            yield view, images * part // parts, images * (part + 1) // parts


def _fill_own(pairs: Tensor, own: Sequence[int], value: float) -> None:
    for offset in own:
        pairs.diagonal(offset, -2, -1).fill_(value)


class Vectors(NamedTuple):
    """z [*, n, D], their squared norms [*, n], and what the gradient's products take in place of z [*, n, D]."""

    z: Tensor
    squares: Tensor
    factors: Tensor

    def part(self, where: slice) -> "Vectors":
        return Vectors(self.z[..., where, :], self.squares[..., where], self.factors[..., where, :])


# --- kernels --------------------------------------------------------------------------------------------------------


class TileKernel(Protocol):
    """A kernel as it is computed on tiles.

    distances  it depends on differences of vectors alone, and its slopes leave that to whoever adds up the gradient
    shifts     it depends on differences of vectors alone: with their mean taken off, near ones keep their digits
    scale      factor of all slopes, left out of them
    keeps      slopes come as one tile, fit to be kept
    vectors    the slope turns S into its part of the gradient in the rows [n, D] and in the columns [m, D] instead
    """

    distances: bool
    shifts: bool
    scale: float
    keeps: bool
    vectors: bool

    def largest(self, radius: float) -> float:
        """Bound of |log2 k| for vectors no longer than `radius`."""
        ...

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        """log2 k in `out` [n, m], EXCLUDED on the diagonals `own`, and the slope: it turns weights S [n, m] of log k
        into those of the dot products, in place where it can, and of the squared distances unless the first tell."""
        ...


class Cosine:
    """log k = scale a·b"""

    distances, shifts, keeps, vectors = False, False, True, False

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def largest(self, radius: float) -> float:
        return self.scale * LOG2_E * radius**2

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        torch.addmm(out, rows.z, columns.z.mT, beta=0, alpha=self.scale * LOG2_E, out=out)
        _fill_own(out, own, EXCLUDED)
        return out, lambda s: (s, None)


class Power:
    """log k = -|a-b|^γ / τ. For γ < 2 distances count as at least √floor, and closer pairs have no gradient."""

    distances, shifts, keeps, vectors = True, True, True, False

    def __init__(self, temperature: float, gamma: float, floor: float) -> None:
        self.gamma, self.floor = gamma, floor if gamma < 2 else 0.0
        # x = unit |a-b|² and log2 k = -outer x^(γ/2); all in the unit, unless that leaves float32's exponents.
        exponent = 2 / gamma * math.log2(LOG2_E / temperature)
        self.unit, self.outer = (2**exponent, 1.0) if abs(exponent) < 60 else (1.0, LOG2_E / temperature)
        self.scale = gamma * self.unit * self.outer / LOG2_E  # d log k / d a·b = scale x^(γ/2 - 1)

    def largest(self, radius: float) -> float:
        return self.outer * (self.unit * 4 * radius**2) ** (self.gamma / 2)

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        unit = -self.unit * self.outer if self.gamma == 2 else self.unit
        torch.add(rows.squares[:, None] * unit, columns.squares * unit, out=out)
        out.addmm_(rows.z, columns.z.mT, alpha=-2 * unit)
        if self.gamma == 2:
            _fill_own(out, own, EXCLUDED)
            return out, lambda s: (s, None)
        _fill_own(out, own, unit)
        near = out <= self.floor * unit if out.amin() <= self.floor * unit else None  # hardly ever
        if near is not None:
            out.clamp_(min=self.floor * unit)
        if self.gamma == 1 and self.outer == 1:  # x^(γ/2 - 1) is -1 / log2 k, and needs no memory
            out.sqrt_().neg_()
            _fill_own(out, own, EXCLUDED)
            return out, lambda s: (_without(s.div_(out).neg_(), near), None)
        power = out.pow(self.gamma / 2 - 1)
        out.mul_(power).mul_(-self.outer)
        _fill_own(out, own, EXCLUDED)
        return out, lambda s: (_without(s.mul_(power), near), None)


def _without(s: Tensor, some: Tensor | None) -> Tensor:
    return s if some is None else s.masked_fill_(some, 0)


class Elementwise:
    """Any function of dot products and squared distances, by autograd: many more passes over a tile."""

    distances, scale, keeps, vectors = False, 1.0, False, False

    def __init__(self, log_kernel: LogKernel, shifts: bool) -> None:
        self.log_kernel, self.shifts = log_kernel, shifts

    def largest(self, radius: float) -> float:
        return math.inf

    def tile(self, rows: Vectors, columns: Vectors, own: Sequence[int], out: Tensor) -> tuple[Tensor, Slope]:
        inputs = pairs(rows, columns, own)
        with torch.enable_grad():
            log_k = self.log_kernel(*(t.requires_grad_() for t in inputs))
        torch.mul(log_k.detach(), LOG2_E, out=out)
        _fill_own(out, own, EXCLUDED)

        def slope(s: Tensor) -> tuple[Tensor, Tensor | None]:
            on_dots, on_squares = torch.autograd.grad(log_k, inputs, s, allow_unused=True, materialize_grads=True)
            return on_dots - 2 * on_squares, on_squares

        return out, slope


def pairs(rows: Vectors, columns: Vectors, own: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Dot products and squared distances, harmless ones on the diagonals `own`."""
    dot = rows.z @ columns.z.mT
    squared_distance = (rows.squares[..., :, None] + columns.squares[..., None, :] - 2 * dot).clamp_(min=0)
    _fill_own(dot, own, 0)
    _fill_own(squared_distance, own, 1)
    return dot, squared_distance


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
        if problem.ranks is not None:
            sums = problem.ranks.log_sum(sums)
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
        rows, columns = work.gradients(ctx.sums, gradient.clamp(min=0), ctx.kept, columns_too)
        if (gradient < 0).any():
            rows_less, columns_less = work.gradients(ctx.sums, (-gradient).clamp(min=0), ctx.kept, columns_too)
            rows, columns = rows - rows_less, columns - columns_less
        ctx.kept = []  # the loss may live on; a second pass computes them again
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
    """Both less the mean of all, if the kernel does not see it: |a|² + |b|² - 2 a·b then loses fewer digits."""
    if not kernel.shifts:
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
        self.tiles = tiles(self.z.shape[-2], self.total, first, self.symmetric, *share)

    def own(self, rows: Tensor) -> Tensor:
        """[..., 2 * rows, D] -> those of this process's anchors, [..., 2B, D]"""
        if self.problem.ranks is None:
            return rows
        own = slice(self.problem.first, self.problem.first + self.batch)
        return rows.unflatten(-2, (2, -1))[..., own, :].flatten(-3, -2)

    def log_sums(self, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """log2 of the sums of all rows, and the tiles' slopes times k where they are kept for the backward pass."""
        kernel = self.problem.kernel
        rows, columns = _vectors(self.z), _vectors(self.z_all)
        direct = self._is_direct(rows, columns)
        keep = keep and direct and kernel.keeps and sum(map(_area, self.tiles)) <= KEPT
        sums = self.z.new_full((rows.z.shape[-2],), 0 if direct else -math.inf)
        out, scratch, kept = self._buffer(), self._buffer(), []
        with full_precision(self.z.device.type):
            for tile in self.tiles:
                log_k, slope = kernel.tile(
                    rows.part(tile.rows), columns.part(tile.columns), tile.own, _shaped(out, tile)
                )
                sides = ((1, tile.rows), (0, tile.columns))[: 1 + tile.mirrored]
                if direct:
                    k = torch.exp2(log_k, out=torch.empty_like(log_k) if keep else _shaped(scratch, tile))
                    for dim, where in sides:
                        sums[where] += k.sum(dim)
                    if keep:
                        kept.append(slope(k)[0])
                    continue
                for dim, where in sides:
                    most = log_k.amax(dim, keepdim=True)
                    total = torch.sub(log_k, most, out=_shaped(scratch, tile)).exp2_().sum(dim)
                    torch.logaddexp2(sums[where], total.log2_().add_(most.view(-1)), out=sums[where])
        return sums.log2_() if direct else sums, kept

    def gradients(self, sums: Tensor, upstream: Tensor, kept: list[Tensor], columns_too: bool) -> tuple[Tensor, Tensor]:
        """Those of Σ upstream · sums, upstream at least 0, in the rows and, unless symmetric, the columns if wanted."""
        kernel, symmetric = self.problem.kernel, self.symmetric
        narrow = self.problem.precision == "bf16" and self.z_all.dtype == torch.float32
        centre = self.z_all.mean(dim=(-3, -2)) if narrow else None  # less is lost of what the vectors have in common
        rows, columns = _vectors(self.z, centre, narrow), _vectors(self.z_all, centre, narrow)
        in_rows = _Gradient(self.z, kernel, centre)
        in_columns = in_rows if symmetric else _Gradient(self.z_all, kernel, centre)
        direct = self._is_direct(rows, columns)
        level = (upstream * kernel.scale).log2_() - sums  # S = exp2(level + log2 k)
        factor = level.exp2()
        out, weights, scratch = self._buffer(), self._buffer(), self._buffer()
        with full_precision(self.z.device.type):
            for number, tile in enumerate(self.tiles):
                part, other = rows.part(tile.rows), columns.part(tile.columns)
                s = _shaped(weights, tile)
                if direct:
                    if kept:
                        k, on_squares = kept[number], None
                    else:
                        log_k, slope = kernel.tile(part, other, tile.own, _shaped(out, tile))
                        k, on_squares = slope(torch.exp2(log_k, out=_shaped(scratch, tile)))
                    torch.mul(k, factor[tile.rows, None], out=s)
                    on_dots = s.addcmul_(k, factor[tile.columns]) if symmetric else s
                else:
                    log_k, slope = kernel.tile(part, other, tile.own, _shaped(out, tile))
                    torch.add(log_k, level[tile.rows, None], out=s).exp2_()
                    if symmetric:
                        s += torch.add(log_k, level[tile.columns], out=_shaped(scratch, tile)).exp2_()
                    on_dots, on_squares = slope(s)
                if kernel.vectors:
                    assert on_squares is not None
                    in_rows.products[tile.rows] += on_dots
                    if tile.mirrored or (columns_too and not symmetric):
                        in_columns.products[tile.columns] += on_squares
                    continue
                rounded = on_dots.bfloat16() if narrow else on_dots
                in_rows.add(tile.rows, on_dots, rounded, on_squares, other.factors, -1)
                if tile.mirrored or (columns_too and not symmetric):
                    in_columns.add(tile.columns, on_dots, rounded.mT, on_squares, part.factors, -2)
        total = in_rows.total()
        return total, total if symmetric else in_columns.total()

    def _is_direct(self, rows: Vectors, columns: Vectors) -> bool:
        """Whether no sum of k needs a shift. One image has no sum."""
        if self.total == 1 or not self.problem.kernel.keeps:
            return False
        radius = torch.maximum(rows.squares.max(), columns.squares.max()).sqrt().item()
        return self.problem.kernel.largest(radius) <= SAFE

    def _buffer(self) -> Tensor:
        return self.z.new_empty(max(map(_area, self.tiles), default=0))


class _Gradient:
    """Of some vectors, summed tile by tile: Σ w (other - centre), Σ w, and twice Σ of the weights of squared distances.

    With |a-b|² = |a|² + |b|² - 2 a·b, a weight of a squared distance is -½ of that of the dot product.
    """

    def __init__(self, z: Tensor, kernel: TileKernel, centre: Tensor | None) -> None:
        self.z, self.centre, self.distances = z.flatten(-3, -2), centre, kernel.distances
        self.products = torch.zeros_like(self.z)
        self.weights = self.z.new_zeros(self.z.shape[:-1]) if kernel.distances or centre is not None else None
        self.squares: Tensor | None = None

    def add(
        self, where: slice, on_dots: Tensor, rounded: Tensor, on_squares: Tensor | None, others: Tensor, dim: int
    ) -> None:
        if rounded.dtype == self.products.dtype and rounded.ndim == 2:
            self.products[where].addmm_(rounded, others)
        else:
            self.products[..., where, :] += rounded @ others
        if self.weights is not None:
            self.weights[..., where] += on_dots.sum(dim)
        if on_squares is not None:
            if self.squares is None:
                self.squares = self.z.new_zeros(self.z.shape[:-1])
            self.squares[..., where].add_(on_squares.sum(dim), alpha=2)

    def total(self) -> Tensor:
        if self.centre is not None and self.weights is not None:
            self.products.addcmul_(self.weights[..., None], self.centre[..., None, :])
        if self.distances and self.weights is not None:
            self.products.addcmul_(self.weights[..., None], self.z, value=-1)
        if self.squares is not None:
            self.products.addcmul_(self.squares[..., None], self.z)
        return self.products


def _vectors(z: Tensor, centre: Tensor | None = None, narrow: bool = False) -> Vectors:
    flat = z.flatten(-3, -2)
    factors = flat if centre is None else flat - centre[..., None, :]
    return Vectors(flat, flat.square().sum(dim=-1), factors.bfloat16() if narrow else factors)


def _area(tile: Tile) -> int:
    return (tile.rows.stop - tile.rows.start) * (tile.columns.stop - tile.columns.start)


def _shaped(buffer: Tensor, tile: Tile) -> Tensor:
    return buffer[: _area(tile)].view(tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start)

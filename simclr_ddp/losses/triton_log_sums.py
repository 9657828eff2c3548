# mypy: disallow-untyped-defs=False
"""Log-sums of `simclr_ddp.losses.tiled` and their gradient as one Triton kernel each, for float32 on a GPU.

This backend is experimental: it is checked against float64 in Triton's interpreter on a CPU and compiled for an H100,
but has not run on a GPU yet (`python -m benchmarks.gpu.log_sums` does that). It is therefore opt-in:
`loss.backend=triton`, or `KernelInfoNCE(backend="triton")`. It will be deleted unless a GPU runs it at least 1.3 times
as fast as the tiles of `simclr_ddp.losses.tiled` for 4,096 images and more.

Each program owns a block of rows and loops over a range of columns:

    forward   A_m = log2 Σ_j k_mj, relative to the largest so far
    backward  Σ_j S_mj slope_mj z_j     with S_mj = g_m k_mj / 2^A_m + g_j k_mj / 2^A_j

S contains both roles of a pair, so a row's gradient is complete when its program ends, and ranks need no sum: each
computes its local rows against all columns, given A and g of all ranks. For M = 2N vectors of width D the cost is

    forward   2 M² D operations, against M² D if every pair is computed once
    backward  4 M² D (pairs again, and weights times vectors), against 3 M² D

This is 1.5 times as much in total, and more where the tiled form keeps the pairs of small batches. In return no two
programs add to the same rows: a symmetric form would need atomics, whose order changes from run to run, or buffers of
M² D / 64 numbers. Ranks send 4N numbers, instead of 2N times W forward and 2N D backward.

A resumed run must equal the uninterrupted one bit for bit, so no timing at run time may choose an order of additions.
One thread adds up a dot product, in order, but the threads that share a block add up a row's sum over it. Therefore
blocks and warps follow from the width D alone, and ranges of columns from the numbers of vectors. Autotuning chooses
only the pipeline stages, that is, the number of blocks loaded ahead. Compiled for an H100, float operations and block
layouts are the same for all stages; tests/test_gpu.py tests that the bits are. SHAPES are guesses from the size of
registers and shared memory; `benchmarks.gpu.log_sums --sweep` measures others, to be entered here.
"""

import os
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_ddp.losses.tile_kernels import EXCLUDED, Cosine, Power, Problem, TileKernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton.jit reads this when it defines the kernels
STAGES = (1,) if INTERPRETED else (1, 2, 3)
PROGRAMS = 512  # enough for a GPU of about a hundred multiprocessors, if there are enough columns to divide
MOST_RANGES = 8  # of columns: the backward pass writes a gradient for each
PRODUCT = "ieee"  # exact float32; "tf32x3" would use tensor cores


class Shape(NamedTuple):
    """Block of a program: rows, columns, width per product, and the warps that share it."""

    rows: int
    columns: int
    width: int
    warps: int


SHAPES = {64: Shape(64, 64, 32, 4), 128: Shape(64, 64, 32, 8), 256: Shape(64, 32, 32, 8), 512: Shape(32, 32, 32, 8)}


class Side(NamedTuple):
    """Vectors, position of their first image in the batch, and, if known, their log-sums.

    z         [2, n, D]  float32
    sums      [2n]       log2 of the sums; None, like upstream, if these vectors contribute no gradient
    upstream  [2n]       gradient of the natural log of the sums
    """

    z: Tensor
    first: int
    sums: Tensor | None = None
    upstream: Tensor | None = None


def usable(z: Tensor, kernel: TileKernel) -> bool:
    """Whether these kernels apply: float32 on a GPU, width at most 512, and a cosine or distance kernel."""
    return z.is_cuda and z.dtype == torch.float32 and z.ndim == 3 and z.shape[-1] <= 512 and supports(kernel)


def forward(z: Tensor, z_all: Tensor, problem: Problem) -> Tensor:
    """log2 of the sum of the kernel over each anchor's negatives, [2B]; about -1e30 without negatives.

    z [2, B, D] and z_all [2, N, D] are those of `log_sums.log_sums`, in float32.
    """
    return log_sums(Side(z, problem.first), Side(z_all, 0), problem.kernel)


def backward(
    z: Tensor, z_all: Tensor, sums: Tensor, upstream: Tensor, problem: Problem, symmetric: bool, columns_too: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of Σ upstream · ln 2 · sums in z and, if `columns_too`, in z_all; with ranks, of the sum over ranks.

    sums, upstream  [2B]  result of `forward`, and the gradient of its natural logarithms
    symmetric       z_all is z, and its gradient is in that of z
    """
    local, others = Side(z, problem.first, sums, upstream), Side(z_all, 0)
    if problem.ranks is not None:
        known = problem.ranks.all_rows(torch.cat([sums.view(2, -1), upstream.view(2, -1)])).reshape(2, -1)
        others = Side(z_all, 0, known[0], known[1])
    elif symmetric:
        others = local
    in_rows = gradient(local, others, problem.kernel, problem.precision)
    return in_rows, gradient(others, local, problem.kernel, problem.precision) if columns_too else None


# --- launches -------------------------------------------------------------------------------------------------------


def log_sums(rows: Side, columns: Side, kernel: TileKernel, shape: Shape | None = None) -> Tensor:
    """log2 of the sum of k over each row's pairs with columns of other images, [2n]."""
    shape = shape or _shape(rows.z.shape[-1])
    ranges, length = column_ranges(rows, columns, shape)
    out = rows.z.new_empty(ranges, 2 * rows.z.shape[1])
    with torch.cuda.device_of(rows.z):
        tuned(_forward, shape.warps)[_grid(rows, shape, ranges)](
            *_operands(rows, columns), out, length, *_numbers(rows, columns), **_constants(rows.z, kernel, shape)
        )
    largest = out.amax(dim=0)
    return out[0] if ranges == 1 else largest + (out - largest).exp2_().sum(dim=0).log2_()


def gradient(rows: Side, columns: Side, kernel: TileKernel, precision: str, shape: Shape | None = None) -> Tensor:
    """Gradient of the weighted log-sums of both sides in the rows, [2, n, D]; see the module docstring."""
    assert isinstance(kernel, Cosine | Power)
    shape = shape or _shape(rows.z.shape[-1])
    ranges, length = column_ranges(rows, columns, shape)
    flat, others = rows.z.flatten(0, 1), columns.z.flatten(0, 1).contiguous()
    centre = others.mean(dim=0) if precision == "bf16" else None  # as in tiled
    factors = others if centre is None else (others - centre).bfloat16()
    products, weights = flat.new_empty(ranges, *flat.shape), flat.new_empty(ranges, len(flat))
    with torch.cuda.device_of(flat):
        tuned(_backward, shape.warps)[_grid(rows, shape, ranges)](
            *_operands(rows, columns),
            factors,
            *_known_sums(rows, kernel.scale),
            *_known_sums(columns, kernel.scale),
            products,
            weights,
            length,
            *_numbers(rows, columns),
            **_constants(rows.z, kernel, shape),
            PADDED=max(triton.next_power_of_2(flat.shape[1]), 16),
            WIDENED=INTERPRETED,
        )
    total, weight = (t.sum(dim=0) if ranges > 1 else t[0] for t in (products, weights[..., None]))
    if centre is not None:
        total.addcmul_(weight, centre)
    if kernel.of_squares:
        total.addcmul_(weight, flat, value=-1)
    return total.view(rows.z.shape)


def supports(kernel: TileKernel) -> bool:
    return type(kernel) is Cosine or (type(kernel) is Power and kernel.outer == 1)


def _shape(width: int) -> Shape:
    return next(shape for limit, shape in SHAPES.items() if width <= limit)


def column_ranges(rows: Side, columns: Side, shape: Shape) -> tuple[int, int]:
    """Number of column ranges that are summed separately, and their length; depends on the numbers of vectors only."""
    row_blocks, blocks = (triton.cdiv(2 * s.z.shape[1], b) for s, b in ((rows, shape.rows), (columns, shape.columns)))
    ranges = min(triton.cdiv(PROGRAMS, row_blocks), MOST_RANGES, triton.cdiv(blocks, 4))
    length = triton.cdiv(blocks, ranges)
    return triton.cdiv(blocks, length), length * shape.columns


def _grid(rows: Side, shape: Shape, ranges: int) -> tuple[int, int]:
    return triton.cdiv(2 * rows.z.shape[1], shape.rows), ranges


def _operands(rows: Side, columns: Side) -> tuple[Tensor, ...]:
    """Vectors and squared norms of both sides."""
    flat = [side.z.flatten(0, 1).contiguous() for side in (rows, columns)]
    return *flat, *(z.square().sum(dim=-1) for z in flat)


def _known_sums(side: Side, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sums and weights; where they are unknown, log-sums of inf make 2^(log2 k - inf) = 0."""
    if side.sums is None or side.upstream is None:
        count = 2 * side.z.shape[1]
        return side.z.new_full((count,), float("inf")), side.z.new_zeros(count)
    return side.sums.contiguous(), side.upstream * scale


def _numbers(rows: Side, columns: Side) -> tuple[int, ...]:
    size = triton.next_power_of_2(columns.z.shape[1])  # key of autotuning
    return rows.z.shape[1], columns.z.shape[1], rows.first, columns.first, size


def _constants(z: Tensor, kernel: TileKernel, shape: Shape) -> dict[str, Any]:
    blocks = {"ROWS": shape.rows, "COLUMNS": shape.columns, "WIDTH": shape.width, "PRODUCT": PRODUCT}
    of = {"D": z.shape[-1], **blocks}
    if isinstance(kernel, Power):
        return {"unit": kernel.unit, "least": kernel.floor * kernel.unit, "GAMMA": float(kernel.gamma), **of}
    assert isinstance(kernel, Cosine)
    return {"unit": kernel.scale * _LOG2_E.value, "least": 0.0, "GAMMA": 0.0, **of}


@cache
def tuned(kernel: Any, warps: int) -> Any:
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for stages in STAGES]
    return triton.autotune(configs, key=["size", "D", "GAMMA", "ROWS", "COLUMNS", "WIDTH", "PRODUCT"])(kernel)


# --- kernels --------------------------------------------------------------------------------------------------------

_EXCLUDED = tl.constexpr(EXCLUDED)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    row_z,
    column_z,
    row_squares,
    column_squares,
    rows,
    columns,
    row_images,
    column_images,
    row_first,
    column_first,
    unit,
    least,
    D: tl.constexpr,
    GAMMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Compute log2 k of the pairs [ROWS, COLUMNS] (EXCLUDED if both are of one image), its slope in the dot product
    without the factor `scale`, and which pairs count. GAMMA 0 is the cosine."""
    is_row, is_column = rows < 2 * row_images, columns < 2 * column_images
    dot = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, WIDTH):
        across = start + tl.arange(0, WIDTH)
        left = tl.load(
            row_z + rows[:, None] * D + across[None, :], mask=is_row[:, None] & (across < D)[None, :], other=0.0
        )
        right = tl.load(
            column_z + columns[None, :] * D + across[:, None],
            mask=is_column[None, :] & (across < D)[:, None],
            other=0.0,
        )
        dot = tl.dot(left, right, dot, input_precision=PRODUCT)

    slope = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    if GAMMA == 0:
        log_k = dot * unit
    else:
        a = tl.load(row_squares + rows, mask=is_row, other=1.0)
        b = tl.load(column_squares + columns, mask=is_column, other=1.0)
        x = (a[:, None] + b[None, :] - 2 * dot) * unit
        if GAMMA == 2:
            log_k = -x
        else:
            near = x <= least  # as in tile_kernels.Power: clamped to the floor, without slope
            x = tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)
            if GAMMA == 1:
                log_k = -tl.sqrt(x)
                slope = -1 / log_k
            else:
                slope = tl.exp2((GAMMA / 2 - 1) * tl.log2(x))
                log_k = -x * slope
            slope = tl.where(near, 0.0, slope)
    row_image, column_image = rows % row_images + row_first, columns % column_images + column_first
    counts = is_row[:, None] & is_column[None, :] & (row_image[:, None] != column_image[None, :])
    return tl.where(counts, log_k, _EXCLUDED), slope, counts


@triton.jit
def _forward(
    row_z,
    column_z,
    row_squares,
    column_squares,
    out,
    length,
    row_images,
    column_images,
    row_first,
    column_first,
    size,
    unit,
    least,
    D: tl.constexpr,
    GAMMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Write out [ranges, rows] = log2 of the sums over `length` columns each; EXCLUDED without pairs."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, 2 * column_images)
    largest = tl.full((ROWS,), _EXCLUDED, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(begin, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        log_k, _, _ = _tile(
            row_z,
            column_z,
            row_squares,
            column_squares,
            rows,
            columns,
            row_images,
            column_images,
            row_first,
            column_first,
            unit,
            least,
            D,
            GAMMA,
            ROWS,
            COLUMNS,
            WIDTH,
            PRODUCT,
        )
        above = tl.maximum(largest, tl.max(log_k, 1))
        total = total * tl.exp2(largest - above) + tl.sum(tl.exp2(log_k - above[:, None]), 1)
        largest = above
    where = tl.program_id(1) * 2 * row_images + rows
    tl.store(out + where, largest + tl.log2(total), mask=rows < 2 * row_images)


@triton.jit
def _backward(
    row_z,
    column_z,
    row_squares,
    column_squares,
    factors,
    row_sums,
    row_upstream,
    column_sums,
    column_upstream,
    products,
    weights,
    length,
    row_images,
    column_images,
    row_first,
    column_first,
    size,
    unit,
    least,
    D: tl.constexpr,
    GAMMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRODUCT: tl.constexpr,
    PADDED: tl.constexpr,
    WIDENED: tl.constexpr,
):
    """Write products [ranges, rows, D] = Σ w factors and weights [ranges, rows] = Σ w over `length` columns each; w is
    the gradient in the dot product. WIDENED: factors are rounded to bfloat16 but multiplied as float32, since the
    interpreter can't multiply bfloat16."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < 2 * row_images
    row_sum = tl.load(row_sums + rows, mask=is_row, other=float("inf"))
    row_weight = tl.load(row_upstream + rows, mask=is_row, other=0.0)
    across = tl.arange(0, PADDED)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, 2 * column_images)
    product = tl.zeros((ROWS, PADDED), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(begin, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < 2 * column_images
        log_k, slope, counts = _tile(
            row_z,
            column_z,
            row_squares,
            column_squares,
            rows,
            columns,
            row_images,
            column_images,
            row_first,
            column_first,
            unit,
            least,
            D,
            GAMMA,
            ROWS,
            COLUMNS,
            WIDTH,
            PRODUCT,
        )
        column_sum = tl.load(column_sums + columns, mask=is_column, other=float("inf"))
        column_weight = tl.load(column_upstream + columns, mask=is_column, other=0.0)
        w = row_weight[:, None] * tl.exp2(log_k - row_sum[:, None])
        w += column_weight[None, :] * tl.exp2(log_k - column_sum[None, :])
        w = tl.where(counts, w * slope, 0.0)
        total += tl.sum(w, 1)
        factor = tl.load(
            factors + columns[:, None] * D + across[None, :],
            mask=is_column[:, None] & (across < D)[None, :],
            other=0.0,
        )
        rounded = w.to(factor.dtype)
        if WIDENED:
            product = tl.dot(rounded.to(tl.float32), factor.to(tl.float32), product, input_precision=PRODUCT)
        else:
            product = tl.dot(rounded, factor, product, input_precision=PRODUCT)
    first_row = tl.program_id(1).to(tl.int64) * 2 * row_images
    tl.store(weights + first_row + rows, total, mask=is_row)
    where = products + (first_row + rows[:, None]) * D + across[None, :]
    tl.store(where, product, mask=is_row[:, None] & (across < D)[None, :])

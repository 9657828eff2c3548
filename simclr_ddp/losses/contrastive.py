"""Contrastive losses as pure functions of (local rows, all columns, offset), without any process group.

Each rank holds the embeddings z [2, B, D] of its images (two views) and those of all ranks, z_all [2, N, D], in rank
order; its image i is image `first + i` of the batch. Each of its 2B anchors has one positive, the other view of the
same image, and 2N-2 negatives, both views of every other image; the pair of an anchor with itself is excluded. The
three are distinguished by index, never by value. With kernel k, the loss of an anchor is

    -log [k(positive) / (k(positive) + sum of k over the negatives)]
        = log(1 + sum over the negatives of exp(log k(negative) - log k(positive)))

The second form is computed: it doesn't overflow at any temperature, and a loss near 0 keeps all its digits.
Chen et al. 2020 (arXiv 2002.05709), eq. 1, for the cosine; Tan et al. 2024 (arXiv 2303.15103) for other kernels.

A log-kernel is an elementwise function of two tensors of one shape, the dot products and the squared Euclidean
distances of pairs. For positives these are computed from the vectors and their differences, since the identity
|a|² + |b|² - 2 a·b, used for all other pairs, loses all digits of the distance of near-duplicates. For distances in
another norm (`simclr_ddp.losses.p_norm`) a log-kernel is a function of differences.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simclr_ddp.losses import log_sums, tile_kernels, tiled
from simclr_ddp.losses.kernels import MIXTURES, LogKernel, Objective, log_kernel, mixture_components, tile_kernel
from simclr_ddp.losses.matmul import Product, not_compiled
from simclr_ddp.losses.p_norm import PDistance
from simclr_ddp.losses.tile_kernels import Ranks, Vectors


def normalize(y: Tensor, squared_radius: float = 1.0, norm_p: float = 2.0) -> Tensor:
    """Scale vectors along the last dimension to length √squared_radius in the norm `norm_p` (1 to inf); 0 stays 0.

    y  [..., D] of any float dtype; returns the same shape in float64 for float64, else float32. Norms are
       clamped to at least 1e-12.
    """
    _check_floats(y)
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    if norm_p == 2:
        z: Tensor = _OnSphere.apply(y, math.sqrt(squared_radius))[0]
        return z
    # Powers of numbers far from 1 underflow or overflow: divide by the largest entry, which cancels in the result.
    unit = y.detach().abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
    y = y / unit
    norm = torch.linalg.vector_norm(y, norm_p, dim=-1, keepdim=True)
    return y / (norm.maximum(1e-12 / unit) / math.sqrt(squared_radius))


class _OnSphere(torch.autograd.Function):
    """Map y [..., D] to y / s and log s [..., 1], s = |y| / radius, in half of autograd's memory and passes.

    The second output is needed for second derivatives, whose chain goes through it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        ctx.radius = radius
        scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_(min=1e-12).div_(radius)
        if y.device.type == "cpu" and scale.isfinite().all():  # on a GPU this test costs more than a pass
            z = y / scale
        else:
            unit = torch.linalg.vector_norm(y, math.inf, dim=-1, keepdim=True)
            unit = unit.masked_fill_(scale.isfinite(), 1)  # bits of a vector don't depend on the others
            z = y / unit
            length = torch.linalg.vector_norm(z, dim=-1, keepdim=True).maximum(1e-12 / unit).div_(radius)
            z, scale = z.div_(length), unit * length
        log_scale = scale.log()
        ctx.save_for_backward(z, scale, log_scale)
        ctx.set_materialize_grads(False)
        return z, log_scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        z, scale, log_scale = ctx.saved_tensors
        in_z, in_log = gradients
        if in_z is None:
            return None, None
        along = (in_z * z).sum(dim=-1, keepdim=True)
        if in_log is not None:
            along = along - in_log
        along = (along / ctx.radius**2).masked_fill(scale <= 1e-12 / ctx.radius, 0)  # below the guard s is a constant
        found = torch.addcmul(in_z, z, along, value=-1)
        return found * (-log_scale).exp() if torch.is_grad_enabled() else found.div_(scale), None


def info_nce(z: Tensor, z_all: Tensor, first: int, log_k: LogKernel | PDistance) -> Tensor:
    """Mean InfoNCE loss of this rank's anchors by definition, in the memory of several 2B x 2N matrices.

    z      [*, 2, B, D]  this rank's embeddings, float32 or float64
    z_all  [*, 2, N, D]  embeddings of all ranks, in rank order
    first                position in z_all of this rank's image 0
    log_k                maps dot products and squared distances [*, ...] of pairs to [...], or differences; see the
                         module docstring. With p-norm distances each matrix of pairs is D times as large.

    The log-kernel reduces the leading dimensions *, none or the halves of an embedding. The loss is log(2N-1) if all
    pairs are equally similar, and 0, without gradient, for N = 1. Averaged over ranks it is the single-process loss.
    Raises ValueError if the shapes disagree. Chen et al. 2020, eq. 1; Tan et al. 2024 for other kernels.
    """
    positive, negatives = log_kernels(z, z_all, first, log_k)
    excess = negatives - positive[:, None]
    # log(1 + Σ exp(excess)), shifted by the largest exponent. logsumexp has no gradient on a row of -inf (N = 1).
    largest = excess.detach().amax(dim=1).clamp(min=0)
    total = (excess - largest[:, None]).exp().sum(dim=1)
    return (largest + torch.log1p(total + torch.expm1(-largest))).mean()


@not_compiled
def contrastive_loss(z: Tensor, z_all: Tensor, first: int, objective: Objective, ranks: Ranks | None = None) -> Tensor:
    """Mean loss of this rank's anchors against the embeddings of the global batch, a scalar.

    z      [2, B, D]  this rank's embeddings, normalised as the objective requires: on a GPU the sums for longer
                      vectors may leave float32's range
    z_all  [2, N, D]  embeddings of all ranks, in rank order; on one rank z itself, so every pair is computed once
    first             position in z_all of this rank's image 0
    ranks             if given, z_all is treated as constant, and the gradient in z is that of the sum over ranks

    The loss is computed in float64 if an input is float64, else in float32, also under autocast, and in tiles: memory
    grows with N (except for second derivatives). Averaged over ranks it is the single-process loss of N images.
    torch.compile breaks the graph here and runs it uncompiled. Raises ValueError if the shapes disagree.
    """
    z, z_all = _widen(z, z_all)
    _check_shapes(z, z_all, first)
    if objective.kernel == "spectral":
        return spectral(z, z_all if ranks is None else ranks.gather(z), first)
    radius = largest_norm(objective, z.shape[-1])
    if objective.kernel == "concat_sum":
        z, z_all = _each(split_halves, z, z_all)
    if objective.kernel in MIXTURES and objective.mix_level == "loss":
        losses = []
        for index, component in enumerate(mixture_components(objective)):
            select = partial(torch.select, dim=0, index=index) if objective.kernel == "concat_sum" else (lambda z: z)
            losses.append(_tiled_info_nce(*_each(select, z, z_all), first, component, ranks, radius))
        return objective.mix_weight * losses[0] + (1 - objective.mix_weight) * losses[1]
    return _tiled_info_nce(z, z_all, first, objective, ranks, radius)


def _tiled_info_nce(
    z: Tensor, z_all: Tensor, first: int, objective: Objective, ranks: Ranks | None, radius: float
) -> Tensor:
    """Compute `info_nce` in tiles, for vectors no longer than `radius`."""
    log_k = log_kernel(objective)
    if z is z_all or ranks is not None:  # both views of a pair are local: it serves both anchors
        positive = pairwise(log_k, *z.unbind(-3)).repeat(2)
    else:
        positive = pairwise(log_k, z, _partners(z, z_all, first)).flatten()

    def plain(z: Tensor, z_all: Tensor) -> Tensor:
        return log_kernels(z, z_all, first, log_k)[1].logsumexp(dim=1)

    kernel, precision, backend = tile_kernel(objective), objective.precision, objective.backend
    problem = tile_kernels.Problem(kernel, plain, first, precision, ranks, backend, radius)
    excess = log_sums.log_sums(z, z_all, problem) - positive
    return torch.logaddexp(excess, torch.zeros_like(excess)).mean()  # log(1 + exp(excess)), exact near 0 too


def spectral(z: Tensor, z_all: Tensor, first: int) -> Tensor:
    """Spectral contrastive loss: mean (a·b)² over all pairs a ≠ b of the 2N, minus 2 mean a·b over the positives.

    Arguments and reduction are those of `contrastive_loss`; the pairs include the positives. There is no temperature:
    the radius of the embeddings takes its role. Unlike InfoNCE it isn't 0 for N = 1.
    HaoChen et al. 2021 (arXiv 2106.04156).
    """
    _check_shapes(z, z_all, first)
    # Σ_j (a·z_j)² = aᵀ (Σ_j z_j z_jᵀ) a, minus a's term with itself: no loop over the pairs is needed.
    moments = Product.apply(z_all.flatten(0, 1).mT, z_all.flatten(0, 1).mT)
    rows, local = z.flatten(0, 1), z_all[:, first : first + z.shape[1]].flatten(0, 1)
    squares = (Product.apply(rows, moments) * rows).sum(dim=1) - (rows * local).sum(dim=1).square()
    positive = (z * _partners(z, z_all, first)).sum(dim=-1)
    return squares.mean() / (2 * z_all.shape[-2] - 1) - 2 * positive.mean()


@not_compiled
@torch.no_grad()
def contrastive_accuracy(z: Tensor, z_all: Tensor, first: int, objective: Objective) -> Tensor:
    """Fraction of this rank's anchors whose positive has a larger kernel than every negative, a scalar in [0, 1].

    Arguments are those of `contrastive_loss`. A tie counts as a miss, so that collapsed embeddings don't look perfect.
    `spectral` ranks pairs by dot product, a loss-level mixture by λ·log k₁ + (1-λ)·log k₂.
    """
    z, z_all = _widen(z, z_all)
    _check_shapes(z, z_all, first)
    if objective.kernel == "concat_sum":
        z, z_all = _each(split_halves, z, z_all)
    rank_by = log_kernel(objective)
    positive = pairwise(rank_by, z, _partners(z, z_all, first)).flatten()

    def of_tile(rows: Vectors, columns: Vectors, own: Sequence[int]) -> Tensor:
        if isinstance(rank_by, PDistance):
            return rank_by.between(rows.z, columns.z)
        return rank_by(*tiled.pairs(rows, columns, own))

    return (positive > tiled.largest(z, z_all, first, of_tile)).to(positive.dtype).mean()


def largest_norm(objective: Objective, width: int) -> float:
    """Upper bound of the Euclidean norm of vectors of length √squared_radius in the norm `norm_p`."""
    return math.sqrt(objective.squared_radius) * width ** max(0.0, 1 / 2 - 1 / objective.norm_p)


# --- pairs ----------------------------------------------------------------------------------------------------------


def pairwise(log_k: LogKernel | PDistance, a: Tensor, b: Tensor) -> Tensor:
    """Log-kernels [...] of corresponding vectors of a and b [*, ..., D]."""
    if isinstance(log_k, PDistance):
        return log_k(a - b)
    return log_k((a * b).sum(dim=-1), (a - b).square().sum(dim=-1))


def log_kernels(z: Tensor, z_all: Tensor, first: int, log_k: LogKernel | PDistance) -> tuple[Tensor, Tensor]:
    """Log-kernels of the anchors' positives [2B] and negatives [2B, 2N]; -inf where a column is not a negative."""
    _check_shapes(z, z_all, first)
    positive = pairwise(log_k, z, _partners(z, z_all, first)).flatten()
    rows, columns = z.flatten(-3, -2), z_all.flatten(-3, -2)

    # The columns of an anchor's image are the anchor and its positive. They first get harmless arguments, since an
    # infinite slope of the kernel would make their zero gradient NaN (0·inf), and then -inf.
    batch, total = z.shape[-2], z_all.shape[-2]
    local = torch.arange(first, first + batch, device=z.device)
    same_image = (local[:, None] == torch.arange(total, device=z.device)).repeat(2, 2)
    if isinstance(log_k, PDistance):
        negatives = log_k((rows[:, None] - columns).masked_fill(same_image[..., None], 1))
        return positive, negatives.masked_fill(same_image, -math.inf)
    dot = Product.apply(rows, columns)
    squares = rows.square().sum(dim=-1)[..., :, None] + columns.square().sum(dim=-1)[..., None, :]
    squared_distance = (squares - 2 * dot).clamp(min=0)
    negatives = log_k(dot.masked_fill(same_image, 0), squared_distance.masked_fill(same_image, 1))
    return positive, negatives.masked_fill(same_image, -math.inf)


def _partners(z: Tensor, z_all: Tensor, first: int) -> Tensor:
    """Positive of each anchor, [*, 2, B, D]: the other view of the same image."""
    return z_all[..., first : first + z.shape[-2], :].flip(-3)


def split_halves(z: Tensor) -> Tensor:
    """Split the embeddings [2, B, D] into [2 (halves), 2 (views), B, D/2]."""
    if z.shape[-1] % 2:
        raise ValueError(
            f"concat_sum halves the embedding, but its width {z.shape[-1]} is odd; choose an even head.out"
        )
    return z.unflatten(-1, (2, -1)).movedim(-2, 0)


def _widen(z: Tensor, z_all: Tensor) -> tuple[Tensor, Tensor]:
    _check_floats(z, z_all)
    dtype = torch.promote_types(torch.promote_types(z.dtype, z_all.dtype), torch.float32)
    return _each(lambda t: t.to(dtype), z, z_all)


def _each(function: Callable[[Tensor], Tensor], z: Tensor, z_all: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the function to both; if they are one object, so are the results."""
    local = function(z)
    return local, local if z is z_all else function(z_all)


# --- errors ---------------------------------------------------------------------------------------------------------


def _check_floats(*embeddings: Tensor) -> None:
    for z in embeddings:
        if not z.is_floating_point():
            raise ValueError(f"embeddings have dtype {z.dtype}; give a real floating-point type, such as torch.float32")


def _check_shapes(z: Tensor, z_all: Tensor, first: int) -> None:
    _check_floats(z, z_all)
    if z.ndim < 3 or z.shape[:-2] != z_all.shape[:-2] or z.shape[-3] != 2 or z.shape[-1] != z_all.shape[-1]:
        raise ValueError(
            f"shapes {tuple(z.shape)} and {tuple(z_all.shape)} don't fit; give rows [2, B, D] and columns [2, N, D]"
        )
    if 0 in z.shape:
        raise ValueError(f"embeddings of shape {tuple(z.shape)} contain no image; give at least one")
    if not 0 <= first <= z_all.shape[-2] - z.shape[-2]:
        raise ValueError(
            f"first={first}: {z.shape[-2]} local images must lie within {z_all.shape[-2]}; "
            f"give a position from 0 to {z_all.shape[-2] - z.shape[-2]}"
        )

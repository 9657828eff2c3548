"""Contrastive losses as pure functions of (own rows, all columns, offset); no process group is ever seen here.

A rank holds the embeddings z [2, B, D] of its images (two views) and those of all ranks, z_all [2, N, D], in rank
order; its image i is image `first + i` of the batch. Each of its 2B anchors has one positive, the other view of the
same image, and 2N-2 negatives, both views of every other image; the anchor itself takes part nowhere. All three are
told apart by index, never by value. With k the kernel, the loss of an anchor is

    -log [k(positive) / (k(positive) + sum of k over the negatives)]
        = log(1 + sum over the negatives of exp(log k(negative) - log k(positive)))

of which the second form is computed: nothing overflows at any temperature, and a loss near 0 keeps all its digits.
Chen et al. 2020 (arXiv 2002.05709), eq. 1, for the cosine; Tan et al. 2024 (arXiv 2303.15103) for other kernels.

A log-kernel is an elementwise function of two tensors of one shape, the dot products and the squared Euclidean
distances of pairs. Those of the positives come from the vectors and their differences, since near-duplicates lose
all digits of a distance in the identity |a|² + |b|² - 2 a·b, which is what the other pairs use. Of distances in
another norm, `simclr_ddp.p_distance`, it is a function of differences.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from simclr_ddp import tiled
from simclr_ddp.arc_cosine import ArcCosine, arccos
from simclr_ddp.p_distance import PDistance
from simclr_ddp.products import Product, not_compiled
from simclr_ddp.tile_kernels import Cosine, Mixture, Power, TileKernel, Vectors
from simclr_ddp.tiled import BACKENDS, PRECISIONS, Ranks

LogKernel = Callable[[Tensor, Tensor], Tensor]

MIXTURES = ("simple_sum", "concat_sum")
KERNELS = ("cosine", "gaussian", "laplacian", "exponential", *MIXTURES, "arccos", "spectral")
OF_ANY_DISTANCE = ("gaussian", "laplacian", "exponential")
MIX_LEVELS = ("loss", "kernel")
LARGEST_GAMMA = 64  # of a distance of 2, the largest at radius 1, the power is a number of float32, divided by τ too


@dataclass(frozen=True)
class Objective:
    """Which loss, with all its numbers. Raises ValueError, in one sentence, for settings that make no sense.

    kernel              one of KERNELS; the function of that name gives formula and temperature convention
    temperature         τ; `spectral` has none and ignores it
    gamma               exponent of the distance in `exponential` and in the first part of the mixtures, at most 64
    mix_weight          λ, weight of the first part of a mixture; the second, Gaussian part has 1 - λ
    mix_level           of a mixture, "loss": λ·loss₁ + (1-λ)·loss₂, as the authors' code (arXiv 2303.15103);
                        "kernel": one loss whose kernel is λ·k₁ + (1-λ)·k₂, as their text
    second_temperature  τ of the Gaussian part of a mixture; None: `temperature`
    order               1, 2 or 3, of `arccos`
    squared_radius      μ: embeddings have norm √μ
    norm_p              which norm; math.inf for the maximum norm
    distance_p          in which norm `gaussian`, `laplacian` and `exponential` take the distance, 1 to math.inf;
                        other than 2 a pair costs a pass over its D differences, and no matrix product
    precision           "fp32" or "bf16", of the products that make the gradient: see `tiled.Problem`
    backend             "tiled" or "triton", what computes it; the latter is experimental, and for a GPU, float32, a
                        width of at most 512, and cosine, gaussian, laplacian and exponential: see `tiled.Problem`

    In `simple_sum` both parts see the whole embedding; in `concat_sum` the first sees its first half, the Gaussian
    its second, after one normalisation of the whole. `spectral` has no other precision and no other backend.
    """

    kernel: str = "cosine"
    temperature: float = 0.1
    gamma: float = 1.0
    mix_weight: float = 0.5
    mix_level: str = "kernel"
    second_temperature: float | None = None
    order: int = 1
    squared_radius: float = 1.0
    norm_p: float = 2.0
    distance_p: float = 2.0
    precision: str = "fp32"
    backend: str = "tiled"

    def __post_init__(self) -> None:
        _require_choice("kernel", self.kernel, KERNELS)
        _require_choice("mix_level", self.mix_level, MIX_LEVELS)
        _require_choice("precision", self.precision, PRECISIONS)
        _require_choice("backend", self.backend, BACKENDS)
        _require_positive("temperature", self.temperature)
        if not (_is_number(self.gamma) and 0 < self.gamma <= LARGEST_GAMMA):
            raise ValueError(f"gamma is {self.gamma!r}: choose a number above 0, at most {LARGEST_GAMMA}")
        _require_positive("radius (the squared radius of the sphere of embeddings)", self.squared_radius)
        if self.second_temperature is not None:
            _require_positive("second_temperature", self.second_temperature)
        if isinstance(self.order, bool) or self.order not in (1, 2, 3):
            raise ValueError(f"order of the arc-cosine kernel is {self.order!r}: choose 1, 2 or 3")
        if not (_is_number(self.norm_p) and self.norm_p >= 1):
            raise ValueError(f"norm_p is {self.norm_p!r}: choose a number from 1 up, inf for the maximum norm")
        if not (_is_number(self.distance_p) and self.distance_p >= 1):
            raise ValueError(f"distance_p is {self.distance_p!r}: choose a number from 1 up, inf for the maximum norm")
        if self.distance_p != 2 and self.kernel not in OF_ANY_DISTANCE:
            raise ValueError(
                f"distance_p is {self.distance_p!r}, but the kernel {self.kernel} takes no other distance than the "
                f"Euclidean: set distance_p to 2, or choose {', '.join(OF_ANY_DISTANCE)}"
            )
        if self.distance_p != 2 and self.precision != "fp32":
            raise ValueError(
                f"precision is {self.precision!r}, but distance_p {self.distance_p!r} has no matrix products: set fp32"
            )
        for name, value, only in (("precision", self.precision, "fp32"), ("backend", self.backend, "tiled")):
            if self.kernel == "spectral" and value != only:
                raise ValueError(
                    f"{name} is {value!r}, but the kernel spectral has no pairs to choose it for: set {only!r}"
                )
        if self.backend == "triton" and (self.kernel not in ("cosine", *OF_ANY_DISTANCE) or self.distance_p != 2):
            of = f"the kernel {self.kernel}" if self.distance_p == 2 else f"distance_p {self.distance_p!r}"
            raise ValueError(
                f"backend is 'triton', which has no {of}: set 'tiled', or choose cosine, {', '.join(OF_ANY_DISTANCE)} "
                "with distance_p 2"
            )
        if not (_is_number(self.mix_weight) and 0 <= self.mix_weight <= 1):
            raise ValueError(f"mix_weight is {self.mix_weight!r}: choose a number between 0 and 1")
        if self.kernel in MIXTURES and self.mix_weight in (0, 1):
            raise ValueError(
                f"mix_weight {self.mix_weight!r} leaves only one part of {self.kernel}: choose a number between 0 "
                "and 1, or the kernel 'exponential' or 'gaussian' alone"
            )
        if self.kernel in ("cosine", "arccos") and self.norm_p != 2:
            raise ValueError(f"norm_p is {self.norm_p!r}, but the kernel {self.kernel} takes angles: set norm_p to 2")
        if self.kernel == "arccos" and self.squared_radius != 1:
            raise ValueError(f"radius is {self.squared_radius!r}, but the kernel arccos needs unit vectors: set 1")
        if self.kernel == "arccos" and self.temperature > 1:
            raise ValueError(
                f"temperature is {self.temperature!r}, but above 1 the kernel arccos leaves the domain of the "
                "arc cosine: choose one of at most 1"
            )


def normalize(y: Tensor, squared_radius: float = 1.0, norm_p: float = 2.0) -> Tensor:
    """Scale the vectors of the last dimension to √squared_radius in the norm `norm_p` (from 1 to inf); 0 stays 0.

    y  [..., D] of any float dtype; returns the same shape, float64 for float64, else float32. A norm counts as at
       least 1e-12.
    """
    _check_floats(y)
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    if norm_p == 2:
        z: Tensor = _OnSphere.apply(y, math.sqrt(squared_radius))[0]
        return z
    # Powers of numbers far from 1 are soon 0 or inf: in units of the largest, whose choice the result doesn't show.
    unit = y.detach().abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
    y = y / unit
    norm = torch.linalg.vector_norm(y, norm_p, dim=-1, keepdim=True)
    return y / (norm.maximum(1e-12 / unit) / math.sqrt(squared_radius))


class _OnSphere(torch.autograd.Function):
    """y [..., D] -> y / s and log s [..., 1], s = |y| / radius: in half of the memory and passes that autograd takes.

    The second is for second derivatives, whose chain goes through it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        ctx.radius = radius
        scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_(min=1e-12).div_(radius)
        if y.device.type == "cpu" and scale.isfinite().all():  # elsewhere to ask costs more than a pass
            z = y / scale
        else:
            unit = torch.linalg.vector_norm(y, math.inf, dim=-1, keepdim=True)
            unit = unit.masked_fill_(scale.isfinite(), 1)  # others' bits don't depend on who is beside them
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
        along = (along / ctx.radius**2).masked_fill(scale <= 1e-12 / ctx.radius, 0)  # the guard: s is a constant
        found = torch.addcmul(in_z, z, along, value=-1)
        return found * (-log_scale).exp() if torch.is_grad_enabled() else found.div_(scale), None


@not_compiled
def contrastive_loss(z: Tensor, z_all: Tensor, first: int, objective: Objective, ranks: Ranks | None = None) -> Tensor:
    """Mean loss of this rank's anchors against the embeddings of the whole batch, a scalar.

    z      [2, B, D]  this rank's embeddings, normalised as the objective says: on a GPU the sums of longer ones may
                      leave float32's exponents
    z_all  [2, N, D]  those of all ranks, in rank order; z itself on one rank: every pair is then computed once
    first             position in z_all of this rank's image 0
    ranks             with them, z_all is taken as constant, and the gradient in z is that of the sum over ranks

    Computed in float64 where an input is float64, else in float32, under autocast too; by tiles, in memory that grows
    with N, but for second derivatives. Averaged over ranks it is the single-process loss of N images. In a function
    that torch.compile compiles it is computed as it is, between two graphs. Raises ValueError if the shapes disagree.
    """
    z, z_all = _widen(z, z_all)
    _check_shapes(z, z_all, first)
    if objective.kernel == "spectral":
        return spectral(z, z_all if ranks is None else ranks.gather(z), first)
    radius = _longest(objective, z.shape[-1])
    if objective.kernel == "concat_sum":
        z, z_all = _each(_halves, z, z_all)
    if objective.kernel in MIXTURES and objective.mix_level == "loss":
        losses = []
        for index, part in enumerate(parts(objective)):
            select = partial(torch.select, dim=0, index=index) if objective.kernel == "concat_sum" else (lambda z: z)
            losses.append(_tiled_info_nce(*_each(select, z, z_all), first, part, ranks, radius))
        return objective.mix_weight * losses[0] + (1 - objective.mix_weight) * losses[1]
    return _tiled_info_nce(z, z_all, first, objective, ranks, radius)


def _tiled_info_nce(
    z: Tensor, z_all: Tensor, first: int, objective: Objective, ranks: Ranks | None, radius: float
) -> Tensor:
    """`info_nce` by tiles, of vectors no longer than `radius`."""
    log_k = log_kernel(objective)
    if z is z_all or ranks is not None:  # both views of a pair are here: it counts for either
        positive = _pairwise(log_k, *z.unbind(-3)).repeat(2)
    else:
        positive = _pairwise(log_k, z, _partners(z, z_all, first)).flatten()

    def plain(z: Tensor, z_all: Tensor) -> Tensor:
        return _log_kernels(z, z_all, first, log_k)[1].logsumexp(dim=1)

    kernel, precision, backend = tile_kernel(objective), objective.precision, objective.backend
    problem = tiled.Problem(kernel, plain, first, precision, ranks, backend, radius)
    excess = tiled.log_sums(z, z_all, problem) - positive
    return torch.logaddexp(excess, torch.zeros_like(excess)).mean()  # log(1 + exp(excess)), exact near 0 too


def info_nce(z: Tensor, z_all: Tensor, first: int, log_kernel: LogKernel | PDistance) -> Tensor:
    """Mean InfoNCE loss of this rank's anchors by the definition: in the memory of several 2B x 2N matrices.

    z           [*, 2, B, D]  this rank's embeddings, float32 or float64
    z_all       [*, 2, N, D]  those of all ranks, in rank order
    first                     position in z_all of this rank's image 0
    log_kernel                of dot products and squared distances [*, ...] of pairs -> [...]; see the module. Of
                              p-distances, each matrix of pairs is D times as large.

    The leading dimensions *, none or parts of an embedding, are the log-kernel's to reduce. Log(2N-1) where all
    pairs are alike; 0, without gradient, for N = 1. Averaged over ranks it is the single-process loss. Raises
    ValueError if the shapes disagree. Chen et al. 2020, eq. 1; Tan et al. 2024 for kernels other than the cosine.
    """
    positive, negatives = _log_kernels(z, z_all, first, log_kernel)
    excess = negatives - positive[:, None]
    # log(1 + Σ exp(excess)), the largest exponent taken out. A logsumexp over a row of -inf (N = 1) has no gradient.
    largest = excess.detach().amax(dim=1).clamp(min=0)
    total = (excess - largest[:, None]).exp().sum(dim=1)
    return (largest + torch.log1p(total + torch.expm1(-largest))).mean()


def spectral(z: Tensor, z_all: Tensor, first: int) -> Tensor:
    """Spectral contrastive loss: mean (a·b)² over all pairs a ≠ b of the 2N, less 2 mean a·b over the positives.

    Arguments and reduction as for `contrastive_loss`; the positives are among the pairs. No temperature: the radius
    of the embeddings plays its part. Unlike InfoNCE it isn't 0 for N = 1. HaoChen et al. 2021 (arXiv 2106.04156).
    """
    _check_shapes(z, z_all, first)
    # Σ_j (a·z_j)² = aᵀ (Σ_j z_j z_jᵀ) a, of which a's own term is taken out: no need to go through the pairs.
    moments = Product.apply(z_all.flatten(0, 1).mT, z_all.flatten(0, 1).mT)
    rows, own = z.flatten(0, 1), z_all[:, first : first + z.shape[1]].flatten(0, 1)
    squares = (Product.apply(rows, moments) * rows).sum(dim=1) - (rows * own).sum(dim=1).square()
    positive = (z * _partners(z, z_all, first)).sum(dim=-1)
    return squares.mean() / (2 * z_all.shape[-2] - 1) - 2 * positive.mean()


@not_compiled
@torch.no_grad()
def contrastive_accuracy(z: Tensor, z_all: Tensor, first: int, objective: Objective) -> Tensor:
    """Fraction of this rank's anchors whose positive has a larger kernel than every negative, a scalar in [0, 1].

    Arguments as for `contrastive_loss`. A tie counts as a miss, so that collapsed embeddings don't look perfect.
    `spectral` ranks by dot product, a loss-level mixture by λ·log k₁ + (1-λ)·log k₂.
    """
    z, z_all = _widen(z, z_all)
    _check_shapes(z, z_all, first)
    if objective.kernel == "concat_sum":
        z, z_all = _each(_halves, z, z_all)
    rank_by = log_kernel(objective)
    positive = _pairwise(rank_by, z, _partners(z, z_all, first)).flatten()

    def of_tile(rows: Vectors, columns: Vectors, own: Sequence[int]) -> Tensor:
        if isinstance(rank_by, PDistance):
            return rank_by.of_all(rows.z, columns.z)
        return rank_by(*tiled.pairs(rows, columns, own))

    return (positive > tiled.largest(z, z_all, first, of_tile)).to(positive.dtype).mean()


def temperature_equivalent(temperature: float, source: str, target: str, squared_radius: float = 1.0) -> float:
    """The temperature at which the kernel `target` gives the loss that `source` gives at `temperature`.

    Exact, between "cosine" and "gaussian" in the 2-norm: on a sphere |a-b|² = 2μ(1 - cos), so the Gaussian at 2μτ
    is the cosine at τ, but for a constant factor of the kernel. ValueError for others: there is no such identity.
    """
    _require_positive("temperature", temperature)
    _require_positive("radius (the squared radius of the sphere of embeddings)", squared_radius)
    for kernel in (source, target):
        if kernel not in ("cosine", "gaussian"):
            raise ValueError(f"no temperature of the kernel {kernel!r} equals another's: choose 'cosine' or 'gaussian'")
    if source == target:
        return temperature
    return temperature * 2 * squared_radius if source == "cosine" else temperature / (2 * squared_radius)


# --- log-kernels: elementwise in (dot products, squared distances) --------------------------------------------------


def cosine(dot: Tensor, squared_distance: Tensor, temperature: float, squared_radius: float = 1.0) -> Tensor:
    """cos(a, b) / τ: NT-Xent (Chen et al. 2020, eq. 1). τ divides the cosine, whatever the radius."""
    return dot / (temperature * squared_radius)


def gaussian(dot: Tensor, squared_distance: Tensor, temperature: float) -> Tensor:
    """-|a-b|² / τ: without the ½ of the usual exponent, so τ = 2σ². Equals `cosine` at τ / (2 squared_radius)."""
    return -squared_distance / temperature


def exponential(
    dot: Tensor, squared_distance: Tensor, temperature: float, gamma: float, squared_radius: float = 1.0
) -> Tensor:
    """-|a-b|^γ / τ (Tan et al. 2024). τ divides the power, so it has the unit of a distance to the γ.

    γ = 1 is the Laplacian.

    Below γ = 2 a distance counts as at least 0.001 radii, and pairs closer than that have no gradient: the slope
    at 0 is infinite (γ < 1) or undefined (γ = 1), and float32 can't tell such distances apart in a Gram matrix.
    """
    if gamma == 2:
        return gaussian(dot, squared_distance, temperature)
    # Beyond 2 a second derivative may be infinite at 0, and meets a distance of 0 (0·inf = NaN).
    least = 1e-6 * squared_radius if gamma < 2 else torch.finfo(squared_distance.dtype).tiny
    squared_distance = squared_distance.clamp(min=least)
    return -squared_distance.pow(gamma / 2) / temperature


def log_kernel(objective: Objective) -> LogKernel | PDistance:
    """The log-kernel of an objective; of `concat_sum` it takes [2, ...], both halves, and returns [...].

    `spectral` isn't made of a kernel, nor is a loss-level mixture: they get what `contrastive_accuracy` ranks by.
    """
    if objective.distance_p != 2:
        floor = 1e-3 * math.sqrt(objective.squared_radius)
        return PDistance(objective.temperature, _gamma(objective), objective.distance_p, floor)
    if objective.kernel == "spectral":
        return lambda dot, squared_distance: dot
    if objective.kernel == "cosine":
        return partial(cosine, temperature=objective.temperature, squared_radius=objective.squared_radius)
    if objective.kernel == "gaussian":
        return partial(gaussian, temperature=objective.temperature)
    if objective.kernel in ("laplacian", "exponential"):
        return partial(
            exponential,
            temperature=objective.temperature,
            gamma=_gamma(objective),
            squared_radius=objective.squared_radius,
        )
    if objective.kernel == "arccos":
        return partial(arccos, temperature=objective.temperature, order=objective.order)

    first_kernel, second_kernel = (cast(LogKernel, log_kernel(part)) for part in parts(objective))
    weight = objective.mix_weight

    def mixture(dot: Tensor, squared_distance: Tensor) -> Tensor:
        dots = dot if objective.kernel == "concat_sum" else (dot, dot)
        squares = squared_distance if objective.kernel == "concat_sum" else (squared_distance, squared_distance)
        log_first, log_second = first_kernel(dots[0], squares[0]), second_kernel(dots[1], squares[1])
        if objective.mix_level == "loss":
            return weight * log_first + (1 - weight) * log_second
        return torch.logaddexp(math.log(weight) + log_first, math.log1p(-weight) + log_second)

    return mixture


def tile_kernel(objective: Objective) -> TileKernel:
    """The same as it is computed on tiles; not of `spectral`, and of a mixture the kernel-level one."""
    if objective.kernel in MIXTURES:
        first, second = (cast(Power, tile_kernel(part)) for part in parts(objective))
        return Mixture(first, second, objective.mix_weight, objective.kernel == "concat_sum")
    if objective.distance_p != 2:
        return cast(PDistance, log_kernel(objective))
    if objective.kernel == "cosine":
        return Cosine(1 / (objective.temperature * objective.squared_radius))
    if objective.kernel == "arccos":
        return ArcCosine(objective.temperature, objective.order)
    return Power(objective.temperature, _gamma(objective), 1e-6 * objective.squared_radius)


def parts(objective: Objective) -> tuple[Objective, Objective]:
    """The two parts of a mixture: an exponential kernel and a Gaussian."""
    second_temperature = objective.second_temperature or objective.temperature
    return (
        replace(objective, kernel="exponential"),
        replace(objective, kernel="gaussian", temperature=second_temperature),
    )


def _longest(objective: Objective, width: int) -> float:
    """Bound of the Euclidean norm of vectors of norm √squared_radius in the norm `norm_p`: equal but for p > 2."""
    return math.sqrt(objective.squared_radius) * width ** max(0.0, 1 / 2 - 1 / objective.norm_p)


def _gamma(objective: Objective) -> float:
    return {"gaussian": 2.0, "laplacian": 1.0}.get(objective.kernel, objective.gamma)


# --- pairs ----------------------------------------------------------------------------------------------------------


def _pairwise(log_kernel: LogKernel | PDistance, a: Tensor, b: Tensor) -> Tensor:
    """Log-kernels of vectors [*, ..., D] with those at the same place, [...]."""
    if isinstance(log_kernel, PDistance):
        return log_kernel(a - b)
    return log_kernel((a * b).sum(dim=-1), (a - b).square().sum(dim=-1))


def _log_kernels(z: Tensor, z_all: Tensor, first: int, log_kernel: LogKernel | PDistance) -> tuple[Tensor, Tensor]:
    """Log-kernels of the anchors' positives [2B] and negatives [2B, 2N], -inf where a column is no negative."""
    _check_shapes(z, z_all, first)
    positive = _pairwise(log_kernel, z, _partners(z, z_all, first)).flatten()
    rows, columns = z.flatten(-3, -2), z_all.flatten(-3, -2)

    # Columns of the anchor's own image are itself and its positive. They get harmless arguments first, so that no
    # infinite slope of the kernel meets their zero gradient (0·inf = NaN), then -inf.
    batch, total = z.shape[-2], z_all.shape[-2]
    own = torch.arange(first, first + batch, device=z.device)
    same_image = (own[:, None] == torch.arange(total, device=z.device)).repeat(2, 2)
    if isinstance(log_kernel, PDistance):
        negatives = log_kernel((rows[:, None] - columns).masked_fill(same_image[..., None], 1))
        return positive, negatives.masked_fill(same_image, -math.inf)
    dot = Product.apply(rows, columns)
    squares = rows.square().sum(dim=-1)[..., :, None] + columns.square().sum(dim=-1)[..., None, :]
    squared_distance = (squares - 2 * dot).clamp(min=0)
    negatives = log_kernel(dot.masked_fill(same_image, 0), squared_distance.masked_fill(same_image, 1))
    return positive, negatives.masked_fill(same_image, -math.inf)


def _partners(z: Tensor, z_all: Tensor, first: int) -> Tensor:
    """The positive of each anchor, [*, 2, B, D]: the same image in the other view."""
    return z_all[..., first : first + z.shape[-2], :].flip(-3)


def _halves(z: Tensor) -> Tensor:
    """[2, B, D] -> [2 (halves), 2 (views), B, D/2]"""
    if z.shape[-1] % 2:
        raise ValueError(f"concat_sum halves the embedding, whose width {z.shape[-1]} is odd: choose an even head.out")
    return z.unflatten(-1, (2, -1)).movedim(-2, 0)


def _widen(z: Tensor, z_all: Tensor) -> tuple[Tensor, Tensor]:
    _check_floats(z, z_all)
    dtype = torch.promote_types(torch.promote_types(z.dtype, z_all.dtype), torch.float32)
    return _each(lambda t: t.to(dtype), z, z_all)


def _each(function: Callable[[Tensor], Tensor], z: Tensor, z_all: Tensor) -> tuple[Tensor, Tensor]:
    """The function of both, which stay one object where they are one."""
    own = function(z)
    return own, own if z is z_all else function(z_all)


# --- errors ---------------------------------------------------------------------------------------------------------


def _check_floats(*embeddings: Tensor) -> None:
    for z in embeddings:
        if not z.is_floating_point():
            raise ValueError(f"embeddings are of {z.dtype}: give real floating-point numbers, such as torch.float32")


def _check_shapes(z: Tensor, z_all: Tensor, first: int) -> None:
    _check_floats(z, z_all)
    if z.ndim < 3 or z.shape[:-2] != z_all.shape[:-2] or z.shape[-3] != 2 or z.shape[-1] != z_all.shape[-1]:
        raise ValueError(
            f"shapes {tuple(z.shape)} and {tuple(z_all.shape)} don't fit: give own rows [2, B, D], columns [2, N, D]"
        )
    if 0 in z.shape:
        raise ValueError(f"embeddings of shape {tuple(z.shape)} are of no image: give at least one")
    if not 0 <= first <= z_all.shape[-2] - z.shape[-2]:
        raise ValueError(
            f"first is {first}, but {z.shape[-2]} own images must lie within {z_all.shape[-2]}: "
            f"give one from 0 to {z_all.shape[-2] - z.shape[-2]}"
        )


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        nearest = get_close_matches(str(value), choices, n=1, cutoff=0)[0]
        raise ValueError(f"{name} is {value!r}: did you mean {nearest!r}? Choose one of {', '.join(choices)}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require_positive(name: str, value: float) -> None:
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(f"{name} is {value!r}: choose a number above 0")

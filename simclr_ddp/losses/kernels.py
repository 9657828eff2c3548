"""Similarity kernels, one function each, and the settings of the contrastive objective."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from numbers import Real
from typing import cast

import torch
from torch import Tensor

from simclr_ddp.losses.arc_cosine import ArcCosine, arccos
from simclr_ddp.losses.p_norm import PDistance
from simclr_ddp.losses.tile_kernels import BACKENDS, PRECISIONS, Cosine, Mixture, Power, TileKernel

LogKernel = Callable[[Tensor, Tensor], Tensor]
MIXTURES = ("simple_sum", "concat_sum")
KERNELS = ("cosine", "gaussian", "laplacian", "exponential", *MIXTURES, "arccos", "spectral")
OF_ANY_DISTANCE = ("gaussian", "laplacian", "exponential")
MIX_LEVELS = ("loss", "kernel")
LARGEST_GAMMA = 64  # at radius 1 distances are at most 2, and float32 holds 2^64, also divided by τ


@dataclass(frozen=True)
class Objective:
    """Settings of the loss. Raises ValueError for invalid settings.

    kernel              one of KERNELS; the function of that name defines formula and temperature convention
    temperature         τ; `spectral` has none and ignores it
    gamma               exponent of the distance in `exponential` and in the first component of mixtures, at most 64
    mix_weight          λ, weight of the first component of a mixture; the second, Gaussian component has 1 - λ
    mix_level           what a mixture mixes; "loss": λ·loss₁ + (1-λ)·loss₂, as in the code of arXiv 2303.15103;
                        "kernel": one loss whose kernel is λ·k₁ + (1-λ)·k₂, as in its text
    second_temperature  τ of the Gaussian component of a mixture; None: `temperature`
    order               order of `arccos`: 1, 2 or 3
    squared_radius      μ: embeddings have norm √μ
    norm_p              p of this norm; math.inf for the maximum norm
    distance_p          p of the distance in `gaussian`, `laplacian` and `exponential`, 1 to math.inf; values
                        other than 2 cost a pass over D differences per pair instead of a matrix product
    precision           "fp32" or "bf16", for the matrix products of the gradient: see `tile_kernels.Problem`
    backend             "tiled" or "triton"; the latter is experimental and needs a GPU, float32, a width of at most
                        512, and cosine, gaussian, laplacian or exponential: see `tile_kernels.Problem`

    In `simple_sum` both components use the complete embedding; in `concat_sum` the first uses its first half and the
    Gaussian its second, after joint normalisation. `spectral` supports only "fp32" and "tiled".
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
        if not (is_number(self.gamma) and 0 < self.gamma <= LARGEST_GAMMA):
            raise ValueError(f"gamma={self.gamma!r}: must be a number above 0 and at most {LARGEST_GAMMA}")
        _require_positive("squared_radius", self.squared_radius)
        if self.second_temperature is not None:
            _require_positive("second_temperature", self.second_temperature)
        if isinstance(self.order, bool) or self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order!r}: the order of the arc-cosine kernel must be 1, 2 or 3")
        if not (is_number(self.norm_p) and self.norm_p >= 1):
            raise ValueError(f"norm_p={self.norm_p!r}: must be a number of at least 1; inf is the maximum norm")
        if not (is_number(self.distance_p) and self.distance_p >= 1):
            raise ValueError(f"distance_p={self.distance_p!r}: must be a number of at least 1; inf is the maximum norm")
        if self.distance_p != 2 and self.kernel not in OF_ANY_DISTANCE:
            raise ValueError(
                f"distance_p={self.distance_p!r}: the kernel {self.kernel} supports only the Euclidean distance; set "
                f"distance_p=2, or choose {', '.join(OF_ANY_DISTANCE)}"
            )
        if self.distance_p != 2 and self.precision != "fp32":
            raise ValueError(
                f"precision={self.precision!r}: distance_p={self.distance_p!r} uses no matrix products; set 'fp32'"
            )
        for name, value, only in (("precision", self.precision, "fp32"), ("backend", self.backend, "tiled")):
            if self.kernel == "spectral" and value != only:
                raise ValueError(
                    f"{name}={value!r}: the kernel spectral computes no tiles of pairs; set {name}={only!r}"
                )
        if self.backend == "triton" and (self.kernel not in ("cosine", *OF_ANY_DISTANCE) or self.distance_p != 2):
            setting = f"kernel={self.kernel}" if self.distance_p == 2 else f"distance_p={self.distance_p!r}"
            raise ValueError(
                f"backend='triton': {setting} is not supported; set backend='tiled', or choose cosine, "
                f"{', '.join(OF_ANY_DISTANCE)} with distance_p=2"
            )
        if not (is_number(self.mix_weight) and 0 <= self.mix_weight <= 1):
            raise ValueError(f"mix_weight={self.mix_weight!r}: must be a number from 0 to 1")
        if self.kernel in MIXTURES and self.mix_weight in (0, 1):
            raise ValueError(
                f"mix_weight={self.mix_weight!r}: leaves only one component of {self.kernel}; choose a number between "
                "0 and 1, or the kernel 'exponential' or 'gaussian' alone"
            )
        if self.kernel in ("cosine", "arccos") and self.norm_p != 2:
            raise ValueError(f"norm_p={self.norm_p!r}: the kernel {self.kernel} is a function of angles; set norm_p=2")
        if self.kernel == "arccos" and self.squared_radius != 1:
            raise ValueError(f"squared_radius={self.squared_radius!r}: the kernel arccos needs unit vectors; set 1")
        if self.kernel == "arccos" and self.temperature > 1:
            raise ValueError(
                f"temperature={self.temperature!r}: above 1 the kernel arccos leaves the domain of the arc cosine; "
                "choose a temperature of at most 1"
            )


def temperature_equivalent(temperature: float, source: str, target: str, squared_radius: float = 1.0) -> float:
    """Temperature at which the kernel `target` gives the loss that `source` gives at `temperature`.

    The conversion is exact between "cosine" and "gaussian" in the 2-norm: on a sphere |a-b|² = 2μ(1 - cos), so the
    Gaussian at 2μτ is the cosine at τ, up to a constant factor of the kernel. Raises ValueError for other kernels.
    """
    _require_positive("temperature", temperature)
    _require_positive("squared_radius", squared_radius)
    for kernel in (source, target):
        if kernel not in ("cosine", "gaussian"):
            raise ValueError(f"kernel={kernel!r}: its temperature has no equivalent; choose 'cosine' or 'gaussian'")
    if source == target:
        return temperature
    return temperature * 2 * squared_radius if source == "cosine" else temperature / (2 * squared_radius)


def cosine(dot: Tensor, squared_distance: Tensor, temperature: float, squared_radius: float = 1.0) -> Tensor:
    """Return cos(a, b) / τ: NT-Xent (Chen et al. 2020, eq. 1). τ divides the cosine at any radius."""
    return dot / (temperature * squared_radius)


def gaussian(dot: Tensor, squared_distance: Tensor, temperature: float) -> Tensor:
    """Return -|a-b|² / τ, without the usual ½, so τ = 2σ². It equals `cosine` at τ / (2 squared_radius)."""
    return -squared_distance / temperature


def exponential(
    dot: Tensor, squared_distance: Tensor, temperature: float, gamma: float, squared_radius: float = 1.0
) -> Tensor:
    """Return -|a-b|^γ / τ (Tan et al. 2024). τ divides the power, so its unit is a distance to the power γ.

    γ = 1 is the Laplacian. For γ < 2 distances are clamped to at least 0.001 radii, and closer pairs have no gradient:
    the slope at 0 is infinite (γ < 1) or undefined (γ = 1), and float32 can't resolve such distances in a Gram matrix.
    """
    if gamma == 2:
        return gaussian(dot, squared_distance, temperature)
    # Beyond 2 a second derivative may be infinite at 0, and meets a distance of 0 (0·inf = NaN).
    least = 1e-6 * squared_radius if gamma < 2 else torch.finfo(squared_distance.dtype).tiny
    squared_distance = squared_distance.clamp(min=least)
    return -squared_distance.pow(gamma / 2) / temperature


def log_kernel(objective: Objective) -> LogKernel | PDistance:
    """Return the log-kernel of an objective; for `concat_sum` it maps both halves [2, ...] to [...].

    `spectral` and loss-level mixtures have no kernel; they get the score by which `contrastive_accuracy` ranks pairs.
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

    first_kernel, second_kernel = (cast(LogKernel, log_kernel(c)) for c in mixture_components(objective))
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
    """Return the kernel on tiles; `spectral` has none, and mixtures are mixed at kernel level."""
    if objective.kernel in MIXTURES:
        first, second = (cast(Power, tile_kernel(c)) for c in mixture_components(objective))
        return Mixture(first, second, objective.mix_weight, objective.kernel == "concat_sum")
    if objective.distance_p != 2:
        return cast(PDistance, log_kernel(objective))
    if objective.kernel == "cosine":
        return Cosine(1 / (objective.temperature * objective.squared_radius))
    if objective.kernel == "arccos":
        return ArcCosine(objective.temperature, objective.order)
    return Power(objective.temperature, _gamma(objective), 1e-6 * objective.squared_radius)


def mixture_components(objective: Objective) -> tuple[Objective, Objective]:
    """The two components of a mixture: an exponential kernel and a Gaussian."""
    second_temperature = objective.second_temperature or objective.temperature
    return (
        replace(objective, kernel="exponential"),
        replace(objective, kernel="gaussian", temperature=second_temperature),
    )


def _gamma(objective: Objective) -> float:
    return {"gaussian": 2.0, "laplacian": 1.0}.get(objective.kernel, objective.gamma)


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        nearest = get_close_matches(str(value), choices, n=1, cutoff=0)[0]
        hint = f"did you mean {nearest!r}? Choose one of {', '.join(choices)}"
        raise ValueError(f"{name}={value!r}: unknown value; {hint}")


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require_positive(name: str, value: float) -> None:
    if not (is_number(value) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r}: must be a finite number above 0")

"""Counter-based random numbers: every draw is a pure function of (seed, epoch, index, view, draw).

A chain of SplitMix64 finalisers (Steele, Lea and Flood 2014) turns the five integers into 64 bits; the upper 24 bits
form a uniform number that float32 and float64 hold exactly. numpy and torch, CPU and GPU give equal bits, and there is
no generator state: workers, ranks, batch sizes and restarts don't change the numbers.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


class Draw(IntEnum):
    """Index of a random number of a view; each use has an entry, so that no two uses share a number."""

    FLIP = 0
    JITTER = 1
    BRIGHTNESS = 2
    CONTRAST = 3
    SATURATION = 4
    HUE = 5
    ORDER = 6
    GREYSCALE = 7
    BLUR = 8
    SIGMA = 9
    SOLARIZE = 10
    NUISANCE = 16  # .. 21: the six nuisance numbers of a Spirograph view
    CROP = 32  # .. 71: ten tries of (area, aspect, top, left)
    PERMUTATION = 80
    SPLIT = 81
    LABELLED = 82
    MONITOR = 83
    DATASET = 96  # .. 105: the ten numbers of a generated Spirograph image


def _mix(h: int) -> int:
    h = ((h ^ (h >> 30)) * _FACTORS[0]) & _MASK
    h = ((h ^ (h >> 27)) * _FACTORS[1]) & _MASK
    return h ^ (h >> 31)


def _fold(h: int, value: int) -> int:
    return _mix((h + (value + 1) * _GAMMA) & _MASK)


def hashes(seed: int, epoch: int, index: np.ndarray, view: np.ndarray | int, draw: np.ndarray | int) -> np.ndarray:
    """Return uint64 bits for each (index, view, draw); the three broadcast against each other."""

    def fold(h: np.ndarray, value: np.ndarray | int) -> np.ndarray:
        h = h + (np.asarray(value).astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(_FACTORS[0])
        h = (h ^ (h >> np.uint64(27))) * np.uint64(_FACTORS[1])
        return h ^ (h >> np.uint64(31))

    with np.errstate(over="ignore"):
        h = np.asarray(_fold(_fold(0, seed), epoch), np.uint64)
        for value in (index, view, draw):
            h = fold(h, value)
    return h


def uniforms(seed: int, epoch: int, index: np.ndarray, view: np.ndarray | int, draw: np.ndarray | int) -> np.ndarray:
    """Return float64 numbers in [0, 1), multiples of 2^-24; index, view and draw broadcast."""
    return (hashes(seed, epoch, index, view, draw) >> np.uint64(40)).astype(np.float64) * 2.0**-24


def view_uniforms(
    seed: int, epoch: int, index: Tensor, views: int, first: int, count: int, dtype: torch.dtype
) -> Tensor:
    """Return numbers [V, B, count] in [0, 1) on index's device: draws first .. first + count - 1 of every view.

    index  [B] int64

    The result equals `uniforms` of the same arguments bit for bit.
    """

    def signed(value: int) -> int:
        return value - (1 << 64) if value >= 1 << 63 else value

    def shift(h: Tensor, bits: int) -> Tensor:  # logical; torch's shift of int64 keeps the sign
        return (h >> bits) & ((1 << (64 - bits)) - 1)

    def mix(h: Tensor) -> Tensor:
        h = (h ^ shift(h, 30)) * signed(_FACTORS[0])
        h = (h ^ shift(h, 27)) * signed(_FACTORS[1])
        return h ^ shift(h, 31)

    def added(start: int, stop: int) -> Tensor:  # (value + 1) * _GAMMA of every value, modulo 2^64
        return torch.arange(start + 1, stop + 1, device=index.device) * signed(_GAMMA)

    start = (_fold(_fold(0, seed), epoch) + _GAMMA) & _MASK
    h = mix(index[None, :, None] * signed(_GAMMA) + signed(start))
    h = mix(h + added(0, views)[:, None, None])
    h = mix(h + added(first, first + count))
    return shift(h, 40).to(dtype) * 2.0**-24


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of the samples in an epoch, int64 [count]; the same for any number of ranks."""
    return np.argsort(hashes(seed, epoch, np.arange(count), 0, Draw.PERMUTATION), kind="stable")


def monitored(seed: int, count: int, images: int) -> np.ndarray:
    """Positions of the images that are measured while a run trains, ascending, int64 [images]."""
    order = np.argsort(hashes(seed, 0, np.arange(count), 0, Draw.MONITOR), kind="stable")
    return np.sort(order[:images])


def holdout(seed: int, count: int, fraction: float) -> np.ndarray:
    """Mask [count] of a validation split of `round(count * fraction)` samples."""
    order = np.argsort(hashes(seed, 0, np.arange(count), 0, Draw.SPLIT), kind="stable")
    held = np.zeros(count, bool)
    held[order[: round(count * fraction)]] = True
    return held

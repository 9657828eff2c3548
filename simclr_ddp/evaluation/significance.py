"""Whether one model is better than another: on the same images, and over the seeds of training.

A comparison on the same images says whether two trained models differ on images of that kind. It does not cover the
variation between training runs: two runs that differ in the seed alone may differ significantly. Differences are those
of the first minus the second; intervals are for 95 %, and p-values are two-sided. Nothing here imports torch or SciPy.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
PIECE = 1 << 22  # random numbers that are held at a time


class Paired(NamedTuple):
    difference: float
    interval: tuple[float, float]
    p: float


class Welch(NamedTuple):
    difference: float  # of the means
    interval: tuple[float, float]
    p: float
    degrees: float  # of freedom; infinite if both groups have no deviation


def discordant(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[int, int]:
    """Numbers of images that only the first and only the second predicts correctly, from bool [n] and [n]."""
    return int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())


def accuracies(correct_a: np.ndarray, correct_b: np.ndarray) -> Paired:
    """Compare two accuracies on the same images, from bool [n] and [n]: McNemar's test and the paired bootstrap."""
    only_a, only_b = discordant(correct_a, correct_b)
    n = len(correct_a)
    return Paired((only_a - only_b) / n, accuracy_interval(only_a, only_b, n), mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: p-value of equal accuracies, from the numbers of images that only one predicts correctly.

    Under equal accuracies each of these images is equally likely to be of either kind (McNemar 1947), and the p-value
    is that of a binomial test with probability 1/2. The permutation test that exchanges the two predictions of an image
    at random has the same p-value in the limit of all exchanges.
    """
    n = only_a + only_b
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(min(only_a, only_b) + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value - n * math.log(2)) for value in logs))


def accuracy_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """Percentile interval of the paired bootstrap for the difference of two accuracies on n images.

    An image adds 1, -1 or 0 to the difference of a resample. The distribution over all resamples is therefore the sum
    of n independent draws of these three, whose Fourier transform is a power: it is computed, not sampled. The interval
    has no width if no image differs.
    """
    return _lower_end(only_a, only_b, n), -_lower_end(only_b, only_a, n)


def _lower_end(only_a: int, only_b: int, n: int) -> float:
    turn = np.exp(-2j * np.pi * np.arange(2 * n + 1) / (2 * n + 1))
    transform = ((n - only_a - only_b + only_a * turn + only_b * turn.conj()) / n) ** n
    probability = np.fft.fftshift(np.fft.ifft(transform).real)  # of the differences -n .. n
    place = int(np.searchsorted(probability.clip(0).cumsum(), (1 - LEVEL) / 2))
    return (place - n) / n


def errors(error_a: np.ndarray, error_b: np.ndarray, seed: int = 0) -> Paired:
    """Compare the means of two errors of the same images, from float [n] and [n], by paired bootstrap and permutation.

    The interval is the percentile interval of RESAMPLES resamples of the images. The p-value is the fraction of as many
    random exchanges of the two errors of an image that give at least this difference, the observed one included.
    """
    differences = error_a.astype(np.float64) - error_b
    bits = np.random.PCG64(seed)  # its numbers, unlike those of a numpy Generator, are the same in every version
    means = np.concatenate([differences[index].mean(1) for index in _resamples(bits, len(differences))])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    observed = abs(differences.sum()) * (1 - 1e-12)  # exchanges of equal errors differ by rounding
    reached = sum(int((abs(signs @ differences) >= observed).sum()) for signs in _signs(bits, len(differences)))
    return Paired(float(differences.mean()), (float(low), float(high)), (1 + reached) / (1 + RESAMPLES))


def _resamples(bits: np.random.PCG64, n: int) -> Iterator[np.ndarray]:
    """Yield positions of resampled images, [b, n], for b of the RESAMPLES at a time."""
    for count in _pieces(n):
        words = bits.random_raw((count * n + 1) // 2).view(np.uint32)[: count * n].reshape(count, n)
        yield (words.astype(np.uint64) * np.uint64(n)) >> np.uint64(32)


def _signs(bits: np.random.PCG64, n: int) -> Iterator[np.ndarray]:
    """Yield random signs +1 and -1, float64 [b, n], for b of the RESAMPLES at a time."""
    for count in _pieces(n):
        words = bits.random_raw((count * n + 63) // 64).view(np.uint8)
        yield np.unpackbits(words)[: count * n].reshape(count, n) * 2.0 - 1


def _pieces(n: int) -> list[int]:
    size = max(1, PIECE // n)
    return [min(size, RESAMPLES - first) for first in range(0, RESAMPLES, size)]


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1 in the denominator; nan of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def welch(values_a: list[float], values_b: list[float]) -> Welch:
    """Compare the means of two groups of runs without assuming equal variances: Welch's t-test and interval.

    The degrees of freedom are those of Welch (1947) and Satterthwaite (1946). Raises ValueError for a group of one.
    """
    if min(len(values_a), len(values_b)) < 2:
        raise ValueError(
            f"groups of {len(values_a)} and {len(values_b)} runs: a deviation needs two runs; give runs of more seeds"
        )
    (mean_a, deviation_a), (mean_b, deviation_b) = mean_and_deviation(values_a), mean_and_deviation(values_b)
    of_a, of_b = deviation_a**2 / len(values_a), deviation_b**2 / len(values_b)
    difference, error = mean_a - mean_b, math.sqrt(of_a + of_b)
    if error == 0:
        return Welch(difference, (difference, difference), float(difference == 0), math.inf)
    degrees = (of_a + of_b) ** 2 / (of_a**2 / (len(values_a) - 1) + of_b**2 / (len(values_b) - 1))
    half = t_quantile(degrees) * error
    return Welch(difference, (difference - half, difference + half), 1 - t_within(difference / error, degrees), degrees)


def t_within(t: float, degrees: float) -> float:
    """Probability that a variable of Student's t distribution lies in -|t| .. |t|, for at least one degree of freedom.

    With t = sqrt(degrees) tan(a) the density becomes a power of the cosine, which a quadrature by Gauss integrates to
    rounding.
    """
    end = math.atan(abs(t) / math.sqrt(degrees))
    nodes, weights = _gauss()
    # The power falls to nothing within a few standard deviations, 1 / sqrt(degrees), so that all nodes lie there.
    end = min(end, 40 / math.sqrt(degrees))
    integral = end / 2 * float(weights @ np.cos(end / 2 * (nodes + 1)) ** (degrees - 1))
    log_beta = math.lgamma(0.5) + math.lgamma(degrees / 2) - math.lgamma(degrees / 2 + 0.5)
    return min(1.0, 2 * integral / math.exp(log_beta))


@cache
def _gauss() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(60)


def t_quantile(degrees: float, level: float = LEVEL) -> float:
    """The t for which t_within is `level`, by bisection."""
    low, high = 0.0, 1.0
    while t_within(high, degrees) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < level else (low, middle)
    return high

"""Scores of a model on images that it has not seen, and how far such a sample of images can be trusted.

Intervals are of 95 %, for the images being a random sample; how the score varies with the training is not in them.
"""

import math

import torch
from torch import Tensor

Z = 1.959963984540054  # a normal variable lies within so many standard deviations with a probability of 95 %


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """[n, K], [n] -> int64 [n]: how many classes come before the right one; of equal logits the first class leads.

    The prediction is right where it is 0, and among the k best where it is below k.
    """
    own = logits.gather(1, labels[:, None])
    first = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & first)).sum(1)


def share(hits: Tensor) -> float:
    """bool [n] -> how many are true, in [0, 1]."""
    return hits.double().mean().item()


def wilson(share: float, n: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a probability that came true in a share of n cases.

    Wilson 1927; unlike share +- Z standard errors it stays within [0, 1] and has a width at 0 and 1.
    """
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_per_class(hits: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the share of hits among their images: bool [n], int64 [n] -> [0, 1]."""
    counts = torch.bincount(labels)
    of_class = torch.bincount(labels[hits], minlength=len(counts))
    return (of_class[counts > 0] / counts[counts > 0].double()).mean().item()


def squared_errors(prediction: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each component: [n, K], [n, K] -> [K]."""
    return (prediction - targets).square().mean(0)


def mean_interval(values: Tensor) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean of n values that are not negative, by the normal approximation."""
    half = Z * values.std(correction=0).item() / math.sqrt(len(values))
    return max(0.0, values.mean().item() - half), values.mean().item() + half

"""Metrics of a model on unseen images, with confidence intervals.

The 95 % intervals cover the random choice of the images, not the variation between training runs.
"""

import math

import torch
from torch import Tensor

Z = 1.959963984540054  # 95 % of a normal distribution lies within Z standard deviations


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Rank of the correct class for logits [n, K] and labels [n], int64 [n]; of equal logits the first class leads.

    Rank 0 is a correct prediction, and a rank below k is among the k best.
    """
    correct = logits.gather(1, labels[:, None])
    first = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > correct) | ((logits == correct) & first)).sum(1)


def accuracy(correct: Tensor) -> float:
    """Fraction of correct predictions, from bool [n]."""
    return correct.double().mean().item()


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a probability that was observed as a fraction `share` of n cases.

    Wilson 1927; unlike share +- Z standard errors it stays within [0, 1] and has a positive width at 0 and 1.
    """
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_per_class(correct: Tensor, labels: Tensor) -> float:
    """Accuracy per class, averaged over the classes that occur, from bool [n] and int64 [n]."""
    counts = torch.bincount(labels)
    of_class = torch.bincount(labels[correct], minlength=len(counts))
    return (of_class[counts > 0] / counts[counts > 0].double()).mean().item()


def squared_errors(prediction: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error [K] of each component of predictions and targets [n, K]."""
    return (prediction - targets).square().mean(0)


def mean_interval(values: Tensor) -> tuple[float, float]:
    """95 % interval of the mean of n non-negative values, by the normal approximation."""
    half = Z * values.std(correction=0).item() / math.sqrt(len(values))
    return max(0.0, values.mean().item() - half), values.mean().item() + half

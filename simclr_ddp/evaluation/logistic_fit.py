"""Multinomial logistic regression at many strengths, for arrays in memory or on disk: `fit_logistic_path`."""

import math
import warnings
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from simclr_ddp.evaluation import logistic, logistic_path
from simclr_ddp.evaluation.chunks import Features

Array = TypeVar("Array", Tensor, np.ndarray)


def fit_logistic_path(
    x: Array, y: Array, strengths: Sequence[float], *, convention: str = "C", tolerance: float = 1e-6
) -> tuple[Array, Array, Array]:
    """Fit multinomial logistic regressions at all strengths: weights [S, D, K], biases [S, K], gradient norms [S].

    x           [n, D] float32 or float64; a memory-mapped array is read in chunks and never copied
    y           [n] integer labels; the K columns are the labels that occur, sorted
    convention  "C" minimises 1/2 |W|^2 + strength * sum of cross-entropies, as scikit-learn does with more than two
                classes; "mean" minimises mean cross-entropy + strength * |W|^2. Biases are not penalised
    tolerance   of the gradient norms: Euclidean, in float64, divided by the norm at zero weights

    Results are float64: NumPy arrays if x is one, or tensors on the device of x. Features are used as they are;
    standardised ones need the fewest iterations. Each process solves alone, also under torchrun. A norm above the
    tolerance, after 1,000 iterations, is returned with a warning.

        weights, biases, norms = fit_logistic_path(x, y, [1e-2, 1, 100])
        predicted = (x_test @ weights[1] + biases[1]).argmax(1)

    Raises ValueError for NaN or infinite features, other shapes or types, a single class, an empty list of strengths or
    one that is not a penalty, and more strengths than fit in memory.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
        features, labels = torch.as_tensor(x), torch.as_tensor(y)
    _check(features, labels, strengths, convention, tolerance)
    names, labels = labels.to(features.device).unique(return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"y: all {len(labels)} labels are {names[0].item()}; samples of at least two classes are needed"
        )
    if fault := logistic_path.memory_fault(features.shape[1], len(names), len(strengths), features.device):
        raise ValueError(fault)
    rows = torch.arange(len(features), device=features.device)
    l2 = [logistic.ridge(convention, strength, len(rows)) for strength in strengths]
    found = logistic.solutions(Features(features), labels, rows, l2, classes=len(names), tolerance=tolerance)
    short = [s.gradient for s in found if not s.converged]
    if short:
        warnings.warn(
            f"{len(short)} of {len(found)} strengths did not reach tolerance={tolerance:g} (gradient norm up to "
            f"{max(short):.1e}); raise the tolerance, or standardise the features",
            stacklevel=2,
        )
    weights, biases = torch.stack([s.weight for s in found]), torch.stack([s.bias for s in found])
    norms = torch.tensor([s.gradient for s in found], dtype=torch.float64, device=features.device)
    if isinstance(x, Tensor):
        return weights, biases, norms
    return weights.numpy(), biases.numpy(), norms.numpy()


def _check(x: Tensor, y: Tensor, strengths: Sequence[float], convention: str, tolerance: float) -> None:
    if convention not in logistic.CONVENTIONS:
        raise ValueError(f"convention={convention}: unknown value; choose one of {', '.join(logistic.CONVENTIONS)}")
    if x.ndim != 2 or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(
            f"x: {list(x.shape)} {_name(x)}; must be floating-point features [n, D] of at least one sample"
        )
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(f"y: {list(y.shape)} {_name(y)}; must be {len(x)} integers, the class of each row of x")
    if not len(strengths):
        raise ValueError("strengths=[]: nothing to fit; name at least one strength, such as 1.0")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: must be 0 or above; use a value such as 1e-6")
    for strength in strengths:
        if not 0 <= strength < math.inf or (convention == "C" and strength < 1e-100):
            bound = "above 0" if convention == "C" else "0 or above"
            raise ValueError(f"strengths: {strength} is no penalty with convention={convention}; must be {bound}")
    if not logistic.finite(x):
        raise ValueError("x: some features are NaN or infinite; leave out these samples")


def _name(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")

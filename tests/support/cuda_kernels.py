"""Replacements for torch's batch-norm kernels that exist only on CUDA, by their formulas (cuda/Normalization.cuh).

They make the fused batch norm testable on the CPU, and, for the Meta key, on fake CUDA tensors. They assert what the
kernels assert or assume without a check.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _alike(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)


def _lies(x: Tensor, *others: Tensor) -> None:
    """Check that all have the memory layout of x (channels last or contiguous), because kernels read raw pointers."""
    form = torch.channels_last if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else None
    for t in (x, *others):
        assert t.shape == x.shape and t.dtype == x.dtype
        assert t.is_contiguous(memory_format=form or torch.contiguous_format), t.stride()


def _of_channels(x: Tensor, *vectors: Tensor) -> None:
    for t in vectors:
        assert t.dtype == _wide(x) and t.shape == (x.shape[1],) and t.is_contiguous(), (t.dtype, t.shape, t.stride())


def update_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    assert running_mean is None and running_var is None
    _lies(x)
    var, mean = torch.var_mean(x.to(_wide(x)), [0, *range(2, x.dim())], correction=0)
    return mean, var


def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    _lies(x)
    _of_channels(x, weight, bias, mean, invstd)
    shape = _alike(x)
    y = (x.to(_wide(x)) - mean.view(shape)) * (weight * invstd).view(shape) + bias.view(shape)
    return torch.empty_like(x).copy_(y)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, input_g: bool, weight_g: bool, bias_g: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert input_g and weight_g and bias_g
    _lies(x, dy)
    _of_channels(x, weight, mean, invstd)
    dims = [0, *range(2, x.dim())]
    wide = dy.to(_wide(x))
    sum_dy = wide.sum(dims)
    sum_dy_xmu = (wide * (x - mean.view(_alike(x)))).sum(dims)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    _lies(x, dy)
    _of_channels(x, weight, mean, invstd, sum_dy, sum_dy_xmu)
    assert count.dtype == torch.int32
    shape, total = _alike(x), count.sum()
    centred = (x.to(_wide(x)) - mean.view(shape)) * (invstd.square() * sum_dy_xmu / total).view(shape)
    dx = (dy - (sum_dy / total).view(shape) - centred) * (weight * invstd).view(shape)
    return torch.empty_like(x).copy_(dx)


@contextmanager
def on(key: str) -> Iterator[None]:
    """In this context, use the replacements as torch's kernels for this dispatch key."""
    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the CPU has one of them, but computes statistics of bf16 in bf16
        kernels = {"elemt": elemt, "backward_reduce": backward_reduce, "backward_elemt": backward_elemt}
        for name, kernel in (kernels | {"update_stats": update_stats}).items():
            library.impl(f"batch_norm_{name}", kernel, key)
        yield

"""Matrix products whose precision is a choice of ours, never one of autocast's or of torch's global settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Product(torch.autograd.Function):
    """a [..., n, D], b [..., m, D] -> a bᵀ [..., n, m], forward and backward in the tensors' own precision.

    Divided by a temperature of 0.01, a dot product rounded by autocast, TF32 or bfloat16 would be off by whole units.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with full_precision(a.device.type):
            return a @ b.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        a, b = ctx.saved_tensors
        with full_precision(a.device.type):
            return gradient @ b, gradient.mT @ a


# Of functions: torch.compile runs them as they are, between two graphs, since it can't trace what sets the precision.
# torch.compiler.disable does the same, but takes a second to import.
not_compiled = torch._disable_dynamo


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products of float32 as exact as float32 allows, whatever autocast and torch's global settings say."""
    before = _get_precision()
    try:
        if before != _EXACT:
            _set_precision(_EXACT)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if before != _EXACT:
            _set_precision(before)


# Torch 2.9 brought a setting per backend; the global one before it raises where a user has touched the new ones.
_BACKENDS: list[Any] = [
    matmul
    for matmul in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(matmul, "fp32_precision")
]
_EXACT = ["ieee" for _ in _BACKENDS] or ["highest"]


def _get_precision() -> list[str]:
    return [backend.fp32_precision for backend in _BACKENDS] or [torch.get_float32_matmul_precision()]


def _set_precision(precision: list[str]) -> None:
    if not _BACKENDS:
        torch.set_float32_matmul_precision(precision[0])
    for backend, value in zip(_BACKENDS, precision, strict=False):
        backend.fp32_precision = value

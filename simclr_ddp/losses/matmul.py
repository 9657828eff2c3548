"""Matrix products of fixed precision, independent of autocast and of torch's global settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Product(torch.autograd.Function):
    """Product a bᵀ [..., n, m] of a [..., n, D] and b [..., m, D], forward and backward in the tensors' dtype.

    Divided by a temperature of 0.01, a dot product rounded by autocast, TF32 or bfloat16 would be off by one or more.
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


# Decorator: torch.compile breaks the graph here, since it can't trace what sets the precision.
# torch.compiler.disable does the same, but takes a second to import.
not_compiled = torch._disable_dynamo


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Compute float32 matrix products in full precision, regardless of autocast and torch's global settings."""
    before = get_precision()
    try:
        if before != EXACT:
            set_precision(EXACT)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if before != EXACT:
            set_precision(before)


# Torch 2.9 added a setting per backend; the older global one raises if a user has changed a new one.
_BACKENDS: list[Any] = [
    matmul
    for matmul in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(matmul, "fp32_precision")
]
EXACT = ["ieee" for _ in _BACKENDS] or ["highest"]


def get_precision() -> list[str]:
    return [backend.fp32_precision for backend in _BACKENDS] or [torch.get_float32_matmul_precision()]


def set_precision(precision: list[str]) -> None:
    if not _BACKENDS:
        torch.set_float32_matmul_precision(precision[0])
    for backend, value in zip(_BACKENDS, precision, strict=False):
        backend.fp32_precision = value

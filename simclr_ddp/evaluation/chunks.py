"""Features [n, D] of any size and precision, read in chunks."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = {"cpu": 2**18, "cuda": 2**26}  # numbers: 2 MiB in float64, which fits the cache, and 512 MiB
_WIDTH = 512  # chunks have no fewer rows than matrices of this width, so that products of wide matrices stay efficient


def chunk_rows(x: Tensor, columns: int = 1) -> int:
    """Number of rows of a chunk; `columns` is the width of the matrices derived from it."""
    return max(1, CHUNK[x.device.type] // min(_WIDTH, max(x.shape[1], columns)))


def chunks(
    x: Tensor, rows: Tensor, columns: int = 1, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x[rows] in chunks (rows [b], features [b, D] of `dtype`)."""
    for part in rows.split(chunk_rows(x, columns)):
        yield part, x[part].to(dtype)


def sum_over(terms: Iterator[Tensor]) -> Tensor:
    """Sum tensors of one shape while holding only two at a time."""
    total = next(terms).clone()
    for term in terms:
        total += term
    return total

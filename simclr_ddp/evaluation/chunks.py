"""Features [n, D] of any size and precision, read in chunks."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = {"cpu": 2**18, "cuda": 2**26}  # numbers: 2 MiB in float64, which fits the cache, and 512 MiB
_WIDTH = 512  # chunks have no fewer rows than matrices of this width, so that products of wide matrices stay efficient


class Features:
    """Features x [n, D], float32 or float64, standardised as they are read: (x - mean) * factor, float64 [D], [D].

    x may be a memory-mapped file that is larger than the memory: it is neither copied nor written.
    """

    def __init__(self, x: Tensor, mean: Tensor | None = None, factor: Tensor | None = None) -> None:
        self.x, self.mean, self.factor = x, mean, factor
        self.count, self.width = x.shape
        self.device = x.device

    def chunks(
        self, rows: Tensor, columns: int = 1, dtype: torch.dtype = torch.float64
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows [m] in chunks (rows [b], features [b, D] of `dtype`).

        columns  width of the matrices that are derived from a chunk
        """
        mean = None if self.mean is None else self.mean.to(dtype)
        factor = None if self.factor is None else self.factor.to(dtype)
        for part in rows.split(chunk_rows(self.x, columns)):
            z = self.x[part].to(dtype)
            if mean is not None and factor is not None:
                z.sub_(mean).mul_(factor)
            yield part, z


def chunk_rows(x: Tensor, columns: int = 1) -> int:
    """Number of rows of a chunk; `columns` is the width of the matrices derived from it."""
    return max(1, CHUNK[x.device.type] // min(_WIDTH, max(x.shape[1], columns)))


def sum_over(terms: Iterator[Tensor]) -> Tensor:
    """Sum tensors of one shape while holding only two at a time."""
    total = next(terms).clone()
    for term in terms:
        total += term
    return total

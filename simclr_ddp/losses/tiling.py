"""Division of the N x N pairs into tiles, and of the tiles among ranks."""

from collections.abc import Iterator
from itertools import combinations, pairwise, product
from typing import NamedTuple

import torch

TILE = 1024  # rows and columns: large enough to hide the cost of a call, small enough that a few fit the cache
TRIANGLE = 512  # of tiles on the diagonal, which are split, since they contain each pair twice
KEPT = 40 * 2**20  # largest number of bytes of tiles that are kept for the backward pass


class Sizes(NamedTuple):
    """The three constants above for one type of device."""

    tile: int
    triangle: int
    kept: int


# A GPU finishes a tile of 1,024 before the host launches the next. These take 64 MiB in float32; up to three exist at a
# time (arc-cosine and p-norm distances: about eight). Predicted from operations and bytes, not measured.
GPU = Sizes(4096, 2048, 256 * 2**20)


def sizes_for(device: torch.device) -> Sizes:
    return Sizes(TILE, TRIANGLE, KEPT) if device.type == "cpu" else GPU


class Tile(NamedTuple):
    """Pairs (row, column) of a range of anchors and a range of columns, each within one view.

    `own` lists the diagonals whose pairs are of one image; a `mirrored` tile also represents its mirror image.
    """

    rows: slice
    columns: slice
    own: list[int]
    mirrored: bool

    @property
    def area(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


Run = tuple[int, int, int]  # view, first image, end


def tiles(
    batch: int,
    total: int,
    first: int,
    symmetric: bool,
    index: int = 0,
    count: int = 1,
    sizes: Sizes | None = None,
) -> list[Tile]:
    """Tiles of 2 * batch anchors against 2 * total columns; if `symmetric`, those of rank `index` of `count`.

    sizes  the CPU's by default

    Each rank computes the pairs of its images with each other and with those of the half of the ranks that follow it,
    cyclically: all shares are equal. If `count` is even, opposite ranks divide their common pairs.
    """
    sizes = sizes or sizes_for(torch.device("cpu"))
    if symmetric:
        starts = [total * rank // count for rank in range(count + 1)]
        chosen = _local(starts[index], starts[index + 1], sizes)
        for rows, columns in _following(starts, index):
            chosen += _cross(rows, columns, sizes.tile)
    else:
        chosen = _cross((0, batch), (0, total), sizes.tile)
    return [
        Tile(
            slice(v * batch + a, v * batch + b),
            slice(u * total + c, u * total + d),
            [offset for offset in {first + a - c} if -(b - a) < offset < d - c],
            symmetric and (v, a) != (u, c),
        )
        for (v, a, b), (u, c, d) in chosen
    ]


def _local(start: int, stop: int, sizes: Sizes) -> list[tuple[Run, Run]]:
    """Pairs among these images on and above the diagonal."""
    runs = [(view, a, b) for view in range(2) for a, b in _split(start, stop, sizes.tile)]
    return [*combinations(runs, 2), *(pair for run in runs for pair in _triangle(run, sizes.triangle))]


def _triangle(run: Run, most: int) -> list[tuple[Run, Run]]:
    """Pairs of a run with itself on and above its diagonal, split while it is longer than `most`."""
    view, start, stop = run
    if stop - start <= most:
        return [(run, run)]
    first, last = (view, start, (start + stop) // 2), (view, (start + stop) // 2, stop)
    return [*_triangle(first, most), (first, last), *_triangle(last, most)]


def _following(starts: list[int], index: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of images (rows, columns) whose pairs across ranks this rank computes."""
    count = len(starts) - 1
    rows, after, end = (starts[index], starts[index + 1]), index + 1, index + 1 + (count - 1) // 2
    yield rows, (starts[after], starts[min(end, count)])
    yield rows, (0, starts[max(end - count, 0)])
    if count % 2 == 0:
        low, high = sorted((index, (index + count // 2) % count))
        middle = (starts[high] + starts[high + 1]) // 2
        if index == low:
            yield rows, (starts[high], middle)
        else:
            yield (middle, starts[high + 1]), (starts[low], starts[low + 1])


def _cross(rows: tuple[int, int], columns: tuple[int, int], tile: int) -> list[tuple[Run, Run]]:
    """All pairs of two ranges of images; tiles with fewer rows get more columns."""
    return [
        ((v, a, b), (u, c, d))
        for a, b in _split(*rows, tile)
        for c, d in _split(*columns, max(tile, tile * tile // (b - a)))
        for v, u in product(range(2), repeat=2)
    ]


def _split(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """Split a range into equal pieces no longer than `most`."""
    count = -(-(stop - start) // most)
    cuts = [start + (stop - start) * piece // count for piece in range(count)] + [stop]
    return list(pairwise(cuts))

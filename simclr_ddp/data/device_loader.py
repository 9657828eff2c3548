"""Loader that decodes a small data set once, keeps it on the device and cuts views there.

Its views equal those of the other loaders bit for bit. Pillow's resize is fixed-point arithmetic with 22-bit weights,
and each of its two passes rounds to 8 bits. Here a pass is a matrix product in float64, whose sums of at most 31 bits
are exact in any order on any device. A table holds the weights of every possible crop along an axis (528 for 32-pixel
images), so a step computes none.
"""

import os
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from simclr_ddp.data.beton import Beton
from simclr_ddp.data.crops import filter_margin
from simclr_ddp.distributed import collectives
from simclr_ddp.system.console import progress

BITS = 22  # fractional bits of a weight
SHARE = 0.25  # largest fraction of the device's memory for the images of one file and their weights
BLOCK = 1024  # images sent to the device at once
T = TypeVar("T")


class Resident(NamedTuple):
    """Images and weights on the device."""

    pixels: Tensor  # uint8 [n, W, 3, H]: W and H are the file's largest; smaller images are at the top left
    columns: Tensor  # float32 [every crop of every width, size, W]: weights along a row, multiples of 2^-22
    rows: Tensor  # float32 [every crop of every height, size, H]: weights along a column


def kept_bytes(images: Beton, size: int) -> int:
    """Bytes of the decoded images of a file and of the weights for views of `size` pixels on the device."""
    height, width = images.sizes.max(axis=0).tolist()
    heights, widths = (np.unique(side) for side in images.sizes.T)
    weights = sum(size * side * int(_crops(lengths).sum()) for lengths, side in ((heights, height), (widths, width)))
    return 3 * images.count * height * width + 4 * weights


def check_room(images: Beton, size: int, device: torch.device) -> None:
    """Raise ValueError if the file's images take more than SHARE of the device's memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:  # divided among the ranks of this machine, each of which keeps the images
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // collectives.local_world_size()
    needed = kept_bytes(images, size)
    if needed > SHARE * total:
        raise ValueError(
            f"data.loader=device: the {images.count:,} decoded images of {images.path} take {needed:,} bytes, over "
            f"{SHARE:.0%} of the {total:,} bytes of {device.type} memory; set data.loader=auto (loader=auto for "
            "linear_eval) to decode batch by batch"
        )


@lru_cache(maxsize=4)
def resident(images: Beton, size: int, device: torch.device, workers: int) -> Resident:
    """Images of an open file and weights for views of `size` pixels, on the device; cached.

    At least one thread decodes, else `workers`. Raises ValueError if an image can't be decoded.
    """
    height, width = images.sizes.max(axis=0).tolist()
    columns, rows = (
        torch.from_numpy(_table(np.unique(lengths), size, strips)).to(device)
        for lengths, strips in ((images.sizes[:, 1], False), (images.sizes[:, 0], True))
    )
    return Resident(_pixels(images, height, width, device, max(1, workers)), columns, rows)


@lru_cache(maxsize=4)
def _pixels(images: Beton, height: int, width: int, device: torch.device, workers: int) -> Tensor:
    pixels = torch.empty(images.count, width, 3, height, dtype=torch.uint8, device=device)

    def blocks(pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        for first in range(0, images.count, BLOCK):
            block = np.zeros((min(BLOCK, images.count - first), width, 3, height), np.uint8)
            for i, image in enumerate(pool.map(images.image, range(first, first + len(block)))):
                block[i, : image.shape[1], :, : image.shape[0]] = image.transpose(1, 2, 0)
                yield block[i]
            pixels[first : first + len(block)] = torch.from_numpy(block)

    with ThreadPoolExecutor(workers, "decode") as pool:
        for _ in progress(blocks(pool), images.count):
            pass
    return pixels


def _crops(length: np.ndarray) -> np.ndarray:
    """Number of crops of a side of that length: pairs (start, extent) with start + extent <= length."""
    return length * (length + 1) // 2


def _table(lengths: np.ndarray, size: int, strips: bool) -> np.ndarray:
    """Weight of each input pixel in each output pixel: float32 [every crop of every length, size, longest].

    lengths  the sides that occur, ascending
    strips   compute the weights of `crops.resize_crop`'s second pass, which sees only the crop's strip: its positions
             are different float64 numbers, so the last bit of a weight may differ
    """
    table = np.zeros((int(_crops(lengths).sum()), size, int(lengths.max())), np.float32)
    entry = 0
    for length in lengths.tolist():
        for start in range(length):
            extent = np.arange(1, length - start + 1)
            above, below = np.zeros_like(extent), np.full_like(extent, length)
            if strips:
                margin = np.array([filter_margin(e, size) for e in extent.tolist()])
                above, below = np.maximum(0, start - margin), np.minimum(length, start + extent + margin)
            first, weights = _weights(start - above, extent, below - above, size)
            crop, pixel = np.ogrid[entry : entry + len(extent), :size]
            for tap in range(weights.shape[2]):
                used = weights[..., tap] > 0
                at = np.broadcast_arrays(crop, pixel, first + above[:, None] + tap)
                table[tuple(a[used] for a in at)] = weights[..., tap][used] / (1 << BITS)
            entry += len(extent)
    return table


def _weights(start: np.ndarray, extent: np.ndarray, length: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's weights to resize [start, start + extent) of `length` pixels, one crop per row.

    first   int64 [n, size]        first input pixel
    weight  int64 [n, size, taps]  in units of 2^-22
    """
    start, extent, length = start[:, None], extent[:, None], length[:, None]
    scale = extent / size
    support = np.maximum(scale, 1.0)
    centre = start + (np.arange(size) + 0.5) * scale
    first = np.maximum(0, (centre - support + 0.5).astype(np.int64))
    count = np.minimum(length, (centre + support + 0.5).astype(np.int64)) - first
    triangle = np.zeros((*count.shape, int(count.max())))
    total = np.zeros(count.shape)
    for tap in range(triangle.shape[2]):
        distance = np.abs((tap + first - centre + 0.5) * (1.0 / support))
        triangle[..., tap] = np.where((distance < 1.0) & (tap < count), 1.0 - distance, 0.0)
        total += triangle[..., tap]  # sequentially, as Pillow does
    weight = 0.5 + triangle * (1.0 / total)[..., None] * (1 << BITS)
    return first, weight.astype(np.int64)


def entries(images: Beton, index: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the weight tables of the boxes int32 [..., V, 4] of the images `index` [...].

    columns, rows  int64 [..., V]
    """

    def along(side: int) -> np.ndarray:
        lengths = np.unique(images.sizes[:, side])
        begin = np.zeros(int(lengths.max()) + 1, np.int64)
        begin[lengths] = _crops(lengths).cumsum() - _crops(lengths)
        length = images.sizes[index, side][..., None]
        start, extent = (boxes[..., k].astype(np.int64) for k in (side, side + 2))
        return begin[length] + start * (2 * length - start + 1) // 2 + extent - 1

    return along(1), along(0)


def cut(kept: Resident, index: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Cut the views of `crops.resize_crop` on the device: uint8 [V, B, 3, size, size].

    index          int64 [B]     positions of the images
    columns, rows  int64 [B, V]  their crops, as returned by `entries`
    """
    (count, views), size = columns.shape, kept.rows.shape[1]
    width, height = kept.pixels.shape[1], kept.pixels.shape[3]
    images = kept.pixels.index_select(0, index).view(count, width, 3 * height).double()
    weights = kept.columns.index_select(0, columns.flatten()).view(count, views * size, width).double()
    strips = torch.bmm(weights, images).add_(0.5).floor_().view(count * views, size * 3, height)
    weights = kept.rows.index_select(0, rows.flatten()).double()
    found = torch.bmm(strips, weights.mT).add_(0.5).view(count, views, size, 3, size)  # [B, V, x, channel, y]
    return found.permute(1, 0, 3, 4, 2).to(torch.uint8, memory_format=torch.contiguous_format)


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """Yield the items; a thread computes each while the previous one is in use."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, "ahead") as pool:
        following = pool.submit(next, iterator, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, iterator, None)
            yield item

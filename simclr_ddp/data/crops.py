"""Crop boxes of an epoch as a table, and the reference implementation of the resize.

Boxes are computed once per epoch for all samples, outside the loaders, so that all loaders cut the same views and none
contains a random generator. A box is (top, left, height, width) in pixels of the stored image.
"""

import math

import numpy as np
from PIL import Image

from simclr_ddp.data.beton import Beton
from simclr_ddp.data.draws import Draw, uniforms

TRIES = 10
_CHUNK = 16384  # samples per step, so that intermediate arrays stay in the processor's cache


def crop_boxes(
    seed: int,
    epoch: int,
    index: np.ndarray,
    sizes: np.ndarray,
    views: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Random boxes, int32 [n, V, 4], per view and sample, distributed as in torchvision's RandomResizedCrop.

    index  int64 [n]   positions of the samples in the data set; a box depends on no other sample
    sizes  int [n, 2]  their heights and widths
    scale              smallest and largest fraction of the area
    ratio              smallest and largest width / height

    The area and the logarithm of the aspect ratio are uniform. After ten tries the largest centred box whose aspect
    ratio is within `ratio` is used. Raises ValueError for invalid ranges.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"crop_scale={list(scale)}: not a range of area fractions; give 0 < smallest <= largest <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio={tuple(ratio)}: not a range of aspect ratios; give 0 < smallest <= largest")
    assert index.ndim == 1 and sizes.shape == (len(index), 2)
    boxes = np.empty((len(index), views, 4), np.int32)
    for start in range(0, len(index), _CHUNK):
        part = slice(start, start + _CHUNK)
        boxes[part] = _boxes(seed, epoch, index[part], sizes[part], views, scale, ratio)
    return boxes


def _boxes(
    seed: int,
    epoch: int,
    index: np.ndarray,
    sizes: np.ndarray,
    views: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    # One row per view: arrays below are flat, and each try covers only the rows without an accepted box.
    index = np.repeat(index, views)
    view = np.tile(np.arange(views), len(sizes))
    height, width = (np.repeat(side.astype(np.int64), views) for side in sizes.T)
    boxes = np.empty((len(index), 4), np.int32)
    open_rows = np.arange(len(index))
    for attempt in range(TRIES):
        i, v, image_height, image_width = index[open_rows], view[open_rows], height[open_rows], width[open_rows]
        draw = Draw.CROP + 4 * attempt
        area, aspect = uniforms(seed, epoch, i, v, draw), uniforms(seed, epoch, i, v, draw + 1)
        side = np.sqrt(image_height * image_width * (scale[0] + (scale[1] - scale[0]) * area))
        root = np.exp(0.5 * (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * aspect))
        w, h = np.rint(side * root).astype(np.int64), np.rint(side / root).astype(np.int64)
        fits = (w > 0) & (w <= image_width) & (h > 0) & (h <= image_height)
        w, h, i, v = w[fits], h[fits], i[fits], v[fits]
        top = (uniforms(seed, epoch, i, v, draw + 2) * (image_height[fits] - h + 1)).astype(np.int64)
        left = (uniforms(seed, epoch, i, v, draw + 3) * (image_width[fits] - w + 1)).astype(np.int64)
        boxes[open_rows[fits]] = np.stack((top, left, h, w), axis=1)
        open_rows = open_rows[~fits]
        if not len(open_rows):
            break
    height, width = height[open_rows], width[open_rows]
    w = np.clip(np.rint(height * ratio[1]).astype(np.int64), 1, width)
    h = np.clip(np.rint(width / ratio[0]).astype(np.int64), 1, height)
    boxes[open_rows] = np.stack(((height - h) // 2, (width - w) // 2, h, w), axis=1)
    return boxes.reshape(-1, views, 4)


def filter_margin(extent: int, size: int) -> int:
    """Upper bound of the pixels that the filter from `extent` to `size` pixels reads beyond the extent."""
    return math.ceil(max(extent / size, 1.0)) + 1


def resize_crop(image: Image.Image, box: tuple[int, int, int, int] | np.ndarray, size: int) -> np.ndarray:
    """Crop the box of the image and resize it to uint8 [size, size, 3] by Pillow's antialiased bilinear filter.

    This is the reference for every loader. At the border of the box the filter reads the surrounding image. Rows are
    resized before columns in two calls, since versions of Pillow differ in their order.
    """
    top, left, height, width = (int(x) for x in box)
    if image.mode != "RGB":
        image = image.convert("RGB")
    margin = filter_margin(height, size)
    above, below = max(0, top - margin), min(image.height, top + height + margin)
    strip = image.crop((0, above, image.width, below))
    bilinear = Image.Resampling.BILINEAR
    rows = strip.resize((size, strip.height), bilinear, box=(left, 0, left + width, strip.height))
    return np.asarray(rows.resize((size, size), bilinear, box=(0, top - above, size, top - above + height)))


def cut_views(images: Beton, sample: int, boxes: np.ndarray, size: int) -> np.ndarray:
    """Decode one image and cut its boxes [V, 4]: uint8 [V, size, size, 3].

    Raises ValueError if the image can't be decoded.
    """
    image = images.jpeg(sample)
    try:
        return np.stack([resize_crop(image, box, size) for box in boxes])
    except OSError as error:
        raise images.undecodable(sample, error) from error


def evaluation_box(height: int, width: int, size: int, crop: float = 0.0) -> tuple[int, int, int, int]:
    """Box of the evaluation view: the centred square whose side is `crop` times the short side of the image.

    crop  0 is 0.875, or the complete image for views of up to 32 pixels, as in the official code of Chen et al. 2020
    """
    if size <= 32 and not crop:
        return 0, 0, height, width
    side = max(1, round((crop or 0.875) * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side

"""Where to cut: the crop boxes of an epoch as a table, and the reference resize.

Boxes are computed once an epoch for all samples, outside the loaders, so that every loader cuts alike and no random
generator runs inside one. A box is (top, left, height, width) in pixels of the stored image.
"""

import math

import numpy as np
from PIL import Image

from simclr_ddp.beton import Beton
from simclr_ddp.draws import Draw, uniforms

TRIES = 10
_CHUNK = 16384  # samples at a time: the intermediate arrays stay in the processor's cache


def crop_boxes(
    seed: int,
    epoch: int,
    index: np.ndarray,
    sizes: np.ndarray,
    views: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """int32 [n, V, 4]: a random box for each view of each sample, by the law of torchvision's RandomResizedCrop.

    index  int64 [n]   the samples' numbers in the data set; a box depends on no other sample
    sizes  int [n, 2]  their heights and widths
    scale              least and greatest share of the area
    ratio              least and greatest width / height

    The area is uniform, the logarithm of the aspect uniform; ten tries, then the largest centred box whose aspect is
    within `ratio`. Raises ValueError for ranges that are impossible.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"crop scale {tuple(scale)} is no range of area shares; give 0 < least <= greatest <= 1.")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"crop ratio {tuple(ratio)} is no range of aspects; give 0 < least <= greatest.")
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
    # One row a view: everything below is flat, and a try is made only in the rows that have none accepted yet.
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
    """How many pixels beyond [start, start + extent) the filter that makes `size` of them can reach, at most."""
    return math.ceil(max(extent / size, 1.0)) + 1


def resize_crop(image: Image.Image, box: tuple[int, int, int, int] | np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the box of the image, resized by Pillow's bilinear filter, antialiased.

    The reference: what every loader gives. At the box's border the filter reaches into the image around it. Rows are
    resized before columns, one after the other, since versions of Pillow differ in what they begin with.
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
    """uint8 [V, size, size, 3]: the boxes [V, 4] of one image, which is decoded once.

    Raises ValueError in one sentence if it can't be decoded.
    """
    image = images.jpeg(sample)
    try:
        return np.stack([resize_crop(image, box, size) for box in boxes])
    except OSError as error:
        raise images.undecodable(sample, error) from error


def evaluation_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """What an evaluation sees of an image: the centred square of 87.5 % of the short side.

    Views of 32 pixels and less show the whole image, as in the official code of Chen et al. 2020.
    """
    if size <= 32:
        return 0, 0, height, width
    side = max(1, round(0.875 * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side

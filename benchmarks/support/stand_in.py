"""A .beton file of random pixels that replaces a missing one, for measurements that don't depend on the images."""

from pathlib import Path

import numpy as np

from simclr_ddp.data import beton
from simclr_ddp.data.dataset import Dataset, open_dataset

SIDE = 8


def stand_in(folder: Path, count: int) -> Dataset:
    """Write and open `count` pictures of 8 x 8 random pixels in ten classes."""
    pixels = np.random.default_rng(0).bytes(SIDE * SIDE * 3)
    samples = ((beton.Picture(pixels, SIDE, SIDE, raw=True), i % 10) for i in range(count))
    path = folder / "stand_in.beton"
    beton.write(path, samples, {"image": beton.PICTURES, "label": beton.INT}, count, {})
    return open_dataset(str(path), "train")

"""A .beton file in place of one that is not on this machine: for figures that no image has a part in."""

from pathlib import Path

import numpy as np

from simclr_ddp import beton
from simclr_ddp.data import Dataset, open_dataset

SIDE = 8


def stand_in(folder: Path, count: int) -> Dataset:
    """`count` pictures of 8 x 8 random pixels in ten classes."""
    pixels = np.random.default_rng(0).bytes(SIDE * SIDE * 3)
    samples = ((beton.Picture(pixels, SIDE, SIDE, raw=True), i % 10) for i in range(count))
    path = folder / "stand_in.beton"
    beton.write(path, samples, {"image": beton.PICTURES, "label": beton.INT}, count, {})
    return open_dataset(str(path), "train")

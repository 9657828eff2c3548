"""Plots of training inputs: images and their augmented views."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from simclr_ddp.data.augmentations import describe
from simclr_ddp.data.batches import VIEWS, evaluation_batches, evaluation_images, views_at
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.plots.png import WIDTH
from simclr_ddp.system.console import say


def views_page(
    dataset: Dataset,
    augment: Callable[..., Tensor],
    *,
    images: int,
    views: int,
    seed: int,
    size: int,
    crop_scale: tuple[float, float],
    mean: Sequence[float],
    std: Sequence[float],
) -> Figure:
    """Plot one row per image: its evaluation view, then its augmented views, two per epoch.

    augment    (inputs, epoch, index) -> views [V, B, 3, H, W], normalised by mean and std

    The pictures undo the normalisation, so the title states the range of what the model receives.
    """
    index, augmented_views = np.arange(min(images, dataset.count)), []
    for epoch in range(-(-views // VIEWS)):
        inputs = views_at(dataset, seed, epoch, index, size=size, crop_scale=crop_scale)
        augmented_views += list(augment(inputs, epoch, torch.from_numpy(index)))
    augmented = torch.stack(augmented_views[:views], 1)  # [images, views, 3, H, W]
    title = f"the model receives {describe(augmented)}"
    say(title)
    if dataset.decoded:  # undo the normalisation; Spirograph has none
        augmented = augmented * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    page = torch.cat([evaluation_views(dataset, index, size)[:, None], augmented], 1)

    rows, count = page.shape[:2]
    side = WIDTH / count
    figure = Figure(figsize=(WIDTH, side * rows + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, count, squeeze=False)
    for row, pictures in zip(axes, page.clamp(0, 1).permute(0, 1, 3, 4, 2).numpy(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for i, axis in enumerate(axes[0]):
        axis.set_title(f"epoch {(i - 1) // VIEWS}\nview {(i - 1) % VIEWS}" if i else "image", fontsize=11)
    return figure


def evaluation_views(dataset: Dataset, index: np.ndarray, size: int, largest: int | None = None) -> Tensor:
    """Evaluation views of the images `index` [n] in [0, 1], at most `largest` pixels high: [n, 3, H, W]."""
    images = evaluation_images(dataset, [0.0] * 3, [1.0] * 3, torch.float32)
    batches = evaluation_batches(
        dataset, index, size=size, batch_size=64, workers=0, loader="torch", device=torch.device("cpu")
    )
    found = []
    for batch in batches:
        part = images(batch.inputs)[0]
        if largest is not None and largest < part.shape[-1]:
            part = F.interpolate(part, size=(largest, largest), mode="bilinear", antialias=True)
        found.append(part)
    return torch.cat(found).clamp(0, 1)  # rounding may exceed the range

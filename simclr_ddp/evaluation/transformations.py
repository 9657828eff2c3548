"""Transformations of images that are to be predicted from representations (Chen et al. 2020, table 3).

Each image gets one of the K transformations of a task, drawn from (seed, image). How well it is predicted shows what a
representation keeps of colours, orientation, noise and edges. Noise has standard deviation 0.1 for colours in [0, 1],
and an edge is the length of the Sobel gradient of a channel; both are our choice.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ddp.data.augmentations import greyscale, to_float
from simclr_ddp.data.draws import uniforms, view_uniforms

NOISE = 0.1
EPOCH = 2**32 + 1  # of the draws of transformations: no training and no average uses it
LABEL, FIRST_NOISE = 0, 1  # draws of an image


class Task(NamedTuple):
    name: str
    classes: list[str]
    shares: list[float]  # of the images that get each transformation

    def labels(self, seed: int, count: int) -> np.ndarray:
        """Transformation of each image, int64 [count]."""
        drawn = uniforms(seed, EPOCH, np.arange(count), 0, LABEL)
        return np.searchsorted(np.cumsum(self.shares)[:-1], drawn, side="right").astype(np.int64)


TASKS = [
    Task("greyscale", ["colour", "greyscale"], [0.8, 0.2]),
    Task("rotation", ["0 degrees", "90 degrees", "180 degrees", "270 degrees"], [0.25] * 4),
    Task("noise", ["original", "noise"], [0.5, 0.5]),
    Task("sobel", ["original", "edges"], [0.5, 0.5]),
]


def transformed(
    task: Task, labels: np.ndarray, seed: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from (uint8 views [1, B, 3, H, W], positions [B]) to transformed, normalised float views."""
    of_image = torch.from_numpy(labels)

    def transform(inputs: Tensor, sample: Tensor) -> Tensor:
        images, chosen = to_float(inputs[0], dtype), of_image.to(sample.device)[sample]
        if task.name == "rotation":
            turned = [images.rot90(turns, (2, 3)) for turns in range(4)]
            images = torch.stack(turned)[chosen, torch.arange(len(chosen), device=chosen.device)]
        else:
            changed = {"greyscale": greyscale, "sobel": edges}.get(task.name, lambda x: noisy(x, sample, seed))(images)
            images = torch.where(chosen.bool()[:, None, None, None], changed, images)
        shift, scale = (torch.tensor(values, dtype=dtype).to(images.device)[:, None, None] for values in (mean, std))
        return ((images - shift) / scale)[None]

    return transform


def edges(images: Tensor) -> Tensor:
    """Length of the Sobel gradient of each channel of [B, 3, H, W], clipped to [0, 1]."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=images.dtype)
    filters = torch.stack([across, across.T])[:, None].to(images.device)
    padded = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, filters).norm(dim=1).view(images.shape).clamp(0, 1)


def noisy(images: Tensor, sample: Tensor, seed: int) -> Tensor:
    """Images [B, 3, H, W] with Gaussian noise, a function of (seed, position), clipped to [0, 1]."""
    found = []
    for picture, position in zip(
        images, sample.split(1), strict=True
    ):  # one by one, since draws take 16 bytes a number
        u = view_uniforms(seed, EPOCH, position, 1, FIRST_NOISE, 2 * picture.numel(), torch.float64)[0, 0]
        radius, angle = (1 - u[: picture.numel()]).log().mul(-2).sqrt(), 2 * torch.pi * u[picture.numel() :]
        found.append(picture + NOISE * (radius * angle.cos()).view(picture.shape).to(picture.dtype))  # Box and Muller
    return torch.stack(found).clamp(0, 1)

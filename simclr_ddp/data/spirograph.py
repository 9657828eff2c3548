"""Spirograph data (Foster et al. 2021): pictures of curves defined by ten numbers, four targets and six nuisances.

The two views of an image share its targets and have different nuisance numbers, so the information that an encoder
should keep is known exactly. Pictures are rendered on the device, differentiably in all ten numbers. Views in [0, 1]
enter the encoder without augmentation; crops and jitter would destroy the targets.
"""

import math

import numpy as np
import torch
from torch import Tensor

from simclr_ddp.data.draws import Draw, uniforms

TARGETS = ("m", "b", "sigma", "red_foreground")
NUISANCES = ("h", "red_background", "green_foreground", "green_background", "blue_foreground", "blue_background")
NAMES = TARGETS + NUISANCES

# Each number is uniform in its range.
_RANGES = {
    "m": (2.0, 5.0),
    "b": (0.1, 1.1),
    "sigma": (0.25, 1.0),
    "red_foreground": (0.4, 1.0),
    "h": (0.5, 2.5),
    "red_background": (0.0, 0.6),
    "green_foreground": (0.4, 1.0),
    "green_background": (0.0, 0.6),
    "blue_foreground": (0.4, 1.0),
    "blue_background": (0.0, 0.6),
}
_POINTS = 40  # points per curve
_SEED = 2021  # of the data set, so that it is the same for all users
_SPLITS = ("train", "test")


def numbers(count: int, split: str) -> np.ndarray:
    """Numbers `NAMES` of the first images of the generated data set, float32 [count, 10].

    split  "train" or "test", which are different images; the published sizes are 100,000 and 20,000
    """
    if split not in _SPLITS:
        raise ValueError(f"split={split!r}: unknown value; choose 'train' or 'test'")
    draws = uniforms(_SEED, _SPLITS.index(split), np.arange(count)[:, None], 0, Draw.DATASET + np.arange(len(NAMES)))
    low, high = np.array([_RANGES[name] for name in NAMES]).T
    return (low + (high - low) * draws).astype(np.float32)


def render(numbers: Tensor, size: int = 32, by_rows: bool = False) -> Tensor:
    """Render numbers [B, 10] to pictures [B, 3, size, size] in [0, 1] and their dtype; X is the first image axis.

    X = (m - h) cos t + h cos((m - h) t / b), Y = (m - h) sin t - h sin((m - h) t / b) at 40 points t in [0, 2 pi];
    the intensity at p is the mean over them of exp(-|p - c|^2 / sigma) (sigma, not its square), divided by the
    image's maximum, and mixes foreground and background. The grid is linspace(-6, 6, size) on both axes.

    by_rows  divide each row (one X) by its own maximum, as the generators of the published data do

    The Gaussian is separable in X and Y, so the mean over points is a matrix product and needs no
    [B, size, size, 40] tensor.
    """
    m, b, sigma, red_fore, h, red_back, green_fore, green_back, blue_fore, blue_back = numbers[..., None].unbind(1)
    t = torch.arange(_POINTS, dtype=numbers.dtype, device=numbers.device) * (2 * math.pi / (_POINTS - 1))
    grid = torch.linspace(-6, 6, size, dtype=numbers.dtype, device=numbers.device)
    turns = (m - h) / b * t
    x = (m - h) * t.cos() + h * turns.cos()
    y = (m - h) * t.sin() - h * turns.sin()

    def gaussians(points: Tensor) -> Tensor:  # [B, 40] -> [B, size, 40]
        return torch.exp(-((grid[:, None] - points[:, None, :]) ** 2) / sigma[..., None])

    with torch.autocast(numbers.device.type, enabled=False):  # the product stays in the dtype of the numbers
        intensity = gaussians(x) @ gaussians(y).transpose(1, 2) / _POINTS
    largest = intensity.amax(2 if by_rows else (1, 2), keepdim=True)
    intensity = (intensity / (largest + 1e-8))[:, None]
    fore = torch.stack((red_fore, green_fore, blue_fore), dim=1)[..., None]
    back = torch.stack((red_back, green_back, blue_back), dim=1)[..., None]
    return back + (fore - back) * intensity


def views(targets: Tensor, draws: Tensor, by_rows: bool = False) -> Tensor:
    """Render V views [V, B, 3, 32, 32] of the targets [B, 4], with nuisance numbers from draws [V, B, 6].

    The draws are uniform in [0, 1) in the order of `NUISANCES`; the views have their dtype.
    """
    assert targets.shape == (draws.shape[1], len(TARGETS)) and draws.shape[2] == len(NUISANCES)
    ranges = [_RANGES[name] for name in NUISANCES]
    nuisances = [low + (high - low) * u for (low, high), u in zip(ranges, draws.unbind(2), strict=True)]
    shared = targets.to(draws.dtype).expand(len(draws), -1, -1)
    images = render(torch.cat((shared, torch.stack(nuisances, dim=2)), dim=2).flatten(0, 1), by_rows=by_rows)
    return images.unflatten(0, draws.shape[:2])

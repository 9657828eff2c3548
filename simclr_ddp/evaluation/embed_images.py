"""Representations of images that are not in a data set: `embed_images`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simclr_ddp.data.transform import open_image
from simclr_ddp.runs.encoder import Loaded
from simclr_ddp.system.machine import cores

Images = Sequence[str | Path | Image.Image] | np.ndarray | Tensor


@torch.no_grad()
def embed_images(
    encoder: Loaded, images: Images, *, batch_size: int = 256, device: str | torch.device = "cpu"
) -> Tensor:
    """Compute representations h of images: float32 [n, D] on the CPU, in their order.

    encoder     what `load_encoder` returns
    images      paths, PIL images, or uint8 [n, H, W, 3]; each is shown as its evaluation view, `encoder.transform`
    batch_size  images per forward pass, which are also decoded at a time

    The encoder is moved to the device and set to evaluation mode. Raises ValueError for an image that can't be read,
    and for arrays of another shape or type.

        loaded = load_encoder("runs/cifar10")
        h = embed_images(loaded, sorted(Path("photos").glob("*.jpg")))
    """
    _check(images, batch_size)
    module = encoder.encoder.to(device, torch.float32).eval()
    found = [torch.empty(0, module.width_out)]
    with ThreadPoolExecutor(cores()) as threads:
        for first in range(0, len(images), batch_size):
            part = images[first : first + batch_size]
            pixels = torch.stack(list(threads.map(lambda image: encoder.transform.pixels(_opened(image)), part)))
            views = encoder.transform.normalized(pixels.to(device))
            found.append(module(views.contiguous(memory_format=module.memory_format)).float().cpu())
    return torch.cat(found)


def _check(images: Images, batch_size: int) -> None:
    if isinstance(images, str | Path):
        raise ValueError(f"images={images}: is one path; give a list of paths, PIL images, or uint8 [n, H, W, 3]")
    if isinstance(images, np.ndarray | Tensor):
        kind = str(images.dtype).removeprefix("torch.")
        if images.ndim != 4 or images.shape[3] != 3 or kind != "uint8":
            raise ValueError(f"images: {list(images.shape)} {kind}; must be uint8 [n, H, W, 3], RGB")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be 1 or above")


def _opened(image: object) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return open_image(Path(image))
    if isinstance(image, np.ndarray | Tensor):
        return Image.fromarray(np.asarray(image))
    raise ValueError(f"images: a {type(image).__name__} is no image; give paths, PIL images, or uint8 [n, H, W, 3]")

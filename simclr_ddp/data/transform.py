"""The evaluation view of one image, for use outside of the loaders."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from simclr_ddp.data.augmentations import normalize
from simclr_ddp.data.convert import DEEP, Storage, convert_file, rgb
from simclr_ddp.data.crops import evaluation_box, resize_crop


class Transform(NamedTuple):
    """Map a PIL image to the float32 view [3, size, size] that evaluations show an encoder.

    size  height and width in pixels
    mean  subtracted from the channels of [0, 1] images
    std   by which the channels are then divided
    crop  fraction of the short side in the centred square that is shown: simclr_ddp.data.crops.evaluation_box

    The pixels are bit for bit those of the tool's loaders: Pillow's antialiased bilinear filter, in float32.
    """

    size: int
    mean: list[float]
    std: list[float]
    crop: float = 0.0

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalized(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """The view before normalisation, uint8 [3, size, size].

        The orientation of EXIF is applied, and transparent pixels are shown over white, as write_dataset does. Raises
        ValueError for an image of more than 8 bits.
        """
        if image.mode in DEEP:
            raise ValueError(
                f"image of mode {image.mode}: has more than 8 bits; convert it to uint8 RGB, or give its file"
            )
        image = rgb(ImageOps.exif_transpose(image))
        view = resize_crop(image, evaluation_box(image.height, image.width, self.size, self.crop), self.size)
        return torch.from_numpy(view.copy()).permute(2, 0, 1)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Views uint8 [..., 3, size, size] as float32, normalised."""
        return normalize(pixels, self.mean, self.std)


def open_image(path: Path) -> Image.Image:
    """Open an image file as write_dataset does, in 8-bit RGB. Raises ValueError with its name if that is impossible."""
    picture = convert_file(path, Storage(mode="raw")).picture
    return Image.frombytes("RGB", (picture.width, picture.height), picture.data)

"""Batched augmentations on the device, as pure functions of (images, draws) with the same code on CPU and GPU.

Random numbers are an argument (`draws`), one row per image, so the functions hold no generator, never wait for the
device, and don't depend on the batch of an image; every operator is differentiable in its factors. The recipe is
that of Chen et al. 2020, appendix A: flip, colour jitter, greyscale, blur, solarize, normalise.

Images are float [B, 3, H, W] in [0, 1] and keep their dtype; factors, turns and sigmas are [B], masks bool [B].
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ddp.data.draws import Draw

DRAWS = Draw.SOLARIZE + 1  # random numbers per view: draws 0 .. 10


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _where(mask: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    """Select `changed` for images whose mask is set. It is exact, and on a CPU several times as fast as torch.where."""
    return torch.lerp(images, changed, _per_image(mask.to(images.dtype)))


def luma(images: Tensor) -> Tensor:
    """Luma [B, 1, H, W]: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    red, green, blue = images.split(1, dim=1)
    return red.mul(0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Return clip(factor x), the multiplicative brightness of SimCLR v2 and torchvision; v1's is additive."""
    return (images * _per_image(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Return clip(factor x + (1 - factor) m), where m is the mean luma of the image."""
    mean = luma(images).mean((1, 2, 3))
    return (images * _per_image(factor)).add_(_per_image(mean * (1 - factor))).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Return clip(factor x + (1 - factor) luma(x)), with the luma of each pixel."""
    return torch.lerp(luma(images), images, _per_image(factor)).clamp_(0, 1)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV by `turns` of the colour circle; value and saturation are unchanged.

    This is the hue operator of the published recipes and of training. It avoids the six-way case of the usual inverse:
    with c = max - min, each channel is min + c T(hue), where T is a trapezoid over the circle.
    """
    red, green, blue = images.split(1, dim=1)
    highest = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    chroma = highest - lowest
    # The hue of a grey pixel (chroma 0) is arbitrary: any nonzero divisor returns the pixel and finite gradients.
    divisor = chroma + (chroma == 0)
    hue = torch.where(
        highest == red,
        (green - blue) / divisor,
        torch.where(highest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * _per_image(turns)
    hue = hue - 6 * (hue / 6).floor()  # sextants, in [0, 6)
    red = ((hue - 3).abs_() - 1).clamp_(0, 1)
    green = (2 - (hue - 2).abs_()).clamp_(0, 1)
    blue = (2 - (hue - 4).abs_()).clamp_(0, 1)
    return torch.cat([torch.addcmul(lowest, chroma, trapezoid) for trapezoid in (red, green, blue)], dim=1)


def rotate_chroma(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the (I, Q) plane of YIQ by `turns` without clipping: a hue that is smooth in `turns` and in the image.

    Foster et al. 2021 (InvCLR). Their three-digit matrices aren't exact inverses: 0 turns change a pixel by up to 2e-3.
    """
    red, green, blue = images.split(1, dim=1)
    y = luma(images)
    i = 0.596 * red - 0.274 * green - 0.321 * blue
    q = 0.211 * red - 0.523 * green + 0.311 * blue
    angle = _per_image(2 * torch.pi * turns)
    cos, sin = angle.cos(), angle.sin()
    i, q = cos * i - sin * q, sin * i + cos * q
    return torch.cat((y + 0.956 * i + 0.621 * q, y - 0.272 * i - 0.647 * q, y - 1.107 * i + 1.705 * q), dim=1)


def colour_factors(draws: Tensor, strength: float) -> Tensor:
    """Map draws [B, K] to [B, 4]: three factors U(max(0, 1 - 0.8 s), 1 + 0.8 s) and hue turns U(-0.2 s, 0.2 s)."""
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    factors = low + (high - low) * draws[:, Draw.BRIGHTNESS : Draw.SATURATION + 1]
    turns = 0.2 * strength * (2 * draws[:, Draw.HUE : Draw.HUE + 1] - 1)
    return torch.cat((factors, turns), dim=1)


def colour_jitter(
    images: Tensor,
    factors: Tensor,
    order: Tensor | None = None,
    hue: Callable[[Tensor, Tensor], Tensor] = shift_hue,
) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order or in an order per image.

    factors  [B, 4]  three factors and the turns of the hue
    order    [B]     int64 in 0 .. 23, one of the 24 orders; None: brightness, contrast, saturation, hue
    hue      `shift_hue`, or `rotate_chroma` for the differentiable distortion of InvCLR

    Images of one batch may have different orders without being sorted into groups: brightness, contrast and
    saturation are one formula with different bases, so three rounds before the hue and three after it, each with
    factor 1 (no change) for the images that skip it, cover every order.
    """
    if order is None:
        images = brightness(images, factors[:, 0])
        images = contrast(images, factors[:, 1])
        images = saturation(images, factors[:, 2])
        return hue(images, factors[:, 3])

    first = order // 8
    second = (first + 1 + order // 4 % 2) % 3
    kinds = torch.stack((first, second, 3 - first - second), dim=1)  # [B, 3]: 0 brightness, 1 contrast, 2 saturation
    factor = factors.gather(1, kinds)
    before = torch.arange(3, device=order.device) < (order % 4)[:, None]  # the hue
    rounds = torch.where(before, factor, 1.0), torch.where(before, 1.0, factor)
    of_contrast, of_saturation = (kinds == 1).to(factors.dtype), (kinds == 2).to(images.dtype)
    for turn, factor in enumerate(rounds):
        for i in range(3):
            images = _blend(images, factor[:, i], of_contrast[:, i], of_saturation[:, i])
        images = images if turn else hue(images, factors[:, 3])
    return images


def _blend(images: Tensor, factor: Tensor, of_contrast: Tensor, of_saturation: Tensor) -> Tensor:
    """Change contrast or saturation of images whose flag [B] is 1, and brightness where both flags are 0."""
    grey = luma(images)
    level = grey.mean((1, 2, 3)) * of_contrast  # brightness 0, contrast the mean
    base = torch.lerp(_per_image(level).expand_as(grey), grey, _per_image(of_saturation))
    return torch.lerp(base, images, _per_image(factor)).clamp_(0, 1)


def greyscale(images: Tensor) -> Tensor:
    """Replace all three channels by the luma."""
    return luma(images).expand_as(images)


def blur_kernel_size(side: int) -> int:
    """Kernel size of the blur: a tenth of the side, made odd (23 for 224, 9 for 96, 7 for 64, 3 for 32)."""
    return 2 * (side // 10 // 2) + 1


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Convolve each image with a Gaussian of `sigma` pixels and size `blur_kernel_size(H)`; pad with zeros and clip.

    Chen et al. 2020, appendix A. The convolution is separable: 2 k products per pixel instead of k^2.
    """
    radius = blur_kernel_size(images.shape[-2]) // 2
    offset = torch.arange(radius + 1, dtype=sigma.dtype, device=sigma.device)
    half = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    half = half / (2 * half.sum(1, keepdim=True) - half[:, :1])  # the centre counts once, the others twice
    weights = [_per_image(weight) for weight in half.to(images.dtype).unbind(1)]
    for dim, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded = F.pad(images, padding)
        length = images.shape[dim]
        images = images * weights[0]
        for k in range(1, radius + 1):
            images.addcmul_(padded.narrow(dim, radius - k, length), weights[k])
            images.addcmul_(padded.narrow(dim, radius + k, length), weights[k])
    return images.clamp_(0, 1)


def solarize(images: Tensor) -> Tensor:
    """Return 1 - v where v >= 128/255, else v."""
    return torch.where(images >= 128 / 255, 1 - images, images)


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    # torch.tensor would copy from the host and wait for the device; a fill does not.
    return torch.stack([torch.full((), value, dtype=like.dtype, device=like.device) for value in values])[:, None, None]


def _standardize(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    if mean is None or std is None:
        return images
    return (images - _channels(mean, images)).div_(_channels(std, images))


def to_float(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 [..., 3, H, W] of any strides to contiguous `dtype` in [0, 1]."""
    return images.to(dtype, memory_format=torch.contiguous_format).div_(255)


def describe(views: Tensor) -> str:
    """State range and standard deviation of inputs of the model."""
    return f"values with min {views.min():.3g}, max {views.max():.3g}, std {views.std():.3g}"


def normalize(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normalise uint8 [..., 3, H, W] to `dtype`: (v / 255 - mean) / std, or v / 255 if mean or std is None."""
    return _standardize(to_float(images, dtype), mean, std)


def _chosen(draws: Tensor, draw: Draw, probabilities: tuple[float, ...]) -> Tensor:
    """Mask [V B] of the images whose draw is below the probability of their view."""
    if len(set(probabilities)) == 1:
        return draws[:, :, draw].flatten() < probabilities[0]
    return torch.cat([draws[v, :, draw] < p for v, p in enumerate(probabilities)])


def _per_view(name: str, value: float | Sequence[float], views: int) -> tuple[float, ...]:
    values = (float(value),) * views if isinstance(value, int | float) else tuple(float(v) for v in value)
    if len(values) != views:
        raise ValueError(f"{name}={list(values)}: {len(values)} numbers for {views} views; give one number or {views}")
    for v in values:
        if not 0 <= v <= 1:
            raise ValueError(f"{name}={v:g}: not a probability; give a number from 0 to 1")
    return values


class Augmentation:
    """Augment all views of a batch: flip, colour jitter, greyscale, blur, solarize, normalise.

    strength            strength of the colour jitter: 1 for ImageNet, 0.5 for CIFAR
    jitter_probability, greyscale, flip  probabilities
    permuted            draw an order of the four colour operators per image, as in published code; else use
                        brightness, contrast, saturation, hue, as in the paper's listing
    blur, solarize      probabilities, one for all views or one per view
    mean, std           three numbers each, or None to leave the views in [0, 1]

    Operators of probability 0 cost nothing. Raises ValueError for invalid settings.
    """

    def __init__(
        self,
        *,
        views: int = 2,
        strength: float = 1.0,
        jitter_probability: float = 0.8,
        permuted: bool = True,
        greyscale: float = 0.2,
        blur: float | Sequence[float] = 0.0,
        solarize: float | Sequence[float] = 0.0,
        flip: float = 0.5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if strength < 0:
            raise ValueError(f"strength={strength:g}: negative; give 0 (no colour jitter) or more")
        if (mean is None) != (std is None):
            raise ValueError("mean and std must be given together; give both or neither")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != 3:
                raise ValueError(f"{name}={list(values)}: {len(values)} numbers; give 3, one per colour channel")
        if std is not None and min(std) <= 0:
            raise ValueError(f"std={list(std)}: not all numbers are positive; give the channels' standard deviations")
        self.views = views
        self.strength = strength
        self.permuted = permuted
        self.flip = _per_view("flip", flip, views)
        self.jitter = _per_view("jitter_probability", jitter_probability if strength > 0 else 0.0, views)
        self.greyscale = _per_view("greyscale", greyscale, views)
        self.blur = _per_view("blur", blur, views)
        self.solarize = _per_view("solarize", solarize, views)
        self.mean, self.std = mean, std

    def __call__(self, views: Tensor, draws: Tensor) -> Tensor:
        """Map uint8 views [V, B, 3, H, W] and draws 0 .. 10 [V, B, 11] to [V, B, 3, H, W] in the dtype of the draws."""
        assert views.shape[:2] == draws.shape[:2] and len(views) == self.views and draws.shape[2] >= DRAWS

        shape = views.shape
        images = to_float(views.flatten(0, 1), draws.dtype)
        flat = draws.flatten(0, 1)
        if any(self.flip):
            images = _where(_chosen(draws, Draw.FLIP, self.flip), images.flip(-1), images)
        if any(self.jitter):
            order = (flat[:, Draw.ORDER].detach() * 24).long() if self.permuted else None
            jittered = colour_jitter(images, colour_factors(flat, self.strength), order)
            images = _where(_chosen(draws, Draw.JITTER, self.jitter), jittered, images)
        if any(self.greyscale):
            images = _where(_chosen(draws, Draw.GREYSCALE, self.greyscale), greyscale(images), images)
        if any(self.blur):
            blurred = gaussian_blur(images, 0.1 + 1.9 * flat[:, Draw.SIGMA])
            images = _where(_chosen(draws, Draw.BLUR, self.blur), blurred, images)
        if any(self.solarize):
            images = _where(_chosen(draws, Draw.SOLARIZE, self.solarize), solarize(images), images)
        return _standardize(images, self.mean, self.std).view(shape)

"""augmentations: every operator against its published definition, per image, differentiable, with its probability."""

import colorsys
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from simclr_ddp.data.augmentations import (
    DRAWS,
    Augmentation,
    blur_kernel_size,
    brightness,
    colour_factors,
    colour_jitter,
    contrast,
    gaussian_blur,
    greyscale,
    luma,
    normalize,
    rotate_chroma,
    saturation,
    shift_hue,
    solarize,
    to_float,
)
from simclr_ddp.data.draws import Draw, view_uniforms

B, SIDE = 5, 20


def pictures(n: int = B, side: int = SIDE, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bytes_and_draws(n: int, side: int = 8, dtype: torch.dtype = torch.float64, views: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (views, n, 3, side, side), dtype=torch.uint8, generator=generator)
    return images, view_uniforms(0, 0, torch.arange(n), views, 0, DRAWS, dtype)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# Operators against their definitions


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(brightness, TF.adjust_brightness), (contrast, TF.adjust_contrast), (saturation, TF.adjust_saturation)],
)
def test_blends_are_torchvisions(ours: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> None:
    x = pictures()
    factors = torch.tensor([0.0, 0.3, 1.0, 1.4, 1.8], dtype=torch.float64)
    expected = torch.stack([theirs(image, f) for image, f in zip(x, factors.tolist(), strict=True)])
    close(ours(x, factors), expected, atol=2e-4)  # torchvision's red weight is 0.2989
    close(ours(x, torch.ones(B, dtype=torch.float64)), x, atol=1e-15)


def test_blends_are_the_formulas() -> None:
    x = pictures(2, 4)
    factors = torch.tensor([0.4, 1.6], dtype=torch.float64)
    grey = [
        [
            [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in zip(*rows, strict=True)]
            for rows in zip(*image, strict=True)
        ]
        for image in x.tolist()
    ]
    close(luma(x)[:, 0], torch.tensor(grey, dtype=torch.float64))
    close(greyscale(x), torch.tensor(grey, dtype=torch.float64)[:, None].expand(2, 3, 4, 4))
    for i, f in enumerate(factors.tolist()):
        mean = sum(map(sum, grey[i])) / 16
        for c, h, w in itertools.product(range(3), range(4), range(4)):
            v = x[i, c, h, w].item()
            for operator, base in ((brightness, 0.0), (contrast, mean), (saturation, grey[i][h][w])):
                expected = min(1.0, max(0.0, f * v + (1 - f) * base))
                assert abs(operator(x, factors)[i, c, h, w].item() - expected) < 1e-12


def test_hue_is_hsv() -> None:
    x = pictures(4, 6)
    x[0, :, 0] = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.2, 0.2])  # grey: black, white, equal channels
    x[0, :, 1] = torch.eye(3, dtype=torch.float64).repeat(1, 2)  # pure colours
    x[0, :2, 2] = 0.7  # ties of the greatest channel
    turns = torch.tensor([0.07, -0.2, 0.5, 0.9], dtype=torch.float64)
    got = shift_hue(x, turns)
    for i, shift in enumerate(turns.tolist()):
        for h, w in itertools.product(range(6), range(6)):
            hue, s, v = colorsys.rgb_to_hsv(*x[i, :, h, w].tolist())
            expected = colorsys.hsv_to_rgb((hue + shift) % 1, s, v)
            close(got[i, :, h, w], torch.tensor(expected, dtype=torch.float64))
    close(got[:3], torch.stack([TF.adjust_hue(a, b) for a, b in zip(x[:3], turns.tolist()[:3], strict=True)]), 2e-6)
    close(shift_hue(x, torch.zeros(4, dtype=torch.float64)), x)
    close(shift_hue(x, torch.ones(4, dtype=torch.float64)), x)


def test_chroma_rotation_is_the_matrix_product() -> None:
    x, turns = pictures(3, 4), torch.tensor([0.0, 0.1, -0.35], dtype=torch.float64)
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]]).double()
    to_rgb = torch.tensor([[1, 0.956, 0.621], [1, -0.272, -0.647], [1, -1.107, 1.705]]).double()
    got = rotate_chroma(x, turns)
    for i, turn in enumerate(turns.tolist()):
        cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
        rotation = torch.tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], dtype=torch.float64)
        close(got[i], torch.einsum("ij,jhw->ihw", to_rgb @ rotation @ to_yiq, x[i]), 1e-6)  # float32 constants above
    close(got[0], x[0], atol=3e-3)


def test_solarize() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 255
    x = levels.expand(1, 3, 1, 256)
    expected = torch.tensor([255 - v if v >= 128 else v for v in range(256)], dtype=torch.float64) / 255
    close(solarize(x)[0, 0, 0], expected)
    between = torch.full((1, 3, 1, 1), 127.9 / 255, dtype=torch.float64)  # jittered pixels are no whole levels
    assert torch.equal(solarize(between), between)
    single = to_float(torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256), torch.float32)
    close(solarize(single)[0, 0, 0], expected.float(), 1e-6)


def test_kernel_sizes_are_the_published() -> None:
    assert [blur_kernel_size(side) for side in (224, 96, 64, 32, 20, 8)] == [23, 9, 7, 3, 3, 1]


@pytest.mark.parametrize("side", [32, 64, 96])
def test_blur_is_torchvisions_inside(side: int) -> None:
    x, sigma = pictures(3, side), torch.tensor([0.1, 0.7, 2.0], dtype=torch.float64)
    k = blur_kernel_size(side)
    r = k // 2
    got = gaussian_blur(x, sigma)[..., r:-r, r:-r]
    expected = torch.stack([TF.gaussian_blur(a, [k, k], [s, s]) for a, s in zip(x, sigma.tolist(), strict=True)])
    close(got, expected[..., r:-r, r:-r], 1e-7)  # torchvision computes its kernel in float32


def test_blur_is_a_gaussian_of_each_images_own_sigma_with_zeros_outside() -> None:
    x = torch.zeros(3, 3, 40, 40, dtype=torch.float64)
    x[:, :, 20, 20] = 1
    sigma = [0.1, 0.6, 1.9]
    got = gaussian_blur(x, torch.tensor(sigma, dtype=torch.float64))
    close(got.sum((2, 3)), torch.ones(3, 3, dtype=torch.float64))
    for i, s in enumerate(sigma):
        weights = [math.exp(-(o**2) / (2 * s**2)) for o in range(-2, 3)]
        line = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        close(got[i, 1, 18:23, 18:23], line[:, None] * line)
    assert got[:, :, :18].abs().max() == 0 and got[:, :, :, 23:].abs().max() == 0
    white = gaussian_blur(torch.ones(1, 3, 40, 40, dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64))
    side = [math.exp(-(o**2) / 2) for o in range(-2, 3)]
    close(white[0, 0, 0, 0], torch.tensor((sum(side[2:]) / sum(side)) ** 2, dtype=torch.float64))
    close(white[0, 0, 2:-2, 2:-2], torch.ones(36, 36, dtype=torch.float64))


def test_blur_of_a_side_too_small_for_a_kernel_changes_nothing() -> None:
    x = pictures(2, 8)
    close(gaussian_blur(x, torch.tensor([0.1, 2.0], dtype=torch.float64)), x)


# Colour jitter


def test_factors_have_the_published_ranges() -> None:
    for strength, low, high, turn in ((0.5, 0.6, 1.4, 0.1), (1.0, 0.2, 1.8, 0.2), (2.0, 0.0, 2.6, 0.4)):
        ends = torch.tensor([[0.0] * DRAWS, [1.0] * DRAWS, [0.5] * DRAWS], dtype=torch.float64)
        factors = colour_factors(ends, strength)
        middle = (low + high) / 2
        expected = [[low, low, low, -turn], [high, high, high, turn], [middle, middle, middle, 0]]
        close(factors, torch.tensor(expected, dtype=torch.float64))
    draws = torch.zeros(1, DRAWS, dtype=torch.float64)
    for column, draw in enumerate((Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE)):
        changed = draws.clone()
        changed[0, draw] = 1
        moved = (colour_factors(changed, 1.0) != colour_factors(draws, 1.0))[0]
        assert moved.tolist() == [k == column for k in range(4)]


OPERATORS = (brightness, contrast, saturation, shift_hue)


def sequential(x: Tensor, factors: Tensor, order: tuple[int, ...]) -> Tensor:
    for k in order:
        x = OPERATORS[k](x, factors[:, k])
    return x


def test_fixed_order() -> None:
    x, factors = pictures(), colour_factors(bytes_and_draws(B)[1][0], 1.0)
    close(colour_jitter(x, factors), sequential(x, factors, (0, 1, 2, 3)))
    chroma = colour_jitter(x, factors, hue=rotate_chroma)
    close(chroma, rotate_chroma(sequential(x, factors, (0, 1, 2)), factors[:, 3]))


def test_the_24_orders_are_the_24_permutations() -> None:
    image = pictures(1)
    factors = torch.tensor([[1.4, 1.6, 1.7, 0.15]], dtype=torch.float64)
    got = colour_jitter(image.expand(24, -1, -1, -1), factors.expand(24, -1), torch.arange(24))
    matched = set()
    for permutation in itertools.permutations(range(4)):
        expected = sequential(image, factors, permutation)
        equal = ((got - expected).abs().amax((1, 2, 3)) < 1e-12).nonzero()[:, 0].tolist()
        assert len(equal) == 1, f"{permutation} is the order of {equal}"
        matched.add(equal[0])
    assert matched == set(range(24))


def test_all_orders_are_drawn_equally_often() -> None:
    n = 4800
    images = torch.randint(0, 256, (1, 1, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = view_uniforms(0, 0, torch.arange(n), 1, 0, DRAWS, torch.float64)
    draws[..., Draw.BRIGHTNESS : Draw.HUE + 1] = torch.tensor([0.9, 0.95, 0.97, 0.8], dtype=torch.float64)
    augment = Augmentation(views=1, strength=1.0, jitter_probability=1.0, greyscale=0, flip=0)
    got = augment(images.expand(1, n, 3, 4, 4), draws)[0]
    _, counts = torch.unique((got * 1e9).round().long().flatten(1), dim=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 140 and counts.max() < 260  # 200 expected, deviation 14


# Differentiability


@pytest.mark.parametrize("hue", [shift_hue, rotate_chroma])
@pytest.mark.parametrize("order", [None, torch.tensor([5, 22])])
def test_gradients_of_the_colour_factors(hue: Callable[[Tensor, Tensor], Tensor], order: Tensor | None) -> None:
    x = 0.3 + 0.2 * pictures(2, 3)  # far from both clips
    factors = torch.tensor([[1.1, 0.9, 1.2, 0.03], [0.8, 1.2, 0.7, -0.05]], dtype=torch.float64, requires_grad=True)
    x.requires_grad_()

    def jitter(x: Tensor, factors: Tensor) -> Tensor:
        return colour_jitter(x, factors, order, hue)

    assert torch.autograd.gradcheck(jitter, (x, factors))
    assert torch.autograd.gradgradcheck(jitter, (x, factors))
    (gradient,) = torch.autograd.grad(jitter(x, factors).square().sum(), factors)
    assert (gradient != 0).all()


def test_gradient_of_sigma() -> None:
    sigma = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: gaussian_blur(pictures(2, 20), s), (sigma,))


def test_gradients_reach_the_draws_and_stay_finite() -> None:
    images, draws = bytes_and_draws(64, 32)
    images[0, 0] = 77  # grey everywhere: the hue is arbitrary
    draws.requires_grad_()
    augment = Augmentation(strength=0.5, jitter_probability=1, greyscale=0, blur=1)
    (gradient,) = torch.autograd.grad(augment(images, draws).square().sum(), draws)
    assert gradient.isfinite().all()
    used = [Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE, Draw.SIGMA]
    assert (gradient[1][:, used] != 0).all()
    assert (gradient[..., [Draw.FLIP, Draw.JITTER, Draw.ORDER, Draw.GREYSCALE, Draw.BLUR]] == 0).all()


# The whole augmentation


def test_it_is_the_sequence_of_its_operators() -> None:
    n = 40
    images, draws = bytes_and_draws(n, 20)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    settings: dict[str, Any] = {"strength": 1.0, "permuted": False, "mean": mean, "std": std}
    got = Augmentation(blur=(1.0, 0.1), solarize=(0.0, 0.2), **settings)(images, draws)
    for v, i in itertools.product(range(2), range(n)):
        u = draws[v, i]
        x = images[v, i : i + 1].double() / 255
        x = x.flip(-1) if u[Draw.FLIP] < 0.5 else x
        if u[Draw.JITTER] < 0.8:
            x = colour_jitter(x, colour_factors(u[None], 1.0))
        x = greyscale(x) if u[Draw.GREYSCALE] < 0.2 else x
        x = gaussian_blur(x, 0.1 + 1.9 * u[None, Draw.SIGMA]) if u[Draw.BLUR] < (1.0, 0.1)[v] else x
        x = solarize(x) if u[Draw.SOLARIZE] < (0.0, 0.2)[v] else x
        x = (x - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
        close(got[v, i : i + 1], x, 1e-6)  # the statistics above are float32


@pytest.mark.parametrize("permuted", [False, True])
def test_an_image_does_not_see_its_batch(permuted: bool) -> None:
    images, draws = bytes_and_draws(9, 20)
    augment = Augmentation(strength=1.0, permuted=permuted, blur=0.5, solarize=0.5)
    together = augment(images, draws)
    for i in range(9):
        close(augment(images[:, i : i + 1], draws[:, i : i + 1]), together[:, i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_range_and_layout(dtype: torch.dtype) -> None:
    images, draws = bytes_and_draws(50, 20, dtype)
    augment = Augmentation(strength=1.0, blur=0.5, solarize=0.3)
    got = augment(images, draws)
    assert got.dtype == dtype and got.shape == images.shape and got.is_contiguous()
    assert got.min() >= 0 and got.max() <= 1
    close(got.double(), augment(images, draws.double()), 1e-12 if dtype == torch.float64 else 2e-5)
    channels_last = images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    from_last = augment(channels_last, draws)
    assert torch.equal(from_last, got) and from_last.is_contiguous()
    assert to_float(channels_last[0], dtype).is_contiguous()
    assert images.dtype == torch.uint8 and torch.equal(images, bytes_and_draws(50, 20)[0]), "the input is not touched"


def test_probabilities_are_realised() -> None:
    n = 2000
    images, draws = bytes_and_draws(n, 20)
    plain = images.double() / 255
    off: dict[str, Any] = {"jitter_probability": 0.0, "greyscale": 0.0, "flip": 0.0}
    for settings, probabilities in (
        ({"flip": 0.5}, (0.5, 0.5)),
        ({"jitter_probability": 0.8}, (0.8, 0.8)),
        ({"greyscale": 0.2}, (0.2, 0.2)),
        ({"blur": 0.5}, (0.5, 0.5)),
        ({"blur": (1.0, 0.1)}, (1.0, 0.1)),
        ({"solarize": (0.0, 0.2)}, (0.0, 0.2)),
    ):
        got = Augmentation(**(off | settings))(images, draws)
        untouched = (got == plain).all(4).all(3).all(2)
        for v, p in enumerate(probabilities):
            share = 1 - untouched[v].double().mean().item()
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / n), (settings, v)


def test_everything_off_is_the_evaluation_view() -> None:
    images, draws = bytes_and_draws(3)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    augment = Augmentation(strength=0.0, greyscale=0.0, flip=0.0, mean=mean, std=std)
    got = normalize(images, mean, std, torch.float64)
    assert torch.equal(augment(images, draws), got)
    for c in range(3):
        close(got[:, :, c], (images[:, :, c].double() / 255 - mean[c]) / std[c])
    assert normalize(images[0, 0], None, None).dtype == torch.float32
    close(normalize(images[0, 0], None, None), images[0, 0].float() / 255, 0)


@pytest.mark.parametrize("permuted", [False, True])
def test_it_compiles_in_one_graph(permuted: bool) -> None:
    images, draws = bytes_and_draws(3, 20, torch.float32)
    augment = Augmentation(permuted=permuted, blur=0.5, solarize=0.5, mean=(0.5,) * 3, std=(0.2,) * 3)
    compiled = torch.compile(augment, backend="eager", fullgraph=True)
    close(compiled(images, draws), augment(images, draws), 0)


def test_autocast_changes_nothing() -> None:
    images, draws = bytes_and_draws(3, 20, torch.float32)
    augment = Augmentation(blur=0.5, solarize=0.5, mean=(0.5,) * 3, std=(0.2,) * 3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment(images, draws)
    assert inside.dtype == torch.float32 and torch.equal(inside, augment(images, draws))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_and_never_waits() -> None:
    images, draws = bytes_and_draws(64, 32)
    augment = Augmentation(blur=0.5, solarize=0.5, mean=(0.5,) * 3, std=(0.2,) * 3)
    expected = augment(images, draws)
    images, draws = images.cuda(), draws.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = augment(images, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(got.cpu(), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strength": -1.0}, "strength=-1"),
        ({"blur": (0.5, 0.5, 0.5)}, "blur=.* 3 numbers for 2 views"),
        ({"flip": 1.5}, "flip=1.5: not a probability"),
        ({"solarize": (0.0, -0.1)}, "solarize=-0.1"),
        ({"mean": (0.5, 0.5, 0.5)}, "must be given together"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean=.* 1 numbers"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.0)}, "std="),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Augmentation(**settings)

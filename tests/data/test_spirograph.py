"""spirograph: the pictures follow the formula, are differentiable in all ten numbers, and views share targets."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr_ddp.data.augmentations import Augmentation
from simclr_ddp.data.batches import evaluation_images, training_images
from simclr_ddp.data.draws import Draw, view_uniforms
from simclr_ddp.data.spirograph import NAMES, NUISANCES, TARGETS, numbers, render, views
from simclr_ddp.evaluation.labels import open_labelled


def direct(row: list[float], size: int) -> Tensor:
    """The formula, point by point, for one image: [3, size, size] float64."""
    m, b, sigma, red_fore, h, red_back, green_fore, green_back, blue_fore, blue_back = row
    grid = [-6 + 12 * i / (size - 1) for i in range(size)]
    v = torch.zeros(size, size, dtype=torch.float64)
    for k in range(40):
        t = 2 * math.pi * k / 39
        x = (m - h) * math.cos(t) + h * math.cos((m - h) * t / b)
        y = (m - h) * math.sin(t) - h * math.sin((m - h) * t / b)
        for i in range(size):
            for j in range(size):
                v[i, j] += math.exp(-((grid[i] - x) ** 2 + (grid[j] - y) ** 2) / sigma) / 40
    v = v / (v.max() + 1e-8)
    fore, back = (red_fore, green_fore, blue_fore), (red_back, green_back, blue_back)
    return torch.stack([v * f + (1 - v) * c for f, c in zip(fore, back, strict=True)])


def test_render_is_the_formula() -> None:
    z = torch.from_numpy(numbers(3, "train")).double()
    images = render(z, 17)
    for row, image in zip(z.tolist(), images, strict=True):
        torch.testing.assert_close(image, direct(row, 17), rtol=0, atol=1e-12)
    assert render(z.float()).dtype == torch.float32 and render(z.float()).shape == (3, 3, 32, 32)
    assert (render(z.float()) - render(z)).abs().max() < 1e-3  # (m - h) t / b reaches 170 turns of float32


def test_rows_are_those_of_the_published_generators() -> None:
    """spirograph_images are pictures by ae-foster/invclr, commit 6da77d0."""
    golden = np.load(Path(__file__).parents[1] / "golden" / "invclr.npz")
    z, expected = (torch.from_numpy(golden[f"spirograph_{name}"]).double() for name in ("numbers", "images"))
    torch.testing.assert_close(render(z, by_rows=True), expected, rtol=0, atol=1e-6)
    assert ((render(z) - expected).abs() > 0.02).double().mean() > 0.2, "today's form is another"
    draws = torch.rand(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_rows, by_image = (views(z[:, :4], draws, form) for form in (True, False))
    assert (by_rows - by_image).abs().max() > 0.1


def test_an_evaluation_renders_what_its_run_has_seen() -> None:
    given, numbers = {"train": "", "test": "spirograph"}, torch.full((1, 10), 0.5)
    for settings, by_rows in (({"data.spirograph": "rows"}, True), ({"data.spirograph": "image"}, False), ({}, False)):
        run: Any = SimpleNamespace(settings={"data.train": "spirograph"} | settings, folder=Path("no run"))
        for dataset in open_labelled(given, run)[:2]:
            images = evaluation_images(dataset, [0.0], [1.0], torch.float32)(numbers)[0]
            assert torch.equal(images, render(numbers, by_rows=by_rows))
            assert dataset.fingerprint.endswith("-rows") == by_rows
            draws = training_images(dataset, Augmentation(), 0, torch.float32)(numbers, 0, torch.arange(1))
            nuisances = view_uniforms(0, 0, torch.arange(1), 2, Draw.NUISANCE, len(NUISANCES), torch.float32)
            assert torch.equal(draws, views(numbers[:, :4], nuisances, by_rows))


def test_range() -> None:
    images = render(torch.from_numpy(numbers(200, "test")))
    assert images.min() >= 0 and images.max() <= 1
    assert images[:, 0].amax((1, 2)).min() > 0.4 - 1e-6, "the curve is drawn in the foreground's colour"


def test_gradients_of_all_ten_numbers() -> None:
    z = torch.from_numpy(numbers(2, "train")).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: render(z, 6), (z,), eps=1e-7, atol=1e-5)
    (gradient,) = torch.autograd.grad(render(z)[:, :, 3:].square().sum(), z)
    assert (gradient != 0).all()


def test_a_row_does_not_see_its_batch() -> None:
    z = torch.from_numpy(numbers(5, "train")).double()
    torch.testing.assert_close(render(z)[3:4], render(z[3:4]), rtol=0, atol=1e-12)


def test_autocast_leaves_the_pictures_alone() -> None:
    z = torch.from_numpy(numbers(2, "train"))
    with torch.autocast("cpu", torch.bfloat16):
        inside = render(z)
    assert torch.equal(inside, render(z))


def test_numbers() -> None:
    train = numbers(20000, "train")
    assert train.dtype == np.float32 and train.shape == (20000, len(NAMES))
    # What the mean predicts of each target: (range)^2 / 12.
    expected = {"m": 0.75, "b": 1 / 12, "sigma": 0.75**2 / 12, "red_foreground": 0.03}
    for k, name in enumerate(TARGETS):
        mse = train[:, k].var()
        assert abs(mse / expected[name] - 1) < 4 * math.sqrt(0.8 / 20000), name
    bounds = [(2, 5), (0.1, 1.1), (0.25, 1), (0.4, 1), (0.5, 2.5), (0, 0.6), (0.4, 1), (0, 0.6), (0.4, 1), (0, 0.6)]
    low, high = np.array(bounds, np.float32).T
    assert (train >= low).all() and (train <= high).all()
    span = train.max(0) - train.min(0)
    assert (span > 0.998 * (high - low)).all()
    assert np.abs(np.corrcoef(train.T) - np.eye(10)).max() < 0.03
    assert np.array_equal(train[:50], numbers(50, "train"))
    assert not np.isin(train[:, 0], numbers(100, "test")[:, 0]).all()
    assert abs(np.corrcoef(train[:5000, 0], numbers(5000, "test")[:, 0])[0, 1]) < 0.06
    with pytest.raises(ValueError, match="valid"):
        numbers(1, "valid")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_views_share_targets_and_draw_nuisances(dtype: torch.dtype) -> None:
    z = torch.from_numpy(numbers(4, "train"))
    draws = view_uniforms(0, 0, torch.arange(4), 2, Draw.NUISANCE, len(NUISANCES), dtype)
    images = views(z[:, :4], draws)
    assert images.shape == (2, 4, 3, 32, 32) and images.dtype == dtype
    assert (images[0] - images[1]).abs().amax((1, 2, 3)).min() > 0.05
    low = torch.tensor([0.5, 0.0, 0.4, 0.0, 0.4, 0.0], dtype=dtype)
    high = torch.tensor([2.5, 0.6, 1.0, 0.6, 1.0, 0.6], dtype=dtype)
    for v in range(2):
        expected = render(torch.cat((z[:, :4].to(dtype), low + (high - low) * draws[v]), dim=1))
        torch.testing.assert_close(images[v], expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)
    # Equal nuisances: equal pictures, so nothing but the targets is left of an image.
    same = views(z[:, :4], draws[:1].expand(2, -1, -1))
    assert torch.equal(same[0], same[1])

"""crops: boxes follow torchvision's law, lie inside, and belong to the sample; resize and evaluation view."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from simclr_ddp.data.crops import crop_boxes, evaluation_box, resize_crop
from simclr_ddp.data.draws import Draw, uniforms

SIZES = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=6)


def same_size(n: int, height: int, width: int) -> np.ndarray:
    return np.tile(np.array([height, width]), (n, 1))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 1000), SIZES, st.integers(1, 4), st.floats(0.01, 1.0))
def test_boxes_lie_inside(seed: int, epoch: int, sizes: list[tuple[int, int]], views: int, least: float) -> None:
    array = np.array(sizes)
    boxes = crop_boxes(seed, epoch, np.arange(len(sizes)), array, views, scale=(least, 1.0))
    assert boxes.dtype == np.int32 and boxes.shape == (len(sizes), views, 4)
    assert (boxes[..., :2] >= 0).all() and (boxes[..., 2:] >= 1).all()
    assert (boxes[..., :2] + boxes[..., 2:] <= array[:, None]).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True), st.data())
def test_a_box_does_not_see_its_batch(indices: list[int], data: st.DataObject) -> None:
    index = np.array(indices)
    sizes = np.stack((100 + index % 400, 10 + index % 900), axis=1)
    subset = np.array(data.draw(st.lists(st.integers(0, len(indices) - 1), min_size=1)))
    whole = crop_boxes(1, 2, index, sizes, 2)
    assert np.array_equal(whole[subset], crop_boxes(1, 2, index[subset], sizes[subset], 2))
    assert np.array_equal(whole[:, :1], crop_boxes(1, 2, index, sizes, 1))


def one_box(seed: int, epoch: int, i: int, view: int, height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision's law, one box at a time, with the draws in their documented places."""
    for attempt in range(10):
        u = uniforms(seed, epoch, np.array(i), view, Draw.CROP + 4 * attempt + np.arange(4))
        area = height * width * (0.08 + 0.92 * u[0])
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def test_boxes_are_the_loops() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 500, (200, 2))
    sizes[100:, 0] = sizes[100:, 1] // 6 + 3  # many tries fail
    boxes = crop_boxes(7, 3, 1000 + np.arange(200), sizes, 2)
    for i, v in np.ndindex(200, 2):
        assert tuple(boxes[i, v]) == one_box(7, 3, 1000 + i, v, *sizes[i].tolist())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    index, sizes = np.arange(100), same_size(100, 50, 300)
    whole = crop_boxes(0, 0, index, sizes, 2)
    monkeypatch.setattr("simclr_ddp.data.crops._CHUNK", 7)
    assert np.array_equal(whole, crop_boxes(0, 0, index, sizes, 2))


def test_epochs_views_and_seeds_differ() -> None:
    index, sizes = np.arange(200), same_size(200, 300, 400)
    boxes = crop_boxes(0, 0, index, sizes, 2)
    for other in (crop_boxes(0, 1, index, sizes, 2), crop_boxes(1, 0, index, sizes, 2), boxes[:, ::-1]):
        assert (boxes == other).all(axis=2).mean() < 0.02


@pytest.mark.parametrize(("height", "width"), [(32, 32), (300, 400), (120, 500), (500, 150)])
def test_law_is_torchvisions(height: int, width: int) -> None:
    n = 3000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = crop_boxes(0, 0, np.arange(n), same_size(n, height, width), 1)[:, 0]
    for name, of in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
    }.items():
        assert ks_2samp(of(ours), of(theirs)).pvalue > 1e-4, name


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (1, 1, (0, 0, 1, 1))],
)
def test_fallback_is_the_centre_with_the_aspect_clamped(height: int, width: int, box: tuple[int, ...]) -> None:
    boxes = crop_boxes(0, 0, np.arange(20), same_size(20, height, width), 2, scale=(0.9, 1.0))
    assert (boxes == np.array(box)).all()


def test_impossible_ranges_are_named() -> None:
    with pytest.raises(ValueError, match="scale"):
        crop_boxes(0, 0, np.arange(1), same_size(1, 9, 9), 1, scale=(0.5, 0.2))
    with pytest.raises(ValueError, match="ratio"):
        crop_boxes(0, 0, np.arange(1), same_size(1, 9, 9), 1, ratio=(0.0, 1.0))


def test_resize_crop() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(resize_crop(image, (10, 20, 32, 32), 32), pixels[10:42, 20:52])
    # Halved: the antialiased triangle has weights 1, 3, 3, 1 over 8; pixels around the box count at its border.
    got = resize_crop(image, np.array([4, 6, 40, 40], np.int32), 20)
    weights = np.array([1, 3, 3, 1]) / 8
    window = pixels[3 + 2 * 5 : 7 + 2 * 5, 5 + 2 * 9 : 9 + 2 * 9].astype(float)
    assert np.abs(got[5, 9] - np.einsum("i,j,ijc->c", weights, weights, window)).max() <= 1
    assert got.shape == (20, 20, 3) and got.dtype == np.uint8
    grey = Image.fromarray(pixels[..., 0])
    assert resize_crop(grey, (0, 0, 60, 90), 8).shape == (8, 8, 3)


def test_evaluation_box() -> None:
    assert evaluation_box(256, 256, 224) == (16, 16, 224, 224)
    assert evaluation_box(400, 500, 224) == (25, 75, 350, 350)
    assert evaluation_box(500, 400, 224) == (75, 25, 350, 350)
    assert evaluation_box(96, 96, 96) == (6, 6, 84, 84)
    assert evaluation_box(64, 64, 64) == (4, 4, 56, 56)
    assert evaluation_box(32, 32, 32) == (0, 0, 32, 32)
    assert evaluation_box(1, 1, 64) == (0, 0, 1, 1)
    assert evaluation_box(400, 500, 224, 1) == (0, 50, 400, 400)
    assert evaluation_box(40, 33, 32, 1) == (3, 0, 33, 33)

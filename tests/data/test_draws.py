"""draws: numpy and torch give equal bits; a number depends on its own five arguments and on nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ddp.data.draws import Draw, holdout, permutation, uniforms, view_uniforms

INTEGERS = st.integers(-(2**63), 2**63 - 1)
INDICES = st.lists(st.integers(0, 2**40), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(INTEGERS, st.integers(0, 10**6), INDICES, st.integers(1, 4), st.integers(0, 100), st.integers(1, 12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_equals_numpy(
    dtype: torch.dtype, seed: int, epoch: int, indices: list[int], views: int, first: int, count: int
) -> None:
    index = np.array(indices, np.int64)
    expected = uniforms(seed, epoch, index[:, None], np.arange(views)[:, None, None], np.arange(first, first + count))
    got = view_uniforms(seed, epoch, torch.from_numpy(index), views, first, count, dtype)
    assert got.dtype == dtype and got.shape == (views, len(indices), count)
    assert np.array_equal(got.double().numpy(), expected)
    assert expected.min() >= 0 and expected.max() < 1


@settings(max_examples=50, deadline=None)
@given(INTEGERS, INDICES)
def test_a_sample_does_not_see_its_batch(seed: int, indices: list[int]) -> None:
    index = torch.tensor(indices)
    together = view_uniforms(seed, 3, index, 2, 0, 11, torch.float32)
    for i in range(len(indices)):
        assert torch.equal(together[:, i : i + 1], view_uniforms(seed, 3, index[i : i + 1], 2, 0, 11, torch.float32))


def test_every_argument_matters() -> None:
    index = np.arange(1000)
    base = uniforms(0, 0, index, 0, 0)
    others = [
        uniforms(1, 0, index, 0, 0),
        uniforms(0, 1, index, 0, 0),
        uniforms(0, 0, index + 1000, 0, 0),
        uniforms(0, 0, index, 1, 0),
        uniforms(0, 0, index, 0, 1),
        uniforms(-1, 0, index, 0, 0),
    ]
    for other in others:
        assert (base == other).sum() <= 1
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.12  # 3.8 standard deviations of an independent pair


def test_moments_and_bits() -> None:
    u = uniforms(5, 7, np.arange(20000)[:, None], 0, np.arange(11))
    n = u.size
    assert abs(u.mean() - 1 / 2) < 4 / np.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)
    counts = np.bincount((u * 64).astype(int).ravel(), minlength=64)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 4 * np.sqrt(2 * 63)
    bits = (u * 2**24).astype(np.int64)
    assert np.array_equal(bits / 2**24, u), "a number is a multiple of 2^-24"
    for bit in range(24):
        assert abs((bits >> bit & 1).mean() - 0.5) < 4 * 0.5 / np.sqrt(n)
    neighbours = np.corrcoef(u.T) - np.eye(11)
    assert np.abs(neighbours).max() < 4.5 / np.sqrt(len(u))


def test_uses_share_no_number() -> None:
    spans = {Draw.NUISANCE: 6, Draw.CROP: 40, Draw.DATASET: 10}
    taken = [value for draw in Draw for value in range(draw, draw + spans.get(draw, 1))]
    assert len(taken) == len(set(taken))


def test_the_numbers_stay_what_they_are() -> None:
    """A run started with an older version of the package must go on with the same images and augmentations."""
    assert (uniforms(0, 0, np.arange(3), 1, Draw.HUE) * 2**24).astype(int).tolist() == [14412872, 9437900, 14165420]
    assert permutation(0, 1, 8).tolist() == [0, 7, 5, 4, 3, 2, 6, 1]
    assert np.flatnonzero(holdout(0, 10, 0.3)).tolist() == [0, 3, 6]


def test_permutation() -> None:
    first, second = permutation(3, 0, 1001), permutation(3, 1, 1001)
    assert first.dtype == np.int64
    for order in (first, second, permutation(4, 0, 1001)):
        assert np.array_equal(np.sort(order), np.arange(1001))
        assert (np.diff(order) == 1).sum() < 10  # neighbours do not stay together; one expected
    assert np.array_equal(first, permutation(3, 0, 1001))
    for other in (second, permutation(4, 0, 1001), np.arange(1001)):
        assert (first == other).sum() < 10  # one expected


@pytest.mark.parametrize(("count", "fraction", "held"), [(1000, 0.1, 100), (7, 0.5, 4), (10, 0.0, 0), (5, 1.0, 5)])
def test_holdout(count: int, fraction: float, held: int) -> None:
    mask = holdout(1, count, fraction)
    assert mask.dtype == bool and mask.shape == (count,) and mask.sum() == held
    assert np.array_equal(mask, holdout(1, count, fraction))


def test_holdout_depends_on_the_seed() -> None:
    assert (holdout(1, 1000, 0.5) != holdout(2, 1000, 0.5)).sum() > 400

"""Which training images have a label."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ddp.data.dataset import Dataset, open_dataset
from simclr_ddp.data.subset import class_balanced, listed, split
from simclr_ddp.data.write import write_dataset
from tests.conftest import write_images


def dataset(counts: list[int], seed: int = 0) -> Dataset:
    """Images of that many of each class, in random order."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    return Dataset("made", len(labels), labels, None, "")


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=6), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 2**40)
)
def test_a_fraction_is_balanced_and_part_of_a_larger_one(counts: list[int], a: float, b: float, seed: int) -> None:
    images = dataset(counts)
    small, large = sorted((a, b))
    if round(small * images.count) < len(counts):
        with pytest.raises(ValueError, match="are fewer than the"):
            class_balanced(images, small, seed)
        return
    few, many = (class_balanced(images, fraction, seed) for fraction in (small, large))
    assert np.isin(few, many).all() and (np.diff(few) > 0).all()
    assert images.labels is not None
    given = np.bincount(images.labels[few], minlength=len(counts))
    assert given.min() >= 1 and len(few) <= round(small * images.count)
    limited = given < np.array(counts)  # a class that has more images than it gives
    assert not limited.any() or given[limited].max() - given[limited].min() <= 1
    if limited.all():
        assert len(few) == round(small * images.count)


def test_the_seed_chooses_the_images() -> None:
    images = dataset([500] * 10)
    one, same, other = (class_balanced(images, 0.1, seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and len(one) == 500
    assert len(np.intersect1d(one, other)) < 100, "about a tenth are in both"
    assert np.array_equal(class_balanced(images, 1, 3), np.arange(5000))
    assert images.labels is not None
    renumbered = replace(images, labels=9 - images.labels)
    assert np.array_equal(one, class_balanced(renumbered, 0.1, 0)), "the order is one of images"


def test_a_list_of_positions_is_read(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("3\n1\n\n19\n")
    assert listed(file, dataset([10, 10])).tolist() == [1, 3, 19]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Ten images of two classes in files 0000.jpg to 0009.jpg, of which 0000.jpg is in both folders."""
    folder = tmp_path_factory.mktemp("named")
    write_images(folder / "train", 10)
    shutil.copy(folder / "train/class0/0000.jpg", folder / "train/class1/0000.jpg")
    write_dataset(str(folder / "train"), folder / "train.beton")
    return open_dataset(str(folder / "train.beton"), "train")


def test_a_list_of_names_is_read(stored: Dataset, tmp_path: Path) -> None:
    file, names = tmp_path / "list.txt", stored.file.names()
    assert names is not None
    file.write_text("0004.jpg\n0007.jpg\nclass1/0000.jpg\n")
    found = [names[i] for i in listed(file, stored)]
    assert sorted(found) == ["class0/0004.jpg", "class1/0000.jpg", "class1/0007.jpg"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("20\n", "20: positions are from 0 to 10; remove it"),
        ("3\n03\n", "1 images are listed twice"),
        ("0004.jpg\nclass0/0004.jpg\n", "1 images are listed twice"),
        ("\n", "it is empty"),
        ("-1\n", "-1: no image has this name"),
        ("0004.png\n", "0004.png: no image has this name"),
        ("0000.jpg\n", "0000.jpg: 2 images have this name; give the folder too"),
    ],
)
def test_a_wrong_list_is_refused(text: str, fault: str, stored: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=fault):
        listed(file, stored)


def test_a_list_that_is_not_there_and_names_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't be read"):
        listed(tmp_path / "absent.txt", dataset([10, 10]))
    (tmp_path / "list.txt").write_text("n01440764_10026.JPEG\n")
    with pytest.raises(ValueError, match="it lists names, and made has no file of names"):
        listed(tmp_path / "list.txt", dataset([10, 10]))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.floats(0, 1), st.integers(0, 2**40))
def test_an_equal_fraction_of_each_class_is_held_out(counts: list[int], fraction: float, seed: int) -> None:
    labels = dataset(counts, seed).labels
    assert labels is not None
    images = np.arange(5, 5 + 2 * len(labels), 2)
    others = np.array(counts) - 1
    count = round(fraction * others.sum())
    part, held = split(images, labels, count, seed)
    assert len(held) == count and np.array_equal(np.union1d(part, held), images)
    assert (np.diff(part) > 0).all() and (np.diff(held) > 0).all()
    assert set(labels[np.isin(images, part)]) == set(range(len(counts))), "no class vanishes"
    of_class = np.bincount(labels[np.isin(images, held)], minlength=len(counts))
    assert (abs(of_class - others * count / max(1, others.sum())) < 1).all()
    with pytest.raises(ValueError, match="can't be held out"):
        split(images, labels, int(others.sum()) + 1, seed)


def test_the_seed_chooses_what_is_held_out() -> None:
    images, labels = np.arange(1000), np.arange(1000) % 10
    one, same, other = (split(images, labels, 100, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(one, same) and len(np.intersect1d(one, other)) < 30
    assert np.bincount(labels[one]).tolist() == [10] * 10

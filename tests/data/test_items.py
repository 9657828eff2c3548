"""write_dataset of a data set in Python."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import FakeData

from simclr_ddp.data import beton
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.write import write_dataset


class Pictures:
    """Items of any kind, with names of classes."""

    def __init__(self, *items: Any, classes: list[str] | None = None) -> None:
        self.items, self.classes = items, classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_items_are_stored_with_their_classes(tmp_path: Path) -> None:
    items = Pictures(*((picture(i), i % 3) for i in range(20)), classes=["a", "b", "c"])
    write_dataset(items, str(tmp_path / "x.beton"), split="test")
    found = open_dataset(str(tmp_path / "x.beton"), "test")
    assert found.labels is not None and found.labels.tolist() == [i % 3 for i in range(20)]
    assert found.classes == ["a", "b", "c"] and found.file.names()[7] == "test/7"
    for i in (0, 13):
        assert np.array_equal(np.asarray(found.file.jpeg(i)), np.asarray(picture(i)))  # raw: not a bit is lost
    record = json.loads(beton.sidecar(tmp_path / "x.beton").read_text())
    assert record["source"] == "Pictures" and record["split"] == "test"


def test_items_without_classes_and_of_other_modes(tmp_path: Path) -> None:
    items = Pictures(picture(0), picture(1, "L"), picture(2, "RGBA"), (picture(3), -1), [picture(4)])
    write_dataset(items, tmp_path / "x.beton", mode="jpeg")
    found = open_dataset(str(tmp_path / "x.beton"), "train")
    assert found.labels is None and found.count == 5
    assert np.array_equal(np.asarray(found.file.jpeg(1).convert("L")).shape, (9, 12))


def test_a_data_set_of_torchvision(tmp_path: Path) -> None:
    write_dataset(FakeData(12, (3, 8, 8), 4), tmp_path / "x.beton", images=10)
    found = open_dataset(str(tmp_path / "x.beton"), "train")
    assert found.count == 10 and found.classes is None and found.class_count <= 4


def test_exif_turns_an_item_and_broken_items_can_be_skipped(tmp_path: Path) -> None:
    class Broken(Pictures):
        def __getitem__(self, i: int) -> Any:
            if i == 1:
                raise OSError("truncated")
            return super().__getitem__(i)

    turned = picture(0)
    turned.getexif()[0x0112] = 6
    items = Broken(turned, picture(1), picture(2))
    with pytest.raises(ValueError, match=r"item 1 of Broken can't be read \(truncated\); fix it, or set on_error=skip"):
        write_dataset(items, tmp_path / "x.beton")
    write_dataset(items, tmp_path / "x.beton", on_error="skip")
    found = open_dataset(str(tmp_path / "x.beton"), "train")
    assert found.count == 2 and found.file.sizes.tolist() == [[12, 9], [9, 12]]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((), "source: Pictures is empty; give a data set of PIL images"),
        ((np.zeros((3, 3)),), "item 0 of Pictures is a ndarray; items must be PIL images"),
        (((picture(0), "cat"),), "item 0 of Pictures has the class 'cat'; classes must be integers"),
        (((picture(0), 0.7),), "item 0 of Pictures has the class 0.7; classes must be integers"),
        ((picture(0), (picture(1), 2)), "item 1 of Pictures has a class, unlike item 0; give all or none"),
        (((picture(0), 2), picture(1)), "item 1 of Pictures has no class, unlike item 0; give all or none"),
        ((Image.fromarray(np.zeros((3, 3), np.uint16)),), r"item 0 of Pictures has more than 8 bits \(mode I;16\)"),
    ],
)
def test_items_that_cannot_be_stored(items: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(Pictures(*items), tmp_path / "x.beton")
    assert not list(tmp_path.glob("*.beton"))

"""A data set: the images of a .beton file, or the generated Spirograph set."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from simclr_ddp.data import spirograph
from simclr_ddp.data.beton import Beton
from simclr_ddp.system import console

SPIROGRAPH_IMAGES = {"train": 10_000, "test": 2_000}


@dataclass(frozen=True)
class Dataset:
    """Images of a file that are decoded, or pictures that are rendered from Spirograph numbers, with their labels.

    images   the file, if there is one
    numbers  what its pictures are rendered from: float32 [n, 10], or None if they are decoded. A file may hold both:
             its images are for looking at
    by_rows  how pictures are rendered from the numbers: see spirograph.render
    """

    source: str
    count: int
    labels: np.ndarray | None  # int64 [n] classes, float32 [n, k] numbers, or None
    classes: list[str] | None
    fingerprint: str
    images: Beton | None = None
    numbers: np.ndarray | None = None
    by_rows: bool = False

    @property
    def stored(self) -> bool:
        """Whether it is a file, rather than generated."""
        return self.images is not None

    @property
    def rendered(self) -> bool:
        """Whether its pictures are rendered from numbers."""
        return self.numbers is not None

    @property
    def decoded(self) -> bool:
        """Whether its images are decoded and cut, rather than rendered."""
        return self.stored and not self.rendered

    @property
    def file(self) -> Beton:
        """The file of a set that is stored."""
        assert self.images is not None, f"{self.source} is generated"
        return self.images

    def numbers_of(self, index: np.ndarray) -> np.ndarray:
        """float32 [n, 10]: what the pictures `index` [n] of a set that is rendered are made from."""
        assert self.numbers is not None, f"the images of {self.source} are decoded"
        return self.numbers[index]

    def is_known_as(self, fingerprint: str) -> bool:
        """Whether this or an earlier version gives its content the fingerprint."""
        return fingerprint == self.fingerprint or (self.images is not None and self.images.is_known_as(fingerprint))

    @property
    def has_classes(self) -> bool:
        return self.labels is not None and self.labels.ndim == 1

    @property
    def has_number_labels(self) -> bool:
        return self.labels is not None and self.labels.ndim == 2

    @property
    def class_count(self) -> int:
        """Number of classes; 0 without classes. Raises ValueError for labels that can't be class numbers."""
        if self.labels is None or not self.has_classes:
            return 0
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= max(1000, 10 * self.count):
            raise ValueError(
                f"{self.source}: labels from {low} to {high} are not class numbers (0, 1, ...); write the file again, "
                "or pretrain without labels: probe.enabled=false"
            )
        return max(len(self.classes or ()), high + 1)


def in_classes_of(train: Dataset, test: Dataset, name: str = "test") -> Dataset:
    """Return the test set with the class numbers of the training set; classes are compared by name.

    name  of the test set in errors

    Raises ValueError if names are missing, or if test images have a class that the training set doesn't name.
    """
    if test.fingerprint == train.fingerprint:
        return test
    for split, dataset in (("train", train), (name, test)):
        if not dataset.classes:
            raise ValueError(
                f"{split}={dataset.source}: holds no class names, so its classes can't be compared with another file; "
                "copy its .json next to it, or write it again"
            )
        if len(set(dataset.classes)) < len(dataset.classes):
            twice = next(found for found in dataset.classes if dataset.classes.count(found) > 1)
            raise ValueError(f"{split}={dataset.source}: names class {twice} twice; write it again")
    assert train.classes and test.classes and test.labels is not None
    places = {found: i for i, found in enumerate(train.classes)}
    unknown = [test.classes[i] for i in np.unique(test.labels) if test.classes[i] not in places]
    if unknown:
        names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else "")
        raise ValueError(
            f"{name}={test.source}: train={train.source} has no class {names}, only {', '.join(train.classes[:5])}"
            f"{' ...' * (len(train.classes) > 5)}; give {name} images of its classes, or folders of the same names"
        )
    numbers = np.array([places.get(found, -1) for found in test.classes])
    return replace(test, labels=numbers[test.labels], classes=train.classes)


def open_dataset(source: str, split: str, spirograph_maximum: str = "image") -> Dataset:
    """A .beton file, or the generated set if source is "spirograph"; split is train or test.

    spirograph_maximum  "image", or "rows" for the published form: data.spirograph

    Raises ValueError or FileNotFoundError if the file is missing, not a .beton file, or truncated.
    """
    by_rows = spirograph_maximum == "rows"
    if source == "spirograph":
        numbers = spirograph.numbers(SPIROGRAPH_IMAGES[split], split)
        name = f"spirograph-{split}-{len(numbers)}{'-rows' * by_rows}"
        return Dataset(source, len(numbers), numbers[:, :4], None, name, numbers=numbers, by_rows=by_rows)
    if not source or Path(source).is_dir():
        what = f"data.{split}={source}: is a folder" if source else f"data.{split} is empty"
        raise ValueError(f"{what}; write a .beton file: python -m simclr_ddp.write_dataset FOLDER OUT.beton")
    beton = Beton(Path(source))
    if beton.labels is not None and beton.labels.ndim == 1 and not beton.classes:
        console.warn(
            f"{source} holds no class names, so evaluation can't compare its classes with those of another file; "
            "copy its .json next to it, or write it again"
        )
    drawn: np.ndarray | None = None
    if beton.nuisance is not None and beton.labels is not None:
        drawn = np.concatenate([beton.labels, beton.nuisance], 1).astype(np.float32)
    return Dataset(source, beton.count, beton.labels, beton.classes, beton.fingerprint(), beton, drawn, by_rows)

"""Labelled training and test images of an evaluation: opening, consistency checks and description."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_ddp.data import spirograph
from simclr_ddp.data.dataset import Dataset, in_classes_of, open_dataset
from simclr_ddp.runs import checkpoint
from simclr_ddp.runs.encoder import Loaded
from simclr_ddp.runs.evaluations import fingerprint
from simclr_ddp.system import console


def open_labelled(given: dict[str, str], loaded: Loaded) -> tuple[Dataset, Dataset, str]:
    """Open training and test images, with equal class numbers; raise ValueError unless labels are of one kind.

    given  a .beton file or `spirograph` for "train" and "test"; empty: the data set of the encoder's run

    Also returns what the test images are: "test", or "train" if the linear model or the encoder is trained on them.
    """
    sources = {}
    for split in ("train", "test"):
        sources[split] = given[split] or loaded.settings.get(f"data.{split}", "")
        if not sources[split]:
            where = (
                "is empty in the settings of the run" if loaded.settings else "is not known without the run's settings"
            )
            raise ValueError(f"data.{split} {where}; give the {split} images as {split}=FILE.beton")
    form = loaded.settings.get("data.spirograph", "image")
    train, test = (_open(sources[split], split, given[split], form) for split in ("train", "test"))
    _check_labels("train", train)
    test = _matching("test", test, train)
    of_run = (fingerprint(loaded.settings.get("data.train", "")), checkpoint.trained_on(loaded.folder / "checkpoints"))
    if test.fingerprint != train.fingerprint and not any(test.is_known_as(found) for found in of_run if found):
        return train, test, "test"
    whose = "" if test.fingerprint == train.fingerprint else " of the run"
    console.warn(f"test={test.source}: these are the training images{whose}; the metrics don't apply to new images")
    return train, test, "train"


def open_validation(source: str, train: Dataset, test: Dataset, loaded: Loaded) -> Dataset:
    """Open labelled images that choose a setting of the model, with the class numbers of the training images.

    Raises ValueError if they are the training or test images.
    """
    form = loaded.settings.get("data.spirograph", "image")
    validation = _matching("validation", open_dataset(source, "train", form), train)
    for name, other in (("training", train), ("test", test)):
        if validation.fingerprint == other.fingerprint:
            raise ValueError(f"validation={source}: these are the {name} images; give others, or leave it out")
    return validation


def _check_labels(split: str, dataset: Dataset) -> None:
    if dataset.labels is None:
        raise ValueError(
            f"{split}={dataset.source}: has no labels, which the evaluation needs; give labelled images as "
            f"{split}=FILE.beton"
        )
    if not np.isfinite(dataset.labels).all() or (dataset.has_classes and dataset.labels.min() < 0):
        raise ValueError(
            f"{split}={dataset.source}: some labels are negative or not finite; write the file again with classes "
            "from 0, or with numbers"
        )


def _matching(split: str, dataset: Dataset, train: Dataset) -> Dataset:
    """Give a data set the class numbers of the training images. Raises ValueError if its labels do not fit theirs."""
    _check_labels(split, dataset)
    assert train.labels is not None and dataset.labels is not None
    if train.labels.shape[1:] != dataset.labels.shape[1:]:
        raise ValueError(
            f"train={train.source}: its labels are {_kind(train)}, but those of {split}={dataset.source} are "
            f"{_kind(dataset)}; give two files of one data set"
        )
    if train.has_classes:
        dataset = in_classes_of(train, dataset, split)
        _check_classes(split, train, dataset)
    return dataset


def _open(source: str, split: str, given: str, form: str) -> Dataset:
    try:
        return open_dataset(source, split, form)
    except FileNotFoundError as error:
        if given:
            raise
        raise ValueError(
            f"data.{split}={source} of the run does not exist here; give its file as {split}=FILE.beton"
        ) from error


def _kind(dataset: Dataset) -> str:
    if dataset.labels is None:
        return "none"
    return "classes" if dataset.has_classes else f"{dataset.labels.shape[1]} numbers"


def _check_classes(split: str, train: Dataset, dataset: Dataset) -> None:
    assert train.labels is not None and dataset.labels is not None
    known = np.unique(train.labels)
    unknown = np.setdiff1d(dataset.labels, known)
    if len(unknown):
        name = f" ({dataset.classes[unknown[0]]})" if dataset.classes else ""
        raise ValueError(
            f"{split}={dataset.source}: class {unknown[0]}{name} has no image in train={train.source}; "
            "give training images of every class"
        )
    if len(known) < 2:
        raise ValueError(f"train={train.source}: has only one class; give images of at least two")


def labels_of(dataset: Dataset, device: torch.device) -> Tensor:
    """Labels on the device: int64 [n] classes, or float64 [n, K] numbers."""
    labels = torch.from_numpy(dataset.labels).to(device)
    return labels if dataset.has_classes else labels.double()


def number_names(dataset: Dataset) -> list[str]:
    """Names of the numbers in a label: from the generated set, the file, or their positions."""
    assert dataset.labels is not None
    count = dataset.labels.shape[1]
    names = dataset.file.numbers or [] if dataset.stored else list(spirograph.TARGETS)
    return names if len(names) == count else [f"number {i}" for i in range(count)]


def absent_classes(train: Dataset, test: Dataset) -> list[str]:
    """Names of the classes that have training images but no test images."""
    assert train.labels is not None and test.labels is not None
    absent = np.setdiff1d(train.labels, test.labels).tolist()
    return [train.classes[i] if train.classes else f"class {i}" for i in absent]


def about(dataset: Dataset, split: str) -> dict[str, Any]:
    """Description of a data set for the record of an evaluation; its fingerprint is the hash of its content."""
    return {
        "source": dataset.source,
        "split": split,
        "fingerprint": dataset.fingerprint,
        "images": dataset.count,
        "labels": _kind(dataset),
        "classes": dataset.class_count or None,
    }

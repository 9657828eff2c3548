"""The labelled images that an evaluator fits and judges a model on: opened, checked against each other, described."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_ddp import cli, spirograph
from simclr_ddp.data import Dataset, open_dataset
from simclr_ddp.representations import Loaded


def open_labelled(given: dict[str, str], loaded: Loaded) -> tuple[Dataset, Dataset]:
    """Training and test images, labelled alike; ValueError in one sentence where they are not.

    given  a .beton file or `spirograph` for "train" and "test"; empty: what the encoder's run names
    """
    sources = {}
    for split in ("train", "test"):
        sources[split] = given[split] or loaded.settings.get(f"data.{split}", "")
        if not sources[split]:
            where = (
                "is empty in the settings of the run" if loaded.settings else "is not known without the run's settings"
            )
            raise ValueError(f"data.{split} {where}: {split}=FILE.beton gives the {split} images")
    train, test = open_dataset(sources["train"], "train"), open_dataset(sources["test"], "test")
    for split, dataset in (("train", train), ("test", test)):
        if dataset.labels is None:
            raise ValueError(
                f"{split}={dataset.source} has no labels, and there is nothing to evaluate without: "
                f"{split}=FILE.beton gives labelled images"
            )
        if not np.isfinite(dataset.labels).all() or (dataset.has_classes and dataset.labels.min() < 0):
            raise ValueError(
                f"{split}={dataset.source} has labels that are negative or not finite: write it again with classes "
                "from 0, or with numbers"
            )
    assert train.labels is not None and test.labels is not None
    if train.labels.shape[1:] != test.labels.shape[1:]:
        raise ValueError(
            f"train={train.source} has {_kind(train)} for labels, but test={test.source} has {_kind(test)}: "
            "give two files of one data set"
        )
    if train.has_classes:
        _check_classes(train, test)
    if train.fingerprint == test.fingerprint:
        cli.warn(f"the test images are the training images, {train.source}: the figures say nothing of new images")
    return train, test


def _kind(dataset: Dataset) -> str:
    assert dataset.labels is not None
    return "classes" if dataset.has_classes else f"{dataset.labels.shape[1]} numbers"


def _check_classes(train: Dataset, test: Dataset) -> None:
    assert train.labels is not None and test.labels is not None
    if train.classes and test.classes and train.classes != test.classes:
        first = next(i for i in range(test.class_count) if train.classes[i : i + 1] != test.classes[i : i + 1])
        here, there = (" ".join(names[first : first + 1]) or "missing" for names in (train.classes, test.classes))
        raise ValueError(
            f"class {first} is {here} in train={train.source} and {there} in test={test.source}: "
            "write both with the same class folders (an empty one keeps its number)"
        )
    known = np.unique(train.labels)
    unknown = np.setdiff1d(test.labels, known)
    if len(unknown):
        name = f" ({test.classes[unknown[0]]})" if test.classes else ""
        raise ValueError(
            f"test={test.source} holds class {unknown[0]}{name}, of which train={train.source} has no image: "
            "give training images of every class"
        )
    if len(known) < 2:
        raise ValueError(f"train={train.source} holds one class only: images of at least two are wanted")


def labels_of(dataset: Dataset, device: torch.device) -> Tensor:
    """int64 [n] classes, or float64 [n, K] numbers."""
    labels = torch.from_numpy(dataset.labels).to(device)
    return labels if dataset.has_classes else labels.double()


def number_names(dataset: Dataset) -> list[str]:
    """Names of the label's numbers: the generated set's, those in the file's sidecar, or their positions."""
    assert dataset.labels is not None
    count = dataset.labels.shape[1]
    names = list(spirograph.TARGETS) if dataset.images is None else dataset.images.info.get("numbers") or []
    return names if len(names) == count else [f"number {i}" for i in range(count)]


def about(dataset: Dataset) -> dict[str, Any]:
    """What the record of an evaluation says of its images."""
    return {
        "source": dataset.source,
        "fingerprint": dataset.fingerprint,
        "images": dataset.count,
        "labels": _kind(dataset),
        "classes": dataset.class_count or None,
    }

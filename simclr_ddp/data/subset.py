"""Which training images have a label: a class-balanced fraction, a list in a file, and a part that is held out."""

from pathlib import Path

import numpy as np

from simclr_ddp.data.dataset import Dataset
from simclr_ddp.data.draws import Draw, hashes


def class_balanced(dataset: Dataset, fraction: float, seed: int) -> np.ndarray:
    """Return ascending positions, int64 [n], of `fraction` of the images, with equally many of each class.

    Every class has an order of its images, which is a function of the seed, and gives the first ones; where the number
    doesn't divide among the classes, some have one more. A smaller fraction is thus part of a larger one. A class with
    fewer images gives all. Chen et al. 2020, section 4.4 (their lists of 1 % and 10 % of ImageNet are published).

    Raises ValueError if the images are fewer than the classes.
    """
    labels = dataset.labels
    assert labels is not None and dataset.has_classes
    if fraction == 1:
        return np.arange(dataset.count)
    present = np.unique(labels)
    total = round(fraction * dataset.count)
    if total < len(present):
        raise ValueError(
            f"labels.fraction={fraction:g}: {total} of {dataset.count:,} images are fewer than the {len(present)} "
            f"classes; use at least {len(present) / dataset.count:.2g}"
        )
    order = np.argsort(hashes(seed, 0, np.arange(dataset.count), 0, Draw.LABELLED), kind="stable")
    ranks = np.argsort(np.argsort(hashes(seed, 1, present, 0, Draw.LABELLED), kind="stable"), kind="stable")
    chosen = []
    for label, rank in zip(present, ranks, strict=True):
        of_class = order[labels[order] == label]
        chosen.append(of_class[: (total + len(present) - 1 - rank) // len(present)])
    return np.sort(np.concatenate(chosen))


def listed(path: str | Path, dataset: Dataset) -> np.ndarray:
    """Read which images a text file lists, one a line: their ascending positions, int64 [n].

    A line is a position from 0, or the name of an image file, with or without its folders. Raises ValueError for a line
    that is neither, for a name of several images, and for images that are listed twice.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not a text file"
        raise ValueError(f"labels.list={path}: it can't be read ({why}); give a text file") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"labels.list={path}: it is empty; list images, one a line")
    numbered = all(line.isdecimal() for line in lines)
    places = {str(i): [i] for i in range(dataset.count)} if numbered else _places(path, dataset)
    for line in lines:
        found = places.get(str(int(line)) if numbered else line, [])
        if len(found) != 1:
            what = f"{len(found)} images have this name; give the folder too" if found else "no image has this name"
            if numbered:
                what = f"positions are from 0 to {dataset.count - 1}; remove it"
            raise ValueError(f"labels.list={path}: {line[:80]}: {what}")
    chosen = np.unique([places[str(int(line)) if numbered else line][0] for line in lines])
    if len(chosen) < len(lines):
        raise ValueError(f"labels.list={path}: {len(lines) - len(chosen)} images are listed twice; remove them")
    return chosen


def _places(path: str | Path, dataset: Dataset) -> dict[str, list[int]]:
    """Return the positions of the images by the name of their file, with and without its folders."""
    names = dataset.file.names() if dataset.stored else None
    if names is None:
        raise ValueError(
            f"labels.list={path}: it lists names, and {dataset.source} has no file of names next to it "
            f"({Path(dataset.source).name}.names); copy or write it again, or list positions from 0"
        )
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        for known in {name, name.rpartition("/")[2]}:
            found.setdefault(known, []).append(i)
    return found


def split(images: np.ndarray, labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions [n] at random into (those to train on, `count` held out); both ascending if `images` is.

    labels  [n] of the images

    One image of each class is trained on; an equal fraction of the others of each class, up to rounding, is held out.
    Raises ValueError if there are fewer others than `count`.
    """
    classes, numbers = np.unique(labels, return_inverse=True)
    turns = hashes(seed, 1, classes, 0, Draw.SPLIT)[numbers]  # which classes have one more
    order = np.lexsort((hashes(seed, 0, images, 0, Draw.SPLIT), numbers, turns))  # class by class
    ordered = numbers[order]
    others = order[1:][ordered[1:] == ordered[:-1]]
    if count > len(others):
        raise ValueError(f"{count} images can't be held out: one of each class is trained on, {len(others)} are left")
    marks = np.arange(len(others) + 1) * count // max(1, len(others))
    held = np.zeros(len(images), bool)
    held[others[np.diff(marks) > 0]] = True
    return images[~held], images[held]

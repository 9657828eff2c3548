"""Source of write_dataset: a data set of PIL images in Python, such as those of torchvision."""

import operator
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from simclr_ddp.data import beton
from simclr_ddp.data.convert import DEEP, Source, Storage, Stored, encode, rgb


class Items(Protocol):
    """Map-style data set: its items are PIL images, or tuples (PIL image, class, ...)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def read_items(items: Items, split: str, storage: Storage) -> Source:
    """Describe a data set whose items are read in threads; the first one says whether there are labels.

    Names of classes are those of the attribute `classes`, if there is one.
    """
    kind, count = type(items).__name__, len(items)
    if not count:
        raise ValueError(f"source: {kind} is empty; give a data set of PIL images")
    labelled = _parts(items[0], kind, 0)[1] is not None
    labels = np.zeros(count, np.int64)

    def load(i: int) -> Stored:
        try:
            image, label = _parts(items[i], kind, i)
            image = ImageOps.exif_transpose(image)
        except (MemoryError, ValueError):
            raise
        except Exception as error:  # the data set and Pillow raise almost any exception for broken data
            raise ValueError(f"item {i} of {kind} can't be read ({error}); fix it, or set on_error=skip") from error
        if (label is not None) != labelled:
            raise ValueError(
                f"item {i} of {kind} has {'no' if labelled else 'a'} class, unlike item 0; give all or none"
            )
        labels[i] = label or 0
        if image.mode in DEEP:
            raise ValueError(f"item {i} of {kind} has more than 8 bits (mode {image.mode}); convert it to uint8 RGB")
        why = "" if image.mode in ("L", "RGB") else image.mode
        return Stored(encode(rgb(image), storage.quality, raw=storage.mode != "jpeg"), why)

    result = Source([f"{split}/{i}" for i in range(count)], load)
    if labelled:
        classes = getattr(items, "classes", None)
        result.columns["label"] = beton.INT, labels
        result.info = {"label_kind": "classes", "classes": [str(name) for name in classes] if classes else None}
    return result


def _parts(item: Any, kind: str, i: int) -> tuple[Image.Image, int | None]:
    """Image and class of an item; None if it has none, or a negative one, as in torchvision's STL-10.

    Raises ValueError if the item has another form.
    """
    image, label = (item[0], item[1] if len(item) > 1 else None) if isinstance(item, tuple | list) else (item, None)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"item {i} of {kind} is a {type(image).__name__}; items must be PIL images or (PIL image, class), so leave "
            "out a transform to tensors"
        )
    if label is None:
        return image, None
    try:
        number = operator.index(label)
    except (TypeError, ValueError) as error:
        raise ValueError(f"item {i} of {kind} has the class {label!r}; classes must be integers") from error
    return image, number if number >= 0 else None

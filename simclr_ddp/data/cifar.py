"""Reader for the archives of CIFAR-10 and CIFAR-100 that executes no pickle."""

import pickle
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from simclr_ddp.data import beton
from simclr_ddp.data.convert import Source, Stored, encode
from simclr_ddp.system.console import say


class Cifar(NamedTuple):
    """Files of CIFAR-10 or CIFAR-100 as published by their authors."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    classes: str


CIFAR = {
    "cifar10": Cifar(
        "CIFAR10",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": Cifar("CIFAR100", "cifar-100-python", ("train",), ("test",), "meta", "fine_labels", "fine_label_names"),
}


def download(cifar: Cifar) -> Path:
    """Return the extracted folder under datasets/; download and verify it if it is missing or incomplete."""
    from torchvision import datasets  # slow to import, and only needed here
    from torchvision.datasets.utils import check_integrity, download_url

    known = getattr(datasets, cifar.name)
    folder = Path("datasets") / cifar.folder
    checksums = [*known.train_list, *known.test_list, (known.meta["filename"], known.meta["md5"])]
    if not all(check_integrity(folder / name, md5) for name, md5 in checksums):
        say(f"downloading {known.url} to datasets/")
        try:
            download_url(known.url, "datasets", filename=known.filename, md5=known.tgz_md5)
            with tarfile.open(Path("datasets") / known.filename) as archive:
                for name, _ in checksums:  # only these: no other path can lead out of the folder
                    file = archive.extractfile(f"{cifar.folder}/{name}")
                    assert file is not None
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(file.read())
        except Exception as error:
            raise OSError(
                f"{known.url} can't be downloaded ({error}); download and extract it elsewhere, and give its folder "
                f"{cifar.folder} as SOURCE"
            ) from error
    return folder


def read_cifar(folder: Path, cifar: Cifar, split: str, quality: int, mode: str) -> Source:
    if split not in ("train", "test"):
        raise ValueError(f"split={split}: unknown split of {cifar.name}; choose train or test")
    meta = _unpickle(folder / cifar.meta)
    classes = meta.get(cifar.classes)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{folder / cifar.meta} names no classes; extract the archive again")
    batches, labels = [], []
    for name in getattr(cifar, split):
        batch = _unpickle(folder / name)
        pixels, numbers = getattr(batch.get("data"), "pixels", None), batch.get(cifar.labels)
        if (
            not isinstance(pixels, np.ndarray)
            or not isinstance(numbers, list)
            or pixels.shape != (len(numbers), 3072)
            or not all(type(number) is int and 0 <= number < len(classes) for number in numbers)
        ):
            raise ValueError(
                f"{folder / name} does not contain {cifar.name}'s images and labels; extract the archive again"
            )
        batches.append(pixels)
        labels += numbers
    pictures = np.concatenate(batches).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [n, 32, 32, 3]
    say(f"{folder}: {len(pictures):,} images of {len(classes)} classes")

    def load(i: int) -> Stored:
        return Stored(encode(Image.fromarray(np.ascontiguousarray(pictures[i])), quality, raw=mode != "jpeg"))

    return Source(
        [f"{split}/{i}" for i in range(len(pictures))],
        load,
        {"label": (beton.INT, np.array(labels, np.int64))},
        {"label_kind": "classes", "classes": classes},
    )


class _Dtype:
    """Replacement of numpy.dtype while a CIFAR file is unpickled."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Replacement of numpy.ndarray that accepts only bytes, so no pickle can forge another type or size."""

    pixels: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.code != "u1" or fortran:
            raise pickle.UnpicklingError("an array does not consist of bytes in C order")
        self.pixels = np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, np.uint8).reshape(shape)


class _Unpickler(pickle.Unpickler):
    """Unpickler for dicts, lists, strings, numbers and arrays of bytes, which rejects everything else."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how Python 3 pickles bytes for Python 2
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return known[module, name]


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
        if not isinstance(content, dict):
            raise TypeError("it is not a dict")
    except OSError:
        raise
    except Exception as error:  # broken pickles raise almost any exception
        raise ValueError(f"{path} is not a CIFAR file ({error}); extract the archive again") from error
    return content

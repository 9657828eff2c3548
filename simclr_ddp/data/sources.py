"""Sources of write_dataset: a folder of images, CIFAR, the generated Spirograph set, or a data set in Python."""

import threading
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_ddp.data import beton, draws
from simclr_ddp.data.cifar import CIFAR, download, read_cifar
from simclr_ddp.data.convert import Source, Storage, Stored, convert_file, encode
from simclr_ddp.data.items import Items, read_items
from simclr_ddp.data.layouts import read_folder
from simclr_ddp.data.walk import SUFFIXES
from simclr_ddp.system.console import printable, say

GIVE = f"give a folder of images, {', '.join(CIFAR)} or spirograph"


def find(source: str | Path | Items, *, split: str | None, storage: Storage, images: int | None) -> Source:
    """Find the data set of that name or in that folder, without decoding images."""
    if not isinstance(source, str | Path):
        return read_items(source, split or "train", storage)
    source = str(source)
    if source == "spirograph":
        split = split or "train"
        return _spirograph(split, images or (20_000 if split == "test" else 100_000), storage.quality, storage.mode)
    if not source:
        raise ValueError(f"SOURCE is empty, perhaps a variable that is not set; {GIVE} (. is the current folder)")
    folder = Path(source)
    if source in CIFAR:
        folder = download(CIFAR[source])
    if not folder.exists():
        raise FileNotFoundError(f"source={source}: does not exist; {GIVE}")
    if not folder.is_dir():
        raise NotADirectoryError(f"source={source}: is a file; {GIVE}")
    for cifar in CIFAR.values():
        for place in (folder, folder / cifar.folder):
            if all((place / name).is_file() for name in (*cifar.train, *cifar.test, cifar.meta)):
                return read_cifar(place, cifar, split or "train", storage.quality, storage.mode)
    return _folder(folder, split, storage)


def _folder(folder: Path, split: str | None, storage: Storage) -> Source:
    found = read_folder(folder, split)
    if not found.files:
        raise ValueError(f"{found.folder} contains no images ({', '.join(SUFFIXES)}); give another folder")
    say(str(found))
    order = draws.permutation(0, 0, len(found.files))
    paths, labels = zip(*(found.files[i] for i in order), strict=True)

    def load(i: int) -> Stored:
        return convert_file(paths[i], storage)

    result = Source([printable(str(path.relative_to(found.folder))) for path in paths], load)
    if found.classes:
        result.columns["label"] = beton.INT, np.array(labels, np.int64)
        result.info = {"label_kind": "classes", "classes": found.classes}
    result.info["ignored"] = {printable(suffix): count for suffix, count in found.others.items()}
    return result


def _spirograph(split: str, count: int, quality: int, mode: str) -> Source:
    import torch  # only needed here

    from simclr_ddp.data import spirograph

    numbers = spirograph.numbers(count, split)
    block, lock = 256, threading.Lock()
    rendered: dict[int, np.ndarray] = {}  # block -> uint8 [256, 32, 32, 3], for the last requested blocks

    def load(i: int) -> Stored:
        with lock:
            if i // block not in rendered:
                while len(rendered) > 2:
                    del rendered[min(rendered)]
                views = spirograph.render(torch.from_numpy(numbers[i // block * block :][:block]))
                rendered[i // block] = (views * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
            pixels = rendered[i // block][i % block]
        return Stored(encode(Image.fromarray(pixels), quality, raw=mode != "jpeg"))

    return Source(
        [f"{split}/{i}" for i in range(count)],
        load,
        {"label": (beton.vector(4), numbers[:, :4]), "nuisance": (beton.vector(6), numbers[:, 4:])},
        {
            "label_kind": "numbers",
            "numbers": list(spirograph.TARGETS),
            "nuisance": list(spirograph.NUISANCES),
        },
    )

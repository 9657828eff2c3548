import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import Ranks

os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four gloo processes; ranks.run(world_size, function, *arguments)."""
    started = Ranks()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _torch_as_found() -> Iterator[None]:
    """Commands run in this process set threads and determinism for good; put them back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "ffcv", "device"])
def loader(request: pytest.FixtureRequest) -> str:
    """A value of data.loader; each test that takes it runs on all."""
    if request.param == "ffcv":
        pytest.importorskip("ffcv", reason="FFCV is not installed: make setup builds it")
    return request.param


def write_images(folder: Path, count: int, size: int = 20, classes: int = 2, seed: int = 0) -> Path:
    """An image folder of class subfolders: smooth random pictures, so that JPEG keeps them, of unequal sizes."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        label = i % classes
        path = folder / f"class{label}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        coarse[..., label] |= 128
        height, width = size + generator.integers(0, 6, 2)
        Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path, quality=95)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .beton file of 40 small labelled JPEG images in two classes."""
    from simclr_ddp.write_dataset import write_dataset

    folder = tmp_path_factory.mktemp("images")
    write_dataset(str(write_images(folder / "train", 40)), folder / "train.beton")
    return folder / "train.beton"

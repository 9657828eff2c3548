import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from simclr_ddp.data.batches import usable_loader
from simclr_ddp.system import console
from tests.support.ranks import Ranks

os.environ.setdefault("WANDB_MODE", "offline")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side share the cores
    torch.set_num_threads(1)

# The same examples every time, and no file of failures that workers would share.
settings.register_profile("the same", derandomize=True, database=None, deadline=None)
settings.load_profile("the same")


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


@pytest.fixture(autouse=True)
def _messages_are_shown() -> Iterator[None]:
    """Also those of functions that a test calls itself; a library is silent."""
    with console.shown():
        yield


@pytest.fixture(params=["torch", "ffcv", "device"])
def loader(request: pytest.FixtureRequest) -> str:
    """A value of data.loader; each test that takes it runs on all."""
    if request.param == "ffcv" and usable_loader("auto")[0] != "ffcv":
        pytest.skip("FFCV is not installed: make setup builds it")
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
    from simclr_ddp.data.write import write_dataset

    folder = tmp_path_factory.mktemp("images")
    write_dataset(str(write_images(folder / "train", 40)), folder / "train.beton")
    return folder / "train.beton"

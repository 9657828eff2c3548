"""FFCV's Loader with an operation of our own: an image is decoded once, and all its views are cut from it.

FFCV 1.0.2 opens the file, finds the bytes of a sample and compiles the pipeline. Its epoch threads are not used: they
hang when anything fails, keep memory for five decoded batches, and hand out buffers that are soon overwritten. Here
a pool of threads runs the compiled pipeline on parts of a batch, each batch in memory of its own. Crop boxes come with
the batch, from outside, so nothing random happens here, and the views are those of the torch loader, bit for bit.

This module imports FFCV: `data.usable_loader` says whether it can be.
"""

import ctypes
import math
import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numba.typed
import numpy as np
import torch
from torch import Tensor

from simclr_ddp.beton import Beton
from simclr_ddp.crops import cut_views
from simclr_ddp.decode import TURBOJPEG, cut_views_of

LEAST_PART = 8  # images a thread takes at once, at least


@contextmanager
def _undisturbed() -> Iterator[None]:
    """FFCV sets torch's threads for the whole process, when imported and by every Loader; here they stay.

    On import it makes a dictionary of two entries whose compilation takes four seconds; here it gets a plain one.
    """
    threads, typed_dictionary = torch.get_num_threads(), numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = typed_dictionary
        torch.set_num_threads(threads)


if not version("ffcv").startswith("1.0."):
    raise ImportError(f"FFCV {version('ffcv')} is installed, but 1.0.2 is known: pip install ffcv==1.0.2")

with _undisturbed():
    import ffcv._libffcv
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import loader as ffcv_loader
    from ffcv.memory_managers import OSCacheManager


# TurboJPEG itself: FFCV's own imdecode takes the fast, less exact DCT and does not tell whether it succeeded.
_library = ctypes.CDLL(ffcv._libffcv.__file__)
_TURBOJPEG = np.array(
    [ctypes.cast(getattr(_library, name), ctypes.c_void_p).value for name in TURBOJPEG],
    np.int64,
)


class DecodeViews(SimpleRGBImageDecoder):
    """FFCV operation: image -> uint8 [V, size, size, 3], all views cut from one decoded image.

    Its memory is not FFCV's, but what `ViewLoader.cut` is given. (It is a SimpleRGBImageDecoder since FFCV takes any
    other operation for a transform, and puts a decoder of its own before it.)
    """

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        return replace(previous_state, jit_mode=True), None

    def generate_code(self) -> Callable:
        def cut(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
            cut_views_of(batch_indices, memory, metadata, storage_state)

        return cut


class _LeanCacheManager(OSCacheManager):
    """FFCV's access to the file by memory mapping, without its tables of pages.

    They serve its own random orders alone, and take 3 s and 600 MB per process for ImageNet.
    """

    def __init__(self, reader: Any) -> None:
        self.reader, self.context = reader, None
        order = np.argsort(reader.alloc_table["ptr"], kind="stable")
        self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
        self.storage = (np.memmap(reader.file_name, np.uint8, mode="r").view(np.ndarray), self.ptrs, self.sizes)

    def compile_reader(self) -> None:
        """Nothing: `cut_views_of` reads by itself."""


class ViewLoader(ffcv_loader.Loader):
    """FFCV's Loader of a file, with `DecodeViews` as the pipeline of its images; other fields are not read."""

    def __init__(self, images: Beton) -> None:
        pipelines = dict.fromkeys(images.fields) | {"image": [DecodeViews()]}
        with _undisturbed():
            whole, ffcv_loader.OSCacheManager = ffcv_loader.OSCacheManager, _LeanCacheManager
            try:
                super().__init__(str(images.path), 1, num_workers=1, os_cache=True, pipelines=pipelines, seed=0)
            finally:
                ffcv_loader.OSCacheManager = whole
        stages, _ = self.code
        self._stage = stages[0][0]
        (self._node,) = self.graph.collect_requirements()[0]["operation"]

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("FFCV's own epochs know no crop boxes: read_views gives the batches")

    def cut(self, index: np.ndarray, boxes: np.ndarray, views: np.ndarray, failed: np.ndarray) -> None:
        """Run the compiled pipeline: write the views [B, V, size, size, 3] of the samples `index` int64 [B].

        boxes   int32 [B, V, 4]
        failed  bool [B], false; made true where the image could not be decoded, and no view was written

        Any number of threads may do so at the same time; Python's lock is not held.
        """
        memory = {f"memory_{self._node}": (views, boxes, failed, _TURBOJPEG), f"shared_memory_{self._node}": None}
        self._stage(
            batch_indices=index, metadata=self.reader.metadata, storage_state=self.memory_manager.storage, **memory
        )


_opened = lru_cache(maxsize=4)(ViewLoader)  # compiled once for all who read an open file


def _memory(shape: tuple[int, ...], pinned: bool) -> Tensor:
    """uint8 of that shape, to be written. It is mapped by itself: a fragmented heap would grow by hundreds of MB."""
    if pinned:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)  # torch keeps it until its copies are done
    pages = mmap.mmap(-1, math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(shape)


@dataclass
class _Batch:
    index: np.ndarray
    boxes: np.ndarray
    views: Tensor
    failed: np.ndarray
    parts: list[Future]


def read_views(
    images: Beton, size: int, cuts: Iterable[tuple[np.ndarray, np.ndarray]], workers: int, ahead: int, pinned: bool
) -> Generator[Tensor, None, None]:
    """uint8 [B, V, size, size, 3] for each (index int64 [B], boxes int32 [B, V, 4]) of `cuts`, in order.

    `workers` threads, at least one, decode the `ahead` batches that come next while one is used. The memory is pinned
    for a GPU if wanted. What a thread raises is raised here. An image that TurboJPEG complains about is given to
    Pillow, as in the torch loader: raises ValueError with one sentence if that can't decode it either. Closed, the
    threads have ended.
    """
    loader, workers = _opened(images), max(1, workers)
    pool = ThreadPoolExecutor(workers, "decode")
    waiting: deque[_Batch] = deque()

    def begin(index: np.ndarray, boxes: np.ndarray) -> _Batch:
        views = _memory((len(index), boxes.shape[1], size, size, 3), pinned)
        failed, out = np.zeros(len(index), bool), views.numpy()
        length = max(LEAST_PART, -(-len(index) // (2 * workers)))
        parts = [slice(i, i + length) for i in range(0, len(index), length)]
        futures = [pool.submit(loader.cut, index[p], boxes[p], out[p], failed[p]) for p in parts]
        return _Batch(index, boxes, views, failed, futures)

    def end(batch: _Batch) -> Tensor:
        for part in batch.parts:
            part.result()
        for i in np.flatnonzero(batch.failed):
            batch.views[i] = torch.from_numpy(cut_views(images, int(batch.index[i]), batch.boxes[i], size))
        return batch.views

    try:
        for index, boxes in cuts:
            waiting.append(begin(index, boxes))
            if len(waiting) > ahead:
                yield end(waiting.popleft())
        while waiting:
            yield end(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)

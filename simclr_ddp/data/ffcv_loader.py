"""FFCV's Loader with a custom operation that decodes an image once and cuts all its views.

FFCV 1.0.2 opens the file, finds the bytes of a sample and compiles the pipeline. Its epoch threads are not used: they
hang when anything fails, keep memory for five decoded batches, and return buffers that are soon overwritten. Here a
pool of threads runs the compiled pipeline on slices of a batch, and each batch has separate memory. Crop boxes are
passed with the batch, so this module contains no randomness, and its views equal those of the torch loader bit for bit.

This module imports FFCV; `batches.usable_loader` checks whether that is possible.
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

from simclr_ddp.data.beton import Beton
from simclr_ddp.data.crops import cut_views
from simclr_ddp.data.jpeg_views import TURBOJPEG, cut_views_of

LEAST_PART = 8  # smallest number of images per task of a thread


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep torch's number of threads, which FFCV changes when imported and in every Loader.

    On import FFCV also makes a numba dictionary that takes four seconds to compile; a plain dict replaces it.
    """
    threads, typed_dictionary = torch.get_num_threads(), numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = typed_dictionary
        torch.set_num_threads(threads)


if not version("ffcv").startswith("1.0."):
    raise ImportError(f"FFCV {version('ffcv')} is installed, but 1.0.2 is required; pip install ffcv==1.0.2")

with _undisturbed():
    import ffcv._libffcv
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import loader as ffcv_loader
    from ffcv.memory_managers import OSCacheManager


# TurboJPEG is called directly: FFCV's imdecode uses the fast, less exact DCT and does not report errors.
_library = ctypes.CDLL(ffcv._libffcv.__file__)
_TURBOJPEG = np.array(
    [ctypes.cast(getattr(_library, name), ctypes.c_void_p).value for name in TURBOJPEG],
    np.int64,
)


class DecodeViews(SimpleRGBImageDecoder):
    """FFCV operation that decodes an image and cuts its views: uint8 [V, size, size, 3].

    It writes to the memory passed to `ViewLoader.cut`, not to FFCV's. (It is a SimpleRGBImageDecoder since FFCV treats
    any other operation as a transform and inserts its decoder before it.)
    """

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        return replace(previous_state, jit_mode=True), None

    def generate_code(self) -> Callable:
        def cut(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
            cut_views_of(batch_indices, memory, metadata, storage_state)

        return cut


class _LeanCacheManager(OSCacheManager):
    """FFCV's memory-mapped access to the file, without its tables of pages.

    The tables serve only FFCV's random orders, and take 3 s and 600 MB per process for ImageNet.
    """

    def __init__(self, reader: Any) -> None:
        self.reader, self.context = reader, None
        order = np.argsort(reader.alloc_table["ptr"], kind="stable")
        self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
        self.storage = (np.memmap(reader.file_name, np.uint8, mode="r").view(np.ndarray), self.ptrs, self.sizes)

    def compile_reader(self) -> None:
        """Do nothing: `cut_views_of` reads the file directly."""


class ViewLoader(ffcv_loader.Loader):
    """FFCV's Loader of a file with `DecodeViews` as the image pipeline; other fields are not read."""

    def __init__(self, images: Beton) -> None:
        pipelines = dict.fromkeys(images.fields) | {"image": [DecodeViews()]}
        with _undisturbed():
            original, ffcv_loader.OSCacheManager = ffcv_loader.OSCacheManager, _LeanCacheManager
            try:
                super().__init__(str(images.path), 1, num_workers=1, os_cache=True, pipelines=pipelines, seed=0)
            finally:
                ffcv_loader.OSCacheManager = original
        stages, _ = self.code
        self._stage = stages[0][0]
        (self._node,) = self.graph.collect_requirements()[0]["operation"]

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("FFCV's epochs have no crop boxes; use read_views")

    def cut(self, index: np.ndarray, boxes: np.ndarray, views: np.ndarray, failed: np.ndarray) -> None:
        """Run the compiled pipeline, which writes the views [B, V, size, size, 3] of the samples `index` int64 [B].

        boxes   int32 [B, V, 4]
        failed  bool [B], initially false; set to true where an image can't be decoded and no view was written

        Any number of threads may call this concurrently; it does not hold the GIL.
        """
        memory = {f"memory_{self._node}": (views, boxes, failed, _TURBOJPEG), f"shared_memory_{self._node}": None}
        self._stage(
            batch_indices=index, metadata=self.reader.metadata, storage_state=self.memory_manager.storage, **memory
        )


_opened = lru_cache(maxsize=4)(ViewLoader)  # compiled once per open file


def _memory(shape: tuple[int, ...], pinned: bool) -> Tensor:
    """Uninitialised uint8 memory, mapped separately: a fragmented heap would grow by hundreds of MB."""
    if pinned:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)  # torch keeps it until copies are done
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
    """Yield uint8 [B, V, size, size, 3] for each (index int64 [B], boxes int32 [B, V, 4]) of `cuts`, in order.

    `workers` threads (at least one) decode the next `ahead` batches while one is in use. `pinned` pins the memory for a
    GPU. Exceptions of threads are raised here. An image that TurboJPEG rejects is decoded by Pillow, as in the torch
    loader; raises ValueError if Pillow can't decode it either. Closing the generator ends the threads.
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

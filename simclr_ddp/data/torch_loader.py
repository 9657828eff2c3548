"""Decode and cut by torch's DataLoader and Pillow: works everywhere, and says what the pixels are."""

import atexit
import signal
from collections.abc import Generator, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simclr_ddp.beton import Beton
from simclr_ddp.crops import cut_views

Cut = tuple[np.ndarray, np.ndarray]


class _Decoder(Dataset):
    """(indices [B], boxes [B, V, 4]) -> uint8 [B, V, size, size, 3]; each image is decoded once.

    An image that can't be decoded is answered with the sentence that says so: the caller raises it, since an error
    in a worker process would reach the user as two tracebacks.
    """

    def __init__(self, images: Beton, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, cuts: tuple[np.ndarray, np.ndarray]) -> Tensor | str:
        index, boxes = cuts
        out = np.empty((len(index), boxes.shape[1], self.size, self.size, 3), np.uint8)
        for i, (sample, cut) in enumerate(zip(index, boxes, strict=True)):
            try:
                out[i] = cut_views(self.images, int(sample), cut, self.size)
            except ValueError as error:
                return str(error)
        return torch.from_numpy(out)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def _leave_signals_to_the_parent(_: int) -> None:
    """Only the training process acts on a signal, also where one reaches the whole process group (Ctrl-C, SLURM).

    Workers end when it closes their queues, or dies: torch's loader watches for both.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def read_views(
    images: Beton, size: int, cuts: Iterable[Cut], workers: int, ahead: int, pinned: bool
) -> Generator[Tensor, None, None]:
    """uint8 [B, V, size, size, 3] for each (index int64 [B], boxes int32 [B, V, 4]) of `cuts`, in order.

    Each of `workers` processes decodes `ahead` batches while one is used; with 0 they are decoded when asked for. The
    memory is pinned for a GPU if wanted. Raises ValueError with one sentence if an image can't be decoded.
    """
    loader = DataLoader(
        _Decoder(images, size),
        sampler=cuts,
        batch_size=None,
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=_leave_signals_to_the_parent,
        prefetch_factor=ahead if workers else None,
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: no worker is hit before it ignores them
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    stop = getattr(iterator, "_shutdown_workers", lambda: None)
    atexit.register(stop)  # Python would end those left open by the signal that they ignore, and wait
    try:
        for views in iterator:
            if isinstance(views, str):
                raise ValueError(views)
            yield views
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # the memory of a worker that is no more
        raise RuntimeError(f"DataLoader worker has left: {error}") from error
    finally:
        stop()
        atexit.unregister(stop)

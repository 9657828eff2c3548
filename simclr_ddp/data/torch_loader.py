"""Loader based on torch's DataLoader and Pillow: it works everywhere and is the reference for the pixels."""

import atexit
import ctypes
import os
import signal
from collections.abc import Generator, Iterable
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from simclr_ddp.data.beton import Beton
from simclr_ddp.data.crops import cut_views
from simclr_ddp.system.errors import one_line
from simclr_ddp.system.signals import STOP

Cut = tuple[np.ndarray, np.ndarray]
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class _Decoder(Dataset):
    """Map (indices [B], boxes [B, V, 4]) to uint8 [B, V, size, size, 3], decoding each image once.

    If an image can't be decoded, or the batch does not fit into /dev/shm, the error message is returned instead and the
    caller raises it, since an error in a worker process would reach the user as two tracebacks.
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
        views = torch.from_numpy(out)
        if get_worker_info() is None:
            return views
        try:
            return views.share_memory_()  # the queue would do so in a thread, whose error reaches nobody
        except RuntimeError as error:
            return (
                f"a decoding process can't pass on a batch of {views.nbytes / 2**20:,.0f} MB through /dev/shm "
                f"({one_line(error, 120)}): use docker run --shm-size=8g or --ipc=host, or "
                "fewer workers"
            )


def _live_for_the_parent(parent: int, _: int) -> None:
    """Ignore signals, so that only the training process handles those sent to the process group (Ctrl-C, SLURM).

    Workers end when that process closes their queues, and on Linux at once when it dies. torch's loader only asks every
    five seconds whether it has died, and never ends a worker that is blocked then: it would hold up whoever reads the
    run's output to its end.
    """
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)
    with suppress(AttributeError):  # macOS has no prctl
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before
        os._exit(1)


def read_views(
    images: Beton, size: int, cuts: Iterable[Cut], workers: int, ahead: int, pinned: bool
) -> Generator[Tensor, None, None]:
    """Yield uint8 [B, V, size, size, 3] for each (index int64 [B], boxes int32 [B, V, 4]) of `cuts`, in order.

    Each of `workers` processes decodes `ahead` batches in advance; with 0 workers this process decodes on demand.
    `pinned` pins the memory for a GPU. Raises ValueError if an image can't be decoded, or if /dev/shm is full.
    """
    loader = DataLoader(
        _Decoder(images, size),
        sampler=cuts,
        batch_size=None,
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=partial(_live_for_the_parent, os.getpid()),
        prefetch_factor=ahead if workers else None,
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # inherited by workers until they ignore the signals
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    stop = getattr(iterator, "_shutdown_workers", lambda: None)
    atexit.register(stop)  # else Python sends workers a signal that they ignore, and hangs at exit
    try:
        for views in iterator:
            if isinstance(views, str):
                raise ValueError(views)
            yield views
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # from the memory of a worker that has ended
        raise RuntimeError(f"DataLoader worker has exited: {error}") from error
    finally:
        stop()
        atexit.unregister(stop)

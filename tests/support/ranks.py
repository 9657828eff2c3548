"""Four processes, started once per test session, that run functions as the ranks of a gloo process group."""

import io
import itertools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


def _serve(pipe: Connection, rank: int) -> None:
    torch.set_num_threads(1)
    while True:
        world_size, store, function, arguments = pipe.recv()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        try:
            if world_size > 1:
                limit = timedelta(seconds=180)
                method = f"file://{store}"
                dist.init_process_group("gloo", method, timeout=limit, rank=rank, world_size=world_size)
                dist.barrier()  # a function that fails at once must not leave while others are still connecting
            buffer = io.BytesIO()
            torch.save(function(*arguments), buffer)
            pipe.send(("done", buffer.getvalue()))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class Ranks:
    def __init__(self, count: int = 4) -> None:
        self._count = count
        # The file of a group must outlive it: the destructor of FileStore, which may run late, ends a process without.
        self._folder = tempfile.TemporaryDirectory()
        self._stores = itertools.count()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run function(*arguments) on ranks 0 .. world_size - 1, and return their results in order.

        The function must be importable; it returns tensors and plain values. If a rank fails, its traceback is raised.
        """
        store = os.path.join(self._folder.name, f"store-{next(self._stores)}")
        for pipe in self._pipes[:world_size]:
            pipe.send((world_size, store, function, arguments))
        answers = []
        for pipe in self._pipes[:world_size]:
            try:
                answered = pipe.poll(240)
                answers += [pipe.recv()] if answered else []
            except (EOFError, ConnectionError):
                answered = False
            if not answered:
                self.close()
                self._start()
                raise AssertionError("a rank does not answer or has ended; all ranks were started again")
        for status, answer in answers:
            if status == "failed":
                raise AssertionError(f"a rank failed:\n{answer}")
        return [torch.load(io.BytesIO(answer), weights_only=False) for _, answer in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()

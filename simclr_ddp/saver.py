"""Saving a run while it trains: a copy is taken between two steps, and a thread brings it to the disk."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simclr_ddp import checkpoint, cli
from simclr_ddp.config import Checkpoint


class Saver:
    """Checkpoints of one run, by steps, by the clock, and on demand; used by rank 0 only.

    A checkpoint that can't be written, to a full disk for example, is a warning: those before it stay, training goes
    on, and the next one that is due is tried.
    """

    def __init__(self, folder: Path, every: Checkpoint, steps_per_epoch: int, device: torch.device) -> None:
        self._folder, self._every, self._device = folder, every, device
        self._keep_steps = every.keep_every_epochs * steps_per_epoch
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._fault = ""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after so many steps."""
        by_steps = self._every.every_steps and step % self._every.every_steps == 0
        by_time = self._every.every_minutes and time.monotonic() - self._last > 60 * self._every.every_minutes
        return bool(by_steps or by_time or self._kept(step))

    def _kept(self, step: int) -> bool:
        return self._keep_steps > 0 and step % self._keep_steps == 0

    def save(self, state: dict[str, Any], step: int) -> None:
        """Copy the state now and write it in the background; waits for the checkpoint before, if that is unfinished."""
        self.wait()
        copied = map_tensors(state, torch.clone)
        ready = torch.cuda.Event() if self._device.type == "cuda" else None
        if ready is not None:
            ready.record()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._write, args=(copied, step, ready), name="checkpoint")
        self._thread.start()

    def wait(self) -> str:
        """Wait until the last checkpoint is on the disk; what kept it from there, or nothing."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        return self._fault

    def _write(self, state: dict[str, Any], step: int, ready: "torch.cuda.Event | None") -> None:
        try:
            if ready is not None:
                with torch.cuda.stream(torch.cuda.Stream(self._device)):  # beside the steps that go on meanwhile
                    torch.cuda.current_stream().wait_event(ready)
                    state = map_tensors(state, Tensor.cpu)
            checkpoint.save(self._folder, state, step, self._every.keep_last, self._kept)
            self._fault = ""
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
            self._fault = " ".join(str(error).split())[:200]
            cli.warn(
                f"the checkpoint of step {step} could not be written to {self._folder} ({self._fault}): training goes "
                "on and the checkpoint before it stays; make room, the next one is tried when it is due"
            )


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same dicts, lists and plain values, with the function of every tensor in its place."""
    if isinstance(value, Tensor):
        return function(value.detach())
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, list):
        return [map_tensors(v, function) for v in value]
    return value

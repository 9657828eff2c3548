"""Saving a run while it trains: a copy is taken between two steps, and a thread brings it to the disk."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simclr_ddp import checkpoint, cli, distributed
from simclr_ddp.config import Checkpoint
from simclr_ddp.report import StepFailed


class Saver:
    """Checkpoints of one run, by steps, by the clock, and on demand; used by rank 0 only.

    A checkpoint that can't be written, to a full disk for example, is a warning: those before it stay, training goes
    on, and the next one that is due is tried.
    """

    def __init__(self, folder: Path, every: Checkpoint, steps_per_epoch: int, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._every_steps, self._every_seconds = every.every_steps, 60 * every.every_minutes
        self._keep_last, self._keep_steps = every.keep_last, every.keep_every_epochs * steps_per_epoch
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._fault = ""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after so many steps."""
        by_steps = self._every_steps and step % self._every_steps == 0
        by_time = self._every_seconds and time.monotonic() - self._last > self._every_seconds
        return bool(by_steps or by_time or self._kept(step))

    def _kept(self, step: int) -> bool:
        return self._keep_steps > 0 and step % self._keep_steps == 0

    def save(self, state: dict[str, Any], step: int) -> None:
        """Copy the state now and write it in the background; waits for the checkpoint before, if that is unfinished."""
        self.wait()
        copied = [map_tensors(state, torch.clone)]
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

    def _write(self, copied: list[dict[str, Any]], step: int, ready: "torch.cuda.Event | None") -> None:
        """copied  holds the state, and is emptied: the copies on the device go as soon as they are on the host"""
        try:
            state = copied.pop()
            if ready is not None:
                with torch.cuda.stream(torch.cuda.Stream(self._device)):  # beside the steps that go on meanwhile
                    torch.cuda.current_stream().wait_event(ready)
                    state = map_tensors(state, Tensor.cpu)
            checkpoint.save(self._folder, state, step, self._keep_last, self._kept)
            self._fault = ""
        except (
            Exception
        ) as error:  # torch.save makes a RuntimeError of a full disk; no fault may end the thread unheard
            self._fault = " ".join(str(error).split())[:200] or type(error).__name__
            cli.warn(
                f"the checkpoint of step {step} could not be written to {self._folder} ({self._fault}): training goes "
                "on and the checkpoint before it stays; make room, the next one is tried when it is due"
            )


def dump(run_dir: Path, failed: StepFailed, saved: dict[str, Any]) -> str:
    """Write what it takes to repeat a step that failed, on rank 0; the sentence that says where, on all ranks.

    saved  the state before that step, the settings, and what a checkpoint must agree in
    """
    path = run_dir / "dumps" / f"step-{failed.step:08d}.pt"
    told = f"`python -m simclr_ddp.replay {path}` repeats the step"
    if not distributed.is_main():
        return told
    saved |= {"step": failed.step - 1, "failed": {"loss": failed.loss, "gradient_norm": failed.gradient_norm}}
    try:
        path.parent.mkdir(exist_ok=True)
        checkpoint.replace_atomically(path, lambda temporary: torch.save(saved, temporary))
    except (OSError, RuntimeError) as error:
        return f"{path}, to repeat the step, could not be written ({' '.join(str(error).split())[:100]})"
    return told


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same dicts, lists and plain values, with the function of every tensor in its place."""
    if isinstance(value, Tensor):
        return function(value.detach())
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, list):
        return [map_tensors(v, function) for v in value]
    return value

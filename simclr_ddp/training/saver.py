"""Save a run while it trains: the state is copied between two steps, and a thread writes the copy to the disk."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simclr_ddp.distributed import collectives
from simclr_ddp.runs import checkpoint
from simclr_ddp.system import console, files
from simclr_ddp.system.errors import one_line
from simclr_ddp.training.reporter import StepFailed


class Saver:
    """Writes the checkpoints of one run, by steps, by the clock, and on demand; used by rank 0 only.

    If a checkpoint can't be written, for example to a full disk, a warning is shown: earlier checkpoints stay, training
    continues, and the next one is tried when it is due.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        every_steps: int = 0,
        every_minutes: float = 0,
        keep_last: int = 2,
        keep_every_steps: int = 0,
    ) -> None:
        """Checkpoints at multiples of keep_every_steps are never deleted. every_*, keep_every_steps: 0 means never."""
        self._folder, self._device = folder, device
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self._keep_last, self._keep_steps = keep_last, keep_every_steps
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._fault = ""

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps."""
        by_steps = self._every_steps and step % self._every_steps == 0
        by_time = self._every_seconds and time.monotonic() - self._last > self._every_seconds
        return bool(by_steps or by_time or self._kept(step))

    def _kept(self, step: int) -> bool:
        return self._keep_steps > 0 and step % self._keep_steps == 0

    def save(self, state: dict[str, Any], step: int) -> None:
        """Copy the state now and write it in the background; first wait for the previous checkpoint, if unfinished."""
        self.wait()
        copied = [map_tensors(state, torch.clone)]
        ready = torch.cuda.Event() if self._device.type == "cuda" else None
        if ready is not None:
            ready.record()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._write, args=(copied, step, ready), name="checkpoint")
        self._thread.start()

    def wait(self) -> str:
        """Wait until the last checkpoint is on the disk; return the error that prevented it, or ""."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        return self._fault

    def _write(self, copied: list[dict[str, Any]], step: int, ready: "torch.cuda.Event | None") -> None:
        """Write the state in `copied`; empty that list, so that device copies are freed once they are on the host."""
        try:
            state = copied.pop()
            if ready is not None:
                with torch.cuda.stream(torch.cuda.Stream(self._device)):  # in parallel to the training steps
                    torch.cuda.current_stream().wait_event(ready)
                    state = map_tensors(state, Tensor.cpu)
            checkpoint.save(self._folder, state, step, self._keep_last, self._kept)
            self._fault = ""
        except (
            Exception
        ) as error:  # torch.save raises RuntimeError if the disk is full; no error may end the thread silently
            self._fault = one_line(error, 200) or type(error).__name__
            console.warn(
                f"the checkpoint of step {step} could not be written to {self._folder} ({self._fault}): training "
                "continues and the previous checkpoint stays; make room before the next one is due"
            )


def dump(run_dir: Path, failed: StepFailed, saved: dict[str, Any], repeats: bool = True) -> str:
    """Write on rank 0 what is needed to repeat a failed step; return, on all ranks, a message that says where.

    saved    the state before that step, the settings, and the identity that a checkpoint has
    repeats  whether simclr_ddp.replay knows this kind of run
    """
    path = run_dir / "dumps" / f"step-{failed.step:08d}.pt"
    message = f"`python -m simclr_ddp.replay {path}` repeats the step" if repeats else f"{path} holds the state before"
    if not collectives.is_main():
        return message
    saved |= {"step": failed.step - 1, "failed": {"loss": failed.loss, "gradient_norm": failed.gradient_norm}}
    try:
        path.parent.mkdir(exist_ok=True)
        files.replace_atomically(path, lambda temporary: torch.save(saved, temporary))
    except (OSError, RuntimeError) as error:
        return f"{path}, to repeat the step, could not be written ({one_line(error, 100)})"
    return message


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Copy nested dicts and lists, with every tensor replaced by function(tensor)."""
    if isinstance(value, Tensor):
        return function(value.detach())
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, list):
        return [map_tensors(v, function) for v in value]
    return value

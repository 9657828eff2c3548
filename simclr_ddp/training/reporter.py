"""What the host learns of a step, one step late: metric lines, and the decision of all ranks to stop together."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from simclr_ddp.metrics import MetricsLog, Progress, peak_memory_bytes

MOST_SKIPPED = 20  # fp16 steps on end whose gradients overflow; the first few are the loss scale finding its place


class LateReader:
    """Device vectors that the host reads one push later, so that reading never waits for the device."""

    def __init__(self) -> None:
        self._tag: dict[str, Any] | None = None
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def push(self, tag: dict[str, Any], vector: Tensor) -> None:
        """Start copying a vector to the host."""
        self._tag, self._event = tag, None
        if vector.is_cuda:
            self._host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._host.copy_(vector, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = vector.clone()

    def read(self) -> tuple[dict[str, Any], list[float]] | None:
        """The vector pushed last, with its tag, waited for if need be; None before the first push."""
        if self._tag is None or self._host is None:
            return None
        if self._event is not None:
            self._event.synchronize()
        return self._tag, self._host.tolist()


class StepFailed(ValueError):
    """The loss or gradient of a step is not finite; all ranks raise it, one step later."""

    DIVERGES = (
        "it diverges; a lower optim.base_learning_rate, a higher loss.temperature or precision=fp32 may help, and the "
        "same command goes on from the last checkpoint"
    )

    def __init__(self, step: int, loss: float, gradient_norm: float, learning_rate: float, why: str = DIVERGES) -> None:
        numbers = f"loss {loss:g}, gradient norm {gradient_norm:g}, learning rate {learning_rate:g}"
        super().__init__(f"step {step}: {numbers}: {why}")
        self.step, self.loss, self.gradient_norm = step, loss, gradient_norm


class Reporter:
    """Takes each step's vector [loss, top1, stop, gradient norm], equal on all ranks, and acts on it a step later.

    `push` is where all ranks decide, at the same step number: it raises for a loss or gradient that is not finite,
    and sets `stop` if any rank was told to stop. Metric lines are written when their values have arrived.
    """

    def __init__(
        self, log: MetricsLog | None, start: int, total: int, images_per_step: int, device: torch.device, fp16: bool
    ) -> None:
        self.stop = False
        self._log, self._reader, self._fp16 = log, LateReader(), fp16
        self._progress = Progress(total, start, shown=log is not None)
        self._images_per_step, self._device = images_per_step, device
        self._begin = self._line_time = time.perf_counter()
        self._line_step, self._waited = start, 0.0
        self._loss_sum, self._loss_count, self._skipped = 0.0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def push(self, line: dict[str, Any], due: bool, vector: Tensor) -> None:
        """Act on the step before, then start reading this one; `line` begins its metric line, if one is due."""
        self.act()
        if due:
            now = time.perf_counter()
            seconds, steps = now - self._line_time, line["step"] - self._line_step
            line |= {
                "images_per_second": round(steps * self._images_per_step / seconds, 2),
                "data_wait_fraction": round(self._waited / seconds, 4),
                "peak_memory_bytes": peak_memory_bytes(self._device),
                "seconds": round(now - self._begin, 3),
            }
            self._line_time, self._line_step, self._waited = now, line["step"], 0.0
        self._reader.push({"line": line, "due": due, "written": False}, vector)
        self._progress.step()

    def add(self, **values: float) -> None:
        """Put further values into the line of the step pushed last."""
        pending = self._reader.read()
        assert pending is not None and not pending[0]["written"]
        pending[0]["line"].update(values)

    def flush(self) -> bool:
        """Write the line of the step pushed last, and bring all lines to the disk.

        False if its values are not finite or the disk has no room: a checkpoint needs the lines of all steps it holds,
        and must not hold a step that failed.
        """
        finite = self._write()
        return (self._log is None or self._log.sync()) and finite

    def to_save(self) -> dict[str, Any]:
        """The newest metric lines and the number of all, for the checkpoint that counts on them."""
        return {"metrics": list(self._log.tail), "metric_count": self._log.count} if self._log is not None else {}

    def epoch_loss(self) -> float:
        """Mean loss of the steps read since the last call."""
        mean = self._loss_sum / max(1, self._loss_count)
        self._loss_sum, self._loss_count = 0.0, 0
        return mean

    def end(self) -> None:
        """Close the metrics, their mirrors and the progress bar."""
        self._progress.close()
        if self._log is not None:
            self._log.close()

    @contextmanager
    def closed_by_failures(self) -> Iterator[None]:
        """Whatever is raised within closes the metrics and their mirrors, without waiting for them."""
        try:
            yield
        except BaseException:
            self._progress.close()
            if self._log is not None:
                self._log.close_failed()
            raise

    def _write(self) -> bool:
        pending = self._reader.read()
        if pending is None:
            return True
        tag, (loss, top1, _, gradient_norm) = pending
        finite = all(v - v == 0 for v in ((loss,) if self._fp16 else (loss, gradient_norm)))
        if tag["due"] and not tag["written"] and finite and self._log is not None:
            line = tag["line"]
            line = {"step": line["step"], "epoch": line["epoch"], "loss": loss, "contrastive_top1": top1} | line
            self._log.write(line)
            self._progress.line(line)
        tag["written"] = True
        return finite

    def act(self) -> None:
        """Wait for the step pushed last and decide upon it; `push` does so for the step before."""
        pending = self._reader.read()
        if pending is None:
            return
        tag, (loss, _, stop, gradient_norm) = pending
        if not self._write():
            raise StepFailed(tag["line"]["step"], loss, gradient_norm, tag["line"]["learning_rate"])
        self._skipped = 0 if gradient_norm - gradient_norm == 0 else self._skipped + 1
        if self._skipped == MOST_SKIPPED:
            why = (
                f"the gradients of {MOST_SKIPPED} steps on end overflow fp16 at ever lower loss scales, so nothing is "
                "learned: precision=bf16 or fp32 has the range"
            )
            raise StepFailed(tag["line"]["step"], loss, gradient_norm, tag["line"]["learning_rate"], why)
        self._loss_sum, self._loss_count = self._loss_sum + loss, self._loss_count + 1
        self.stop = stop > 0

"""Metrics of each step, read one step late: the lines of metrics.jsonl, and the joint decision of all ranks to stop."""

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from simclr_ddp.data.batches import Batch
from simclr_ddp.distributed import collectives
from simclr_ddp.runs.metrics import MetricsLog, summary
from simclr_ddp.system.console import Progress, warn
from simclr_ddp.system.machine import peak_memory_bytes
from simclr_ddp.training.plan import Plan
from simclr_ddp.training.step import Record

LEAST_EPOCH = 20  # least number of steps over which the mean loss is judged
MOST_SKIPPED = 20  # successive fp16 steps that may overflow; at the start some do until the loss scale is low enough


class LateReader:
    """Copies device vectors to the host, to be read one push later, so that reading never waits for the device."""

    def __init__(self) -> None:
        self.tag: dict[str, Any] | None = None
        self.host: Tensor | None = None
        self.event: torch.cuda.Event | None = None

    def push(self, tag: dict[str, Any], vector: Tensor) -> None:
        """Start copying a vector to the host."""
        self.tag, self.event = tag, None
        if vector.is_cuda:
            self.host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self.host.copy_(vector, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = vector.clone()

    def read(self) -> tuple[dict[str, Any], list[float]] | None:
        """Return (tag, vector) of the last push, waiting for the copy if needed; None before the first push."""
        if self.tag is None or self.host is None:
            return None
        if self.event is not None:
            self.event.synchronize()
        return self.tag, self.host.tolist()


class StepFailed(ValueError):
    """Raised by all ranks, one step later, if the loss or gradient of a step is not finite."""

    def __init__(self, step: int, loss: float, gradient_norm: float, learning_rate: float, why: str) -> None:
        numbers = f"loss {loss:g}, gradient norm {gradient_norm:g}, learning rate {learning_rate:g}"
        super().__init__(f"step {step}: {numbers}: {why}")
        self.step, self.loss, self.gradient_norm = step, loss, gradient_norm


class Reporter:
    """Takes each step's Record, equal on all ranks, and acts on it one step later.

    In `push` all ranks decide at the same step number: it raises StepFailed for a loss or gradient that is not finite,
    and sets `stop` if any rank was asked to stop. Metric lines are written when their values have arrived.

    log           None on all ranks except rank 0
    every_steps   a metric line is written every N steps, and at the end of each epoch and of the run
    accuracy      name of the accuracy of a step's images in a metric line
    remedies      what may help against a loss that diverges
    loss_warning  (mean loss of an epoch) -> a warning or None; called once, an epoch after the warm-up
    """

    def __init__(
        self,
        log: MetricsLog | None,
        plan: Plan,
        start: int,
        *,
        images_per_step: int,
        device: torch.device,
        fp16: bool,
        every_steps: int = 1,
        loss_warning: Callable[[float], str | None] = lambda mean_loss: None,
        accuracy: str = "contrastive_top1",
        remedies: str = "a lower optim.base_learning_rate, a higher loss.temperature or precision=fp32",
    ) -> None:
        self.stop = False
        self._log, self.reader, self._fp16 = log, LateReader(), fp16
        self._plan, self._every_steps, self._loss_warning = plan, every_steps, loss_warning
        self._accuracy, self._remedies = accuracy, remedies
        self._progress = Progress(plan.total_steps, start, unit="steps", shown=log is not None)
        self._images_per_step, self._device = images_per_step, device
        self._begin = self._line_time = time.perf_counter()
        self._line_step, self._waited = start, 0.0
        self._loss_sum, self._loss_count, self._skipped = 0.0, 0, 0

    def timed(self, batches: Iterator[Batch], start: int = 0) -> Generator[Batch, None, None]:
        """Yield the same batches, the first for step `start`, and count the time spent waiting for them."""
        for step in itertools.count(start + 1):
            collectives.note("its data", step)
            begin = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def due(self, step: int) -> bool:
        """Return whether a metric line of `step`, counted from 0, is written."""
        last = step + 1 == self._plan.total_steps
        return (step + 1) % self._every_steps == 0 or self._plan.ends_epoch(step) or last

    def push(self, step: int, record: Record) -> None:
        """Act on the previous step, then start reading the record of `step`, counted from 0."""
        self.act()
        plan, due = self._plan, self.due(step)
        line = {
            "step": step + 1,
            "epoch": (step + 1) / plan.steps_per_epoch,
            "learning_rate": plan.learning_rate(step),
        }
        if due:
            now = time.perf_counter()
            seconds, steps = now - self._line_time, step + 1 - self._line_step
            line |= {
                "images_per_second": round(steps * self._images_per_step / seconds, 2),
                "data_wait_fraction": round(self._waited / seconds, 4),
                "peak_memory_bytes": peak_memory_bytes(self._device),
                "seconds": round(now - self._begin, 3),
            }
            self._line_time, self._line_step, self._waited = now, step + 1, 0.0
        self.reader.push({"line": line, "due": due, "written": False}, record.values)
        self._progress.advance()
        if step + 1 == plan.warmup_steps:
            self._epoch_loss()
        elif step + 1 == plan.warmup_steps + max(plan.steps_per_epoch, LEAST_EPOCH):
            warn(self._loss_warning(self._epoch_loss()))

    def add(self, **values: float) -> None:
        """Add values to the metric line of the step pushed last."""
        pending = self.reader.read()
        assert pending is not None and not pending[0]["written"]
        pending[0]["line"].update(values)

    def flush(self) -> bool:
        """Write the line of the step pushed last, and sync all lines to the disk.

        Returns False if its values are not finite or the disk is full: a checkpoint needs the lines of all its steps,
        and must not contain a step that failed.
        """
        finite = self._write()
        return (self._log is None or self._log.sync()) and finite

    def to_save(self) -> dict[str, Any]:
        """Return the newest metric lines and the number of all lines, for the checkpoint."""
        return {"metrics": list(self._log.tail), "metric_count": self._log.count} if self._log is not None else {}

    def _epoch_loss(self) -> float:
        """Return the mean loss of the steps read since the last call."""
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
        """Close the metrics and their mirrors, without waiting for them, if an exception is raised in this context."""
        try:
            yield
        except BaseException:
            self._progress.close()
            if self._log is not None:
                self._log.close(failed=True)
            raise

    def _write(self) -> bool:
        pending = self.reader.read()
        if pending is None:
            return True
        tag, numbers = pending[0], Record.on_host(pending[1])
        judged = (numbers.loss,) if self._fp16 else (numbers.loss, numbers.gradient_norm)
        finite = all(math.isfinite(value) for value in judged)
        if tag["due"] and not tag["written"] and finite and self._log is not None:
            line = tag["line"]
            first = {"step": line["step"], "epoch": line["epoch"]}
            line = first | {"loss": numbers.loss, self._accuracy: numbers.top1} | line
            self._log.write(line)
            self._progress.describe(summary(line))
        tag["written"] = True
        return finite

    def act(self) -> None:
        """Wait for the step pushed last and act on its values; `push` calls this for the previous step."""
        pending = self.reader.read()
        if pending is None:
            return
        line, numbers = pending[0]["line"], Record.on_host(pending[1])
        failed = line["step"], numbers.loss, numbers.gradient_norm, line["learning_rate"]
        if not self._write():
            why = f"it diverges; {self._remedies} may help, and the same command resumes from the last checkpoint"
            raise StepFailed(*failed, why)
        self._skipped = 0 if math.isfinite(numbers.gradient_norm) else self._skipped + 1
        if self._skipped == MOST_SKIPPED:
            why = (
                f"the gradients of {MOST_SKIPPED} successive steps overflow fp16 at ever lower loss scales, so nothing "
                "is learned; use precision=bf16 or fp32, which have a larger range"
            )
            raise StepFailed(*failed, why)
        self._loss_sum, self._loss_count = self._loss_sum + numbers.loss, self._loss_count + 1
        self.stop = numbers.stop > 0

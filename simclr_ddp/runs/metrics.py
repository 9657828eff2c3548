"""metrics.jsonl, which may have mirrors in Weights & Biases and TensorBoard."""

import json
import os
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simclr_ddp.runs.mirrors import Mirror
from simclr_ddp.system.console import warn
from simclr_ddp.system.files import replace_atomically

# Keys of a line that depend on the machine and the time; all other keys are equal in equal runs.
TIMED = ("images_per_second", "data_wait_fraction", "peak_memory_bytes", "seconds")
TAIL = 200  # number of newest lines that a checkpoint also holds
LOADER_LIMITS = 0.2  # share of the time spent waiting for data above which the progress line mentions it


class MetricsLog:
    """Append-only metrics.jsonl with its W&B and TensorBoard mirrors; on rank 0 only.

    Lines after `resume_step`, and an incomplete last line, are removed, so that every step appears once, in order. If
    the disk is full, lines are kept in memory, with one warning, and are written as soon as there is room.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int,
        config: dict[str, Any],
        tail: Sequence[str] = (),
        count: int = 0,
        *,
        wandb: bool = False,
        tensorboard: bool = False,
    ) -> None:
        """tail and count come from the checkpoint: its newest lines without TIMED, which replace lines that the file
        has lost, and the number of all lines."""
        self._path = run_dir / "metrics.jsonl"
        lines = _cut(self._path, resume_step, tail)
        if len(lines) < count:
            warn(
                f"{self._path} has lost {count - len(lines)} of its {count} lines, and the checkpoint holds only the "
                f"newest {len(tail)}: the run's curves have a gap"
            )
        self.count = max(len(lines), count)
        self.tail = deque(map(_untimed, lines[-TAIL:]), maxlen=TAIL)
        self._file = self._path.open("ab", buffering=0)
        self._waiting = b""
        kinds = [kind for kind, chosen in (("wandb", wandb), ("tensorboard", tensorboard)) if chosen]
        for kind in kinds:
            if find_spec(kind) is None:
                raise ValueError(f"log.{kind}=true: {kind} is not installed; pip install {kind}, or set it to false")
        self._mirrors = [Mirror(kind, run_dir, config, resume_step) for kind in kinds]

    def write(self, line: dict[str, Any]) -> None:
        warned = bool(self._waiting)
        text = json.dumps(line)
        self.tail.append(_untimed(text))
        self.count += 1
        self._waiting += text.encode() + b"\n"
        fault = self._write_waiting()
        if fault is not None and not warned:
            warn(
                f"{self._path} can't be written ({fault.strerror}): until it can, lines are kept in memory and no "
                "checkpoint is saved; make room"
            )

    def _write_waiting(self) -> OSError | None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def sync(self) -> bool:
        """Flush all lines to the disk, before a checkpoint that needs them; return False if the disk is full."""
        if self._write_waiting() is not None:
            return False
        os.fsync(self._file.fileno())
        return True

    def close(self, failed: bool = False) -> None:
        """Close the file and its mirrors. If the run failed, `config.command.run` waits for the mirrors later."""
        self._file.close()
        for mirror in self._mirrors:
            mirror.close(failed)
        for mirror in self._mirrors:
            if not failed:
                mirror.wait()


def summary(line: dict[str, Any]) -> str:
    """Summarise a line of metrics in a few words, for the progress of a run."""
    waited = line["data_wait_fraction"]
    words = [f"epoch {line['epoch']:.2f}", f"loss {line['loss']:.4f}", f"{line['images_per_second']:.0f} images/s"]
    words.append(f"data {waited:.0%}{' (the loader is the limit)' * (waited > LOADER_LIMITS)}")
    if "probe_top1" in line:
        words.append(f"probe {line['probe_top1']:.1%}")
    if "monitor_knn_top1" in line:
        words.append(f"kNN {line['monitor_knn_top1']:.1%}")
    return ", ".join(words)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a metrics.jsonl, without incomplete and damaged ones."""
    return complete_lines(path)[0]


def complete_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the lines of a metrics.jsonl, and count those that are damaged; one that is being written is not."""
    found, damaged = [], 0
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
        elif line.endswith("\n"):
            damaged += 1
    return found, damaged


def _cut(path: Path, resume_step: int, tail: Sequence[str]) -> list[str]:
    """Keep the lines up to `resume_step`, add lines of `tail` that the file has lost, and return all of them."""
    found = {json.loads(line)["step"]: line for line in tail}
    found |= {line["step"]: json.dumps(line) for line in read_metrics(path)}
    lines = [line for step, line in sorted(found.items()) if step <= resume_step]
    if path.exists() or lines:
        text = "".join(line + "\n" for line in lines)
        replace_atomically(path, lambda temporary: temporary.write_text(text))
    return lines


def _untimed(line: str) -> str:
    """Return a line of metrics.jsonl without the keys in TIMED."""
    return json.dumps({key: value for key, value in json.loads(line).items() if key not in TIMED})

"""metrics.jsonl, its mirrors in Weights & Biases and TensorBoard, and progress on the screen."""

import json
import os
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from simclr_ddp.cli import main_rank, say, warn
from simclr_ddp.config import Log, short_hash

T = TypeVar("T")
TAIL = 200  # newest lines that a checkpoint holds, too


class MetricsLog:
    """Append-only metrics.jsonl with its W&B and TensorBoard mirrors; on rank 0 only.

    Lines after `resume_step`, and a half-written last line, are cut off: every step is there once, in order. Lines
    that the disk has no room for wait in memory, with one warning, and are written once there is.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int,
        log: Log,
        config: dict[str, Any],
        tail: Sequence[str] = (),
        count: int = 0,
    ) -> None:
        """tail, count: those of the log that wrote the checkpoint: its newest lines, which mend a file that has lost
        its end, and how many there were in all."""
        self._path = run_dir / "metrics.jsonl"
        lines = _cut(self._path, resume_step, tail)
        if len(lines) < count:
            warn(
                f"{self._path} has lost {count - len(lines)} of its {count} lines, and the checkpoint holds the newest "
                f"{len(tail)} only: their curves have a gap"
            )
        self.count = max(len(lines), count)
        self.tail = deque(lines[-TAIL:], maxlen=TAIL)
        self._file = self._path.open("ab", buffering=0)
        self._waiting = b""
        self._wandb = _wandb_run(run_dir, config) if log.wandb else None
        self._tensorboard = _tensorboard_writer(run_dir, resume_step) if log.tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        warned = bool(self._waiting)
        self.tail.append(json.dumps(line))
        self.count += 1
        self._waiting += self.tail[-1].encode() + b"\n"
        fault = self._write_waiting()
        if fault is not None and not warned:
            warn(
                f"{self._path} can't be written ({fault.strerror}): its lines are kept in memory, and no checkpoint is "
                "saved, until it can; make room"
            )
        numbers = {k: v for k, v in line.items() if k != "step"}
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, line["step"])

    def _write_waiting(self) -> OSError | None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def sync(self) -> bool:
        """Bring all lines to the disk, before a checkpoint that counts on them; False if it has no room."""
        if self._write_waiting() is not None:
            return False
        os.fsync(self._file.fileno())
        return True

    def close(self, failed: bool = False) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))

    def close_failed(self) -> None:
        """Close the log of a run that failed, in a thread that `cli.run` waits for, but not for ever."""

        def close() -> None:
            try:
                self.close(failed=True)
            except Exception as error:
                warn(f"the mirrors of {self._path} are not closed: {type(error).__name__}: {str(error)[:200]}")

        threading.Thread(target=close, name="metrics", daemon=True).start()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; half-written and damaged ones are left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            lines.append(found)
    return lines


def _cut(path: Path, resume_step: int, tail: Sequence[str]) -> list[str]:
    """Leave the lines up to that step, those of the tail in the place of ones that the file has lost; returns them."""
    found = {line["step"]: json.dumps(line) for line in read_metrics(path)}
    found |= {json.loads(line)["step"]: line for line in tail}
    lines = [line for step, line in sorted(found.items()) if step <= resume_step]
    if path.exists() or lines:
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return lines


def _wandb_id(run_dir: Path) -> str:
    """An id of the run directory's own: a resumed run continues its curves, and no other's of the same name."""
    return f"{run_dir.name}-{short_hash({'run_dir': str(run_dir.resolve())})}"


def _wandb_run(run_dir: Path, config: dict) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("log.wandb=true needs wandb: pip install wandb, or leave it off") from error
    name = run_dir.name
    options: dict[str, Any] = {
        "project": "simclr_ddp",
        "id": _wandb_id(run_dir),
        "name": name,
        "dir": run_dir,
        "config": config,
        "resume": "allow",
    }
    try:
        return wandb.init(**options)
    except wandb.errors.UsageError as error:  # no key, and no terminal to ask for one
        warn(f"Weights & Biases: {error}; logging offline under {run_dir}/wandb, `wandb sync` sends it later")
        return wandb.init(**options, mode="offline")


def _tensorboard_writer(run_dir: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("log.tensorboard=true needs tensorboard: pip install tensorboard, or leave it off") from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: of the CUDA allocator, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


LOADER_LIMITS = 0.2  # share of the time that is spent waiting for data, from which it is worth a word


class Progress:
    """A bar with rate and time left on a terminal, a plain line for each line of metrics elsewhere."""

    def __init__(self, total: int, start: int, shown: bool) -> None:
        self._shown, self._total, self._start, self._begin = shown, total, start, time.perf_counter()
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", disable=not on_terminal, dynamic_ncols=True)

    def step(self) -> None:
        self._bar.update()

    def line(self, values: dict[str, Any]) -> None:
        if not self._shown:
            return
        text = f"epoch {values['epoch']:.2f}  loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s"
        waited = values["data_wait_fraction"]
        text += f"  data {waited:.0%}{' (the loader is the limit)' if waited > LOADER_LIMITS else ''}"
        if "probe_top1" in values:
            text += f"  probe {values['probe_top1']:.1%}"
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
            return
        done = values["step"] - self._start
        left = (time.perf_counter() - self._begin) / max(done, 1) * (self._total - values["step"])
        print(f"step {values['step']}/{self._total}  {text}  {_clock(left)} left", flush=True)

    def close(self) -> None:
        self._bar.close()


def progress(items: Iterable[T], count: int) -> Iterator[T]:
    """The items, images, with rate and time left: a bar on a terminal, elsewhere a line every ten seconds."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=count, unit=" images", smoothing=0.05, disable=not main_rank())
        return
    start = last = time.perf_counter()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if now - last > 10:
            last, rate = now, done / (now - start)
            say(f"{done:,} of {count:,} images, {rate:,.0f} images/s, {duration((count - done) / rate)} left")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"

"""The trials of a sweep: processes of this machine or SLURM jobs, and what their metrics.jsonl says.

Both live on when the sweep is killed. What a trial's `handle` records is enough for the next sweep to find it again.
"""

import fcntl
import math
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from simclr_ddp import config
from simclr_ddp.config import Pretrain
from simclr_ddp.pretrain import PAUSED

PRETRAIN = [sys.executable, "-m", "simclr_ddp.pretrain"]
SETTINGS, LOG = "trial.yaml", "log.txt"  # in a trial's run directory

Handle = dict[str, Any]


class Ending(NamedTuple):
    state: str  # finished, failed, paused, or lost: cut off by something else, or nobody saw how it ended
    error: str = ""  # or what cut it off


def epoch_values(lines: Iterable[dict[str, Any]], metric: str) -> dict[int, float]:
    """{epoch, from 1: value} of whole epochs: the probe's one value, or the mean over the lines of the epoch."""
    values: dict[int, list[float]] = {}
    whole = set()
    for line in lines:
        epoch = math.ceil(line["epoch"] - 1e-9)
        if metric in line:
            values.setdefault(epoch, []).append(line[metric])
        if line["epoch"] > epoch - 1e-9:
            whole.add(epoch)
    return {epoch: sum(found) / len(found) for epoch, found in values.items() if epoch in whole}


def write_settings(settings: Pretrain, run_dir: Path) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / SETTINGS
    path.write_text(config.to_yaml(settings))
    return path


class Processes:
    """Trials as processes of this machine, each in a session of its own, on the device with the fewest of them."""

    POLL = 1.0  # seconds between two looks at the trials

    def __init__(self, devices: list[str]) -> None:
        self._devices = devices
        self._own: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, run_dir: Path, others: list[Handle]) -> Handle:
        """others: the handles of those that run"""
        environment, device = dict(os.environ), ""
        if self._devices:
            busy = Counter(other["device"] for other in others)
            device = min(self._devices, key=lambda d: busy[d])
            environment["CUDA_VISIBLE_DEVICES"] = device
        log = run_dir / LOG
        with log.open("ab") as file:
            written = file.tell()
            process = subprocess.Popen(
                [*PRETRAIN, str(run_dir / SETTINGS)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._own[process.pid] = process
        began = _start_time(process.pid)
        return {"pid": process.pid, "began": began, "host": socket.gethostname(), "device": device, "log": written}

    def endings(self, begun: list[tuple[Path, Handle]]) -> list[Ending | None]:
        """How each of the trials ended; None while it runs."""
        return [self._ending(run_dir, handle) for run_dir, handle in begun]

    def _ending(self, run_dir: Path, handle: Handle) -> Ending | None:
        process = self._own.get(handle["pid"])
        if process is None:
            return None if self._lives(run_dir, handle) else Ending("lost")
        status = process.poll()
        if status is None:
            return None
        del self._own[handle["pid"]]
        if status in (0, PAUSED):
            return Ending("paused" if status else "finished")
        return Ending("failed", _error(run_dir / LOG, handle["log"], status))

    def stop(self, run_dir: Path, handle: Handle, kill: bool = False) -> None:
        """Tell it to save and end, or end it."""
        if handle["pid"] in self._own or self._lives(run_dir, handle):
            os.kill(handle["pid"], signal.SIGKILL if kill else signal.SIGTERM)

    def _lives(self, run_dir: Path, handle: Handle) -> bool:
        """Whether the process that another sweep has started runs; ValueError if it can't be watched from here."""
        if handle["host"] != socket.gethostname():
            if _held(run_dir / ".lock"):
                raise ValueError(f"the trial in {run_dir} runs on {handle['host']}: start the sweep there")
            return False
        return _start_time(handle["pid"]) == handle["began"]


class Jobs:
    """Trials as SLURM jobs, which queue themselves again until they are done."""

    POLL = 5.0
    CUT_OFF = ("CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL")  # not by a fault of the trial

    def __init__(self, settings: Any) -> None:
        """settings: launch.slurm.Slurm"""
        self._settings = settings

    def start(self, run_dir: Path, others: list[Handle]) -> Handle:
        from launch import slurm

        named = replace(self._settings, name=f"{self._settings.name}-{run_dir.name}")
        return {"job": slurm.submit(named, slurm.make_plan(self._command(run_dir)))}

    def start_all(self, run_dirs: list[Path], at_once: int) -> list[Handle]:
        """All of them as one job array, of which so many run at once."""
        from launch import slurm, snapshot

        code = snapshot.sources()
        plans = [slurm.make_plan(self._command(run_dir), code) for run_dir in run_dirs]
        job = slurm.submit_array(self._settings, plans, at_once)
        return [{"job": f"{job}_{i}"} for i in range(len(plans))]

    def endings(self, begun: list[tuple[Path, Handle]]) -> list[Ending | None]:
        """How each of the trials ended; None while it is queued or runs."""
        from launch import slurm

        states = slurm.states([handle["job"] for _, handle in begun])
        return [self._ending(run_dir, handle["job"], states[handle["job"]]) for run_dir, handle in begun]

    def _ending(self, run_dir: Path, job: str, state: Any) -> Ending | None:
        """state: slurm.State"""
        from launch import slurm

        if state.name not in slurm.ENDED:
            return None
        if state.name in ("COMPLETED", "UNKNOWN"):
            return Ending("finished" if state.name == "COMPLETED" else "lost")
        ended = f"its job {job} ended as {state.name}"
        if state.name in self.CUT_OFF:
            return Ending("lost", ended)
        return Ending(
            "failed", job_error(run_dir / "slurm", job) or slurm.unwritable(state, run_dir / "slurm") or ended
        )

    def stop(self, run_dir: Path, handle: Handle, kill: bool = False) -> None:
        subprocess.run(["scancel", "--quiet", handle["job"]], check=False)

    def _command(self, run_dir: Path) -> list[str]:
        return ["simclr_ddp.pretrain", str(run_dir / SETTINGS)]


def queued(run_dir: Path) -> Handle | None:
    """The handle of the newest job, or task of an array, that was submitted for the run.

    The sweep may have been killed before noting it. A job without this file ends by itself, before it begins.
    """
    found = sorted((run_dir / "slurm").glob("[0-9]*_submitted.pkl"), key=lambda path: path.stat().st_mtime_ns)
    return {"job": found[-1].name.removesuffix("_submitted.pkl")} if found else None


def job_error(folder: Path, job_id: str) -> str:
    """Why a job failed, by the logs of its ranks; empty if none says.

    Of the last errors that each rank tells it is a cause, rather than that others have gone or that the command ended.
    """
    from launch.job import is_own_error

    told = []
    for log in sorted(folder.glob(f"{job_id}_*log.out")):
        lines = log.read_text(errors="replace").splitlines()
        own = [line for line in lines if not is_own_error(line)]
        told += [(found, "lost the other ranks" in found) for found in [_last("\n".join(own), "error:")] if found]
        told += [(found, True) for found in [_last("\n".join(lines), "error:")] if found]
    return next((line for line, follows in told if not follows), told[0][0] if told else "")


def run_error(run_dir: Path) -> str:
    """The last error of a run, by the logs of its newest job or that of its process; empty if none says one."""
    newest, log = queued(run_dir), run_dir / LOG
    told = job_error(run_dir / "slurm", newest["job"]) if newest else ""
    return told or (_last(log.read_text(errors="replace"), "error:") if log.exists() else "")


def _start_time(pid: int) -> str:
    """When the process began, in ticks since the machine did; empty if there is none or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _held(lock: Path) -> bool:
    """Whether another process trains there."""
    if not lock.exists():
        return False
    with lock.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _error(log: Path, start: int, status: int) -> str:
    """Why it failed, in a line: its own, a traceback's last, or the signal."""
    text = log.read_bytes()[start:].decode(errors="replace")
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}{' (out of memory?)' if -status == signal.SIGKILL else ''}"
    return _last(text, "error:") or _last(text, "") or f"exit status {status} without a word"


def _last(text: str, beginning: str) -> str:
    """The last line that begins so, and says something."""
    lines = [line.strip() for line in text.splitlines() if line.startswith(beginning) and line.strip()]
    return lines[-1].removesuffix(" (--debug shows where)") if lines else ""

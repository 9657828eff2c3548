"""The trials of a sweep, as processes of this machine or as SLURM jobs.

Both outlive a sweep that is killed. A trial's recorded `handle` is enough for the next sweep to find it again.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from launch.cluster import snapshot, status, submit
from launch.cluster.job import PAUSED, is_held
from launch.cluster.settings import Slurm, tasks_per_node
from launch.search.results import LOG, SETTINGS, Handle, job_error, last
from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain

PRETRAIN = [sys.executable, "-m", "simclr_ddp.pretrain"]


class Ending(NamedTuple):
    state: str  # finished, failed, paused, or lost: interrupted from outside, or nobody saw how it ended
    error: str = ""  # or what interrupted it


def write_settings(settings: Pretrain, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / SETTINGS).write_text(options.to_yaml(settings))


class Processes:
    """Trials as processes of this machine, each in a session of its own, on the device with the fewest of them."""

    POLL = 1.0  # seconds between two looks at the trials
    ranks = 1  # of a trial

    def __init__(self, devices: list[str]) -> None:
        self._devices = devices
        self._own: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, run_dir: Path, others: list[Handle], note: Callable[[Handle], None]) -> None:
        """Start a trial as soon as `note` has recorded its handle; others: the handles of the running trials.

        A shell that waits for a line becomes the trial, or ends with the sweep if that is killed before.
        """
        environment, device = dict(os.environ), ""
        if self._devices:
            busy = Counter(other["device"] for other in others)
            device = min(self._devices, key=lambda d: busy[d])
            environment["CUDA_VISIBLE_DEVICES"] = device
        with (run_dir / LOG).open("ab") as file:
            written = file.tell()
            process = subprocess.Popen(
                ["sh", "-c", 'read -r _ && exec "$@" </dev/null', "sh", *PRETRAIN, str(run_dir / SETTINGS)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        began, host = start_time(process.pid), socket.gethostname()
        assert process.stdin is not None
        with process.stdin as go:
            note({"pid": process.pid, "began": began, "host": host, "device": device, "log": written})
            self._own[process.pid] = process
            go.write(b"\n")

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
        """Have the trial save and end, or kill it."""
        if handle["pid"] in self._own or self._lives(run_dir, handle):
            os.kill(handle["pid"], signal.SIGKILL if kill else signal.SIGTERM)

    def _lives(self, run_dir: Path, handle: Handle) -> bool:
        """Whether a process that an earlier sweep started runs; ValueError if that can't be seen from here."""
        if handle["host"] == socket.gethostname():
            return start_time(handle["pid"]) == handle["began"]
        if is_held(run_dir / ".lock"):
            raise ValueError(f"the trial in {run_dir} runs on {handle['host']}; start the sweep there")
        return False


class Jobs:
    """Trials as SLURM jobs, which queue themselves again until they are done."""

    POLL = 5.0
    INTERRUPTED = ("CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL")  # not by an error of the trial

    def __init__(self, settings: Slurm) -> None:
        self._settings = settings
        self.ranks = settings.nodes * tasks_per_node(settings)

    def start(self, run_dir: Path, others: list[Handle], note: Callable[[Handle], None]) -> None:
        """As of Processes; a job without the file by which it is found again (`queued`) ends at its start."""
        named = replace(self._settings, name=f"{self._settings.name}-{run_dir.name}")
        note({"job": submit.submit(named, submit.make_plan(_command(run_dir)))})

    def most_tasks(self) -> int:
        """The most tasks of an array that SLURM accepts."""
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False).stdout
        limits = re.findall(r"(?:MaxArraySize\s*=\s*|max_array_tasks=)(\d+)", shown)
        return max(1, min(map(int, limits), default=1000))

    def start_all(self, run_dirs: list[Path], at_once: int) -> list[Handle]:
        """All of them as one job array, of which at most `at_once` run at the same time."""
        code = snapshot.sources()
        plans = [submit.make_plan(_command(run_dir), code) for run_dir in run_dirs]
        job = submit.submit_array(self._settings, plans, at_once)
        return [{"job": f"{job}_{i}"} for i in range(len(plans))]

    def endings(self, begun: list[tuple[Path, Handle]]) -> list[Ending | None]:
        """How each of the trials ended; None while it is queued or runs."""
        states = status.states([handle["job"] for _, handle in begun])
        return [self._ending(run_dir / "slurm", handle["job"], states[handle["job"]]) for run_dir, handle in begun]

    def _ending(self, folder: Path, job: str, state: status.State) -> Ending | None:
        if state.name not in status.ENDED:
            return None
        if state.name in ("COMPLETED", "UNKNOWN"):
            return Ending("finished" if state.name == "COMPLETED" else "lost")
        ended = f"its job {job} ended as {state.name}"
        if state.name in self.INTERRUPTED:
            return Ending("lost", ended)
        return Ending("failed", job_error(folder, job) or status.unwritable(state, folder) or ended)

    def stop(self, run_dir: Path, handle: Handle, kill: bool = False) -> None:
        subprocess.run(["scancel", "--quiet", handle["job"]], check=False)


def _command(run_dir: Path) -> list[str]:
    return ["simclr_ddp.pretrain", str(run_dir / SETTINGS)]


def start_time(pid: int) -> str:
    """When the process began, in ticks since the machine booted; empty if it does not exist or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _error(log: Path, start: int, status: int) -> str:
    """Why it failed, in one line: its own error, a traceback's last line, or the signal."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}{' (out of memory?)' if -status == signal.SIGKILL else ''}"
    return last(lines, "error:") or last(lines) or f"exit status {status} without a message"

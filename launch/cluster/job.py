"""What each task of a job does: one rank of a command, in a process of its own, with torchrun's variables.

SLURM sends its warning (USR1: the time limit or a preemption comes), or SIGTERM, to the tasks of the job. The command
saves and ends with status 75; the task then ends with 0 and leaves a note, on which the batch script queues the
job again (see launch.slurm). The handler of the signals only remembers them and passes the first of them on, since a
second would cut off a slow save.

A node that SLURM gives up, as its daemon there does not answer, may still run its ranks when the job starts again. A
start therefore says that it is the newest, at which the ranks of the one before save and end, and waits for them.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from launch import meeting

WATCH = 5.0  # seconds between two looks at whether the job has started again elsewhere
SAVING = 60.0  # seconds that a command then has to save
PAUSED = 75  # exit status of a command that was told to stop, and has saved
REQUEUED = "scontrol requeue"  # SIGTERM alone; if the batch script survives it, it was a preemption
NOT_MET = "told to stop before the ranks had met"


@dataclass(frozen=True)
class Job:
    command: list[str]  # module and arguments
    folder: Path  # of logs, snapshots and notes, on a file system that all nodes share
    progress: Path  # a file whose content changes as the command gets on
    lock: Path  # which a command that trains holds
    gpus: int  # that each node was asked for
    time_limit: float  # seconds
    warning: float  # seconds before it at which SLURM tells
    arrival: float  # seconds that the nodes wait for each other


def run(job: Job) -> None:
    """One rank from start to end; exits with the command's status, or with 0 if it is to go on later."""
    told: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def handle(number: int, _: object) -> None:
        told.append(number)
        for process in child if len(told) == 1 else []:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, handle)
    from submitit.helpers import TorchDistributedEnvironment

    began, start = float(os.environ.get("RUN_BEGAN", time.time())), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    os.environ.pop("MASTER_PORT", None)  # of the shell that submitted; submitit's is a function of the job's id
    ranks = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    job_id, node = ranks._job_env.job_id, ranks._job_env.hostnames[ranks._job_env.node]
    note, newest, main = job.folder / f"{job_id}.again", job.folder / f"{job_id}.start", ranks.rank == 0
    failed = job.folder / f"{job_id}-{start}.failed"
    try:
        if ranks.local_rank == 0:
            check_writable(job.folder, node)
        if main:
            newest.write_text(str(start))
            if start:
                _wait_for_the_start_before(job, lambda: bool(told))
        if ranks.local_rank == 0:
            _check_gpus(job.gpus, node)
        held = _meet(job, ranks, job.folder / f"{job_id}-{start}.address", lambda: bool(told))
    except ConnectionAbortedError:
        noted = _read(note)
        _pause(note, NOT_MET, main)  # first, as little time may be left
        if main:
            _record_start(job, job_id, start, list(ranks._job_env.hostnames), _reason(noted, job_id, start))
        return None
    except (OSError, ValueError) as error:
        _fail(str(error), 1, failed)
    before = _read(job.progress)
    if main:
        noted = _read(note)
        note.unlink(missing_ok=True)
        _record_start(job, job_id, start, list(ranks._job_env.hostnames), _reason(noted, job_id, start))
    child.append(subprocess.Popen([sys.executable, "-m", *job.command]))
    if told:
        child[0].send_signal(signal.SIGTERM)
    status = _wait(child[0], newest, start) if ranks.local_rank == 0 else child[0].wait()
    if held is not None:
        held.close()
    if status == PAUSED or (told and status):
        limit = signal.SIGUSR1 in told and time.time() - began > job.time_limit - job.warning - 60
        # Only a run of pretrain says how far it has come; another command that ends with PAUSED is believed.
        stands = _read(job.progress) == before and (status != PAUSED or job.command[0] == "simclr_ddp.pretrain")
        if limit and main and stands:
            _fail(
                f"the time limit, minutes={job.time_limit / 60:.0f}, came before anything was saved: raise it",
                1,
                failed,
            )
        reason = "time limit" if limit else "preemption" if signal.SIGUSR1 in told else REQUEUED
        return _pause(note, reason, main)
    if status:
        _fail(f"rank {ranks.rank} on {node}: {job.command[0]} ended with status {status}", max(status, 1), failed)
    return None


def is_own_error(line: str) -> bool:
    """Whether that line of a log is only this module's word that a command has failed, which says why itself."""
    return re.match(r"error: rank \d+ on \S+: \S+ ended with status -?\d+$", line.strip()) is not None


def _wait(child: subprocess.Popen[bytes], newest: Path, start: int) -> int:
    """The exit status of the command, which is ended if the job has started again without this one's having ended."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(WATCH)
        if int(_read(newest) or 0) > start:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(SAVING)
            child.kill()
            _fail("SLURM had given this node up and has started the job again: this start of it ends", 1)


def _wait_for_the_start_before(job: Job, stop: Callable[[], bool]) -> None:
    """Until nobody holds the run directory, or half the time in which the nodes must meet is over."""
    end = time.monotonic() + job.arrival / 2
    while time.monotonic() < end and _is_held(job.lock):
        if stop():
            raise ConnectionAbortedError("told to stop")
        time.sleep(0.5)


def _is_held(path: Path) -> bool:
    try:
        with path.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # it is not there, or on a file system without locks
        return False
    return False


def check_writable(folder: Path, machine: str, make: bool = False) -> None:
    """ValueError naming both if no file can be made in the folder; with `make`, make that first if need be."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{machine} can't write to {folder} ({error.strerror}): run_dir=... is wanted on a file system that all "
            "nodes can write to"
        ) from error


def _check_gpus(wanted: int, node: str) -> None:
    """ValueError if torch does not see the GPUs that the job has asked for: it would go on, slowly, without them."""
    if not wanted:
        return
    counting = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    told = subprocess.run(counting, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
    if told != str(wanted):
        raise ValueError(
            f"torch sees {told or 'no'} GPUs of the {wanted} of {node}: look at nvidia-smi and at the driver there; "
            f"exclude={node} does without it"
        )


def _meet(job: Job, ranks: Any, file: Path, stop: Callable[[], bool]) -> socket.socket | None:
    """Make MASTER_ADDR and MASTER_PORT those of a free port that every node reaches; rank 0 is given what holds it."""
    nodes, held = list(ranks._job_env.hostnames), None
    if ranks.rank == 0:
        for old in job.folder.glob(f"{ranks._job_env.job_id}-*.address*"):
            old.unlink()
        address = nodes[0] if len(nodes) > 1 else "127.0.0.1"
        held = meeting.host(file, address, ranks.master_port, nodes, job.arrival, stop)
        port = held.getsockname()[1]
    else:
        connect = ranks.local_rank == 0
        address, port = meeting.join(file, nodes[ranks._job_env.node], connect, job.arrival, stop)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return held


def _record_start(job: Job, job_id: str, start: int, nodes: list[str], after: str) -> None:
    line: dict[str, Any] = {"job": job_id, "start": start, "after": after, "nodes": nodes}
    line |= {name.lower(): os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")}
    line |= {"code": Path(__file__).parent.parent.name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with (job.folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _reason(noted: str, job_id: str, start: int) -> str:
    """Why the start before this one ended; `noted` is what that one has left."""
    if start == 0:
        return "submission"
    asked = ["sacct", "-X", "-n", "-P", "--duplicates", "-o", "State", "-j", job_id]
    states = []
    if shutil.which("sacct"):  # not in every container
        with suppress(OSError, subprocess.SubprocessError):
            states = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")
    named = {"NODE_FAIL": "node failure", "PREEMPTED": "preemption"}
    known = [named[state] for state in states[start - 1 : start] if state in named]
    return (known or [noted or REQUEUED])[0]


def _pause(note: Path, reason: str, main: bool) -> None:
    if main:
        note.write_text(reason)
        why = f"{REQUEUED} or scancel" if reason == REQUEUED else reason
        print(f"paused ({why}): unless it was cancelled, the job is queued again", flush=True)


def _fail(message: str, status: int, note: Path | None = None) -> NoReturn:
    """End over a fault of this rank, or of its node; the note tells the batch script."""
    if note is not None:
        with suppress(OSError):
            note.touch()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""

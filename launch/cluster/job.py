"""What each task of a job does: one rank of a command, in a process of its own, with torchrun's variables.

Before the time limit or a preemption, SLURM sends USR1 or SIGTERM to the tasks; `scancel --signal` sends any other. The
command saves and exits with status 75; the task then exits with 0 and leaves a note, and the batch script queues the
job again (see requeue.sh). The first signal is passed on to the command, as SIGTERM; a second would interrupt the save.

When SLURM gives up a node whose daemon does not answer, ranks may still run there while the job starts again. So each
start records that it is the newest; ranks of an older one then save and end, and the newest waits for them.
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

from launch.cluster import rendezvous

WATCH = 5.0  # seconds between two checks whether the job has started again elsewhere
SAVING = 60.0  # seconds that a command then has to save
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
PAUSED = 75  # exit status of a command that was stopped by a signal and has saved
REQUEUED = "scontrol requeue"  # only SIGTERM was received; if the batch script survives it, it was a preemption
NOT_MET = "stopped before the ranks had met"  # requeue.sh compares with this


@dataclass(frozen=True)
class Job:
    command: list[str]  # module and arguments
    folder: Path  # of logs, snapshots and notes, on a file system that all nodes share
    progress: Path  # a file whose content changes whenever the command saves
    lock: Path  # held by a command that trains
    gpus: int  # per node
    time_limit: float  # seconds
    warning: float  # seconds before it at which SLURM sends a signal
    arrival: float  # seconds that the nodes wait for each other


def run(job: Job) -> None:
    """One rank from start to end; exits with the command's status, or with 0 if the job is to be queued again."""
    received: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def handle(number: int, _: object) -> None:
        received.append(number)
        for process in child if len(received) == 1 else []:
            process.send_signal(signal.SIGTERM)

    for number in STOP:
        signal.signal(number, handle)
    from submitit.helpers import TorchDistributedEnvironment

    began, start = float(os.environ.get("RUN_BEGAN", time.time())), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    os.environ.pop("MASTER_PORT", None)  # of the shell that submitted; submitit computes it from the job's id
    ranks = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    job_id, nodes = ranks._job_env.job_id, list(ranks._job_env.hostnames)
    node, first, main = nodes[ranks._job_env.node], ranks.local_rank == 0, ranks.rank == 0
    note, newest = job.folder / f"{job_id}.again", job.folder / f"{job_id}.start"
    failed = job.folder / f"{job_id}-{start}.failed"
    try:
        if first:
            check_writable(job.folder, node)
        if main:
            newest.write_text(str(start))
            if start:
                wait_for_previous_start(job, lambda: bool(received))
        if first:
            _check_gpus(job.gpus, node)
        held = meet(job, ranks, job.folder / f"{job_id}-{start}.address", lambda: bool(received))
    except ConnectionAbortedError:
        reason = _read(note)
        _pause(note, NOT_MET, main)  # first, as little time may be left
        if main:
            _record_start(job, job_id, start, nodes, reason)
        return
    except (OSError, ValueError) as error:
        _fail(str(error), 1, failed)
    before = _read(job.progress)
    if main:
        reason = _read(note)
        note.unlink(missing_ok=True)
        _record_start(job, job_id, start, nodes, reason)
    until_limit = rendezvous.Countdown(job.time_limit - job.warning - 60 - (time.time() - began))
    # SLURM signals the command itself, too, which need not know all of the signals: it ignores what it doesn't handle.
    child.append(subprocess.Popen([sys.executable, "-m", *job.command], preexec_fn=_ignore_all_but_sigterm))
    if received:
        child[0].send_signal(signal.SIGTERM)
    status = wait_while_newest(child[0], newest, start, until_limit.is_over) if first else child[0].wait()
    if held is not None:
        held.close()
    if status == PAUSED or (received and status):
        limit = signal.SIGUSR1 in received and until_limit.is_over()
        # Only pretrain records how far it is; of another command that exits with PAUSED this is not known.
        unchanged = _read(job.progress) == before and (status != PAUSED or job.command[0] == "simclr_ddp.pretrain")
        if limit and main and unchanged:
            _fail(f"minutes={job.time_limit / 60:.0f}: the time limit came before anything was saved; increase it",
                  1, failed)  # fmt: skip
        sent = signal.Signals(received[0]).name if received else "SIGTERM"
        named = {"SIGUSR1": "preemption", "SIGTERM": REQUEUED}
        _pause(note, "time limit" if limit else named.get(sent, sent), main)
    elif status:
        _fail(f"rank {ranks.rank} on {node}: {job.command[0]} ended with status {status}", max(status, 1), failed)


def is_own_error(line: str) -> bool:
    """Whether that line of a log only reports that the command has failed, for which the command has its own line."""
    return re.match(r"error: rank \d+ on \S+: \S+ ended with status -?\d+$", line.strip()) is not None


def _ignore_all_but_sigterm() -> None:
    for number in set(STOP) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)


def wait_while_newest(
    child: subprocess.Popen[bytes], newest: Path, start: int, look: Callable[[], object] = bool
) -> int:
    """The exit status of the command, which is ended if the job has started again; `look` is called meanwhile."""
    while True:
        look()
        with suppress(subprocess.TimeoutExpired):
            return child.wait(WATCH)
        if int(_read(newest) or 0) > start:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(SAVING)
            child.kill()
            _fail("SLURM gave up this node and has started the job again: this start ends", 1)


def wait_for_previous_start(job: Job, stop: Callable[[], bool]) -> None:
    """Wait until nobody holds the run directory, for at most half of the time in which the nodes must meet."""
    end = rendezvous.Countdown(job.arrival / 2)
    while not end.is_over() and is_held(job.lock):
        if stop():
            raise ConnectionAbortedError("stopped by a signal")
        time.sleep(0.5)


def is_held(path: Path) -> bool:
    """Whether another process holds that lock file."""
    try:
        with path.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # it does not exist, or is on a file system without locks
        return False
    return False


def check_writable(folder: Path, machine: str, make: bool = False) -> None:
    """ValueError naming both if the machine can't make files in the folder; with `make`, the folder is made first."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{machine} can't write to {folder} ({error.strerror}); choose a run_dir on a file system that all nodes "
            "can write to"
        ) from error


def count_gpus() -> str:
    """The number of GPUs that torch sees, asked of a process of its own; empty if it can't say or does not answer."""
    counting = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        return subprocess.run(counting, stdout=subprocess.PIPE, text=True, check=False, timeout=300).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""


def _check_gpus(expected: int, node: str) -> None:
    """ValueError if torch does not see the GPUs that the job asked for: it would train on the CPU, slowly."""
    if expected and (found := count_gpus()) != str(expected):
        raise ValueError(
            f"torch sees {found or 'no'} GPUs of the {expected} of {node}; check nvidia-smi and the driver there, or "
            f"set exclude={node}"
        )


def meet(job: Job, ranks: Any, file: Path, stop: Callable[[], bool]) -> socket.socket | None:
    """Set MASTER_ADDR and MASTER_PORT to a free port that all nodes reach; rank 0 receives the socket that holds it."""
    nodes, held = list(ranks._job_env.hostnames), None
    if ranks.rank == 0:
        for old in job.folder.glob(f"{ranks._job_env.job_id}-*.address*"):
            old.unlink()
        address = nodes[0] if len(nodes) > 1 else "127.0.0.1"
        held = rendezvous.host(file, address, ranks.master_port, nodes, job.arrival, stop)
        port = held.getsockname()[1]
    else:
        connect = ranks.local_rank == 0
        address, port = rendezvous.join(file, nodes[ranks._job_env.node], connect, job.arrival, stop)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return held


def _record_start(job: Job, job_id: str, start: int, nodes: list[str], reason: str) -> None:
    line: dict[str, Any] = {"job": job_id, "start": start, "after": _after(reason, job_id, start), "nodes": nodes}
    line |= {name.lower(): os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")}
    line |= {"code": Path(__file__).parents[2].name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with (job.folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _after(reason: str, job_id: str, start: int) -> str:
    """Why the previous start ended: by SLURM's accounting if it knows, else by the note that was left."""
    if start == 0:
        return "submission"
    asked = ["sacct", "-X", "-n", "-P", "--duplicates", "-o", "State", "-j", job_id]
    states = []
    if shutil.which("sacct"):  # not in every container
        with suppress(OSError, subprocess.SubprocessError):
            states = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")
    named = {"NODE_FAIL": "node failure", "PREEMPTED": "preemption"}
    return next((named[s] for s in states[start - 1 : start] if s in named), reason or REQUEUED)


def _pause(note: Path, reason: str, main: bool) -> None:
    if main:
        note.write_text(reason)
        print(f"paused ({f'{REQUEUED} or scancel' if reason == REQUEUED else reason})", flush=True)


def _fail(message: str, status: int, note: Path | None = None) -> NoReturn:
    """End because of an error of this rank or node; the note says so to the batch script."""
    if note is not None:
        with suppress(OSError):
            note.touch()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""

"""Real commands in real processes, as a user starts them, and real signals to them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(module: str, *arguments: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        launcher += [f"--nproc_per_node={ranks}", "-m"]
    return [*launcher, module, *arguments]


def start(module: str, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
    """The command in a process group of its own, with its output kept."""
    return start_command(command(module, *arguments, ranks=ranks))


def start_command(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], limit: float = 180) -> tuple[int, str]:
    """(exit status, output) once it has ended; whatever is left of its process group is killed."""
    try:
        output, _ = process.communicate(timeout=limit)
    finally:
        kill_group(process)
    return process.returncode, output


def run(module: str, *arguments: str, ranks: int = 1) -> tuple[int, str]:
    return finish(start(module, *arguments, ranks=ranks))


def kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def group(process: subprocess.Popen[str]) -> list[int]:
    """The pids of those of its process group that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, pgid = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(pgid) == process.pid and state != "Z":
                found.append(int(entry.name))
    return found


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str], limit: float = 120) -> None:
    """Until metrics.jsonl shows the step."""
    end = time.monotonic() + limit
    path = run_dir / "metrics.jsonl"
    while time.monotonic() < end:
        lines = path.read_text().splitlines() if path.exists() else []
        if any(json.loads(line)["step"] >= step for line in lines if line.endswith("}")):
            return
        if process.poll() is not None:
            raise AssertionError(f"it ended before step {step}:\n{process.communicate()[0]}")
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {limit} s")


def rank_processes(process: subprocess.Popen[str]) -> list[int]:
    """The pids of the training processes below a torchrun, in the order of their ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
        if parent == process.pid and ranks:
            found.append((ranks[0], int(entry.name)))
    return [pid for _, pid in sorted(found)]

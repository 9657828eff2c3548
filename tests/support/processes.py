"""Start real commands in real processes, as a user does, and send them real signals."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(module: str, *arguments: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        launcher += [f"--nproc_per_node={ranks}", "-m"]
    return [*launcher, module, *arguments]


def start(module: str, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
    """Start the command in a new process group, with captured output."""
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


def finish(process: subprocess.Popen[str], limit: float = 400) -> tuple[int, str]:
    """Wait for the process, kill what is left of its process group, and return (exit status, output)."""
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired as expired:
        printed = expired.output.decode() if expired.output else ""
        raise AssertionError(f"not ended after {limit:.0f} s: {_writers(process)}\n{printed}") from expired
    finally:
        kill_group(process)
    return process.returncode, output


def _writers(process: subprocess.Popen[str]) -> str:
    """Describe the processes that keep the output of a process open: the id, parent, state and command of each."""
    found, pipe = [], os.readlink(f"/proc/self/fd/{process.stdout.fileno()}") if process.stdout else ""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and pipe in {os.readlink(fd) for fd in entry.glob("fd/[12]")}:
                state = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines())
                where, command = (entry / "wchan").read_text(), (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append(f"{entry.name} of {state['PPid']}, {state['State']}, {where}: {command.decode()[:120]}")
    return "; ".join(found) or "nothing keeps its output open"


def run(module: str, *arguments: str, ranks: int = 1) -> tuple[int, str]:
    return finish(start(module, *arguments, ranks=ranks))


def kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def group(process: subprocess.Popen[str]) -> list[int]:
    """Return the pids of its process group that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, pgid = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(pgid) == process.pid and state != "Z":
                found.append(int(entry.name))
    return found


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str], limit: float = 240) -> None:
    """Wait until metrics.jsonl contains the step."""
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
    """Return the pids of the training processes below a torchrun, in the order of their ranks."""
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


def start_rank(
    rank: int, size: int, port: int, arguments: list[str], arrival: float = 4, disturbed: str = ""
) -> subprocess.Popen[str]:
    """One rank as a batch system starts it, with torchrun's variables and without torchrun.

    disturbed  code that runs before the command does
    """
    code = (
        "import sys; from simclr_ddp import pretrain; from simclr_ddp.distributed import rendezvous\n"
        f"rendezvous.ARRIVAL = {arrival}\n{disturbed}\n"
        "sys.exit(pretrain.main(sys.argv[1:]))"
    )
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {k: str(v) for k, v in variables.items()} | {"MASTER_ADDR": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """None of those that the kernel gives to who wants any: it could be another's before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port

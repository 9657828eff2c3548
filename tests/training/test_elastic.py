"""Restarts by torchrun itself: the run resumes unattended on the ranks that are left."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr_ddp.runs.metrics import read_metrics
from tests.support import processes
from tests.support.parity_run import model_at
from tests.support.processes import free_port
from tests.support.ranks import Ranks
from tests.support.tiny_run import assert_same_run, settings, train

pytestmark = pytest.mark.slow


def test_max_restarts_starts_the_group_again_and_the_run_resumes(images: Path, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, train, settings(images, tmp_path / "unbroken"))
    command = processes.command("simclr_ddp.pretrain", *settings(images, tmp_path / "killed"), ranks=2)
    process = processes.start_command([*command[:3], "--max-restarts=2", *command[3:]])
    for step, victim in ((8, 1), (14, 0)):
        processes.wait_for_step(tmp_path / "killed", step, process)
        config = tmp_path / "killed" / "config.yaml"
        written = config.stat().st_mtime_ns  # each start writes it anew
        os.kill(processes.rank_processes(process)[victim], signal.SIGKILL)
        wait_until(lambda config=config, written=written: config.stat().st_mtime_ns != written, process)
    status, output = processes.finish(process)
    assert status == 0 and output.count("resuming from") == 2, output
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


def starts(run_dir: Path) -> list[int]:
    """World sizes of the starts so far."""
    path = run_dir / "config.yaml"
    words = path.read_text().split() if path.exists() else []
    return [int(words[i + 1]) for i, word in enumerate(words) if word == "world_size:"]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], limit: float = 240) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"waited for {limit} s"
        time.sleep(0.05)


def newest(run_dir: Path) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.stem[5:]) for path in (run_dir / "checkpoints").glob("step-*.pt"))


def is_told_to_end(pid: int) -> bool:
    """Whether SIGTERM waits for the process, which stands still."""
    (waiting,) = re.findall(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(waiting, 16) >> (signal.SIGTERM - 1) & 1)


def test_nodes_come_and_go(images: Path, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers with a rank each; the second is killed with its rank, and later another one joins."""
    steps = 300
    exact = [
        "precision=fp64",
        "data.workers=0",
        "model.width=0.0625",
        "checkpoint.every_steps=2",
        "probe.enabled=false",
    ]
    exact += ["optim.global_batch_size=32", f"optim.steps={steps}", "optim.name=sgd"]
    # In a training that is chaotic rounding would grow over so many steps.
    exact += ["optim.base_learning_rate=0.0005", "loss.temperature=1"]
    ranks.run(1, train, settings(images, tmp_path / "alone", *exact))

    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=9"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    command += ["--rdzv-id=test", "--rdzv-conf=last_call_timeout=10", "-m", "simclr_ddp.pretrain"]
    run = tmp_path / "run"
    command += settings(images, run, *exact)
    # Else a launcher that joins later waits for an address that torch (2.14) tells only to those of the first round.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    first = processes.start_command(command)
    wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, first)  # else it may be the second's
    second = processes.start_command(command)
    try:
        wait_until(lambda: starts(run)[-1:] == [2], first)
        processes.wait_for_step(run, 6, first)
        pids = processes.rank_processes(second)  # in sessions of their own: they outlive their launcher
        processes.kill_group(second)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        second.communicate()
        wait_until(lambda: starts(run)[-1:] == [1], first)
        reached = newest(run)
        wait_until(lambda: newest(run) > reached, first)  # a checkpoint of the one rank
        (pid,) = processes.rank_processes(first)
        os.kill(pid, signal.SIGSTOP)  # the run must not end before the third launcher has joined
        second = processes.start_command(command)
        wait_until(lambda: is_told_to_end(pid), second)
        os.kill(pid, signal.SIGCONT)
        status, output = processes.finish(first)
    finally:
        processes.kill_group(second)
        others, _ = second.communicate()
    assert status == 0, f"{output}\n{others}"
    assert "ranks: the run was on 2 and resumes on 1" in output
    # Rank 0 reports this; it belongs to the launcher with the smaller pid.
    assert "ranks: the run was on 1 and resumes on 2" in output + others
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, steps + 1))
    mine, alone = (model_at(folder, steps) for folder in (run, tmp_path / "alone"))
    losses = [line["loss"] for line in read_metrics(tmp_path / "alone" / "metrics.jsonl")]
    assert losses[0] - losses[-1] > 0.1, "it trains"
    for name, value in alone.items():
        assert (mine[name] - value).double().norm() <= 1e-10 * value.double().norm(), name

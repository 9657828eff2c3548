"""Restarts by torchrun itself: the run goes on with no one at the keyboard, on the ranks that are left."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr_ddp.metrics import read_metrics
from tests import processes
from tests.test_parity import model_at
from tests.test_resume import assert_same_run, settings

pytestmark = pytest.mark.slow


def test_max_restarts_starts_the_group_again_and_the_run_goes_on(images: Path, tmp_path: Path) -> None:
    unbroken = settings(images, tmp_path / "unbroken")
    status, output = processes.run("simclr_ddp.pretrain", *unbroken, ranks=2)
    assert status == 0, output
    command = processes.command("simclr_ddp.pretrain", *settings(images, tmp_path / "killed"), ranks=2)
    process = processes.start_command([*command[:3], "--max-restarts=2", *command[3:]])
    for step, victim in ((8, 1), (14, 0)):
        processes.wait_for_step(tmp_path / "killed", step, process)
        os.kill(processes.rank_processes(process)[victim], signal.SIGKILL)
        count = len(starts(tmp_path / "killed"))
        wait_until(lambda count=count: len(starts(tmp_path / "killed")) > count, process)
    status, output = processes.finish(process)
    assert status == 0 and output.count("going on from") == 2, output
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


def starts(run_dir: Path) -> list[int]:
    """World sizes of the starts so far."""
    path = run_dir / "config.yaml"
    words = path.read_text().split() if path.exists() else []
    return [int(words[i + 1]) for i, word in enumerate(words) if word == "world_size:"]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], limit: float = 180) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"waited for {limit} s"
        time.sleep(0.05)


def test_nodes_come_and_go(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers with a rank each; the second is killed with its rank, and later another one joins."""
    steps = 300  # enough for the third launcher to come while they last
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
    status, output = processes.run("simclr_ddp.pretrain", *settings(images, tmp_path / "alone", *exact))
    assert status == 0, output

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
        ranks = processes.rank_processes(second)  # in sessions of their own: they outlive their launcher
        processes.kill_group(second)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        second.communicate()
        wait_until(lambda: starts(run)[-1:] == [1], first)
        second = processes.start_command(command)
        status, output = processes.finish(first)
    finally:
        processes.kill_group(second)
        others, _ = second.communicate()
    assert status == 0, f"{output}\n{others}"
    assert "the run was on 2 ranks and goes on with 1" in output
    assert "the run was on 1 ranks and goes on with 2" in output
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, steps + 1))
    mine, alone = (model_at(folder, steps) for folder in (run, tmp_path / "alone"))
    losses = [line["loss"] for line in read_metrics(tmp_path / "alone" / "metrics.jsonl")]
    assert losses[0] - losses[-1] > 0.1, "it trains"
    for name, value in alone.items():
        assert (mine[name] - value).double().norm() <= 1e-10 * value.double().norm(), name

"""Ranks that can't meet, or don't fit together, end in seconds with a sentence. Real processes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import processes
from tests.test_resume import settings


def start_rank(rank: int, size: int, port: int, arguments: list[str], arrival: float = 4) -> subprocess.Popen[str]:
    """One rank as a batch system starts it, with torchrun's variables and without torchrun."""
    code = (
        "import sys; from simclr_ddp import distributed, pretrain; "
        f"distributed.ARRIVAL = {arrival}; sys.exit(pretrain.main(sys.argv[1:]))"
    )
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=processes.ROOT,
        env=os.environ | {k: str(v) for k, v in variables.items()} | {"MASTER_ADDR": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def errors(started: list[subprocess.Popen[str]], limit: float = 60) -> tuple[list[int], list[str]]:
    """(exit statuses, lines of errors)"""
    told = []
    for process in started:
        _, stderr = process.communicate(timeout=limit)
        told += [line for line in stderr.splitlines() if line.startswith("error:")]
    return [process.returncode for process in started], told


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


@pytest.fixture
def port() -> int:
    return free_port()


def test_a_rank_that_does_not_come_is_named(port: int, images: Path, tmp_path: Path) -> None:
    arguments = settings(images, tmp_path / "run")
    begin = time.monotonic()
    statuses, told = errors([start_rank(rank, 3, port, arguments) for rank in (0, 1)])
    assert statuses == [2, 2] and time.monotonic() - begin < 45
    assert any(f"rank 2 of 3 did not come to 127.0.0.1:{port} within 4 s" in line for line in told), told


def test_a_port_that_is_taken(port: int, images: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", port))
        taken.listen()
        statuses, told = errors([start_rank(0, 2, port, settings(images, tmp_path / "run"))])
    assert statuses == [2] and f"can't meet at 127.0.0.1:{port}, which rank 0 has not opened" in told[0]


def test_ranks_with_other_settings_or_data_are_told(port: int, images: Path, tmp_path: Path) -> None:
    same, other = settings(images, tmp_path / "run"), settings(images, tmp_path / "run", "loss.temperature=0.3")
    statuses, told = errors([start_rank(0, 2, port, same, 60), start_rank(1, 2, port, other, 60)])
    assert statuses == [2, 2] and len(told) == 1
    assert "loss.temperature is 0.2 on rank 0, but 0.3 on rank 1" in told[0]

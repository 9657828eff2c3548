"""Ranks that can't meet, or don't fit together, end in seconds with a sentence. Real processes."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from simclr_ddp import distributed
from tests import processes
from tests.test_resume import settings


def start_rank(
    rank: int, size: int, port: int, arguments: list[str], arrival: float = 4, disturbed: str = ""
) -> subprocess.Popen[str]:
    """One rank as a batch system starts it, with torchrun's variables and without torchrun.

    disturbed  code that runs before the command does
    """
    code = (
        f"import sys; from simclr_ddp import distributed, pretrain\ndistributed.ARRIVAL = {arrival}\n{disturbed}\n"
        "sys.exit(pretrain.main(sys.argv[1:]))"
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


def damaged_copy(images: Path, folder: Path) -> Path:
    """The file with one bit flipped, beside the same sidecar."""
    content = bytearray(images.read_bytes())
    content[len(content) // 2] ^= 1
    folder.mkdir()
    (folder / "train.beton").write_bytes(content)
    shutil.copy(f"{images}.json", folder)
    return folder / "train.beton"


@pytest.mark.parametrize("what", ["settings", "data"])
def test_ranks_with_other_settings_or_data_are_told(what: str, port: int, images: Path, tmp_path: Path) -> None:
    same, run_dir = settings(images, tmp_path / "run"), tmp_path / "run"
    if what == "settings":
        other, wanted = settings(images, run_dir, "loss.temperature=0.3"), "loss.temperature is 0.2 on rank 0, but 0.3"
    else:
        copy = damaged_copy(images, tmp_path / "copy")
        other, wanted = settings(copy, run_dir), f"{copy} on rank 1 does not hold the bytes that {images} on rank 0"
    statuses, told = errors([start_rank(0, 2, port, same, 60), start_rank(1, 2, port, other, 60)])
    assert statuses == [2, 2] and len(told) == 1
    assert wanted in told[0]


def test_a_batch_that_does_not_divide_is_told_once(port: int, images: Path, tmp_path: Path) -> None:
    """The ranks have met, and every one of them finds it."""
    arguments = settings(images, tmp_path / "run", "optim.global_batch_size=15")
    statuses, told = errors([start_rank(rank, 2, port, arguments, 60) for rank in (0, 1)])
    assert statuses == [2, 2] and len(told) == 1 and "does not divide among 2 ranks" in told[0]


def test_a_torchrun_in_each_of_several_tasks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID")
    step, asked, step_id, torchrun = names

    def started(**variables: str) -> None:
        with monkeypatch.context() as patch:
            for name in names:
                patch.delenv(name, raising=False)
            for name, value in ({"LOCAL_WORLD_SIZE": "4", torchrun: "1"} | variables).items():
                patch.setenv(name, value)
            distributed.refuse_launchers_side_by_side()

    for variables in ({step: "4"}, {step: "4(x2)"}, {step: "1,2"}, {asked: "2", step_id: "0"}):
        with pytest.raises(ValueError, match=r"srun --ntasks-per-node=1 torchrun .*, or python -m launch.slurm"):
            started(**variables)
    started()
    started(**{step: "1(x16)", asked: "4", step_id: "0"})  # launch.template
    started(**{asked: "4"})  # a batch script, in which torchrun runs once
    started(**{step: "4", "LOCAL_WORLD_SIZE": "1"})  # each starts one rank


def test_that_ends_the_start_in_a_line(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(distributed, "ARRIVAL", 3)
    with pytest.raises(ValueError, match="srun has started 2 tasks a node"):
        distributed.start(torch.device("cpu"))

"""Ranks that can't meet, or don't fit together, end in seconds with a sentence. Real processes."""

import contextlib
import io
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from simclr_ddp import pretrain
from simclr_ddp.distributed import collectives
from tests.support.processes import free_port, start_rank
from tests.support.ranks import Ranks
from tests.support.tiny_run import settings


def errors(started: list[subprocess.Popen[str]], limit: float = 180) -> tuple[list[int], list[str]]:
    """(exit statuses, lines of errors)"""
    spoken = []
    for process in started:
        _, stderr = process.communicate(timeout=limit)
        spoken += [line for line in stderr.splitlines() if line.startswith("error:")]
    return [process.returncode for process in started], spoken


@pytest.fixture
def port() -> int:
    return free_port()


# Ranks begin to wait for each other at the same time, however long each of them took to import what it needs.
TOGETHER = """
import pathlib, time
start = rendezvous.start
def together(*arguments):
    pathlib.Path(FOLDER, "ready" + rendezvous.os.environ["RANK"]).touch()
    while len(list(pathlib.Path(FOLDER).glob("ready*"))) < 2:
        time.sleep(0.01)
    start(*arguments)
rendezvous.start = together
"""


def test_a_rank_that_does_not_come_is_named(port: int, images: Path, tmp_path: Path) -> None:
    arguments, together = settings(images, tmp_path / "run"), TOGETHER.replace("FOLDER", repr(str(tmp_path)))
    statuses, spoken = errors([start_rank(rank, 3, port, arguments, disturbed=together) for rank in (0, 1)])
    assert statuses == [2, 2]
    assert any(f"rank 2 of 3 did not connect to 127.0.0.1:{port} within 4 s" in line for line in spoken), spoken


def test_a_port_that_is_taken(port: int, images: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", port))
        taken.listen()
        statuses, spoken = errors([start_rank(0, 2, port, settings(images, tmp_path / "run"))])
    assert statuses == [2] and f"can't meet at 127.0.0.1:{port}: rank 0 could not open it" in spoken[0]


def damaged_copy(images: Path, folder: Path) -> Path:
    """The file with one bit flipped, beside the same sidecar."""
    content = bytearray(images.read_bytes())
    content[len(content) // 2] ^= 1
    folder.mkdir()
    (folder / "train.beton").write_bytes(content)
    shutil.copy(f"{images}.json", folder)
    return folder / "train.beton"


def ended(arguments: list[list[str]]) -> tuple[int, list[str]]:
    """(exit status, lines of errors) of the command with this rank's arguments."""
    said, status = io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try:
            status = pretrain.main(arguments[collectives.rank()])
        except SystemExit as end:  # ranks other than 0, which says why
            status = int(str(end.code))
    return status, [line for line in said.getvalue().splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("what", ["settings", "data"])
def test_ranks_with_other_settings_or_data_are_reported(what: str, ranks: Ranks, images: Path, tmp_path: Path) -> None:
    same, run_dir = settings(images, tmp_path / "run"), tmp_path / "run"
    if what == "settings":
        other, wanted = settings(images, run_dir, "loss.temperature=0.3"), "loss.temperature is 0.2 on rank 0, but 0.3"
    else:
        copy = damaged_copy(images, tmp_path / "copy")
        other, wanted = settings(copy, run_dir), f"{copy} on rank 1 differs from {images} on rank 0"
    (first, spoken), (second, nothing) = ranks.run(2, ended, [same, other])
    assert (first, second, nothing) == (2, 2, []) and len(spoken) == 1 and wanted in spoken[0]


def test_a_batch_that_does_not_divide_is_reported_once(ranks: Ranks, images: Path, tmp_path: Path) -> None:
    """The ranks have met, and every one of them finds it."""
    arguments = settings(images, tmp_path / "run", "optim.global_batch_size=15")
    (first, spoken), (second, nothing) = ranks.run(2, ended, [arguments, arguments])
    assert (first, second, nothing) == (2, 2, [])
    assert len(spoken) == 1 and "does not divide among 2 ranks" in spoken[0]

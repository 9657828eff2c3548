"""The lock that one process holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from simclr_ddp.system import files

HOLDS = """
import sys, time
from multiprocessing import get_context
from pathlib import Path
from simclr_ddp.system.files import locked
with locked(Path(sys.argv[1])) as known:
    get_context("fork").Process(target=time.sleep, args=(5,), daemon=True).start()
    print(known, flush=True)
    input()
"""


def test_one_process_holds_a_lock_until_it_ends(tmp_path: Path) -> None:
    """However it ends, and though a process that it forked is still there."""
    path = tmp_path / "folder" / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        with pytest.raises(BlockingIOError, match="is held by another process"), files.locked(path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with files.locked(path) as known:
        assert known


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    with files.locked(tmp_path / ".lock") as known:
        assert not known


def test_a_lock_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError), files.locked(tmp_path / "file" / ".lock"):
        pass

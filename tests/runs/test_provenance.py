"""The commit of the package, wherever it is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

CODE = """
import torch
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.runs.provenance import describe
print(describe(Runtime(torch.device("cpu"), "fp32", 1))["git_commit"])
"""


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.email=a@b", "-c", "user.name=n", "-c", "core.excludesFile=/dev/null")
    return subprocess.check_output(["git", "-C", str(folder), *name, *arguments], text=True).strip()


@pytest.mark.slow
def test_the_commit_is_that_of_the_packages_own_repository_or_none(tmp_path: Path) -> None:
    places = {"own": tmp_path / "own", "beside": tmp_path / "mine", "inside": tmp_path / "mine" / ".venv" / "lib"}
    for place in places.values():
        shutil.copytree(ROOT / "simclr_ddp", place / "simclr_ddp", ignore=shutil.ignore_patterns("__pycache__"))
    for repository in ("own", "mine"):
        git(tmp_path / repository, "init", "-q")
        (tmp_path / repository / "paper.tex").touch()
        git(tmp_path / repository, "add", "paper.tex", *(["simclr_ddp"] if repository == "own" else []))
        git(tmp_path / repository, "commit", "-qm", "first")
    git(tmp_path / "mine", "add", ".venv")  # even if they are committed there
    git(tmp_path / "mine", "commit", "-qm", "second")
    environment = os.environ | {"GIT_DIR": str(tmp_path / "mine" / ".git")}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", CODE],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(place)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, place in places.items()
    }
    found = {name: process.communicate(timeout=120)[0].strip() for name, process in running.items()}
    commit = git(tmp_path / "own", "rev-parse", "--short=12", "HEAD")
    assert found == {"own": commit, "beside": "None", "inside": "None"}

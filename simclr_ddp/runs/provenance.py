"""Provenance of a run: versions, commit, hardware."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.system.machine import cores


def describe(runtime: Runtime) -> dict[str, Any]:
    """Return versions, hardware and world size as plain values for the record of a run."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "torchvision", "numpy", "pillow", "ffcv")
    gpu = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else None
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in packages},
        "processor": _processor(),
        "cores": cores(),
        "gpu": gpu,
        "world_size": collectives.world_size(),
        "threads": runtime.threads,
        "precision": runtime.precision,
        "device": runtime.device.type,
    }


def _git_commit() -> str | None:
    """Return the commit of the package's own repository; None where it is not in it."""
    recorded = Path(__file__).parents[2] / "COMMIT"  # in the snapshot of a job (launch.cluster.snapshot)
    if recorded.is_file():
        return recorded.read_text().strip() or None
    root, own = Path(__file__).parents[2], "simclr_ddp/runs/provenance.py"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
        return done.stdout.strip()

    try:
        # A package that is installed inside a repository of its user is no file of it, or is at another place.
        if git("ls-files", "--full-name", "--", own) != own:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

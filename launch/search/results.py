"""What trials and other runs leave on disk: values by epoch, their newest job, and why they failed."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch.cluster.job import is_own_error
from simclr_ddp.system import files

SETTINGS, LOG = "trial.yaml", "log.txt"  # in a trial's run directory

Handle = dict[str, Any]


def epoch_values(lines: Iterable[dict[str, Any]], metric: str) -> dict[int, float]:
    """{epoch, from 1: value} of complete epochs: the probe's one value, or the mean over the epoch's lines.

    A value that is not a finite number stays one, so that the trial can be said to have failed.
    """
    values: dict[int, list[float]] = {}
    complete = set()
    for line in lines:
        epoch = math.ceil(line["epoch"] - 1e-9)
        if metric in line:
            values.setdefault(epoch, []).append(line[metric])
        if line["epoch"] > epoch - 1e-9:
            complete.add(epoch)
    return {epoch: sum(found) / len(found) for epoch, found in values.items() if epoch in complete}


def queued(run_dir: Path) -> Handle | None:
    """The handle of the newest job, or task of an array, that was submitted for the run.

    The sweep may have been killed before it recorded the handle. A job without this file ends at its start.
    """
    found = sorted((run_dir / "slurm").glob("[0-9]*_submitted.pkl"), key=lambda path: path.stat().st_mtime_ns)
    return {"job": found[-1].name.removesuffix("_submitted.pkl")} if found else None


def job_error(folder: Path, job_id: str) -> str:
    """Why a job failed, by the logs of its ranks; empty if none has an error.

    Of the last error in each log a cause is preferred to one that other ranks are gone or that the command ended.
    """
    causes: list[str] = []
    effects: list[str] = []
    for log in sorted(folder.glob(f"{job_id}_*log.out")):
        lines = log.read_text(errors="replace").splitlines()
        cause = last([line for line in lines if not is_own_error(line)], "error:")
        (effects if "lost the other ranks" in cause else causes).append(cause)
        effects.append(last(lines, "error:"))
    return next(filter(None, [*causes, *effects]), "")


def run_error(run_dir: Path) -> str:
    """The last error of a run, by the logs of its newest job or of its process; empty if there is none."""
    newest, log = queued(run_dir), run_dir / LOG
    error = job_error(run_dir / "slurm", newest["job"]) if newest else ""
    return error or (last(log.read_text(errors="replace").splitlines(), "error:") if log.exists() else "")


def last(lines: Iterable[str], beginning: str = "") -> str:
    """The last line with that beginning that is not empty."""
    found = [line.strip() for line in lines if line.startswith(beginning) and line.strip()]
    return found[-1].removesuffix(" (--debug shows where)") if found else ""


def write_text(path: Path, text: str) -> None:
    files.replace_atomically(path, lambda temporary: temporary.write_text(text))

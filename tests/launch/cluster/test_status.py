"""The states of jobs, from stand-ins for SLURM's commands."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cluster import status

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_the_state_of_a_job_without_accounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Invalid job id specified >&2\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status.state("7") == status.State("UNKNOWN", 1)


def test_the_states_of_many_jobs_are_one_question(tmp_path: Path, tools: Callable[..., None]) -> None:
    tools(
        squeue='echo "squeue $*" >>asked; echo "5 PENDING"; echo "7_1 RUNNING"',
        scontrol='echo "scontrol $*" >>asked; echo "JobState=FAILED Reason=NonZeroExitCode BatchHost=n1 ExitCode=3:0"',
    )
    found = status.states(["5", "7_0", "7_1"])
    assert found == {
        "5": status.State("PENDING"),
        "7_0": status.State("FAILED", 3, "NonZeroExitCode", "n1"),
        "7_1": status.State("RUNNING"),
    }
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["squeue -h -r -o %i %T -j 5,7", "scontrol -o show job 7_0"]
    tools(squeue="echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    assert status.states(["5", "7_0"]) == {"5": status.State(""), "7_0": status.State("")}, "nothing is known"

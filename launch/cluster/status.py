"""The states of jobs, as SLURM reports them."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
ENDED |= {"DEADLINE", "REVOKED", "UNKNOWN"}
NO_LOG = 128 + 53  # exit status of a job whose node can't open its log, by SLURM's convention


class State(NamedTuple):
    name: str  # empty while SLURM does not answer
    status: int = 0  # exit status
    reason: str = ""  # why it waits, or has failed
    node: str = ""  # where its batch script runs


def state(job_id: str) -> State:
    """The state of a job; of one that ended long ago, by SLURM's accounting."""
    shown = _output("scontrol", "-o", "show", "job", job_id)
    found = re.search(r"JobState=(\w+)(?: Reason=(\S+))?.* ExitCode=(\d+):(\d+)", shown.stdout)
    if found is None:
        if "Invalid job id" not in shown.stderr:
            return State("")
        if shutil.which("sacct"):  # else a cluster without accounting
            shown = _output("sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", job_id)
            found = re.search(r"(\w+)()[^|]*\|(\d+):(\d+)", shown.stdout)
        if found is None:
            return State("UNKNOWN", 1)
    name, reason, status, by_signal = found.groups()
    node = re.search(r" BatchHost=(\S+)", shown.stdout)
    number = int(status) or (128 + int(by_signal) if int(by_signal) else 0)
    return State(name, number, "" if reason in (None, "None") else reason, node[1] if node else "")


def states(job_ids: list[str]) -> dict[str, State]:
    """The states of many jobs: one question for all that are queued or running, and one for each other."""
    if not job_ids:
        return {}
    arrays = sorted({job_id.partition("_")[0] for job_id in job_ids})  # a command line is too short for all tasks
    shown = _output("squeue", "-h", "-r", "-o", "%i %T", "-j", ",".join(arrays))
    if shown.returncode and "Invalid job id" not in shown.stderr:  # the error if none of them is queued
        return dict.fromkeys(job_ids, State(""))
    queued = {job_id: State(name) for job_id, name in map(str.split, shown.stdout.splitlines())}
    return {job_id: queued.get(job_id) or state(job_id) for job_id in job_ids}


def unwritable(ended: State, folder: Path) -> str:
    """The error of a job that could not write its own log; empty if it could."""
    if ended.status != NO_LOG:
        return ""
    return (
        f"error: {ended.node or 'the first node'} can't write the job's log into {folder}; choose a run_dir on a file "
        "system that all nodes can write to"
    )


def _output(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)

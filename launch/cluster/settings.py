"""The settings of a job, and what follows from them alone."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from launch.cluster import sbatch
from simclr_ddp.config.options import option
from simclr_ddp.system.console import warn


@dataclass
class Slurm:
    name: str = option("simclr", "name of the job; by default the name of the config file")
    nodes: int = option(1, "number of nodes", low=1)
    gpus_per_node: int = option(0, "GPUs of each node, one rank per GPU; 0 is ranks on CPUs", low=0)
    tasks_per_node: int = option(0, "ranks per node; 0 is one per GPU, or one without GPUs", low=0)
    cpus_per_task: int = option(8, "cores per rank: data.workers and one more", low=1)
    memory_gb: int = option(0, "memory per node in GB; 0 is the partition's default", low=0)
    minutes: int = option(60, "time limit of each start, after which the job is queued again and resumes", low=1)
    warning_seconds: int = option(
        120, "seconds before the time limit at which the run saves and stops; large models need more", low=1
    )
    arrival_seconds: int = option(
        300, "seconds that the nodes wait for each other at a start, at most half of the time until the warning", low=1
    )
    partition: str = option("", "partition, as `sinfo` lists them; empty is the cluster's default")
    account: str = option("", "account that is charged for the job")
    qos: str = option("", "quality of service")
    constraint: str = option("", "features that the nodes must have, for example a100")
    exclude: str = option("", "nodes not to use, for example node[3-5]")
    dependency: str = option("", "jobs to wait for, for example afterok:123")
    comment: str = option("", "comment for the accounting")
    sbatch: list[str] = option([], "more options of sbatch, for example [--gres=gpu:a100:4, --reservation=x]")
    check: bool = option(True, "check data, batch and disk before the job is queued; false: they come with the job")
    setup: list[str] = option([], "lines of shell before the command, for example [module load cuda]")
    environment: list[str] = option(
        [], "environment variables, for example [NCCL_DEBUG=INFO]; no file or message shows their values", secret=True
    )
    interface: str = option("", "network interface between the nodes for NCCL and gloo, for example ib0")
    container: str = option("", "image for srun's --container-image (pyxis); runs its python3 unless python is set")
    srun: list[str] = option([], "more arguments of srun, for example [--container-mounts=/data:/data]")
    python: list[str] = option(
        [], "how to start Python, for example [apptainer, exec, IMAGE, python3]; empty is this one"
    )


@dataclass(frozen=True)
class Plan:
    """A job to submit, or a task of an array: what it runs, and where its files go."""

    command: list[str]  # as the user gave it
    run_dir: Path
    folder: Path  # of logs, snapshots and notes
    files: dict[Path, bytes]  # of the code
    code: Path  # the folder of their copies
    configs: dict[Path, bytes]  # config files of the command
    config: Path  # the folder of their copies, always in `folder`


def gpus_per_node(settings: Slurm) -> int:
    return sbatch.gpus(sbatch.options(vars(settings))) or settings.gpus_per_node


def tasks_per_node(settings: Slurm) -> int:
    return settings.tasks_per_node or gpus_per_node(settings) or 1


def named_variables(settings: Slurm) -> dict[str, str]:
    """The environment variables that the settings name."""
    return dict(pair.split("=", 1) for pair in settings.environment)


def check_settings(settings: Slurm) -> None:
    """ValueError for what could break out of the batch script, or end the job at its start."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        for text in value if isinstance(value, list) else [value]:
            shown = "..." if field.metadata["secret"] else repr(text)
            if isinstance(text, dict):
                raise ValueError(f"{field.name}={shown}: not a string, since it has a colon; put it in quotes")
            if isinstance(text, str) and not text.isprintable():
                raise ValueError(f"{field.name}={shown}: it holds a line break or control character; remove it")
    for number, pair in enumerate(settings.environment, 1):
        if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", pair):
            raise ValueError(f"environment: entry {number} is not a variable; write environment=[NAME=value, ...]")
        if pair.startswith("PYTHONPATH="):
            raise ValueError(
                "environment=[PYTHONPATH=...]: it would hide the copy of the code that the job runs; export PYTHONPATH "
                "in the shell that submits, and the job adds it after the copy"
            )
    for text in settings.sbatch:
        sbatch.check(text)
    if ignored := sbatch.ignored():
        warn(
            f"{', '.join(ignored)}: not passed on to sbatch; the launcher sets such options itself or doesn't know them"
        )
    if settings.warning_seconds >= 60 * settings.minutes:
        raise ValueError(
            f"warning_seconds={settings.warning_seconds}: not less than the time limit, minutes={settings.minutes}; "
            "decrease it or increase minutes"
        )
    tasks, gpus = tasks_per_node(settings), gpus_per_node(settings)
    if settings.gpus_per_node not in (0, gpus):
        raise ValueError(f"gpus_per_node={settings.gpus_per_node}: sbatch asks for {gpus} per node; leave one out")
    if gpus and tasks != gpus:
        raise ValueError(f"tasks_per_node={tasks}: each of gpus_per_node={gpus} GPUs is one rank; leave it out")

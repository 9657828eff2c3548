"""The batch script of a job: where its files are, the command that starts the ranks, and requeue.sh."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.cluster import sbatch
from launch.cluster.settings import Plan, Slurm, named_variables, tasks_per_node

REQUEUE = Path(__file__).with_name("requeue.sh")
# The last line before the command, so that the snapshot precedes whatever a line of `setup` puts on the path.
SNAPSHOT_FIRST = 'export PYTHONPATH="$run_code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1'


def parameters(settings: Slurm, plans: list[Plan], at_once: int = 0) -> dict[str, Any]:
    """submitit's parameters of the job or, with `at_once`, of an array that runs at most that many tasks at once."""
    # submitit would send USR2; the commands of the package handle USR1.
    others = sbatch.options(vars(settings))
    gpus = None if sbatch.gpus(others) else settings.gpus_per_node or None
    # `environment` is in the environment of sbatch.
    others |= {"signal": f"USR1@{settings.warning_seconds}", "requeue": True, "export": "ALL"}
    if at_once:
        others["output"] = str(plans[0].folder / "%A_array.log")  # SLURM's own messages about the tasks
    end = f"$((RUN_BEGAN + {60 * settings.minutes}))"
    names = ("nodes", "cpus_per_task", "partition", "account", "qos", "constraint", "exclude", "dependency", "comment")
    values = {name: getattr(settings, name) for name in names} | {
        "job_name": settings.name,
        "time": settings.minutes,
        "mem": f"{settings.memory_gb}GB" if settings.memory_gb else None,
        "gpus_per_node": gpus,
        "array_parallelism": at_once or None,
        "ntasks_per_node": tasks_per_node(settings),
        "setup": [*_places(plans, at_once), *_exports(settings), *settings.setup, SNAPSHOT_FIRST],
        "teardown": [f'queue_again "$?" "$run_dir" "$run_folder" "$run_job" "$before" "$from" {end}'],
        "stderr_to_stdout": True,
        "use_srun": False,  # submitit's line can't hold shell variables; see `srun`
        "additional_parameters": others,
    }
    return {name: value for name, value in values.items() if value not in (None, "")}


def script(settings: Slurm, plans: list[Plan], at_once: int = 0) -> str:
    """The script that `submit` hands to sbatch; needs no SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string

    plans = sharing(plans)
    values = parameters(settings, plans, at_once) | ({"map_count": len(plans)} if at_once else {})
    return _make_sbatch_string(command=srun(settings, at_once), folder=plans[0].folder, **values)


def sharing(plans: list[Plan]) -> list[Plan]:
    """The plans, where those with equal code have it in the folder of the first of them."""
    first: dict[str, Path] = {}
    return [replace(plan, code=first.setdefault(plan.code.name, plan.code)) for plan in plans]


def srun(settings: Slurm, at_once: int) -> str:
    """The line that starts the ranks; it uses the variables of `_places`."""
    words = ["srun", "--unbuffered", '--output="$run_folder/${run_job}_%t_log.out"', "--kill-on-bad-exit=1"]
    words += [f"--cpus-per-task={settings.cpus_per_task}"]  # srun does not take it over from sbatch
    if settings.container:
        here = str(Path.cwd())
        words += [shlex.quote(f"--container-image={settings.container}"), shlex.quote(f"--container-workdir={here}")]
        if not any(a.startswith("--container-mounts=") for a in settings.srun):
            mounts = "$run_dir:$run_dir" + (",$run_code:$run_code" if at_once else "")
            words += [f'--container-mounts={shlex.quote(f"{here}:{here}")},"{mounts}"']
    python = settings.python or (["python3"] if settings.container else [sys.executable])
    return " ".join([*words, shlex.join([*settings.srun, *python]), '-u -m submitit.core._submit "$run_folder"'])


def _places(plans: list[Plan], at_once: int) -> list[str]:
    """The beginning of the script: where this job, or this task of the array, has its files."""
    paths = [{"run_dir": plan.run_dir, "run_folder": plan.folder, "run_code": plan.code} for plan in plans]
    lines = [" ".join(f"{name}={shlex.quote(str(path))}" for name, path in one.items()) for one in paths]
    if at_once:
        cases = [f"{i}) {line} ;;" for i, line in enumerate(lines)]
        lines = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
        lines += ['run_job="$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"']
        lines += ['exec >>"$run_folder/${run_job}_0_log.out" 2>&1']
    else:
        lines += ['run_job="$SLURM_JOB_ID"']
    lines += ['before=$(last_saved "$run_dir") from=$(cat "$run_folder/${run_job}_0_log.out" 2>/dev/null | wc -c)']
    return [*REQUEUE.read_text().splitlines(), *lines, "RUN_BEGAN=$(date +%s)", "export RUN_BEGAN"]


def _exports(settings: Slurm) -> list[str]:
    named = named_variables(settings)
    values = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "SUBMITIT_LOG_LEVEL": "ERROR"}
    if settings.interface:
        values |= {"NCCL_SOCKET_IFNAME": settings.interface, "GLOO_SOCKET_IFNAME": settings.interface}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items() if name not in named]
    return [*lines, *(f"# {name}: a variable of this job's environment" for name in named)]

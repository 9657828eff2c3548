"""From a command to a job in the queue: what it runs, where its files go, and its submission."""

import importlib.util
import io
import json
import os
import re
import shutil
from contextlib import redirect_stderr
from pathlib import Path

from launch.cluster import job, snapshot
from launch.cluster.batch_script import parameters, sharing, srun
from launch.cluster.settings import Plan, Slurm, gpus_per_node, named_variables
from simclr_ddp.config.command import parse
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.system.files import short_hash

TOOLS = ("sbatch", "srun", "scontrol", "squeue")  # needed to submit jobs and to follow them


def make_plan(command: list[str], code: dict[Path, bytes] | None = None) -> Plan:
    """A job with that command. Raises ValueError if the command can't be run.

    code  snapshot.sources(), to read them once for many plans
    """
    if not command:
        raise ValueError("no command; write `-- simclr_ddp.pretrain configs/pretrain/NAME.yaml` after the options")
    if not _is_command(command[0]):
        raise ValueError(
            f"{command[0]}: not a command; write a module such as simclr_ddp.pretrain, without `python -m`"
        )
    run_dir = _run_dir(command).absolute()
    if {"%", "\\"} & set(str(run_dir)) or not str(run_dir).isprintable():
        raise ValueError(f"run_dir={run_dir}: SLURM allows no %, \\ or control character in it; choose another name")
    files, configs, folder = code or snapshot.sources(), snapshot.configs(command), run_dir / "slurm"
    names = (f"code-{snapshot.digest(files)}", f"config-{snapshot.digest(configs)}")
    return Plan(command, run_dir, folder, files, folder / names[0], configs, folder / names[1])


def submit(settings: Slurm, plan: Plan) -> str:
    """Write the snapshot and queue the job; returns its id. Raises ValueError with SLURM's message if it refuses."""
    return _submit(settings, [plan])


def submit_array(settings: Slurm, plans: list[Plan], at_once: int) -> str:
    """Queue one array; returns its id, ARRAY. Raises as `submit` does.

    plans    task I, the job ARRAY_I, is plans[I], with its own run directory, config file, logs and starts, and is
             queued again independently; equal code is stored once, in the first's folder, and linked from the others
    at_once  tasks that may run at the same time
    """
    if not plans or at_once < 1:
        raise ValueError(f"an array of {len(plans)} runs, {at_once} at once: both must be 1 or more")
    run_dirs = [plan.run_dir for plan in plans]
    twice = [run_dir for run_dir in run_dirs if run_dirs.count(run_dir) > 1]
    if twice:
        raise ValueError(f"run_dir={twice[0]}: two runs of the array have it; give each its own")
    return _submit(settings, plans, at_once)


def check_slurm(otherwise: str, tools: tuple[str, ...] = TOOLS) -> None:
    """ValueError if no job can be submitted from this machine; `otherwise` is what the user can do instead."""
    if importlib.util.find_spec("submitit") is None:
        raise ValueError(f"submitit is not installed; pip install '.[slurm]', or {otherwise}")
    for tool in tools:
        if shutil.which(tool) is None:
            raise ValueError(f"this machine has no SLURM ({tool} not found); submit from another, or {otherwise}")


def _submit(settings: Slurm, plans: list[Plan], at_once: int = 0) -> str:
    check_slurm("run the command without launch.slurm")
    import submitit
    from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, JobPaths
    from submitit.core.utils import temporary_save_path as saved

    own, plans = plans, sharing(plans)
    for before, plan in zip(own, plans, strict=True):
        job.check_writable(plan.folder, "this machine", make=True)
        snapshot.write(plan.files, plan.code)
        if plan.configs:
            snapshot.write(plan.configs, plan.config)
        if before.code != plan.code:
            snapshot.link(before.code, plan.code)
    executor = submitit.SlurmExecutor(plans[0].folder)
    executor.update_parameters(**parameters(settings, plans, at_once))
    if at_once:
        executor.parameters["map_count"] = len(plans)
    shell = dict(os.environ)
    try:
        # Without the variables of a job that this may run in. submitit would also print SLURM's message.
        with submitit.helpers.clean_env(), redirect_stderr(io.StringIO()):
            os.environ.update({k: v for k, v in shell.items() if k == "SLURM_CONF"} | named_variables(settings))
            queued = executor._submit_command(srun(settings, at_once)).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"SLURM refuses the job: {str(error).replace('sbatch: error: ', '')}") from error
    finally:
        os.environ.clear()
        os.environ.update(shell)
        for path in plans[0].folder.glob("*submission*.sh"):
            path.chmod(0o600)  # a line of `setup` may hold a secret
    for i, plan in enumerate(plans):  # the tasks wait for these files
        run = DelayedSubmission(job.run, describe(settings, plan))
        run.set_timeout(settings.minutes, 0)
        with saved(JobPaths(plan.folder, f"{queued}_{i}" if at_once else queued).submitted_pickle) as file:
            run.dump(file)
    return queued


def describe(settings: Slurm, plan: Plan) -> job.Job:
    """The job as its tasks receive it."""
    return job.Job(
        command=snapshot.with_copies(plan.command, plan.config),
        folder=plan.folder,
        progress=plan.run_dir / "checkpoints" / "latest",
        lock=plan.run_dir / ".lock",
        gpus=gpus_per_node(settings),
        time_limit=60 * settings.minutes,
        warning=settings.warning_seconds,
        arrival=min(settings.arrival_seconds, max(10, 30 * settings.minutes - settings.warning_seconds / 2)),
    )


def _is_command(module: str) -> bool:
    """Whether `python -m` would run something."""
    try:
        found = importlib.util.find_spec(module)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{module}.__main__")
    except (ImportError, ValueError):
        return False
    if found is None or not found.origin or not found.origin.endswith(".py"):
        return False
    text = Path(found.origin).read_text(errors="replace")
    return module != found.name or re.search(r"^(def main\(|if __name__ ==)", text, re.MULTILINE) is not None


def _run_dir(command: list[str]) -> Path:
    """The run directory that the command trains in or reads; for other commands a new one."""
    from simclr_ddp.runs.directory import default_run_dir

    module, *arguments = command
    if module == "simclr_ddp.pretrain":
        settings: Pretrain = parse(arguments, Pretrain, "[CONFIG.yaml]")
        return default_run_dir(settings)
    for argument in arguments[:1]:
        if (Path(argument) / "config.yaml").is_file():
            return Path(argument)
    return Path("runs") / f"{module.rpartition('.')[2]}-{short_hash({'command': json.dumps(command)})}"

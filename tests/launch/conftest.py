"""Fixtures of the tests of launch: stand-ins for SLURM's commands, a rank, and a batch script."""

import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit

from launch.cluster import batch_script, job
from launch.cluster import submit as submission
from launch.cluster.settings import Slurm

BUSY = "slurm_load error: Unable to contact slurm controller"


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tools(in_an_empty_folder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts shell scripts in the place of SLURM's commands."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def make(**scripts: str) -> None:
        for name, content in scripts.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{content}\n")
            (tmp_path / "bin" / name).chmod(0o755)

    return make


@pytest.fixture
def rank(in_an_empty_folder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[job.Job]:
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
    monkeypatch.setattr(job, "meet", lambda *_: None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    told.export = lambda **_: os.environ.update(MASTER_PORT="1") or told
    before = {number: signal.getsignal(number) for number in job.STOP}
    yield job.Job(["saving"], tmp_path, tmp_path / "checkpoints/latest", tmp_path / ".lock", 0, 60, 30, 10)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def batch(in_an_empty_folder: None, tmp_path: Path) -> Callable[..., tuple[str, int]]:
    """Runs a batch script without its ranks; (what it prints last, its status).

    With stand-ins for srun, which prints `probe` and fails where a node may have failed; for scontrol, which fails
    `busy` times; for sleep, which returns at once; and for date, whose clock moves by ten minutes with each question.
    """
    plan = submission.make_plan(["simclr_ddp.pretrain", f"run_dir={tmp_path / 'a run'}"])
    latest = plan.run_dir / "checkpoints" / "latest"
    for folder in (plan.folder, latest.parent, tmp_path / "bin"):
        folder.mkdir(parents=True)
    latest.write_text("step-00000005")
    steps = itertools.count(6)

    def run(
        status: int,
        saved: bool = False,
        note: str = "",
        probe: str = "",
        restarts: int = 0,
        busy: int = 0,
        step: int = 0,
        log: str = "",
    ) -> tuple[str, int]:
        asked = f'echo requeue >>asked; [ $(grep -c requeue asked) -gt {busy} ] || {{ echo "$busy" >&2; exit 1; }}'
        scripts = {
            "srun": f"echo srun \"$*\" >>asked; echo '{probe}'; exit {int(bool(probe))}",
            "scontrol": f'[ $1 != requeue ] || {{ {asked}; exit 0; }}\necho "JobId=7 Restarts={restarts} F=1"',
            "sleep": "",
            "date": "echo x >>time; echo $((600 * $(wc -l <time)))",
        }
        for name, content in scripts.items():
            (tmp_path / "bin" / name).write_text(f'#!/bin/bash\nbusy="{BUSY}"\n{content}\n')
            (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / "asked").unlink(missing_ok=True)
        step = step or (next(steps) if saved else 0)
        job = [f"echo step-{step:08d} > '{latest}'"] * bool(step)
        job += [f"echo '{log}' >>'{plan.folder}/7_0_log.out'"] * bool(log)
        job += [f"printf '{note}' > '{plan.folder}/7.again'"] * bool(note)
        ranks = "; ".join([*job, f"(exit {status})"])
        script = batch_script.script(Slurm(nodes=2), [plan]).splitlines()
        lines = [ranks if line.startswith("srun ") else line for line in script]
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        variables = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
        done = subprocess.run(["bash", "-c", "\n".join(lines)], env=variables, capture_output=True, text=True)
        assert not done.stderr, done
        return (done.stdout.splitlines() or [""])[-1], done.returncode

    return run

"""Nothing hangs: if a rank dies or hangs, every process ends and one line names that rank. Uses real processes."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from simclr_ddp.system import signals
from tests.support import processes
from tests.support.processes import free_port, start_rank
from tests.support.tiny_run import settings

LONG = ("optim.steps=4000", "checkpoint.every_steps=0", "timeout=20")  # a cold start on busy cores takes ten


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named(number: int, images: Path, tmp_path: Path) -> None:
    process = processes.start("simclr_ddp.pretrain", *settings(images, tmp_path / "run", *LONG), ranks=2)
    processes.wait_for_step(tmp_path / "run", 20, process)
    victim = processes.rank_processes(process)[1]
    os.kill(victim, number)
    status, said = processes.finish(process)
    assert status != 0
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and re.search(r"rank 1 has been silent for \d+ s; last seen at step \d+", lines[0]), said
    assert processes.group(process) == []


FAILS = """
from simclr_ddp.training import components
step = components.forward_backward
def fails(*arguments):
    fails.steps += 1
    if fails.steps == 5:
        raise ERROR
    return step(*arguments)
fails.steps = 0
components.forward_backward = fails
"""
# What destroying the process group does under NCCL, until all ranks come.
WAITS = """import time
from simclr_ddp.distributed import rendezvous
rendezvous.dist.destroy_process_group = lambda *_: time.sleep(1000)"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "wanted", "said"),
    [
        ("ValueError('a picture is broken')", 2, "error: rank 1: a picture is broken (--debug shows where)"),
        ("RuntimeError('a bug')", 1, "RuntimeError: a bug"),
    ],
)
def test_a_rank_that_fails_alone_reports_why_and_ends(
    error: str, wanted: int, said: str, images: Path, tmp_path: Path
) -> None:
    """Whatever destroying the process group waits for."""
    fast = ("timeout=120", "data.loader=torch", "data.workers=0", "probe.enabled=false")
    port, arguments = free_port(), settings(images, tmp_path / "run", *LONG[:2], *fast)
    first = start_rank(0, 2, port, arguments, 60, WAITS)
    second = start_rank(1, 2, port, arguments, 60, WAITS + FAILS.replace("ERROR", error))
    try:
        _, stderr = second.communicate(timeout=180)
        _, others = first.communicate(timeout=180)
    finally:
        first.kill()
        second.kill()
    assert second.returncode == wanted and stderr.splitlines()[-1] == said, stderr
    assert ("Traceback" in stderr) == ("bug" in error)
    assert first.returncode == 2 and "error: another rank has gone" in others, others


FAILS_ALONE = f"""
import sys, threading, time
from pathlib import Path
from simclr_ddp.config import command as cli
from simclr_ddp.distributed import rendezvous as distributed
from simclr_ddp.config.schema import WriteDataset
from simclr_ddp.system import ranks
{WAITS}

def command(settings):
    distributed.start_here(0, 1, settings.source)
    ranks.join(distributed.dist.is_initialized)
    threading.Thread(target=lambda: (time.sleep(1), Path(settings.out).touch()), name="checkpoint").start()
    threading.Thread(target=time.sleep, args=(1000,)).start()
    try:
        raise ERROR
    finally:
        distributed.stop()

print(cli.run(command, WriteDataset, "SOURCE OUT", "", sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("error", "wanted", "said"),
    [
        ("OSError('the disk is full')", 2, "error: the disk is full (--debug shows where)"),
        ("KeyError('a bug')", 1, "KeyError: 'a bug'"),
        ("SystemExit(3)", 3, ""),
        ("SystemExit('a library gives up')", 1, "a library gives up"),
    ],
)
def test_the_end_after_an_error_waits_for_a_checkpoint_and_nothing_else(
    error: str, wanted: int, said: str, tmp_path: Path
) -> None:
    """Neither for the process group, in which another rank may have failed, nor for any other thread."""
    code = FAILS_ALONE.replace("ERROR", error)
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(tmp_path / "saved")]
    status, output = processes.finish(processes.start_command(command))
    assert status == wanted and (output.splitlines() or [""])[-1] == said, output
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_decoding_process_dies_or_hangs(number: int, images: Path, tmp_path: Path) -> None:
    """Of a run on one process, which no other rank watches."""
    options = (*LONG, "data.loader=torch", "data.workers=1")
    process = processes.start("simclr_ddp.pretrain", *settings(images, tmp_path / "run", *options))
    processes.wait_for_step(tmp_path / "run", 20, process)
    decoding = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(decoding[0]), number)
    status, said = processes.finish(process)
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    wanted = "a decoding process has gone" if number == signal.SIGKILL else "nothing has moved for"
    # torch's handler of the dead process's signal may raise while Python forks, which Python shows and ignores.
    shown = said.count("Traceback") - said.count("Exception ignored in")
    assert status != 0 and len(lines) == 1 and wanted in lines[0] and shown <= 0, said


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_waits_for_another(images: Path, tmp_path: Path) -> None:
    """Where the main thread is in a collective, Python calls no handler of signals."""
    port, arguments = free_port(), settings(images, tmp_path / "run", *LONG, "timeout=300")
    first, second = (start_rank(rank, 2, port, arguments, 60) for rank in (0, 1))
    try:
        processes.wait_for_step(tmp_path / "run", 20, first)
        os.kill(second.pid, signal.SIGSTOP)
        time.sleep(1)
        first.send_signal(signal.SIGTERM)
        time.sleep(4)
        assert first.poll() is None, "the first signal asks only"
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 128 + signal.SIGTERM
    finally:
        first.kill()
        second.kill()
        _, said = first.communicate()
        second.communicate()
    assert "stopping at the end of this step" in said


@pytest.mark.slow
def test_a_suspended_run_continues(images: Path, tmp_path: Path) -> None:
    """All ranks are suspended for longer than the timeout, and than the timeout of their collectives."""
    port, arguments = free_port(), settings(images, tmp_path / "run", *LONG, "timeout=6", "log.every_steps=1")
    first, second = ranks = [start_rank(rank, 2, port, arguments, 6) for rank in (0, 1)]
    try:
        processes.wait_for_step(tmp_path / "run", 20, first)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in ranks:
                rank.send_signal(number)
            if number == signal.SIGSTOP:
                time.sleep(20)  # the suspension
                step = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        processes.wait_for_step(tmp_path / "run", step + 40, first)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == second.wait(60) == signals.PAUSED
    finally:
        first.kill()
        second.kill()
        said = [rank.communicate()[1] for rank in ranks]
    assert "silent" not in "".join(said) and "error" not in "".join(said), said


@pytest.mark.slow
def test_the_store_stops_answering(images: Path, tmp_path: Path) -> None:
    """Without torchrun rank 0 holds the store that the ranks watch each other through."""
    port, arguments = free_port(), settings(images, tmp_path / "run", *LONG)
    first, second = (start_rank(rank, 2, port, arguments, 60) for rank in (0, 1))
    try:
        processes.wait_for_step(tmp_path / "run", 20, first)
        os.kill(first.pid, signal.SIGSTOP)
        _, said = second.communicate(timeout=180)
    finally:
        first.kill()
        second.kill()
        first.communicate()
    assert second.returncode != 0 and "the store of the ranks has been silent" in said, said


@pytest.mark.slow
def test_a_failed_steps_dump_is_waited_for(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks stay until it is written: torchrun would end the one that writes."""
    slow = "import time, torch; save = torch.save; torch.save = lambda *a: (time.sleep(6), save(*a))"
    (tmp_path / "sitecustomize.py").write_text(f"{slow}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ("optim.base_learning_rate=1e30", "optim.name=sgd", "checkpoint.every_steps=0")
    process = processes.start("simclr_ddp.pretrain", *settings(images, tmp_path / "run", *options), ranks=2)
    status, said = processes.finish(process)
    assert status != 0 and "repeats the step" in said, said
    assert len(list((tmp_path / "run" / "dumps").glob("step-*.pt"))) == 1

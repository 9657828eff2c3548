"""Nothing hangs: a rank that dies or stands still ends every process, and one line names it. Real processes."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests import processes
from tests.test_resume import settings

LONG = ("optim.steps=4000", "checkpoint.every_steps=0", "timeout=8")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stands_still_is_named(number: int, images: Path, tmp_path: Path) -> None:
    process = processes.start("simclr_ddp.pretrain", *settings(images, tmp_path / "run", *LONG), ranks=2)
    processes.wait_for_step(tmp_path / "run", 20, process)
    victim = processes.rank_processes(process)[1]
    os.kill(victim, number)
    begin = time.monotonic()
    status, told = processes.finish(process, limit=90)
    assert status != 0 and time.monotonic() - begin < 75
    lines = [line for line in told.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and re.search(r"rank 1 has been silent for \d+ s; last seen at step \d+", lines[0]), told
    assert processes.group(process) == []

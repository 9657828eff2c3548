"""The signals that ask a run to save and stop, and a bus error, which ends it with a sentence."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr_ddp.system.signals import STOP, stop_signals


def is_asked(stopping: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not stopping() and time.monotonic() < end:
        time.sleep(0.01)
    return stopping()


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "XCPU"])
def test_every_signal_that_stops_a_process_asks_the_run_to_save(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    number = signal.Signals[f"SIG{name}"]
    before = {each: signal.getsignal(each) for each in STOP}
    with stop_signals() as stopping:
        assert not stopping()
        os.kill(os.getpid(), number)
        assert is_asked(stopping)
    assert {each: signal.getsignal(each) for each in STOP} == before
    assert capfd.readouterr().err.startswith("stopping at the end of this step")


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not stopping()
            os.kill(os.getpid(), signal.SIGTERM)
            assert is_asked(stopping), "the others are not"
    finally:
        signal.signal(signal.SIGHUP, before)


CUT = """
import os, sys, threading
from simclr_ddp.data.beton import Beton
from simclr_ddp.system.signals import explain_bus_errors
explain_bus_errors()
data = Beton(sys.argv[1])
os.truncate(sys.argv[1], 100)
reader = threading.Thread(target=data.stored, args=(0,))
reader.start()
reader.join()
"""


def test_a_file_that_is_cut_while_it_is_read(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(images.read_bytes())
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CUT, str(path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: a file was cut or overwritten while this process read it")

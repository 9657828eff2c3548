"""Messages and progress: silent in a library, as lines of rank 0 in a command, as a bar on a terminal."""

import logging
import re
import subprocess
import sys
from typing import Any

import pytest

from simclr_ddp.system import console
from simclr_ddp.system.console import Progress, progress, say, warn
from tests.support.processes import ROOT


class Clock:
    """Time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(console, "time", made)
    return made


def test_a_line_is_printed_as_it_is_and_a_warning_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    say("100 % of {this} %s")
    warn("text")
    warn(None)
    warn("")
    assert capsys.readouterr() == ("100 % of {this} %s\n", "warning: text\n")


def test_other_ranks_are_silent_but_for_lines_of_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    say("text")
    warn("text")
    say("rank 1: text", every_rank=True)
    with Progress(3) as shown:
        shown.advance(3)
    assert capsys.readouterr() == ("rank 1: text\n", "")


def test_a_library_is_silent() -> None:
    code = """
import logging, sys
from simclr_ddp.system.console import Progress, say, shown, warn
sys.stderr.isatty = lambda: True
def all():
    say("line")
    warn("text")
with Progress(3) as progress:
    progress.advance(3)
all()
shown()(all)()
all()
logging.basicConfig(stream=sys.stdout, format="%(name)s %(message)s", level=logging.WARNING)
all()
shown()(all)()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("line\nsimclr_ddp text\nline\n", "warning: text\n" * 2)


def test_writing_that_fails_is_an_error_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        say("nobody reads this")


def test_messages_go_to_the_logger_of_the_package(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("simclr_ddp")
    logger.addHandler(caplog.handler)
    try:
        say("line")
        warn("text")
    finally:
        logger.removeHandler(caplog.handler)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", "line"), ("WARNING", "text")]


def test_a_line_every_ten_seconds_and_one_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress(range(10), 10):
        clock.now += 4
    assert capsys.readouterr().out.splitlines() == [
        "3 of 10 images, 0.25 images/s, 28 s left",
        "6 of 10 images, 0.25 images/s, 16 s left",
        "9 of 10 images, 0.25 images/s, 4 s left",
        "10 of 10 images, 0.25 images/s, 0 s left",
    ]


def test_lines_have_a_title_and_say_how_it_goes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(4000, 1000, unit="steps", title="run")
    for _ in range(12):
        clock.now += 1
        shown.advance(100)
        shown.describe(f"loss {clock.now:.0f}")
    shown.close()
    shown.close()
    assert capsys.readouterr().out.splitlines() == [
        "run: 2,100 of 4,000 steps, 100 steps/s, 19 s left, loss 110",
        "run: 2,200 of 4,000 steps, 100 steps/s, 18 s left, loss 112",
    ]
    with Progress(10):
        pass
    assert capsys.readouterr().out == "", "nothing was done"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown: Any
    with Progress(40, 10, unit="steps", title="run") as shown:
        shown.advance(10)
        shown.describe("loss 3.1")
        say("a line")
    out, bar = capsys.readouterr()
    assert out == "a line\n"
    assert "run:" in bar and re.search(r"20/40 .*loss 3\.1", bar.replace("\r", "\n"))
    assert "\r" in bar and not console.bars


def test_warnings_and_errors_have_a_line_of_their_own_next_to_a_bar() -> None:
    """Those of libraries too, which Python would write behind the bar; one per place and text, as always."""
    code = """
import sys, warnings
from simclr_ddp.config.command import run
from simclr_ddp.config.schema import Visualize
from simclr_ddp.system.console import Progress
sys.stderr.isatty = lambda: True
def command(settings):
    progress = Progress(3, title="run")
    progress.advance()
    for _ in range(2):
        warnings.warn("of a library,\\nin two lines", UserWarning)
    progress.advance()
    raise ValueError("it fails")
sys.exit(run(command, Visualize, "RUN", "", ["RUN"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    lines = done.stderr.decode().replace("\r", "\n").splitlines()
    assert done.returncode == 2
    assert [line for line in lines if "library" in line] == ["warning: of a library, in two lines"]
    assert lines[-1] == "error: it fails (--debug shows where)" and lines[-2].startswith("run:  67%")

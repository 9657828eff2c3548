"""Console output: lines, warnings, progress. As a library the package is silent: it prints only within `shown`."""

import errno
import logging
import os
import re
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from simclr_ddp.system.errors import one_line

_logger = logging.getLogger("simclr_ddp")
_logger.addHandler(logging.NullHandler())


def main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    r"""Return the text with bytes that are not UTF-8, and control characters, as \xe2: any stream can print it."""
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code & 0xFF:02x}" if code < 0x100 or 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def _encodable(text: str, encoding: str) -> str:
    """Return the text with escapes in place of characters that the encoding lacks."""
    text = re.sub("[\udc80-\udcff]", lambda found: _escaped(found[0]), text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, every_rank: bool = False) -> None:
    """Show a line of rank 0, or of each rank."""
    _logger.info(text, extra={"every_rank": every_rank})


def warn(text: str | None) -> None:
    """Show a warning of rank 0, if there is one."""
    if text:
        _logger.warning(text)


@contextmanager
def shown() -> Iterator[None]:
    """Show messages in this context, lines on stdout and warnings on stderr, Python's too. Also a decorator."""
    if _showing():
        yield
        return
    show_warning = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: warn(one_line(message))
    screen, before = _Screen(), (_logger.level, _logger.propagate)
    screen.addFilter(lambda record: main_rank() or getattr(record, "every_rank", False))
    _logger.addHandler(screen)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False  # a library that has set up the root logger would show them again
    try:
        yield
    finally:
        warnings.showwarning = show_warning
        _logger.removeHandler(screen)
        _logger.setLevel(before[0])
        _logger.propagate = before[1]


def _showing() -> bool:
    return any(isinstance(handler, _Screen) for handler in _logger.handlers)


class _Screen(logging.Handler):
    """Writes messages, and raises errors of writing, as `print` does; logging would print a traceback and continue."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        stream = sys.stderr if warning else sys.stdout
        for bar in bars:
            bar.clear()
        encoding = getattr(stream, "encoding", None) or "utf-8"
        try:
            stream.write(_encodable(f"{'warning: ' * warning}{record.getMessage()}\n", encoding))
            stream.flush()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # The terminal has been closed; the run must be saved all the same.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        for bar in bars:
            bar.refresh()


T = TypeVar("T")
EVERY = 10.0  # seconds between two lines of progress
bars: list[tqdm] = []  # on the terminal now


class Progress:
    """Shows the progress of a long task: a bar on a terminal, elsewhere a line every ten seconds and one at the end.

    total  number of units of work, of which `start` were done before
    title  beginning of each line
    shown  whether this process shows the progress; by default rank 0 does
    """

    def __init__(
        self, total: int, start: int = 0, *, unit: str = "images", title: str = "", shown: bool | None = None
    ) -> None:
        shown = _showing() and (main_rank() if shown is None else shown)
        self._total, self._unit, self._title, self._text = total, unit, title, ""
        self._start = self._done = self._last_done = start
        self._begin = self._last = time.perf_counter()
        on_terminal = shown and sys.stderr.isatty()
        self._lines = shown and not on_terminal
        self._bar: tqdm | None = None
        if on_terminal:
            self._bar = tqdm(
                total=total, initial=start, desc=title or None, unit=f" {unit}", smoothing=0.05, dynamic_ncols=True
            )
            bars.append(self._bar)

    def advance(self, count: int = 1) -> None:
        """Record that `count` more units are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._lines and time.perf_counter() - self._last > EVERY:
            self._line()

    def describe(self, text: str) -> None:
        """Set a short text that the bar and all later lines show."""
        self._text = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        if self._bar is not None and self._bar in bars:
            self._bar.close()
            bars.remove(self._bar)
        elif self._lines and self._done != self._last_done:
            self._line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _line(self) -> None:
        now, self._last_done = time.perf_counter(), self._done
        self._last, rate = now, (self._done - self._start) / max(now - self._begin, 1e-9)
        left = f"{duration((self._total - self._done) / max(rate, 1e-9))} left"
        words = [f"{self._done:,} of {self._total:,} {self._unit}", f"{_number(rate)} {self._unit}/s", left, self._text]
        say(f"{self._title}{': ' if self._title else ''}{', '.join(word for word in words if word)}")


def end_bars() -> None:
    """Leave the bars as they are on the terminal, so that the error that ends a process has a line of its own."""
    while bars:
        bars.pop().close()


def progress(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield the items, `count` images, and show the progress."""
    with Progress(count) as shown:
        for item in items:
            yield item
            shown.advance()


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"

"""What a command has printed."""

import pytest


def only_error(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].endswith("(--debug shows where)"), lines
    return lines[0]

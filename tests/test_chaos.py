"""Five faults on a seeded schedule; `make chaos` has a hundred."""

from pathlib import Path

import pytest

from tests import chaos


@pytest.mark.slow
def test_five_faults_leave_no_trace(tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed: make setup builds it")
    report = chaos.chaos(tmp_path, ranks=2, faults=5, seed=2, steps=60)  # each within eight steps
    assert report["faults"] == 5

"""`--help` of the commands of launch, and its imports, take no torch: they run on login nodes, and in seconds."""

import subprocess
import sys

import pytest

from tests.support import processes

IMPORTS = """
import importlib, pkgutil, sys
import launch
for module in ["launch", *(m.name for m in pkgutil.walk_packages(launch.__path__, "launch."))]:
    importlib.import_module(module)
    assert "torch" not in sys.modules, module
"""
HELP = """
import runpy, sys
for command in ("demo", "slurm", "summary", "sweep"):
    sys.argv = [command, "--help"]
    try:
        runpy.run_module(f"launch.{command}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, command
    assert "torch" not in sys.modules, command
"""


@pytest.mark.parametrize("program", [IMPORTS, HELP], ids=["imports", "help"])
def test_torch_is_not_imported(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=processes.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

"""What needs no torch imports none: help, the list of commands, and the package itself."""

import json
import subprocess
import sys

import pytest

import simclr_ddp
from simclr_ddp.__main__ import about, commands, files
from simclr_ddp.__main__ import main as simclr
from tests.support.processes import ROOT

HEAVY = {"torch", "torchvision", "numpy", "matplotlib", "PIL", "numba"}
HELP = """
import json, runpy, sys
status = 0
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as ended:
    status = ended.code
print(json.dumps([status, sorted(sys.modules)]))
"""


def fresh(code: str, *arguments: str) -> list[str]:
    """The lines that a fresh process of that code prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", commands("simclr_ddp"))
def test_the_help_of_a_command_needs_no_torch(name: str) -> None:
    *text, last = fresh(HELP, f"simclr_ddp.{name}", "--help")
    status, modules = json.loads(last)
    assert status == 0 and "options:" in text
    assert not HEAVY & set(modules)


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), ("--version",), ("write_dataset", "--help"), ("slurm", "--help"), ("no_command",)]
)
def test_the_package_as_a_command_needs_no_torch(arguments: tuple[str, ...]) -> None:
    *text, last = fresh(HELP, "simclr_ddp", *arguments)
    status, modules = json.loads(last)
    assert status == (2 if arguments == ("no_command",) else 0)
    assert not HEAVY & set(modules)
    if arguments in ((), ("--help",)):
        for name, path in files().items():
            assert f"{name} {about(path)}" in [" ".join(line.split()) for line in text]
    if arguments == ("--version",):
        assert text == [f"simclr_ddp {simclr_ddp.__version__}"]
    if arguments == ("write_dataset", "--help"):
        assert any(line.startswith("usage: python -m simclr_ddp.write_dataset SOURCE OUT") for line in text)


def test_what_the_launchers_ask_of_the_package_needs_no_torch() -> None:
    names = ["simclr_ddp", "simclr_ddp.config.command", "simclr_ddp.config.schema", "simclr_ddp.system.signals"]
    names += ["simclr_ddp.system.console", "simclr_ddp.system.files", "simclr_ddp.runs.directory"]
    names += ["simclr_ddp.system.machine", "simclr_ddp.system.errors", "simclr_ddp.runs.metrics"]
    names += ["simclr_ddp.config.options", "simclr_ddp.training.plan", "simclr_ddp.runs.evaluations"]
    (last,) = fresh(f"import json, sys, {', '.join(names)}; print(json.dumps(sorted(sys.modules)))")
    assert not HEAVY & set(json.loads(last))


def test_public_names() -> None:
    for name in simclr_ddp.__all__:
        assert getattr(simclr_ddp, name).__name__ == name and name in dir(simclr_ddp)
    assert not set(commands("simclr_ddp")) & set(simclr_ddp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Kernel'"):
        simclr_ddp.Kernel  # noqa: B018
    with pytest.raises(ImportError):
        from simclr_ddp import Kernel  # noqa: F401


def test_a_command_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert simclr(["pretrian"]) == 2
    assert capsys.readouterr().err == "error: COMMAND=pretrian: there is no such command; did you mean pretrain?\n"
    assert all(about(path) and "`" not in about(path) for path in files().values())
    assert {"slurm", "sweep", "summary"} <= set(commands("launch"))

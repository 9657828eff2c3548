"""Imports go one way: read from the source, so that an import inside a function counts too.

launch, benchmarks -> commands -> training | evaluation | plots -> runs -> losses | models | data
                   -> distributed | config -> system
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source import parsed

ROOT = Path(__file__).parent.parent
PACKAGE = "simclr_ddp"
LAYERS = (
    {"system"},
    {"distributed", "config"},
    {"losses", "models", "data"},
    {"runs"},
    {"training", "evaluation", "plots"},
)
LAYER = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
COMMANDS = len(LAYERS)
# Modules below the commands that may know the options; all others take plain arguments.
KNOW_CONFIG = {
    *(
        f"simclr_ddp.training.{name}"
        for name in ("components", "finetuning", "lifecycle", "plan", "resume", "state", "preflight")
    ),
    *(f"simclr_ddp.training.{name}" for name in ("examination", "forecast", "parity")),  # bodies of doctor and verify
    "simclr_ddp.runs.directory",
    "simclr_ddp.runs.encoder",
}
FILES = sorted(path for folder in (PACKAGE, "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name or None) of each import statement of a file, those inside functions too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full, None) if full in MODULES else (node.module or "", alias.name)


def level(module: str) -> int:
    """Position of a module of the package in the layers; commands are above all folders."""
    _, _, rest = module.partition(".")
    return LAYER.get(rest.split(".")[0], COMMANDS)


def is_command(module: str) -> bool:
    return module.startswith(f"{PACKAGE}.") and level(module) == COMMANDS


INSIDE = [module for module in MODULES if module.startswith(f"{PACKAGE}.")]


@pytest.mark.parametrize("module", INSIDE)
def test_a_module_imports_only_from_lower_layers_and_its_own_folder(module: str) -> None:
    for imported, _ in imports(MODULES[module]):
        if imported.startswith(f"{PACKAGE}."):
            same_folder = not is_command(module) and module.split(".")[1] == imported.split(".")[1]
            assert level(imported) < level(module) or same_folder, f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_no_command_of_the_package_is_imported(module: str) -> None:
    for imported, _ in imports(MODULES[module]):
        assert not is_command(imported), f"{module} imports the command {imported}"


def test_no_circle() -> None:
    graph = {
        module: {imported for imported, _ in imports(path) if imported in MODULES and imported != module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", INSIDE)
def test_options_are_known_only_where_runs_are_made(module: str) -> None:
    if is_command(module) or module in KNOW_CONFIG or module.startswith("simclr_ddp.config"):
        return
    for imported, _ in imports(MODULES[module]):
        assert not imported.startswith("simclr_ddp.config"), f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_ffcv_and_torch_distributed_have_one_user(module: str) -> None:
    if module.startswith("benchmarks"):
        return
    for imported, name in imports(MODULES[module]):
        if imported.split(".")[0] == "ffcv":
            assert module == "simclr_ddp.data.ffcv_loader", f"{module} imports {imported}"
        if imported.startswith("torch.distributed") or (imported, name) == ("torch", "distributed"):
            assert module.startswith("simclr_ddp.distributed."), f"{module} imports {imported}"


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("launch")])
def test_variables_of_slurm_are_read_in_launch_only(module: str) -> None:
    tree = parsed(MODULES[module])
    named = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert not [text for text in named if re.fullmatch(r"SLURM_\w+", text)], module


def private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def private_names_reached(path: Path) -> Iterator[str]:
    """Private names of the project's modules that a file imports, reads or patches."""
    tree, modules = parsed(path), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if private(alias.name) and (node.module or "").split(".")[0] in (PACKAGE, "launch", "benchmarks"):
                    yield full
                if full in MODULES:
                    modules[alias.asname or alias.name] = full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and private(node.attr):
            if node.value.id in modules:
                yield f"{modules[node.value.id]}.{node.attr}"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr" and len(node.args) > 1:
            owner, name = node.args[0], getattr(node.args[1], "value", None)
            if isinstance(owner, ast.Name) and owner.id in modules and private(name):
                yield f"{modules[owner.id]}.{name}"


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_is_reached_from_another_module(path: Path) -> None:
    assert list(private_names_reached(path)) == []


def test_a_job_starts_without_the_package() -> None:
    """It runs in every task before its rank does, perhaps while the package is only being installed."""
    for imported, _ in imports(MODULES["launch.cluster.job"]):
        assert not imported.startswith(PACKAGE), f"launch.cluster.job imports {imported}"

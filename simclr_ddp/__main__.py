"""All commands: `simclr COMMAND ...` is `python -m simclr_ddp.COMMAND ...`, or `python -m launch.COMMAND ...`"""

import ast
import difflib
import runpy
import sys
from pathlib import Path

from simclr_ddp import __version__

PACKAGES = {"simclr_ddp": Path(__file__).parent, "launch": Path(__file__).parents[1] / "launch"}


def main(argv: list[str] | None = None) -> int:
    """Run a command, or list all of them; returns the exit status."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(listing())
        return 0
    if name == "--version":
        print(f"simclr_ddp {__version__}")
        return 0
    known = files()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        print(f"error: COMMAND={name}: there is no such command; {hint}", file=sys.stderr)
        return 2
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        runpy.run_module(f"{known[name].parent.name}.{name}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    return 0


def files() -> dict[str, Path]:
    """Files of the commands by name: the modules at the top of the two packages."""
    found = [path for folder in PACKAGES.values() for path in sorted(folder.glob("*.py"))]
    return {path.stem: path for path in found if not path.stem.startswith("_")}


def commands(package: str) -> list[str]:
    """Names of the commands of a package."""
    return [name for name, path in files().items() if path.parent == PACKAGES[package]]


def listing() -> str:
    width = max(map(len, files()))
    lines = [f"  {name:<{width}}  {about(path)}" for name, path in files().items()]
    program = "simclr" if Path(sys.argv[0]).name == "simclr" else "python -m simclr_ddp"
    usage = f"usage: {program} COMMAND [argument ...] [key=value ...]"
    return "\n".join([usage, "", *lines, "", f"{program} COMMAND --help lists the options of a command"])


def about(path: Path) -> str:
    """The first sentence of a command's docstring, which is read and not imported."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n")[0].partition(": `")[0].partition(" `python")[0].rstrip(" :")


if __name__ == "__main__":
    sys.exit(main())

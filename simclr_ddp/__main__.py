"""The commands of simclr_ddp: `simclr COMMAND ...` is the same as `python -m simclr_ddp.COMMAND ...`"""

import ast
import difflib
import runpy
import sys
from pathlib import Path

from simclr_ddp import __version__

FOLDER = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Run a command, or list all of them; returns the exit status."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(listing())
        return 0
    if name == "--version":
        print(f"simclr_ddp {__version__}")
        return 0
    known = commands()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        print(f"error: COMMAND={name}: there is no such command; {hint}", file=sys.stderr)
        return 2
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        runpy.run_module(f"simclr_ddp.{name}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    return 0


def commands() -> list[str]:
    """Names of the commands: the modules at the top of the package."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def listing() -> str:
    width = max(map(len, commands()))
    lines = [f"  {name:<{width}}  {about(name)}" for name in commands()]
    program = "simclr" if Path(sys.argv[0]).name == "simclr" else "python -m simclr_ddp"
    usage = f"usage: {program} COMMAND [argument ...] [key=value ...]"
    return "\n".join([usage, "", *lines, "", f"{program} COMMAND --help lists the options of a command"])


def about(name: str) -> str:
    """The first sentence of a command's docstring, which is read and not imported."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    return text.partition("\n")[0].partition(": `")[0].partition(" `python")[0].rstrip(" :")


if __name__ == "__main__":
    sys.exit(main())

"""The code as it was when a job was submitted, which the job runs however long it waits and however often it starts."""

import os
import re
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("simclr_ddp", "launch")
COPIES = re.compile(r"(^|/)slurm/\.?(code|config)-[^/]*/")  # of runs in the checkout, complete or being written


def sources() -> dict[Path, bytes]:
    """{path within the snapshot: content} of the code and its commit."""
    files = {path.relative_to(ROOT): path.read_bytes() for path in _sources()}
    return files | {Path("COMMIT"): _git("describe", "--always", "--dirty", "--abbrev=12")}


def configs(arguments: list[str]) -> dict[Path, bytes]:
    """{path of the copy: content} of the config files among the arguments."""
    return {copy: Path(arguments[i]).read_bytes() for i, copy in _copies(arguments).items()}


def with_copies(arguments: list[str], folder: Path) -> list[str]:
    """The arguments, where config files are replaced by their copies in the folder."""
    copies = _copies(arguments)
    return [str(folder / copies[i]) if i in copies else argument for i, argument in enumerate(arguments)]


def _copies(arguments: list[str]) -> dict[int, Path]:
    """{position: path of the copy} of the arguments that are config files; the name stays, since it names the run."""
    paths = enumerate(map(Path, arguments))
    return {i: Path(str(i), p.name) for i, p in paths if p.suffix in (".yaml", ".yml") and p.is_file()}


def digest(files: dict[Path, bytes]) -> str:
    """Twelve digits that identify the files."""
    total = sha256()
    for path, content in sorted(files.items()):
        total.update(f"{path} {len(content)}\n".encode() + content)
    return total.hexdigest()[:12]


def write(files: dict[Path, bytes], code: Path) -> None:
    """Write the files into the folder `code`, which is complete as soon as it exists."""
    if code.is_dir():
        return
    if code.is_symlink():  # to a run directory that is gone
        code.unlink()
    temporary = code.with_name(f".{code.name}.{os.getpid()}.tmp")
    for path, content in files.items():
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        (temporary / path).write_bytes(content)
    try:
        temporary.rename(code)
    except OSError:  # another submission was faster
        shutil.rmtree(temporary)
        if not code.is_dir():
            raise


def link(code: Path, target: Path) -> None:
    """Make `code` a link to the snapshot `target`, which is equal, unless `code` exists."""
    if not code.is_dir():
        code.unlink(missing_ok=True)
        code.symlink_to(os.path.relpath(target.resolve(), code.parent.resolve()))


def _sources() -> list[Path]:
    """Files of code and settings that git tracks, and new Python and shell files; of an installed package, its files.

    What runs write into the checkout is left out: their settings, which are new YAML files, and copies of the code.
    """
    tracked = _git("ls-files", "-cz", "--", "*.py", "*.sh", "*.yaml", "*.html", "*.js")
    new = _git("ls-files", "-oz", "--exclude-standard", "--", "*.py", "*.sh")
    found = [ROOT / name for name in (tracked + new).decode().split("\0") if name and (ROOT / name).is_file()]
    if not any(path.is_relative_to(ROOT / PACKAGES[0]) for path in found):
        patterns = ("*.[ps][yh]", "plots/atlas.*")
        found = [path for package in PACKAGES for pattern in patterns for path in (ROOT / package).rglob(pattern)]
    return [path for path in found if not COPIES.search(path.relative_to(ROOT).as_posix())]


def _git(*arguments: str) -> bytes:
    """git's output for the checkout that holds this file; empty without one."""
    if not (ROOT / ".git").exists():
        return b""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return b""

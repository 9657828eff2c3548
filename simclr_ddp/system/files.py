"""Files that are either complete or absent, regular files only, and a lock that one process holds."""

import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def not_a_file(path: Path) -> str:
    """Return "" for a regular file, possibly behind links, else what is wrong, such as "is a named pipe, not a file".

    Opening anything else may wait for ever (a named pipe) or never end (/dev/zero).
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is a link to nothing" if path.is_symlink() else "does not exist"
    return "" if stat.S_ISREG(mode) else f"is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file"


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file with what `write(temporary path)` writes, so that it always has the old or the new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        plain_permissions(temporary)  # safetensors writes files that only their owner can read
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def plain_permissions(path: Path) -> None:
    """Give a file the permissions of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock file, creating it and its folder if needed; yield whether the file system has locks.

    Raises BlockingIOError if another process holds it, and any other OSError if it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            # A record lock ends with this process. A flock would stay in its decoding processes, which end only seconds
            # after a kill -9, so a run that is restarted at once would be refused.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            known = True
        except (BlockingIOError, PermissionError) as error:
            raise BlockingIOError(f"{path} is held by another process") from error
        except OSError:
            known = False
        yield known


def short_hash(values: dict[str, Any]) -> str:
    """Return eight hexadecimal digits that depend on the values, not on their order; used in folder names."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

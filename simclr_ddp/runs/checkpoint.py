"""Checkpoints: atomic writing, checked reading, and search for the newest valid one.

A checkpoint is written under a temporary name in the same directory, flushed to disk, and renamed. torch.save writes a
zip archive, whose CRC-32 per record detects damaged files. Only tensors and plain values are stored, so everything
loads with weights_only=True. Equal states give equal bytes.
"""

import errno
import os
import re
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from simclr_ddp.system.errors import one_line
from simclr_ddp.system.files import not_a_file, replace_atomically

_NAME = re.compile(r"step-(\d{8})\.pt")
KEPT_DAMAGED = 2  # damaged checkpoints to keep for diagnosis; each is as large as a valid one


def save(
    folder: Path,
    state: dict[str, Any],
    step: int,
    keep_last: int,
    keep: Callable[[int], bool] = lambda step: False,
) -> Path:
    """Write step-NNNNNNNN.pt, point `latest` at it, and delete all but the newest keep_last. Rank 0 only.

    keep  maps the step of a checkpoint to whether it is never deleted
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    state = _with_interned_texts(state)
    replace_atomically(path, lambda temporary: torch.save(state, temporary))
    _point_latest_at(path)
    for old in all_steps(folder)[:-keep_last]:
        if not keep(int(old.stem.removeprefix("step-"))):
            old.unlink()
    return path


def _with_interned_texts(value: Any) -> Any:
    """The same dicts, lists and values, in which equal texts are one object.

    Pickle writes a text anew where it is another object, so a state that was loaded would give other bytes.
    """
    if type(value) is str:
        return sys.intern(value)
    if isinstance(value, dict):
        return {_with_interned_texts(k): _with_interned_texts(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_with_interned_texts, value))
    return value


def trial_write(folder: Path, size: int) -> str:
    """Write and delete a file of `size` bytes in the folder of checkpoints; return an error message or ""."""
    trial = folder / ".trial.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with trial.open("wb", buffering=0) as file:
            for first in range(0, size, 1 << 20):
                file.write(bytes(min(size - first, 1 << 20)))
            os.fsync(file.fileno())
    except OSError as error:
        return (
            f"a checkpoint of {size / 1e6:,.0f} MB can't be written to {folder} ({error.strerror}); "
            "free space there, or choose another place with run_dir=..."
        )
    finally:
        with suppress(OSError):  # the cause of the failure may also prevent deletion
            trial.unlink(missing_ok=True)
    return ""


def all_steps(folder: Path) -> list[Path]:
    """Checkpoint files in the order of their steps, valid or damaged."""
    return sorted(p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint; ValueError if the file is damaged or foreign, OSError if it can't be read at present.

    It is opened once, so it is read to its end even if the run that wrote it deletes it meanwhile.
    """
    try:
        if fault := not_a_file(path):
            raise ValueError(f"it {fault}")
        with path.open("rb") as file:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"record {damaged} fails its checksum")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "step" not in state or "model" not in state:
            raise ValueError("it is not a training checkpoint")
    except Exception as error:  # errors of zip, pickle and torch have no common class
        transient = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.ENOENT)
        if transient or isinstance(error, MemoryError):
            raise  # the file may be valid and must not be renamed because a disk is unavailable
        raise ValueError(f"checkpoint {path} can't be used: {one_line(error, 200)}") from error
    return state


def trained_on(folder: Path) -> str:
    """Content hash of the training images, from the newest checkpoint that can be read; "" if there is none."""
    for path in reversed(all_steps(folder)):
        with suppress(Exception):  # errors of zip, pickle and torch have no common class
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads no tensor
            return str(saved["identity"]["data fingerprint"])
    return ""


def newest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """Find the newest checkpoint that loads; rank 0 only.

    Newer damaged checkpoints are reported and renamed to *.damaged, of which the newest two are kept.
    """
    for left in folder.glob(".step-*.tmp"):  # left by a killed save
        left.unlink()
    for path in reversed(all_steps(folder)):
        try:
            load(path)
        except ValueError as error:
            path.rename(path.with_suffix(".pt.damaged"))
            report(f"{error}; renamed to {path.name}.damaged, resuming from the previous checkpoint")
            for old in sorted(folder.glob("step-*.pt.damaged"))[:-KEPT_DAMAGED]:
                old.unlink()
        else:
            _point_latest_at(path)
            return path
    (folder / "latest").unlink(missing_ok=True)
    return None


def _point_latest_at(path: Path) -> None:
    latest = path.with_name("latest")
    if not latest.exists() or latest.read_text().strip() != path.name:
        replace_atomically(latest, lambda temporary: temporary.write_text(path.name + "\n"))

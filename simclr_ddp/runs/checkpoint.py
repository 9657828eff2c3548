"""Checkpoints that are whole or not there, the newest valid one, and the encoder's export.

A checkpoint is written under a temporary name in the same directory, flushed to the disk, and renamed. torch.save
writes a zip archive, whose per-record CRC-32 tells a damaged file from a whole one. Nothing but tensors and plain
values is stored: everything loads with weights_only=True.
"""

import errno
import os
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

_NAME = re.compile(r"step-(\d{8})\.pt")
KEPT_DAMAGED = 2  # they may still tell what damaged them, but are as large as whole ones


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write(temporary path)` make the new content, then put it in place of path: old or new, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save(
    folder: Path,
    state: dict[str, Any],
    step: int,
    keep_last: int,
    keep: Callable[[int], bool] = lambda step: False,
) -> Path:
    """Write step-NNNNNNNN.pt and point `latest` at it; then drop all but the newest keep_last. Rank 0 only.

    keep  (step of a checkpoint) -> whether it stays for good
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    replace_atomically(path, lambda temporary: torch.save(state, temporary))
    _point_latest_at(path)
    for old in all_steps(folder)[:-keep_last]:
        if not keep(int(old.stem.removeprefix("step-"))):
            old.unlink()
    return path


def trial_write(folder: Path, size: int) -> str:
    """Write and drop a file of that many bytes where checkpoints will be; what is wrong, in a sentence, or ""."""
    trial = folder / ".trial.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with trial.open("wb", buffering=0) as file:
            for first in range(0, size, 1 << 20):
                file.write(bytes(min(size - first, 1 << 20)))
            os.fsync(file.fileno())
    except OSError as error:
        return (
            f"a checkpoint of {size / 1e6:,.0f} MB can't be written to {folder} ({error.strerror}): "
            "make room there, or run_dir=... takes another place"
        )
    finally:
        with suppress(OSError):  # what kept it from being written may keep it from being dropped
            trial.unlink(missing_ok=True)
    return ""


def all_steps(folder: Path) -> list[Path]:
    """Checkpoint files in the order of their steps, whole or damaged."""
    return sorted(p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint; ValueError if the file is damaged or not ours, OSError if it can't be read now."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"record {damaged} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "step" not in state or "model" not in state:
            raise ValueError("it is no training checkpoint")
    except Exception as error:  # zip's, pickle's and torch's errors have no common class
        passing = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.ENOENT)
        if passing or isinstance(error, MemoryError):
            raise  # it says nothing of the file, which must not be put aside because a disk is away
        raise ValueError(f"checkpoint {path} can't be used: {' '.join(str(error).split())[:200]}") from error
    return state


def newest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that loads; rank 0 only.

    Damaged ones after it are reported and renamed to *.damaged, of which the newest two stay.
    """
    for left in folder.glob(".step-*.tmp"):  # of a save that was killed
        left.unlink()
    for path in reversed(all_steps(folder)):
        try:
            load(path)
        except ValueError as error:
            path.rename(path.with_suffix(".pt.damaged"))
            report(f"{error}; kept aside as {path.name}.damaged, going on from the one before")
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


def export_encoder(path: Path, encoder: nn.Module, metadata: dict[str, str]) -> None:
    """The encoder alone, torchvision key names, as safetensors; metadata says how to build and feed it."""
    tensors: dict[str, Tensor] = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    replace_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

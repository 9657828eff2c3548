"""Cache of representations: one .safetensors file for each encoder, data set and way to compute them.

A file holds the tensor `h`, what it was computed from (its key), and a checksum. A file that is damaged, or that has
another key, is not used but replaced. Deleting the files is safe. Files are memory maps while they are computed and
read, so that representations may be larger than the memory.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simclr_ddp.system import console
from simclr_ddp.system.errors import one_line
from simclr_ddp.system.files import not_a_file, plain_permissions, short_hash, sync

FOLDER = "representations"  # in a run directory
DTYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_LEFT_BEHIND = 24 * 3600  # seconds after which an unfinished file is that of a killed process


def path_of(folder: Path, name: str, key: dict[str, Any]) -> Path:
    """File of the representations with this key; `name` is a readable beginning, such as that of the data set."""
    return folder / FOLDER / f"{name[:40]}-{short_hash(key)}.safetensors"


def read(path: Path, key: dict[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Return the representations h of the file, mapped into memory and writable without a change of the file.

    None if there is no file; with a warning if it is damaged or holds something else.
    """
    if not path.exists():
        return None
    try:
        return _mapped(path, key, shape)
    except (ValueError, OSError, SafetensorError) as error:
        console.warn(f"{path}: {one_line(error, 200)}; the representations are computed again")
        return None


def _mapped(path: Path, key: dict[str, Any], shape: tuple[int, int]) -> Tensor:
    if fault := not_a_file(path):
        raise ValueError(fault)
    with safe_open(path, "np") as opened:
        metadata = opened.metadata() or {}
    known = json.loads(metadata.get("key", "null"))
    if known != json.loads(json.dumps(key)):
        names = [name for name in key if not isinstance(known, dict) or known.get(name) != key[name]]
        raise ValueError(f"holds the representations of other {', '.join(names) or 'settings'}")
    with path.open("rb") as file:
        offset = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(offset - 8))
    if set(header) != {"__metadata__", "h"} or header["h"]["dtype"] not in DTYPES:
        raise ValueError("does not hold one tensor h of float32 or float64")
    if header["h"]["shape"] != list(shape):
        raise ValueError(f"holds h of shape {header['h']['shape']} instead of {list(shape)}")
    h = np.memmap(path, DTYPES[header["h"]["dtype"]], "c", offset, (shape[0], shape[1]))
    if sha256(h.data).hexdigest() != metadata.get("sha256"):
        raise ValueError("is damaged: its checksum is another")
    return torch.from_numpy(h)


@contextmanager
def filling(path: Path, key: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield representations [n, D] to fill in a temporary file, which is then completed; not if some are not finite.

    If there is no room, warn and yield memory.
    """
    numbers = {torch.float32: "F32", torch.float64: "F64"}[dtype]
    try:
        temporary = _reserve(path, len(_header(key, shape, numbers, "")), shape[0] * shape[1] * dtype.itemsize)
    except OSError as error:
        _warn(path.parent, one_line(error, 80))
        yield torch.zeros(shape, dtype=dtype)
        return
    try:
        h = np.memmap(temporary, DTYPES[numbers], "r+", len(_header(key, shape, numbers, "")), shape)
        yield torch.from_numpy(h)
        if all(np.isfinite(h[first : first + 8192]).all() for first in range(0, len(h), 8192)):
            _complete(temporary, path, h, _header(key, shape, numbers, sha256(h.data).hexdigest()))
    finally:
        temporary.unlink(missing_ok=True)


def _complete(temporary: Path, path: Path, h: np.memmap, header: bytes) -> None:
    try:
        with temporary.open("r+b") as file:
            file.write(header)
        h.flush()
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        _warn(path.parent, one_line(error, 80))


def _header(key: dict[str, Any], shape: tuple[int, int], numbers: str, checksum: str) -> bytes:
    """Beginning of a .safetensors file: the length of the JSON that follows, and the JSON."""
    size = shape[0] * shape[1] * DTYPES[numbers].itemsize
    metadata = {"key": json.dumps(key), "sha256": checksum.rjust(64)}
    header = {"__metadata__": metadata, "h": {"dtype": numbers, "shape": shape, "data_offsets": (0, size)}}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _reserve(path: Path, header: int, numbers: int) -> Path:
    """Create a temporary file beside the path, of `header` + `numbers` bytes. Raises OSError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process has removed it
            if time.time() - old.stat().st_mtime > _LEFT_BEHIND:
                old.unlink()
    descriptor, name = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    try:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(descriptor, 0, header + numbers)
        os.truncate(descriptor, header + numbers)
        plain_permissions(Path(name))
    except OSError:
        Path(name).unlink()
        raise
    finally:
        os.close(descriptor)
    return Path(name)


@lru_cache
def _warn(folder: Path, why: str) -> None:
    """Warn, once for each folder."""
    console.warn(
        f"representations are not kept in {folder} ({why}), so the next evaluation computes them again; free space "
        "there, or set cache=false"
    )

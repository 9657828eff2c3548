"""Cache of representations: one .safetensors file for each encoder, data set and way to compute them.

A file holds the tensor `h`, what it was computed from (its key), and a checksum. A file that is damaged, or that has
another key, is not used but replaced. Deleting the files is safe.
"""

import json
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simclr_ddp.runs.encoder import export_tensors
from simclr_ddp.system import console
from simclr_ddp.system.errors import one_line
from simclr_ddp.system.files import not_a_file, short_hash

FOLDER = "representations"  # in a run directory
DTYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


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


def write(path: Path, key: dict[str, Any], h: Tensor) -> None:
    """Write representations [n, D]; if there is no room, warn and write nothing."""
    if not all(bool(part.isfinite().all()) for part in h.split(8192)):
        return
    metadata = {"key": json.dumps(key), "sha256": sha256(h.numpy().data).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        export_tensors(path, {"h": h}, metadata)
    except OSError as error:
        _warn(path.parent, one_line(error, 80))


@lru_cache
def _warn(folder: Path, why: str) -> None:
    """Warn, once for each folder."""
    console.warn(
        f"representations are not kept in {folder} ({why}), so the next evaluation computes them again; free space "
        "there, or set cache=false"
    )

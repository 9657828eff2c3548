"""Files as versions before class names were inside them wrote them, and as FFCV's writer does."""

import hashlib
import json
from pathlib import Path

import numpy as np

from simclr_ddp.data import beton


def without_description(path: Path) -> bytes:
    """The bytes of a file of ours without what FFCV's writer would not write."""
    data = bytearray(path.read_bytes())
    header = np.frombuffer(data, beton.HEADER, 1)
    end = int(header["allocations"][0])
    assert data[end - 8 : end] == beton.MARK
    header["allocations"] = end - 16 - int.from_bytes(data[end - 16 : end - 8], "little")
    return bytes(data[: int(header["allocations"][0])] + data[end:])


def as_before(path: Path) -> Path:
    """Rewrite a file and its sidecar, which then alone names its classes."""
    path.write_bytes(without_description(path))
    info = json.loads(beton.sidecar(path).read_text())
    info |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    beton.sidecar(path).write_text(json.dumps(info))
    return path

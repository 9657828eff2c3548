"""One objective of each kind."""

import math
from typing import Any

from simclr_ddp import KernelInfoNCE

MEMBERS: dict[str, dict[str, Any]] = {
    "cosine": {},
    "gaussian": {"norm_p": 3.0},
    "laplacian": {},
    "laplacian, maximum norm": {"norm_p": math.inf},
    "laplacian, precision bf16": {"precision": "bf16"},
    "laplacian, sent in bf16": {"gather": "bf16"},
    "exponential": {"gamma": 0.5},
    "exponential, gamma 3": {"gamma": 3.0},
    "simple_sum": {},
    "simple_sum, losses": {"mix_level": "loss"},
    "concat_sum": {},
    "concat_sum, losses": {"mix_level": "loss"},
    "arccos": {"order": 1},
    "arccos, order 2": {"order": 2},
    "arccos, order 3": {"order": 3},
    "spectral": {},
    "gaussian of the 1-norm": {"distance_p": 1.0},
    "laplacian of the 1.5-norm": {"distance_p": 1.5},
    "laplacian of the maximum norm": {"distance_p": math.inf},
}


def member(name: str, temperature: float = 0.1) -> KernelInfoNCE:
    return KernelInfoNCE(name.split(",")[0].split(" of ")[0], temperature, **MEMBERS[name])

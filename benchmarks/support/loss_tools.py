"""The losses that `benchmarks.loss` compares, by name, and the number of operations and bytes of ours."""

import math
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.support.peers import FOLDER
from benchmarks.support.rows_only import RowsOnly
from simclr_ddp import KernelInfoNCE
from simclr_ddp.distributed import collectives
from simclr_ddp.losses import tiled, tiling
from simclr_ddp.losses.kernels import tile_kernel

Loss = Callable[[Tensor, Tensor], Tensor]

TEMPERATURE = 0.1
# Arguments of KernelInfoNCE; a Gaussian at twice the temperature is the cosine.
KERNELS: dict[str, dict[str, Any]] = {
    "cosine": {"kernel": "cosine", "temperature": TEMPERATURE},
    "gaussian": {"kernel": "gaussian", "temperature": 2 * TEMPERATURE},
    "laplacian": {"kernel": "laplacian", "temperature": TEMPERATURE},
    "exponential": {"kernel": "exponential", "temperature": TEMPERATURE, "gamma": 0.5},
    "simple_sum": {"kernel": "simple_sum", "temperature": TEMPERATURE},
    "concat_sum": {"kernel": "concat_sum", "temperature": TEMPERATURE},
    "arccos": {"kernel": "arccos", "temperature": 0.5},
    "spectral": {"kernel": "spectral"},
    "laplacian p=1": {"kernel": "laplacian", "temperature": 1.0, "distance_p": 1.0},
}
OURS = {f"ours {kernel}": kernel for kernel in KERNELS} | {"ours cosine bf16": "cosine"}
PEERS = {
    "rows only": "cosine",
    "plain": "cosine",
    "lightly": "cosine",
    "metric learning": "cosine",
    "solo-learn": "cosine",
    "Kernel-InfoNCE 2": "cosine",
    "Kernel-InfoNCE 1": "laplacian",
}
PACKAGES = {"lightly": "lightly", "metric learning": "pytorch-metric-learning"}
COMPARED = OURS | PEERS  # {name of a loss: name of its kernel}
# Bytes per pair, as `peak_memory` measured them at 2,048 images of 128 numbers.
PEAK = {"plain": 14, "lightly": 19, "solo-learn": 18, "Kernel-InfoNCE 2": 21, "Kernel-InfoNCE 1": 21}


def make(name: str) -> Loss:
    """Build the loss of two views' raw projections [n, d]; ours, `rows only` and lightly's work over all ranks."""
    if name in OURS:
        return KernelInfoNCE(**KERNELS[OURS[name]], precision="bf16" if name.endswith("bf16") else "fp32")
    others: dict[str, Callable[[], Loss]] = {
        "rows only": lambda: RowsOnly(TEMPERATURE),
        "plain": lambda: plain,
        "lightly": _lightly,
        "metric learning": _metric_learning,
        "solo-learn": lambda: solo_learn,
        "Kernel-InfoNCE 2": lambda: kernel_infonce(2, 2 * TEMPERATURE),
        "Kernel-InfoNCE 1": lambda: kernel_infonce(1, TEMPERATURE),
    }
    return others[name]()


def missing(name: str) -> bool:
    """Return whether the loss needs a package that is not installed."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return name in PACKAGES and find_spec(PACKAGES[name].replace("-", "_")) is None


def matrix_bytes(name: str, images: int) -> int:
    """Estimate the bytes of the matrices that a loss holds at once.

    They contain 2N x 2N pairs, in `metric learning` each positive with each negative; ours and `rows only` have none.
    """
    if name in OURS or name == "rows only":
        return 0
    pairs = (2 * images) ** 2
    return 17 * 2 * images * pairs if name == "metric learning" else PEAK[name] * pairs


def package_versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, package in PACKAGES.items():
        try:
            found[package] = None if missing(name) else version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def plain(y_a: Tensor, y_b: Tensor) -> Tensor:
    """Compute the cross-entropy over the matrix of all similarities, with its diagonal masked."""
    z = F.normalize(torch.cat([y_a, y_b]), dim=1)
    logits = (z @ z.T / TEMPERATURE).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(y_a)))


def solo_learn(y_a: Tensor, y_b: Tensor) -> Tensor:
    """Compute solo-learn's formula: exponentials without a shift, and masks of positives and negatives."""
    z = F.normalize(torch.cat([y_a, y_b]), dim=1)
    similarities = torch.exp(z @ z.T / TEMPERATURE)
    number = torch.arange(len(y_a), device=z.device).repeat(2)
    positive = (number[:, None] == number).float().fill_diagonal_(0)
    negative = (number[:, None] != number).float()
    positives = (similarities * positive).sum(1)
    return -torch.log(positives / (positives + (similarities * negative).sum(1))).mean()


def kernel_infonce(gamma: float, temperature: float) -> Loss:
    """Build Kernel-InfoNCE's formula: kernels and their row sums, without logarithms (code of arXiv 2303.15103)."""

    def loss(y_a: Tensor, y_b: Tensor) -> Tensor:
        z = F.normalize(torch.cat([y_a, y_b]), dim=1)
        kernels = torch.exp(-torch.cdist(z, z).pow(gamma) / temperature)
        others = (kernels.sum(1) - kernels.diagonal()).clamp(min=1e-6)
        positives = torch.cat([kernels.diagonal(len(y_a)), kernels.diagonal(-len(y_a))])
        return -torch.log(positives / (others + 1e-6)).mean()

    return loss


def _lightly() -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(TEMPERATURE, gather_distributed=collectives.world_size() > 1)


def _metric_learning() -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    theirs = NTXentLoss(temperature=TEMPERATURE)
    return lambda y_a, y_b: theirs(torch.cat([y_a, y_b]), torch.arange(len(y_a), device=y_a.device).repeat(2))


# --- counted work ---------------------------------------------------------------------------------------------------


def work(name: str, images: int, width: int) -> tuple[int, int] | None:
    """Count (operations of matrix products, bytes between memory and cache) of one forward and backward pass of ours.

    An addition or multiplication is one operation. Only bytes are counted that no cache of a few tiles can avoid: each
    tile's vectors once per pass, the gradient's rows read and written, and tiles that are kept. Returns None for other
    tools' losses and for those whose time is not spent on products.
    """
    if name not in OURS:
        return None
    rows = 2 * images
    if OURS[name] == "spectral":  # two products forward, each with two more backward
        return 6 * 2 * rows * width**2, 4 * (6 * rows * width + 6 * width**2)
    loss = make(name)
    assert isinstance(loss, KernelInfoNCE)
    tiles = tiling.tiles(images, images, 0, True)
    areas = [(t.rows.stop - t.rows.start) * (t.columns.stop - t.columns.start) for t in tiles]
    edges = [(t.rows.stop - t.rows.start) + (t.columns.stop - t.columns.start) for t in tiles]
    kernel = tile_kernel(loss.objective)
    if kernel.of_vectors:
        return None
    kept = kernel.keeps and kernel.largest(1.0) <= tiled.SAFE and 4 * sum(areas) <= tiling.KEPT
    gradient = sum(area * (1 + tile.mirrored) for area, tile in zip(areas, tiles, strict=True))
    operations = 2 * width * (sum(areas) * (1 if kept else 2) + gradient)
    return operations, 4 * (width * sum(edges) * 4 + 2 * sum(areas) * kept)


def busiest_share(images: int, ranks: int) -> float:
    """Return the share of all computed pairs that falls on the busiest rank, counted in its tiles."""
    shares = [tiling.tiles(images, images, 0, True, index, ranks) for index in range(ranks)]
    pairs = [sum((t.rows.stop - t.rows.start) * (t.columns.stop - t.columns.start) for t in s) for s in shares]
    return max(pairs) / sum(pairs)

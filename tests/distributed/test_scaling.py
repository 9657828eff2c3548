"""docs/scaling.md: its counts are the code's, and its table is its formula's."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from simclr_ddp import KernelInfoNCE
from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.losses import tiled, tiling
from simclr_ddp.training import forecast
from tests.test_doctor import Live

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()


class Counted(NamedTuple):
    """Of a model: parameters, batch-norm layers and channels, GFLOP and kept MiB of a view, as the page has them."""

    config: str
    parameters: int
    layers: int
    channels: int
    gflop: float
    kept: float


MODELS = {
    "ResNet-18, 32": Counted("cifar10", 11_497_664, 22, 5_440, 3.33, 2.2),
    "ResNet-50, 224": Counted("imagenet_kernel_infonce", 27_968_704, 55, 28_736, 24.3, 41.7),
}


def milliseconds(model: Counted, n: int, nodes: int) -> list[float]:
    """Compute, batch norm, exchange of embeddings and loss, gradients: the page's formula on `nodes` x 8 GPUs."""
    ranks = 8 * nodes
    compute = 2 * n / ranks * model.gflop * 1e9 / 150e12
    latency = 15e-6 if nodes == 1 else (22 + 10 * math.log2(nodes)) * 1e-6
    batch_norm = 2 * model.layers * latency
    embeddings = 2 * n * 128 * 4
    exchange = 5 * latency + (3 * embeddings) / 300e9
    pairs = 0.5 * (2 * n) ** 2 / ranks
    loss = pairs * (8 * 128 / 40e12 + 40 / 3.35e12)
    gradients = 2 * 4 * model.parameters / 300e9
    return [1e3 * t for t in (compute, batch_norm, exchange + loss, gradients)]


def rows() -> list[str]:
    found = []
    for name, n in (
        ("ResNet-18, 32", 512),
        ("ResNet-18, 32", 1024),
        ("ResNet-50, 224", 4096),
        ("ResNet-50, 224", 32768),
    ):
        one = sum(milliseconds(MODELS[name], n, 1))
        for nodes in (1, 2, 8, 64):
            share = n // (8 * nodes)
            if share < 8:
                continue
            parts = milliseconds(MODELS[name], n, nodes)
            numbers = " | ".join(f"{part:.2g}" if part < 10 else f"{part:.0f}" for part in [*parts, sum(parts)])
            found.append(f"| {name}, N = {n:,} | {nodes} | {share} | {numbers} | {one / sum(parts) / nodes:.0%} |")
    return found


def test_the_table_is_the_formula() -> None:
    for row in rows():
        assert row in PAGE, row


@pytest.mark.parametrize("name", MODELS)
def test_the_counts_are_those_of_the_code(name: str) -> None:
    model = MODELS[name]
    path = ROOT / "configs" / "pretrain" / f"{model.config}.yaml"
    settings = options.build(Pretrain, [(str(path), options.read_yaml(path))])
    made = forecast.blank_model(settings)
    norms = [m for m in made.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert sum(p.numel() for p in made.parameters()) == model.parameters
    assert (len(norms), sum(m.num_features for m in norms)) == (model.layers, model.channels)
    assert forecast.flops_per_view(settings) / 1e9 == pytest.approx(model.gflop, rel=0.003)
    assert forecast.activation_bytes(settings) / 2**20 == pytest.approx(model.kept, rel=0.03)
    row = f"| {model.parameters:,} | {model.layers} | {model.channels:,} | {model.gflop} | {model.kept} |"
    assert row in PAGE, row


def test_rank_0_of_512() -> None:
    """In a fake process group, whose all-gather gives each rank's place the same embeddings."""
    areas = [tile.area for tile in tiling.tiles(32_768, 32_768, 0, True, 0, 512)]
    text = " ".join(PAGE.split())
    said = f"{len(areas)} tiles of pairs, the largest of {max(areas):,}, together {sum(areas):,} pairs"
    assert f"{said}, which is {sum(areas) / (65_536**2 / 512):.4f} of (2 N)² / W" in text
    peaks = []
    dist.init_process_group("fake", rank=0, world_size=512, store=FakeStore())
    try:
        for kernel in ("cosine", "laplacian"):
            tiled.buffers.idle.clear()
            generator = torch.Generator().manual_seed(0)
            y_a, y_b = (torch.randn(64, 128, generator=generator).requires_grad_() for _ in range(2))
            with Live() as live:
                KernelInfoNCE(kernel)(y_a, y_b).backward()
            peaks.append(live.peak / 2**20)
    finally:
        dist.destroy_process_group()
    held = re.search(r"held (\d+) MiB \(cosine\) and (\d+) MiB \(Laplacian\) of tensors", text)
    assert held is not None and peaks == pytest.approx([float(number) for number in held.groups()], rel=0.05)

"""Invariant 1: a run on W ranks takes the steps of the run on one."""

from pathlib import Path

import pytest
import torch

from simclr_ddp import config, pretrain
from simclr_ddp.metrics import read_metrics
from tests.ranks import Ranks

STEPS = 10


def train(arguments: list[str]) -> None:
    assert pretrain.main([*arguments, "--debug"]) == 0


def settings(images: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"data.train={images}",
        f"run_dir={run_dir}",
        "device=cpu",
        "precision=fp64",
        "threads=1",
        "data.size=16",
        "data.workers=0",
        "data.augmentation.blur=[0.5,0.5]",
        "data.augmentation.solarize=[0,0.2]",
        "model.width=0.0625",
        "head.out=16",
        "optim.global_batch_size=16",
        f"optim.steps={STEPS}",
        "optim.scaling=none",
        "optim.base_learning_rate=0.2",
        "optim.trust_coefficient=0.01",
        "loss.temperature=0.5",
        "optim.warmup_epochs=0",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=100",
        "log.every_steps=1",
        *more,
    ]


def model_at(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)["model"]


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("kernel", ["cosine", "concat_sum"])
def test_ten_steps_are_those_of_one_rank(kernel: str, images: Path, ranks: Ranks, tmp_path: Path) -> None:
    for world_size in (1, 2, 4):
        ranks.run(world_size, train, settings(images, tmp_path / str(world_size), f"loss.kernel={kernel}"))
    first, last = model_at(tmp_path / "1", 1), model_at(tmp_path / "1", STEPS)
    weights = [k for k in last if last[k].dim() > 1 and "probe" not in k]
    assert min(relative_difference(first[k], last[k]) for k in weights) > 0.01
    alone = read_metrics(tmp_path / "1" / "metrics.jsonl")
    assert len(alone) == STEPS
    for world_size in (2, 4):
        together = read_metrics(tmp_path / str(world_size) / "metrics.jsonl")
        for a, b in zip(together, alone, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-10)
            assert a["contrastive_top1"] == pytest.approx(b["contrastive_top1"], rel=1e-10)
        probes = [(a["probe_top1"], b["probe_top1"]) for a, b in zip(together, alone, strict=True) if "probe_top1" in a]
        assert len(probes) == STEPS // 2 and all(a == b for a, b in probes)
        for step in (1, STEPS):
            one, many = model_at(tmp_path / "1", step), model_at(tmp_path / str(world_size), step)
            for key, value in one.items():
                if value.is_floating_point():
                    assert relative_difference(many[key], value) < 1e-10, (key, step)


def test_float32_starts_alike(images: Path, ranks: Ranks, tmp_path: Path) -> None:
    for world_size in (1, 4):
        arguments = settings(images, tmp_path / str(world_size), "precision=fp32", "optim.steps=1")
        ranks.run(world_size, train, arguments)
    (one,), (four,) = (read_metrics(tmp_path / w / "metrics.jsonl") for w in ("1", "4"))
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    saved = [
        torch.load(tmp_path / w / "checkpoints" / "step-00000001.pt", weights_only=True)["optimizers"][0]
        for w in ("1", "4")
    ]
    # After one step the momentum holds the (adapted) gradient.
    gradients = [torch.cat([s["momentum_buffer"].flatten() for s in o["state"].values()]) for o in saved]
    assert relative_difference(gradients[1], gradients[0]) < 1e-3


def test_settings_of_this_file_are_known(images: Path, tmp_path: Path) -> None:
    overrides = dict(config.parse_override(text) for text in settings(images, tmp_path))
    assert config.build(config.Pretrain, [("here", overrides)]).precision == "fp64"

"""A tiny run in float64 that several numbers of ranks must share, and how far two such runs differ."""

from pathlib import Path

import pytest
import torch

from simclr_ddp import pretrain
from simclr_ddp.runs.metrics import read_metrics

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
        "data.size=20",  # the least at which blur has a kernel
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


def assert_equal_runs(run_dir: Path, alone: Path, steps: tuple[int, ...]) -> None:
    lines, expected = (read_metrics(d / "metrics.jsonl") for d in (run_dir, alone))
    assert len(lines) == STEPS
    for line, wanted in zip(lines, expected, strict=True):
        assert line.keys() == wanted.keys()
        for key in ("loss", "contrastive_top1", "learning_rate", "probe_top1"):
            assert line.get(key, 0) == pytest.approx(wanted.get(key, 0), rel=1e-10), (key, line["step"])
    for step in steps:
        for key, value in model_at(alone, step).items():
            if value.is_floating_point():
                found = model_at(run_dir, step)[key]
                # Batch norm removes some shifts: their gradient, and what is left of them, is rounding alone.
                assert relative_difference(found, value) < 1e-10 or (found - value).norm() < 1e-11, (key, step)

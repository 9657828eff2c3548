"""One tiny training run: its options, and what two equal runs have in common."""

from pathlib import Path

import torch

from simclr_ddp import pretrain
from simclr_ddp.runs.metrics import read_metrics

STEPS = 24


def settings(images: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"data.train={images}",
        f"run_dir={run_dir}",
        "device=cpu",
        "threads=1",
        "data.size=16",
        "data.workers=1",
        "model.width=0.125",
        "optim.global_batch_size=16",
        f"optim.steps={STEPS}",
        "optim.scaling=none",
        "optim.base_learning_rate=0.5",
        "optim.trust_coefficient=0.01",
        "optim.warmup_epochs=0",
        "checkpoint.every_steps=5",
        "log.every_steps=1",
        *more,
    ]


def final_state(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / f"step-{STEPS:08d}.pt", weights_only=True)


def assert_equal_bits(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_equal_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_bits(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    one, other = final_state(run_dir), final_state(unbroken)
    for part in ("model", "optimizers", "scaler"):
        assert_equal_bits(one[part], other[part], part)
    lines, expected = read_metrics(run_dir / "metrics.jsonl"), read_metrics(unbroken / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for key in ("loss", "contrastive_top1", "learning_rate", "probe_top1"):
        assert [line.get(key) for line in lines] == [line.get(key) for line in expected]
    assert not list((run_dir / "checkpoints").glob(".*")), "a temporary file is left"


def train(arguments: list[str]) -> None:
    """In ranks that may start no process themselves."""
    assert pretrain.main([*arguments, "data.workers=0"]) == 0

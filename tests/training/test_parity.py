"""Invariant 1: a run on W ranks takes the steps of the run on one."""

import shutil
from pathlib import Path

import pytest
import torch

from simclr_ddp.config import schema
from simclr_ddp.config.options import build, parse_override
from simclr_ddp.runs.metrics import read_metrics
from tests.support.parity_run import STEPS, assert_equal_runs, model_at, relative_difference, settings, train
from tests.support.ranks import Ranks


@pytest.mark.parametrize(
    ("loader", "kernel", "optimizer", "world_sizes"),
    [
        ("torch", "cosine", "lars", (2, 4)),
        pytest.param("ffcv", "cosine", "lars", (2, 4), marks=pytest.mark.slow),
        ("ffcv", "concat_sum", "lars", (4,)),
        ("device", "cosine", "lars", (2, 4)),
        *(
            pytest.param("torch", kernel, optimizer, (2,), marks=pytest.mark.slow)
            for kernel, optimizer in (
                ("gaussian", "sgd"),
                ("laplacian", "adamw"),
                ("exponential", "lars"),
                ("simple_sum", "lars"),
                ("arccos", "lars"),
                ("spectral", "lars"),
            )
        ),
    ],
    indirect=["loader"],
)
def test_ten_steps_are_those_of_one_rank(
    loader: str, kernel: str, optimizer: str, world_sizes: tuple[int, ...], images: Path, ranks: Ranks, tmp_path: Path
) -> None:
    rate = {"lars": 0.2, "sgd": 0.08, "adamw": 0.003}[optimizer]
    options = [f"loss.kernel={kernel}", f"optim.name={optimizer}", f"optim.base_learning_rate={rate}"]
    options.append(f"data.loader={loader}")
    for world_size in (1, *world_sizes):
        ranks.run(world_size, train, settings(images, tmp_path / str(world_size), *options))
    first, last = model_at(tmp_path / "1", 1), model_at(tmp_path / "1", STEPS)
    weights = [k for k in last if last[k].dim() > 1 and "probe" not in k]
    assert min(relative_difference(first[k], last[k]) for k in weights) > 0.01
    probes = [line for line in read_metrics(tmp_path / "1" / "metrics.jsonl") if "probe_top1" in line]
    assert len(probes) == STEPS // 2, "one at the end of every epoch"
    for world_size in world_sizes:
        assert_equal_runs(tmp_path / str(world_size), tmp_path / "1", (1, STEPS))


def test_a_run_resumes_on_another_number_of_ranks_and_another_loader(
    images: Path, ranks: Ranks, loader: str, tmp_path: Path
) -> None:
    other = {"torch": "auto", "ffcv": "device", "device": "torch"}[loader]
    ranks.run(1, train, settings(images, tmp_path / "1", "data.loader=torch"))
    ranks.run(2, train, settings(images, tmp_path / "2", f"data.loader={other}"))
    (tmp_path / "4" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "2" / "metrics.jsonl", tmp_path / "4")
    shutil.copy(tmp_path / "2" / "checkpoints" / "step-00000005.pt", tmp_path / "4" / "checkpoints")
    ranks.run(4, train, settings(images, tmp_path / "4", f"data.loader={loader}"))
    assert_equal_runs(tmp_path / "4", tmp_path / "1", (STEPS,))


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


@pytest.mark.slow
def test_float32_resumes_on_another_number_of_ranks_within_the_spread_of_rounding(
    images: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Runs that differ only in their threads tell how far rounding alone carries the loss.

    Other threads change the rounding of convolutions only, other ranks also that of batch norm, of the loss and of the
    mean gradient: ten times the spread is allowed.
    """
    options = ("precision=fp32", "model.width=0.25", "data.size=32", "optim.base_learning_rate=0.05")

    def losses(name: str, *more: str) -> torch.Tensor:
        train(settings(images, tmp_path / name, *options, *more))
        return torch.tensor([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")])

    one, *others = [losses(f"threads{count}", f"threads={count}") for count in (1, 2, 4)]
    spread = torch.stack(others).sub(one).abs().amax()
    assert spread > 0, "rounding differs"
    for before, after in ((1, 4), (4, 2)):
        first, second = tmp_path / f"on{before}", tmp_path / f"from{before}on{after}"
        ranks.run(before, train, settings(images, first, *options))
        (second / "checkpoints").mkdir(parents=True)
        shutil.copy(first / "metrics.jsonl", second)
        shutil.copy(first / "checkpoints" / f"step-{STEPS // 2:08d}.pt", second / "checkpoints")
        ranks.run(after, train, settings(images, second, *options))
        found = torch.tensor([line["loss"] for line in read_metrics(second / "metrics.jsonl")])
        assert len(found) == STEPS and (found - one).abs().amax() <= 10 * spread, (before, after, spread, found - one)


def test_settings_of_this_file_are_known(images: Path, tmp_path: Path) -> None:
    overrides = dict(parse_override(text) for text in settings(images, tmp_path))
    assert build(schema.Pretrain, [("here", overrides)]).precision == "fp64"

"""A step that failed can be repeated from what it left behind."""

from pathlib import Path

import pytest
import torch

from simclr_ddp import pretrain, replay
from simclr_ddp.runs import checkpoint
from tests.support.ranks import Ranks
from tests.support.tiny_run import settings

LARGE = ("optim.name=sgd", "optim.base_learning_rate=1e30", "checkpoint.every_steps=1", "precision=fp32")


def failing_run(images: Path, run_dir: Path, *more: str) -> int:
    try:
        return pretrain.main(settings(images, run_dir, *LARGE, *more))
    except SystemExit as ended:  # ranks other than 0, which says why
        return int(str(ended.code))


def only_dump(run_dir: Path) -> Path:
    (path,) = (run_dir / "dumps").iterdir()
    return path


def test_the_state_is_that_before_the_step(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert failing_run(images, tmp_path / "run") == 2
    said = capfd.readouterr().err
    path = only_dump(tmp_path / "run")
    assert f"python -m simclr_ddp.replay {path}" in said and "diverges" in said
    saved = torch.load(path, weights_only=True)
    last = checkpoint.all_steps(tmp_path / "run" / "checkpoints")[-1]
    before = checkpoint.load(last)
    assert before["step"] == saved["step"] > 0
    for name, value in before["model"].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(saved["model"][name], value), f"{name}: the step after the failed one has moved it"

    assert replay.main([str(path), "threads=1", "device=cpu"]) == 0
    printed = capfd.readouterr().out
    assert "first output that is not finite: " in printed and "all finite" in printed
    assert "now:  loss" in printed


def test_a_step_that_does_not_fail_again(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As after a fault of the hardware: the dump's parameters are sound."""
    assert failing_run(images, tmp_path / "run") == 2
    path = only_dump(tmp_path / "run")
    saved = torch.load(path, weights_only=True)
    sound = tmp_path / "sound.pt"
    first = torch.load(checkpoint.all_steps(tmp_path / "run" / "checkpoints")[0], weights_only=True)
    torch.manual_seed(0)
    model = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in first["model"].items()}
    torch.save(saved | {"model": model}, sound)
    capfd.readouterr()
    assert replay.main([str(sound), "threads=1", "device=cpu"]) == replay.FINE
    assert "every module's output is finite" in capfd.readouterr().out


def test_on_two_ranks(images: Path, tmp_path: Path, ranks: Ranks) -> None:
    assert ranks.run(2, failing_run, images, tmp_path / "run") == [2, 2]
    assert ranks.run(2, replay.main, [str(only_dump(tmp_path / "run")), "threads=1", "device=cpu"]) == [0, 0]


def test_mistakes(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert failing_run(images, tmp_path / "run") == 2
    (ordinary, *_) = checkpoint.all_steps(tmp_path / "run" / "checkpoints")
    assert replay.main([str(ordinary)]) == 2
    assert "not the dump of a failed step" in capfd.readouterr().err
    assert replay.main([str(only_dump(tmp_path / "run")), "train=spirograph"]) == 2
    assert "these are not the images of the run" in capfd.readouterr().err

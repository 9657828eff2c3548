"""Micro-batches: the undivided step where there is no batch norm, and one run on any number of ranks where there is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simclr_ddp import pretrain
from simclr_ddp.config import Pretrain, build
from simclr_ddp.data import open_dataset
from simclr_ddp.distributed import CrossRankBatchNorm
from simclr_ddp.run import make_plan
from simclr_ddp.runtime import Runtime
from simclr_ddp.state import State
from simclr_ddp.step import forward_backward
from tests.ranks import Ranks
from tests.test_cli import only_error
from tests.test_parity import assert_equal_runs, model_at, relative_difference, settings, train


class Count(nn.Module):
    """The most images that were in a forward pass with a graph, and how many passes there were."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.most, self.passes = model, 0, 0

    def forward(self, images: Tensor) -> Tensor:
        self.most, self.passes = max(self.most, images.shape[1]), self.passes + 1
        return self.model(images)


def without_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, CrossRankBatchNorm):
            setattr(module, name, nn.GroupNorm(1, child.num_features).double())
        else:
            without_batch_norm(child)


def step(images: Path, normalized: bool, micro: int | None) -> tuple[Tensor, Tensor, dict[str, Tensor], Count, State]:
    """(loss, projections, gradients, the model's passes, state) of the first step"""
    pairs = [text.split("=", 1) for text in settings(images, images.parent / "none")]
    wanted = {key: value.strip("[]").split(",") if value[:1] == "[" else value for key, value in pairs}
    made = build(Pretrain, [("the test", wanted | {"optim.micro_batch_size": micro})])
    runtime, dataset = Runtime(torch.device("cpu"), "fp64", 1), open_dataset(made.data.train, "train")
    state = State(made, runtime, dataset)
    if not normalized:
        without_batch_norm(state.model)
    model = Count(state.model)
    batches = pretrain.make_batches(made, dataset, runtime.device, range(1))
    batch = next(batches)
    batches.close()
    parts = make_plan(made, dataset).micro_batches
    augment = pretrain.make_augmentation(made, dataset, runtime)
    loss, y = forward_backward(model, state, runtime, pretrain.make_objective(made), augment, batch, 0, parts)
    return loss, y, {n: p.grad for n, p in state.model.named_parameters() if p.grad is not None}, model, state


@pytest.mark.parametrize("micro", [8, 4, 2])
def test_without_batch_norm_it_is_the_undivided_step(micro: int, images: Path) -> None:
    loss, y, gradients, _, _ = step(images, normalized=False, micro=micro)
    whole_loss, whole_y, whole, _, _ = step(images, normalized=False, micro=None)
    assert loss.item() == pytest.approx(whole_loss.item(), rel=1e-12)
    assert relative_difference(y, whole_y) < 1e-12 and gradients.keys() == whole.keys()
    for name, gradient in whole.items():
        assert relative_difference(gradients[name], gradient) < 1e-10, name


def test_the_encoder_holds_one_micro_batch_and_sees_each_once(images: Path) -> None:
    *_, model, state = step(images, normalized=True, micro=4)
    assert (model.most, model.passes) == (4, 4), "the passes without a graph are the bare model's"
    assert state.model.encoder.bn1.num_batches_tracked == 4


def test_batch_norm_sees_micro_batches(images: Path) -> None:
    loss, *_ = step(images, normalized=True, micro=4)
    whole, *_ = step(images, normalized=True, micro=None)
    assert abs(loss - whole) > 1e-6


@pytest.mark.parametrize("world_sizes", [(2,), pytest.param((4,), marks=pytest.mark.slow)])
def test_ten_steps_are_those_of_one_rank(
    world_sizes: tuple[int, ...], images: Path, ranks: Ranks, tmp_path: Path
) -> None:
    for count in (1, *world_sizes):
        ranks.run(count, train, settings(images, tmp_path / str(count), "optim.micro_batch_size=8"))
    for count in world_sizes:
        assert_equal_runs(tmp_path / str(count), tmp_path / "1", (1, 10))
    assert min(relative_difference(model_at(tmp_path / "1", 1)[k], v) for k, v in weights(tmp_path / "1")) > 0.01


def weights(run_dir: Path) -> list[tuple[str, Tensor]]:
    return [(k, v) for k, v in model_at(run_dir, 10).items() if v.dim() > 1 and "probe" not in k]


@pytest.mark.parametrize("micro", [3, 32])
def test_what_does_not_divide_is_told(
    micro: int, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(settings(images, tmp_path / "run", f"optim.micro_batch_size={micro}")) == 2
    assert f"optim.micro_batch_size={micro} is wanted to divide optim.global_batch_size=16" in only_error(capfd)

"""Micro-batches: the undivided step where there is no batch norm, and one run on any number of ranks where there is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_ddp import pretrain
from simclr_ddp.config.options import build
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.batches import Batch
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.distributed.ddp import data_parallel
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
from simclr_ddp.training import components
from simclr_ddp.training.plan import make_plan
from simclr_ddp.training.state import State
from simclr_ddp.training.step import forward_backward
from tests.support.output import only_error
from tests.support.parity_run import (
    assert_equal_runs,
    model_at,
    relative_difference,
    settings,
    train,
)
from tests.support.ranks import Ranks


class Count(nn.Module):
    """Of each forward pass, how many images there were and whether it had a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.passes: list[tuple[int, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.passes.append((images.shape[1], torch.is_grad_enabled()))
        return self.model(images)


def without_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, CrossRankBatchNorm):
            setattr(module, name, nn.GroupNorm(1, child.num_features).to(child.weight))
        else:
            without_batch_norm(child)


def step(
    images: Path,
    normalized: bool,
    micro: int | None,
    wrap: Callable[[nn.Module], nn.Module] = Count,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, dict[str, Tensor], Any, State]:
    """(loss, projections, gradients, the model as `wrap` made it, state) of the first step, on each of the ranks"""
    pairs = [text.split("=", 1) for text in settings(images, images.parent / "none")]
    wanted = {key: value.strip("[]").split(",") if value[:1] == "[" else value for key, value in pairs}
    made = build(Pretrain, [("the test", wanted | {"optim.micro_batch_size": micro})])
    runtime, dataset = Runtime(torch.device(device), "fp64", 1), open_dataset(made.data.train, "train")
    state = State(made, runtime, dataset)
    if not normalized:
        without_batch_norm(state.model)
    model = wrap(state.model)
    batches = components.make_batches(made, dataset, runtime.device, range(1))
    batch = next(batches)
    batches.close()
    parts = make_plan(made, dataset).micro_batches
    augment = components.make_augmentation(made, dataset, runtime)
    loss, y = forward_backward(model, state, runtime, components.make_objective(made), augment, batch, 0, parts)
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
    assert model.passes == [(4, False)] * 4 + [(4, True)] * 4, "all by the model as it is trained, which is compiled"
    assert state.model.encoder.bn1.num_batches_tracked == 4


class _Calls(TorchDispatchMode):
    """Collects the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


def test_without_a_probe_micro_batches_make_no_number_a_tensor(images: Path) -> None:
    """On a GPU the host would wait for its copy."""
    *_, model, state = step(images, normalized=True, micro=4, wrap=lambda model: model)
    state.probe = None
    batch = Batch(torch.rand(2, 16, 3, 16, 16).double(), torch.arange(16), None)
    objective, runtime = KernelInfoNCE("cosine", 0.2), Runtime(torch.device("cpu"), "fp64", 1)
    with _Calls() as calls:
        forward_backward(model, state, runtime, objective, lambda inputs, *_: inputs, batch, 0, 4)
    assert "aten.convolution.default" in calls.names and "aten.lift_fresh.default" not in calls.names


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_norm_of_the_gradient_is_not_that_of_the_scaled_loss(precision: str) -> None:
    made = build(Pretrain, [("here", {"device": "cpu", "model.width": 0.0625, "head.out": 8})])
    state = State(made, Runtime(torch.device("cpu"), precision, 1), open_dataset("spirograph", "train"))
    for parameter in (parameters := list(state.model.parameters())):
        parameter.requires_grad_()
    state.scaler.scale(torch.stack([p.sum() for p in parameters]).sum()).backward()
    assert (parameters[0].grad.flatten()[0] == 1) == (precision == "fp32")
    assert state.gradient_norm().item() == pytest.approx(sum(p.numel() for p in parameters) ** 0.5, rel=1e-5)


def reduced(images: Path, micro: int | None, compiled: bool) -> tuple[int, int]:
    """On a rank: how many numbers DistributedDataParallel all-reduced in a step, and how many parameters there are."""
    sizes: list[int] = []

    def count(_: None, bucket: GradBucket) -> Future[Tensor]:
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    def parallel(model: nn.Module) -> nn.Module:
        made = data_parallel(model, torch.device("cpu"))
        made.register_comm_hook(None, count)  # type: ignore[operator]
        return torch.compile(made, backend="eager") if compiled else made  # type: ignore[return-value]

    *_, state = step(images, normalized=True, micro=micro, wrap=parallel)
    return sum(sizes), sum(p.numel() for p in state.model.parameters())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_are_reduced_once(compiled: bool, images: Path, ranks: Ranks) -> None:
    for numbers, parameters in ranks.run(2, reduced, images, 4, compiled):
        assert numbers == parameters > 0


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
def test_batches_that_do_not_divide_are_reported(
    micro: int, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(settings(images, tmp_path / "run", f"optim.micro_batch_size={micro}")) == 2
    assert f"optim.micro_batch_size={micro}: it must divide optim.global_batch_size=16" in only_error(capfd)

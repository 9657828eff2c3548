"""Every part of a training step on CUDA tensors without numbers: nothing waits for the device or mixes it with the CPU.

On one rank, and as rank 0 of a fake process group of two.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from simclr_ddp import KernelInfoNCE
from simclr_ddp.config.options import build
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.augmentations import Augmentation
from simclr_ddp.data.batches import Batch, training_images
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.data.draws import view_uniforms
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.losses.kernels import KERNELS
from simclr_ddp.models.resnet import recompute
from simclr_ddp.training import components
from simclr_ddp.training import reporter as report
from simclr_ddp.training.optim import global_norm, make_optimizer, set_learning_rate
from simclr_ddp.training.plan import Plan
from simclr_ddp.training.reporter import LateReader, Reporter
from simclr_ddp.training.sanity import STEPS, LearningRateGuard
from simclr_ddp.training.state import State
from simclr_ddp.training.step import Record, agree, forward_backward
from tests.support.fake_cuda import CUDA, HostWait, NoHostWaits, fake_cuda, fake_group, gradients
from tests.support.objectives import MEMBERS, member

CLASSES, IMAGES, BATCH = 10, 64, 8  # of a data set without files; B on each rank
PRECISIONS = ["fp32", "bf16", "fp16"]


@pytest.fixture(params=[1, 2], ids=["one-rank", "two-ranks"], autouse=True)
def world_size(request: pytest.FixtureRequest) -> Iterator[int]:
    with fake_group(request.param), fake_cuda():
        yield request.param


def dataset(numbers: bool = False) -> Dataset:
    labels = np.arange(IMAGES) % CLASSES
    drawn = np.zeros((IMAGES, 10), np.float32) if numbers else None
    return Dataset("fake", IMAGES, labels, [str(c) for c in range(CLASSES)], "fake", numbers=drawn)


def settings(**given: Any) -> Pretrain:
    wanted = {
        "model.arch": "resnet18",
        "model.width": 0.125,
        "model.stem": "cifar",
        "head.out": 16,
        "loss.temperature": 0.5,
        "optim.global_batch_size": BATCH * collectives.world_size(),
    }
    dotted = {key.replace("__", "."): value for key, value in given.items()}
    return build(Pretrain, [("the test", wanted | dotted)])


def runtime(precision: str) -> Runtime:
    return Runtime(CUDA, precision, 1)


def batch(size: int = 32) -> Batch:
    views = torch.zeros(BATCH, 2, size, size, 3, dtype=torch.uint8, device=CUDA).permute(1, 0, 4, 2, 3)
    sample = torch.arange(BATCH, device=CUDA)
    return Batch(views, sample, sample % CLASSES)


# --- what these tests stand on ---------------------------------------------------------------------------------------

WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "to-the-host": lambda x: x.cpu(),
    "from-the-host": lambda x: torch.tensor([1.0, 2.0], device=CUDA),
    "list-as-index": lambda x: x[[0, 1]],
    "two-devices": lambda x: x + torch.zeros(4),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_wait_for_the_device_raises(wait: Callable[[Tensor], Any]) -> None:
    x = torch.zeros(4, device=CUDA)
    with NoHostWaits(), pytest.raises(RuntimeError) as raised:
        wait(x)
    names = "DataDependentOutputException", "DynamicOutputShapeException", "FakeTensorDeviceMismatchError"
    assert isinstance(raised.value, HostWait) or type(raised.value).__name__ in names


def test_the_backward_pass_is_that_of_torch() -> None:
    with unset_fake_temporarily():
        torch.manual_seed(0)
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
        first, second = (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), CrossRankBatchNorm(3)).double() for _ in range(2))
        h = first(x).relu()
        h = h + recompute(second, h)  # two ways that meet again
        y = h.flatten(1).unflatten(0, (2, 2))
        loss, weights = KernelInfoNCE("spectral")(y[0], y[1]), [*first.parameters(), *second.parameters()]
        found = gradients(loss, weights)
        torch.autograd.backward(loss)
        for ours, parameter in zip(found, weights, strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-12, atol=1e-14)


# --- from a batch to views ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws(dtype: torch.dtype) -> None:
    index = torch.arange(BATCH, device=CUDA)
    with NoHostWaits():
        draws = view_uniforms(0, 3, index, 2, 0, 11, dtype)
    assert draws.device == CUDA and draws.dtype == dtype and draws.shape == (2, BATCH, 11)


CIFAR = {"strength": 0.5, "mean": [0.5] * 3, "std": [0.2] * 3}
IMAGENET = {"strength": 1.0, "blur": (1.0, 0.1), "solarize": (0.0, 0.2), "mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.mark.parametrize("options", [CIFAR, IMAGENET, CIFAR | {"permuted": False}], ids=["cifar", "imagenet", "fixed"])
def test_augmentation(options: dict[str, Any]) -> None:
    augment = training_images(dataset(), Augmentation(**options), 0, torch.float32)
    given = batch(size=224 if options is IMAGENET else 32)
    with NoHostWaits():
        views = augment(given.inputs, 3, given.sample)
    assert views.device == CUDA and views.dtype == torch.float32 and views.shape == given.inputs.shape


def test_spirograph() -> None:
    render = training_images(dataset(numbers=True), Augmentation(), 0, torch.float32)
    with NoHostWaits(), runtime("bf16").autocast():
        views = render(torch.zeros(BATCH, 10, device=CUDA), 3, torch.arange(BATCH, device=CUDA))
    assert views.device == CUDA and views.dtype == torch.float32 and views.shape == (2, BATCH, 3, 32, 32)


# --- model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 6, 5, 5), (8, 6)], ids=["channels-last", "head"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_batch_norm(precision: str, shape: tuple[int, ...], world_size: int) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    norm = CrossRankBatchNorm(6).to(CUDA)
    x = torch.zeros(shape, device=CUDA, dtype=dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x).requires_grad_()
    with NoHostWaits():
        out = norm(x)
        out.sum().backward()
    assert out.dtype == dtype and out.stride() == x.stride()
    assert x.grad is not None and x.grad.dtype == dtype
    assert norm.weight.grad.dtype == norm.bias.grad.dtype == norm.running_var.dtype == torch.float32


@pytest.mark.parametrize(("precision", "stem"), [("fp32", "cifar"), ("bf16", "stl"), ("fp16", "imagenet")])
def test_model(precision: str, stem: str) -> None:
    state = State(settings(model__stem=stem), runtime(precision), dataset())
    with NoHostWaits():
        with runtime(precision).autocast():
            out = state.model(torch.zeros(2, BATCH, 3, 36, 36, device=CUDA))
        assert out.logits is not None
        (out.y.float().sum() + out.logits.float().sum()).backward()
    assert out.y.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    gradients = {name: p.grad for name, p in state.model.named_parameters()}
    assert all(g is not None and g.device == CUDA and g.dtype == torch.float32 for g in gradients.values())


@pytest.mark.parametrize("kind", ["none", "linear", "nonlinear"])
def test_projection_head(kind: str) -> None:
    state = State(settings(head__kind=kind), runtime("bf16"), dataset())
    h = torch.zeros(2 * BATCH, state.model.encoder.width_out, device=CUDA, requires_grad=True)
    with NoHostWaits():
        with runtime("bf16").autocast():
            y = state.model.projection_head(h)
        y.float().sum().backward()
    assert h.grad is not None


def test_probe_loss() -> None:
    state = State(settings(), runtime("bf16"), dataset())
    assert state.probe is not None
    logits = torch.zeros(2, BATCH, CLASSES, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    given = batch()
    with NoHostWaits():
        loss = state.probe.loss(logits, given.labels, given.sample)
        loss.backward()
    assert loss.device == CUDA and logits.grad is not None and logits.grad.dtype == torch.bfloat16


# --- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEMBERS)
def test_loss(name: str) -> None:
    """As autocast hands it over; tests/losses/test_fake_cuda.py has float32, low temperatures and launches."""
    objective = member(name)
    y = torch.randn(2, BATCH, 16, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    with NoHostWaits():
        loss = objective(y[0], y[1])
        loss.backward()
        top1 = objective.top1(y[0], y[1])
    assert loss.device == top1.device == CUDA and loss.dtype == torch.float32
    assert y.grad is not None and y.grad.device == CUDA and y.grad.dtype == torch.bfloat16


# --- collectives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collective", [collectives.differentiable_sum, collectives.gather], ids=["sum", "gather"])
def test_collective_with_a_gradient(collective: Callable[[Tensor], Tensor], world_size: int) -> None:
    z = torch.zeros(2, BATCH, 4, device=CUDA, requires_grad=True)
    with NoHostWaits():
        found = collective(z.mT.contiguous().mT)  # of any strides
        found.square().sum().backward()
    count = BATCH * (world_size if collective is collectives.gather else 1)
    assert found.device == CUDA and found.shape == (2, count, 4) and z.grad is not None


# --- update ---------------------------------------------------------------------------------------------------------


def with_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("scaled", [False, True], ids=["skip", "loss-scale"])
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_optimizer(name: str, scaled: bool) -> None:
    model = State(settings(), runtime("fp32"), dataset()).model
    optimizer = make_optimizer(model, name, weight_decay=1e-4, momentum=0.9, trust_coefficient=0.001)
    set_learning_rate(optimizer, 0.1)
    with_gradients(model)
    found_inf, scale = torch.zeros((), device=CUDA), torch.ones((), device=CUDA) if scaled else None
    optimizer.found_inf, optimizer.grad_scale = found_inf, scale  # type: ignore[attr-defined]
    with NoHostWaits():
        optimizer.step()
        optimizer.step()
        norm = global_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm.device == CUDA and all(t.device == CUDA for s in optimizer.state.values() for t in s.values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_state_step(name: str, precision: str) -> None:
    """With fp16 the scaler's part: it looks for what is not finite, and gives its scale to the optimizers."""
    state = State(settings(optim__name=name), runtime(precision), dataset())
    assert state.scaler.is_enabled() == (precision == "fp16")
    state.scaler.scale(torch.zeros((), device=CUDA))
    with_gradients(state.model)
    with NoHostWaits():
        norm = state.gradient_norm()
        for _ in range(2):
            state.step(skip=~norm.isfinite())
    assert norm.device == CUDA and state.failed.dtype == torch.bool


def test_learning_rate_guard() -> None:
    """Until the step at which it reads what it has gathered, once in a run."""
    state = State(settings(), runtime("fp32"), dataset())
    guard = LearningRateGuard(state.optimizer, 1.0, 1.0)
    with NoHostWaits():
        for _ in range(STEPS - 1):
            guard.before(0.1)
            assert guard.after(0.1) is None


# --- the host's part, a step late -----------------------------------------------------------------------------------


def read_late(reader: LateReader) -> tuple[dict[str, Any], list[float]] | None:
    """LateReader.read, but for the numbers, which are not there."""
    if reader.tag is None:
        return None
    assert reader.host is not None and reader.host.device.type == "cpu"
    reader.event.synchronize()  # type: ignore[union-attr]
    return reader.tag, [1.0, 0.5, 0.0, 1.0]


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> Reporter:
    monkeypatch.setattr(report, "peak_memory_bytes", lambda device: 0)
    monkeypatch.setattr(LateReader, "read", read_late)
    plan = Plan(Path(), 4, 10, 0, 0.1, "constant", 1)
    return Reporter(None, plan, 0, images_per_step=BATCH, device=CUDA, fp16=False)


def test_reporter(reporter: Reporter) -> None:
    with NoHostWaits():
        for step in range(3):
            values = torch.zeros(4, device=CUDA)
            reporter.push(step, Record(values, ~values.isfinite().all()))
            assert reporter.reader.event.recorded and not reporter.reader.event.waited_for, "this step is read late"
    reporter.end()


# --- a step as a whole ----------------------------------------------------------------------------------------------


def step(made: Pretrain, precision: str, parts: int, reporter: Reporter, numbers: bool = False) -> None:
    """A step as the loop of pretrain takes it; waiting for the device raises."""
    runs, data = runtime(precision), dataset(numbers)
    state, objective = State(made, runs, data), components.make_objective(made)
    augment = components.make_augmentation(made, data, runs)
    guard = LearningRateGuard(state.optimizer, 1.0, 1.0)
    given = batch()._replace(inputs=torch.zeros(BATCH, 10, device=CUDA)) if numbers else batch()
    set_learning_rate(state.optimizer, 0.1)
    with NoHostWaits():
        loss, y = forward_backward(state.model, state, runs, objective, augment, given, 0, parts)
        record = agree(loss, objective.top1(y[0], y[1]), False, state)
        with guard.update(0.1):
            state.step(skip=record.failed)
        reporter.push(0, record)
    assert all(p.grad is not None and p.grad.device == CUDA for p in state.model.parameters())


@pytest.mark.parametrize("kernel", KERNELS)
def test_step(kernel: str, reporter: Reporter) -> None:
    step(settings(loss__kernel=kernel), "bf16", 1, reporter)


OTHERS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "micro-batches": ({"optim__micro_batch_size": 4}, 2, False),
    "checkpoint-stages": ({"model__checkpoint_stages": True}, 1, False),
    "blur": ({"data__augmentation__blur": [1.0, 0.1], "data__augmentation__solarize": [0.0, 0.2]}, 1, False),
    "spirograph": ({"model__stem": "stl", "probe__enabled": False}, 1, True),
}


@pytest.mark.parametrize(("given", "parts", "numbers"), OTHERS.values(), ids=OTHERS)
def test_step_of_another_kind(given: dict[str, Any], parts: int, numbers: bool, reporter: Reporter) -> None:
    step(settings(loss__kernel="spectral", **given), "fp16", parts, reporter, numbers)

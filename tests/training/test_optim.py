"""LARS against its rule written out in plain loops, skipped steps, and the parameter groups."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.models.resnet import Encoder
from simclr_ddp.models.simclr import SimCLR, projection_head
from simclr_ddp.training.optim import (
    LARS,
    global_norm,
    make_optimizer,
    optimizer_of,
    parameter_groups,
    set_learning_rate,
)

STEPS, WARMUP, PEAK, MOMENTUM = 200, 20, 2.0, 0.9
SHAPES = {"weight": (4, 3), "zero weight": (3, 2), "unused at first": (5,), "bias": (4,), "zero bias": (3,)}
ADAPTED = ("weight", "zero weight", "unused at first")


def rate_at(step: int) -> float:
    if step < WARMUP:
        return PEAK * step / WARMUP
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def start_values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in SHAPES.items()}
    return {k: v * 0 if k.startswith("zero") else v for k, v in values.items()}


def gradient(name: str, step: int, w: list[float]) -> list[float]:
    """That of a bowl with a moving centre; of one tensor 0 for the first 30 steps, with weights 0 / 0."""
    if name == "zero weight" and step < 30:
        return [0.0] * len(w)
    if name == "unused at first" and step < 30:
        return [0.0] * len(w)
    return [(1 + i / 4) * (x - math.sin(step / 7 + i)) for i, x in enumerate(w)]


def by_hand(weight_decay: float, trust_coefficient: float) -> dict[str, list[float]]:
    """The reference rule, tensor by tensor and number by number."""
    weights = {k: v.flatten().tolist() for k, v in start_values().items()}
    velocity = {k: [0.0] * len(w) for k, w in weights.items()}
    for step in range(STEPS):
        for name, w in weights.items():
            g = gradient(name, step, w)
            ratio = 1.0
            if name in ADAPTED:
                for i in range(len(w)):
                    g[i] = g[i] + weight_decay * w[i]
                norm_w = math.sqrt(math.fsum(x * x for x in w))
                norm_g = math.sqrt(math.fsum(x * x for x in g))
                if norm_w > 0 and norm_g > 0:
                    ratio = trust_coefficient * norm_w / norm_g
            for i in range(len(w)):
                velocity[name][i] = MOMENTUM * velocity[name][i] + rate_at(step) * ratio * g[i]
                w[i] = w[i] - velocity[name][i]
    return weights


def lars_of(weights: dict[str, nn.Parameter], weight_decay: float, trust_coefficient: float = 0.01) -> LARS:
    adapted = {"params": [weights[k] for k in ADAPTED], "weight_decay": weight_decay}
    others = {"params": [w for k, w in weights.items() if k not in ADAPTED], "weight_decay": 0.3, "adapt": False}
    return LARS([adapted, others], lr=0.0, momentum=MOMENTUM, trust_coefficient=trust_coefficient)


@pytest.mark.parametrize(("weight_decay", "trust_coefficient"), [(0.0, 0.01), (1e-4, 0.01), (0.1, 0.001)])
def test_lars_is_its_rule_for_200_steps(weight_decay: float, trust_coefficient: float) -> None:
    weights = {k: nn.Parameter(v) for k, v in start_values().items()}
    optimizer = lars_of(weights, weight_decay, trust_coefficient)
    for step in range(STEPS):
        for name, w in weights.items():
            numbers = gradient(name, step, w.detach().flatten().tolist())
            w.grad = torch.tensor(numbers, dtype=torch.float64).view_as(w)
        set_learning_rate(optimizer, rate_at(step))
        optimizer.step()
    start = start_values()
    for name, expected in by_hand(weight_decay, trust_coefficient).items():
        wanted = torch.tensor(expected, dtype=torch.float64).view(SHAPES[name])
        assert (wanted - start[name]).norm() > 0.01, name
        torch.testing.assert_close(weights[name].detach(), wanted, rtol=1e-10, atol=1e-12)


def test_tensors_that_are_zero_move() -> None:
    """Defect V2: a trust ratio of 0 for a tensor of zeros, and 0/0 = NaN where its gradient is zero too."""
    zero, still = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    zero.grad, still.grad = torch.tensor([1.0, -2.0, 0.0]), torch.zeros(2)
    LARS([zero, still], lr=0.5, trust_coefficient=0.001).step()
    assert zero.tolist() == [-0.5, 1.0, 0.0] and still.tolist() == [0.0, 0.0]


def test_gradients_and_missing_ones_are_left_alone() -> None:
    w, without = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    w.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer = LARS([w, without], lr=1.0, weight_decay=0.1)
    optimizer.step()
    assert w.grad.tolist() == [1.0, 2.0, 3.0] and without.tolist() == [1.0, 1.0] and without not in optimizer.state


def test_learning_rate_is_inside_the_momentum() -> None:
    """A step at rate 0 still moves by what the momentum holds; with the rate outside it would not."""
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = LARS([w], lr=1.0, momentum=0.9, trust_coefficient=0.001)
    w.grad = torch.ones_like(w)
    optimizer.step()
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full_like(w, 1 - 0.001 - 0.0009))


# --- all optimizers -------------------------------------------------------------------------------------------------


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), CrossRankBatchNorm(6), nn.ReLU(), nn.Linear(6, 3))


def set_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator)


def make(name: str, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = make_optimizer(model, name, weight_decay=0.01, momentum=0.9, trust_coefficient=0.01)
    set_learning_rate(optimizer, 0.1)
    return optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [p.detach().clone() for p in model.parameters()]
    states = optimizer.state_dict()["state"]
    return parameters + [v.clone() for i in sorted(states) for _, v in sorted(states[i].items())]


def take(optimizer: Any, skip: bool, scale: float | None = None) -> None:
    optimizer.found_inf = torch.tensor(float(skip))
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    optimizer.step()


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("skipped", [{0}, {0, 1, 5}, {3}, {3, 4, 8}])
def test_a_step_with_found_inf_never_was(name: str, skipped: set[int]) -> None:
    """Bitwise, momentum and step counts too, the very first step included."""
    runs = []
    for with_bad_steps in (False, True):
        model = small_model()
        optimizer = make(name, model)
        for step in range(9):
            if step not in skipped:
                set_gradients(model, step)
                take(optimizer, skip=False)
            elif with_bad_steps:
                for p in model.parameters():
                    p.grad = torch.full_like(p, [math.nan, math.inf][step % 2])
                before = everything(model, optimizer)
                take(optimizer, skip=True)
                after = everything(model, optimizer)
                if step:
                    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        runs.append(everything(model, optimizer))
    assert len(runs[0]) == len(runs[1]) and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], next(small_model().parameters()))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_grad_scale_divides_the_gradients(name: str) -> None:
    runs = []
    for scale in (1.0, 1024.0):
        model = small_model()
        optimizer = make(name, model)
        for step in range(5):
            set_gradients(model, step, scale)
            take(optimizer, skip=False, scale=None if scale == 1 else scale)
        runs.append(everything(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_state_survives_a_file(name: str) -> None:
    model = small_model()
    optimizer = make(name, model)
    for step in range(4):
        set_gradients(model, step)
        take(optimizer, skip=False)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = small_model()
    restored = make(name, again)
    again.load_state_dict(saved["model"])
    restored.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for m, o in ((model, optimizer), (again, restored)):
        for step in range(4, 8):
            set_gradients(m, step)
            take(o, skip=False)
    expected, got = everything(model, optimizer), everything(again, restored)
    assert len(expected) > len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    hyper = [{k: v for k, v in g.items() if k != "params"} for g in restored.param_groups]
    assert hyper == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


# --- parameter groups -----------------------------------------------------------------------------------------------


def test_groups_are_by_module_type() -> None:
    """Defects K8, F1 (batch norm of shortcuts and of the head missed by a filter on names) and P2 (no filter)."""
    model = SimCLR(Encoder("resnet18", 1 / 16), projection_head("nonlinear", 32, out=8))
    weights, others = parameter_groups(model)
    names = {p: n for n, p in model.named_parameters()}
    assert len(weights) + len(others) == len(names) == len({*weights, *others})
    assert {p.dim() for p in weights} <= {2, 4} and {p.dim() for p in others} == {1}
    other_names = {names[p] for p in others}
    assert {"encoder.layer2.0.downsample.1.weight", "encoder.layer2.0.downsample.1.bias"} <= other_names
    assert {"projection_head.1.weight", "projection_head.1.bias", "projection_head.4.weight"} <= other_names
    assert "encoder.layer2.0.downsample.0.weight" in {names[p] for p in weights}


def test_names_do_not_matter() -> None:
    model = nn.Module()
    model.bn = nn.Linear(3, 3)
    model.bias_layer = nn.Conv2d(3, 3, 1)
    model.features = nn.BatchNorm1d(3)
    weights, others = parameter_groups(model)
    assert {id(p) for p in weights} == {id(model.bn.weight), id(model.bias_layer.weight)}
    expected = (model.bn.bias, model.bias_layer.bias, model.features.weight, model.features.bias)
    assert {id(p) for p in others} == {id(p) for p in expected}


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_biases_and_batch_norm_are_free_of_decay(name: str) -> None:
    model = small_model()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    take(make(name, model), skip=False)
    assert all((p < 1).all() for p in (model[0].weight, model[3].weight))
    assert all(torch.equal(p, torch.ones_like(p)) for p in (model[0].bias, *model[1].parameters(), model[3].bias))


def test_lars_does_not_adapt_biases_and_batch_norm() -> None:
    model = small_model()
    before = {k: v.clone() for k, v in model.named_parameters()}
    set_gradients(model, 0)
    take(make("lars", model), skip=False)
    for key, p in model.named_parameters():
        plain = before[key] - 0.1 * p.grad
        assert torch.allclose(p, plain) == (key not in ("0.weight", "3.weight")), key


def test_settings_reach_the_optimizers() -> None:
    for name, momentum in (("lars", "momentum"), ("sgd", "momentum"), ("adamw", "betas")):
        first, second = make_optimizer(small_model(), name, 0.02, 0.8, 0.005).param_groups
        assert (first["weight_decay"], second["weight_decay"]) == (0.02, 0.0)
        assert first[momentum] == second[momentum] == ((0.8, 0.999) if name == "adamw" else 0.8)
        assert first["lr"] == 0.0
        if name == "lars":
            assert (first["trust_coefficient"], first["adapt"], second["adapt"]) == (0.005, True, False)


def test_global_norm() -> None:
    assert global_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0], [12.0, 0.0]])]).item() == 13.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_of_nesterov_needs_momentum(momentum: float) -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = optimizer_of([{"params": [weight]}], "sgd", momentum, 0.001, nesterov=True)
    set_learning_rate(optimizer, 0.1)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.1 * (1 + momentum))

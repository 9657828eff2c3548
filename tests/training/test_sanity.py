"""Learning rates that can't work are warned about; those that can are not."""

import math
import re

import pytest
import torch
from torch import nn

from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
from simclr_ddp.training.optim import make_optimizer, set_learning_rate
from simclr_ddp.training.sanity import STEPS, LearningRateGuard, loss_warning


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors: more threads only wait for each other."""
    torch.set_num_threads(1)


def warnings(name: str, base: float, warmup: int = 0, batch: int = 256, trust: float = 1e-3, n: int = 60) -> list[str]:
    """What the guard says while a small network learns to tell views of 16 images apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8))
    optimizer = make_optimizer(model, name, weight_decay=1e-6, momentum=0.9, trust_coefficient=trust)
    peak = base * batch / 256
    guard, objective, said = LearningRateGuard(optimizer, base, peak), KernelInfoNCE(temperature=0.5), []
    images = torch.randn(16, 12)
    for step in range(n):
        rate = peak * min(1.0, step / warmup) if warmup else peak
        set_learning_rate(optimizer, rate)
        views = [images + 0.3 * torch.randn(16, 12) for _ in range(2)]
        optimizer.zero_grad()
        objective(*(model(v) for v in views)).backward()
        guard.before(rate)
        optimizer.step()
        said.append(guard.after(rate))
    return [s for s in said if s]


def test_the_published_mistake_is_warned_about_once_with_a_rate_that_works() -> None:
    """LARS with a trust coefficient of 0.001 at a learning rate of 0.001."""
    (warning,) = warnings("lars", 1e-3)
    assert (
        "learning rate too small for LARS: at optim.base_learning_rate=0.001 an update moves the weights by" in warning
    )
    suggestion = float(re.search(r"try optim.base_learning_rate=([\d.e+-]+)$", warning)[1])
    assert 0.2 < suggestion < 5
    assert warnings("lars", suggestion) == []


@pytest.mark.parametrize("base", [0.3, 1.0, 1.5])
@pytest.mark.parametrize("warmup", [0, 10, 1000])
def test_usual_recipes_are_not(base: float, warmup: int) -> None:
    """Also in the middle of a long warm-up: the full rate is judged, not the present one."""
    assert warnings("lars", base, warmup) == []
    assert warnings("lars", base, warmup, batch=4096) == []


def test_too_large_is() -> None:
    (warning,) = warnings("lars", 1000.0)
    assert "too large for LARS" in warning and "at most 0.3 is expected" in warning
    suggestion = float(re.search(r"try optim.base_learning_rate=([\d.e+-]+)$", warning)[1])
    assert suggestion < 10 and warnings("lars", suggestion) == []


def test_a_large_trust_coefficient_makes_up_for_a_small_rate() -> None:
    assert warnings("lars", 0.03, trust=0.05) == [] != warnings("lars", 0.001, trust=0.01)


def test_other_optimizers_are_left_alone() -> None:
    assert warnings("sgd", 1e-6) == [] == warnings("adamw", 1e-9)


def test_it_judges_after_n_updates_and_not_at_rate_zero() -> None:
    assert warnings("lars", 1e-3, n=STEPS - 1) == []
    assert warnings("lars", 1e-3, n=STEPS) != []
    assert warnings("lars", 1e-3, warmup=5, n=STEPS) == []  # the first update had rate 0
    assert warnings("lars", 0.0) == []


@pytest.mark.parametrize("kernel", ["cosine", "laplacian", "concat_sum"])
def test_loss_warning(kernel: str) -> None:
    objective = KernelInfoNCE(kernel, 0.5)
    untrained, attainable = objective.untrained_loss(256), objective.attainable_loss(256)
    assert untrained == pytest.approx(math.log(511))
    warning = loss_warning(untrained - 0.01, objective, 256, "lars")
    assert warning.startswith(f"the loss is {untrained - 0.01:.3f} an epoch after the warm-up")
    assert "log(2N-1) = 6.236" in warning
    assert "learning rate too small for LARS? optim.base_learning_rate=0.3 to 1.5" in warning
    assert "LARS" not in loss_warning(untrained, objective, 256, "sgd")
    edge = untrained - 0.1 * (untrained - attainable)
    assert loss_warning(edge + 1e-6, objective, 256, "lars") and not loss_warning(edge - 1e-6, objective, 256, "lars")
    assert loss_warning(untrained + 1, objective, 256, "lars")


def test_loss_warning_has_nothing_to_say_about_the_spectral_loss() -> None:
    assert loss_warning(100.0, KernelInfoNCE("spectral"), 256, "lars") is None


def test_a_resumed_run_is_not_judged_again() -> None:
    model = nn.Linear(4, 4)
    optimizer = make_optimizer(model, "lars", weight_decay=0, momentum=0.9, trust_coefficient=1e-3)
    guard = LearningRateGuard(optimizer, 1e-3, 1e-3, start=40)
    said = []
    for _ in range(STEPS + 1):
        model(torch.ones(2, 4)).square().sum().backward()
        set_learning_rate(optimizer, 1e-3)
        guard.before(1e-3)
        optimizer.step()
        said.append(guard.after(1e-3))
    assert said == [None] * (STEPS + 1)


def test_a_loss_above_that_of_no_learning_is_no_small_learning_rate() -> None:
    warning = loss_warning(9.0, KernelInfoNCE(), 256, "lars")
    assert warning is not None and "collapsed" in warning and "too small" not in warning
    adamw = loss_warning(6.2, KernelInfoNCE(), 256, "adamw")
    assert adamw is not None and "LARS" not in adamw

"""Logistic regression whose samples are split over ranks."""

import pytest
import torch
from torch import Tensor

from simclr_ddp.distributed import collectives
from simclr_ddp.evaluation import logistic
from simclr_ddp.evaluation.chunks import Features
from simclr_ddp.evaluation.cross_entropy import CrossEntropy
from simclr_ddp.evaluation.shared_cross_entropy import Shared, helping
from tests.support.ranks import Ranks

CLASSES = 3
STRENGTHS = [1e-2, 1.0, 100.0]


def samples(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, 5], labels, and a mask of those held out."""
    g = torch.Generator().manual_seed(n)
    labels = torch.randint(CLASSES, (n,), generator=g)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64) + labels[:, None] * torch.arange(5) / 4
    return x, labels, torch.rand(n, generator=g) < 0.25


def solve(n: int) -> tuple[Tensor, Tensor, list[float]]:
    """What each rank does; rank 0 alone has the features, and returns a model and the scores of the strengths."""
    with helping(torch.device("cpu")) as helpers:
        if not collectives.is_main():
            return torch.empty(0), torch.empty(0), []
        x, labels, held = samples(n)
        features = logistic.standardized(x)
        select = Shared(helpers, features, labels, CLASSES).select if helpers else None
        _, model, candidates = logistic.choose(
            features, labels, held, STRENGTHS, "C", classes=CLASSES, tolerance=1e-10, select=select
        )
        return model.weight, model.bias, [c.score for c in candidates]


def sums_of(n: int) -> tuple[Tensor, Tensor]:
    """Sums over samples of all ranks: of the cross-entropy and its gradient, and of the curvature."""
    with helping(torch.device("cpu")) as helpers:
        if helpers is None:
            return torch.empty(0), torch.empty(0)
        x, labels, held = samples(n)
        shared = Shared(helpers, Features(x), labels, CLASSES).select(torch.arange(n)[held])
        loss, gradient = shared.sums(torch.ones(2, CLASSES, 6, dtype=torch.float64))
        w, rows = torch.linspace(-1, 1, CLASSES * 6).view(CLASSES, 6), torch.arange(0, n, 3)
        hessians = shared.hessian_sum(w, rows).flatten(), shared.coupled_hessian_sum(w, rows).flatten()
        return torch.cat([loss, gradient.flatten()]), torch.cat(hessians)


def test_any_ranks_find_the_solution_of_one(ranks: Ranks) -> None:
    ((weight, bias, scores),) = ranks.run(1, solve, 203)
    for world_size in (2, 3):
        found, *others = ranks.run(world_size, solve, 203)
        torch.testing.assert_close(found[0], weight, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(found[1], bias, rtol=1e-7, atol=1e-8)
        assert found[2] == scores and len(set(scores)) > 1
        assert all(other[2] == [] for other in others)


@pytest.mark.parametrize("n", (3, 40))
def test_sums_over_ranks_are_those_of_one_process(ranks: Ranks, n: int) -> None:
    x, labels, held = samples(n)
    alone = CrossEntropy(Features(x), labels, torch.arange(n)[held], CLASSES)
    loss, gradient = alone.sums(torch.ones(2, CLASSES, 6, dtype=torch.float64))
    w, rows = torch.linspace(-1, 1, CLASSES * 6).view(CLASSES, 6), torch.arange(0, n, 3)
    expected = torch.cat([alone.hessian_sum(w, rows).flatten(), alone.coupled_hessian_sum(w, rows).flatten()])
    for world_size in (2, 4):  # with three samples on four ranks, one has none
        (sums, hessian), *_ = ranks.run(world_size, sums_of, n)
        torch.testing.assert_close(sums, torch.cat([loss, gradient.flatten()]), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(hessian, expected, rtol=1e-5, atol=1e-5)


def test_one_process_has_no_helpers() -> None:
    with helping(torch.device("cpu")) as helpers:
        assert helpers is None

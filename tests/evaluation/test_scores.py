import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from simclr_ddp.evaluation import scores


def test_label_ranks_are_places_in_a_stable_order() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 2, 0], [5, 5, 5, 5], [0, 7, 7, 1]])
    for label in range(4):
        labels = torch.full((5,), label)
        order = logits.sort(dim=1, descending=True, stable=True).indices
        assert scores.label_ranks(logits, labels).tolist() == (order == label).int().argmax(1).tolist()
    # A model that knows nothing is right only where the first class is.
    assert scores.label_ranks(torch.zeros(3, 3), torch.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (3, 7), (51_860, 100_000), (1, 1)])
def test_wilsons_interval_is_scipys(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert scores.wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_mean_per_class_counts_every_class_once() -> None:
    labels = torch.tensor([0] * 8 + [2] * 2)  # of class 1 there is no image
    hits = torch.tensor([True] * 6 + [False] * 2 + [False, True])
    assert scores.accuracy(hits) == pytest.approx(0.7)
    assert scores.mean_per_class(hits, labels) == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert scores.mean_per_class(torch.zeros(3, dtype=torch.bool), torch.tensor([0, 5, 5])) == 0


def test_squared_errors_of_each_number() -> None:
    errors = scores.squared_errors(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[0.0, 2], [0, 2]]))
    assert errors.tolist() == [5, 2]


def test_the_interval_of_a_mean_holds_it_in_95_of_100_samples() -> None:
    generator = np.random.default_rng(0)
    ends = [scores.mean_interval(torch.from_numpy(generator.exponential(2.0, 200))) for _ in range(2000)]
    assert 0.92 < np.mean([low < 2 < high for low, high in ends]) < 0.97
    assert scores.mean_interval(torch.tensor([3.0])) == (3, 3)

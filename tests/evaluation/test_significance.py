"""Comparisons of two models and of two groups of runs, against SciPy, resampling and their definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simclr_ddp.evaluation import significance

COUNTS = st.integers(0, 40)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 3), (5, 9), (12, 12), (1000, 1100), (20_000, 20_500)])
def test_mcnemar_is_the_binomial_test_of_scipy(only_a: int, only_b: int) -> None:
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert significance.mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-8)


def test_mcnemar_is_the_permutation_test_by_all_exchanges() -> None:
    """Every exchange of the two predictions of the images that only one predicts correctly, as methods.md asks."""
    only_a, only_b = 8, 2
    differences = [sum(signs) for signs in itertools.product((1, -1), repeat=only_a + only_b)]
    expected = np.mean([abs(d) >= only_a - only_b for d in differences])
    assert significance.mcnemar(only_a, only_b) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(COUNTS, COUNTS, COUNTS)
def test_a_comparison_of_b_and_a_is_that_of_a_and_b_negated(only_a: int, only_b: int, both: int) -> None:
    correct_a = np.repeat([True, False, True, False], [only_a, only_b, both, 1])
    correct_b = np.repeat([False, True, True, False], [only_a, only_b, both, 1])
    one, other = significance.accuracies(correct_a, correct_b), significance.accuracies(correct_b, correct_a)
    assert one.difference == -other.difference == pytest.approx(correct_a.mean() - correct_b.mean())
    assert one.interval == tuple(-end for end in reversed(other.interval))
    assert one.p == other.p and 0 < one.p <= 1
    assert -1 <= one.interval[0] <= one.difference <= one.interval[1] <= 1
    assert significance.discordant(correct_a, correct_b) == (only_a, only_b)


@pytest.mark.parametrize(("only_a", "only_b", "n"), [(3, 1, 6), (30, 22, 500), (0, 4, 40), (300, 250, 10_000)])
def test_the_interval_of_accuracies_is_that_of_many_resamples(only_a: int, only_b: int, n: int) -> None:
    counts = np.random.default_rng(0).multinomial(n, np.array([only_a, only_b, n - only_a - only_b]) / n, 100_000)
    resampled = (counts[:, 0] - counts[:, 1]) / n
    ends = significance.accuracy_interval(only_a, only_b, n)
    assert np.mean(resampled < ends[0]) <= 0.027 and np.mean(resampled > ends[1]) <= 0.027
    assert np.mean(resampled <= ends[0]) >= 0.023 and np.mean(resampled >= ends[1]) >= 0.023


def test_the_interval_of_accuracies_covers_the_truth_in_95_of_100_samples() -> None:
    only_a, only_b, n, covered = 0.06, 0.03, 400, 0
    for counts in np.random.default_rng(0).multinomial(n, [only_a, only_b, 1 - only_a - only_b], 500):
        low, high = significance.accuracy_interval(int(counts[0]), int(counts[1]), n)
        covered += low <= only_a - only_b <= high
    assert 0.93 < covered / 500 < 0.97


def test_errors_have_the_interval_and_p_value_of_the_paired_t_test() -> None:
    """Of many images, to which both then tend."""
    random = np.random.default_rng(0)
    error_a = random.exponential(size=500)
    error_b = error_a + random.normal(size=500) * 0.3 + 0.003
    found, expected = significance.errors(error_a, error_b), stats.ttest_rel(error_a, error_b)
    assert found.difference == pytest.approx((error_a - error_b).mean(), rel=1e-12)
    assert found.p == pytest.approx(expected.pvalue, abs=0.015) and 0.01 < expected.pvalue < 0.9
    np.testing.assert_allclose(found.interval, expected.confidence_interval(), atol=0.0012)
    assert found == significance.errors(error_a, error_b), "it is a function of the errors and the seed"
    assert found.interval != significance.errors(error_a, error_b, seed=1).interval


def test_the_p_value_of_errors_is_that_of_all_exchanges() -> None:
    differences = np.array([0.5, 0.2, -0.1, 0.4, 0.3, -0.2, 0.1])
    every = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=7)]
    expected = np.mean([total >= differences.sum() - 1e-9 for total in every])
    found = significance.errors(differences, np.zeros(7))
    assert found.p == pytest.approx(expected, abs=0.015) and expected > 0.03
    assert significance.errors(differences, differences) == (0.0, (0.0, 0.0), 1.0)


def test_many_images_are_resampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    error_a, error_b = random.exponential(size=(2, 64))
    found = significance.errors(error_a, error_b)
    monkeypatch.setattr(significance, "PIECE", 64 * 1000)
    assert significance.errors(error_a, error_b) == found


VALUES = st.lists(st.floats(-1, 1, allow_subnormal=False).map(lambda x: round(x, 6)), min_size=2, max_size=6)


@settings(max_examples=40, deadline=None)
@given(VALUES, VALUES)
def test_welch_is_scipys(a: list[float], b: list[float]) -> None:
    found = significance.welch(a, b)
    if np.std(a) + np.std(b) < 1e-9:
        assert found.interval == (found.difference, found.difference)
        return
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert found.degrees == pytest.approx(expected.df, rel=1e-6)
    assert found.p == pytest.approx(expected.pvalue, abs=1e-6)
    np.testing.assert_allclose(found.interval, expected.confidence_interval(), rtol=1e-5, atol=1e-9)
    other = significance.welch(b, a)
    assert other.interval == pytest.approx(tuple(-end for end in reversed(found.interval)))


@pytest.mark.parametrize("degrees", [1, 1.3, 2, 3.7, 10, 100, 1e4])
def test_students_t_is_scipys(degrees: float) -> None:
    for t in (0.01, 0.5, 2, 5, 30):
        assert significance.t_within(-t, degrees) == pytest.approx(1 - 2 * stats.t.sf(t, degrees), abs=1e-7)
    assert significance.t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-7)


def test_a_group_of_one_has_no_deviation() -> None:
    mean, deviation = significance.mean_and_deviation([0.5])
    assert mean == 0.5 and math.isnan(deviation)
    assert significance.mean_and_deviation([1.0, 2.0, 4.0])[1] == pytest.approx(np.sqrt(7 / 3))
    with pytest.raises(ValueError, match="groups of 1 and 2 runs"):
        significance.welch([1.0], [1.0, 2.0])

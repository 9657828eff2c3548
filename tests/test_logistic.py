import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from simclr_ddp import logistic
from simclr_ddp.logistic import Solution, choose, logistic_regression, ridge_regression


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the problems are small: several threads would only wait for each other


def samples(n: int = 120, d: int = 6, k: int = 4, seed: int = 0, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features of unequal scales and means, and labels that depend on them."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, d)) * np.logspace(-1, 1, d) + generator.normal(size=d)
    labels = (sharpness * x @ generator.normal(size=(d, k)) + generator.gumbel(size=(n, k))).argmax(1)
    assert len(np.unique(labels)) == k
    return torch.from_numpy(x), torch.from_numpy(labels)


def oracle(w: np.ndarray, x: np.ndarray, labels: np.ndarray, k: int, l2: float) -> tuple[float, np.ndarray]:
    """Objective and gradient at [W; b], written out sample by sample."""
    w = w.reshape(x.shape[1] + 1, k)
    gradient = np.zeros_like(w)
    loss = 0.0
    for row, label in zip(x, labels, strict=True):
        logits = row @ w[:-1] + w[-1]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        loss -= np.log(p[label])
        p[label] -= 1
        gradient += np.append(row, 1)[:, None] * p
    gradient /= len(x)
    gradient[:-1] += 2 * l2 * w[:-1]
    return loss / len(x) + l2 * (w[:-1] ** 2).sum(), gradient.ravel()


def at(solution: Solution, x: Tensor, labels: Tensor) -> tuple[float, np.ndarray]:
    w = torch.cat([solution.weight, solution.bias[None]]).numpy().ravel()
    return oracle(w, x.numpy(), labels.numpy(), solution.weight.shape[1], solution.l2)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_it_is_the_minimum_that_scipy_finds(l2: float) -> None:
    x, labels = samples(50)
    solution = logistic_regression(x, labels, 4, l2, tolerance=1e-9)
    value, gradient = at(solution, x, labels)
    assert solution.converged and np.abs(gradient).max() < 1.1e-9
    assert solution.gradient == pytest.approx(np.abs(gradient).max(), abs=1e-12)
    arguments = (x.numpy(), labels.numpy(), 4, l2)
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 0, "gtol": 1e-8}
    found = minimize(oracle, np.zeros(28), arguments, "L-BFGS-B", jac=True, options=options)
    assert value <= found.fun + 1e-12 and value == pytest.approx(found.fun, abs=1e-8)


@pytest.mark.parametrize("tolerance", [1e-5, 1e-8, 1e-11])
def test_it_reaches_the_tolerance_on_separable_data(tolerance: float) -> None:
    x, labels = samples(sharpness=100)
    solution = logistic_regression(x, labels, 4, 1e-6, tolerance=tolerance)
    assert solution.converged and solution.gradient <= tolerance
    assert np.abs(at(solution, x, labels)[1]).max() <= tolerance + 1e-14
    assert (solution.predict(x).argmax(1) == labels).all()


@pytest.mark.parametrize("l2", [0.0, 1e-4, 1e-2])
def test_collinear_and_constant_features(l2: float) -> None:
    x, labels = samples()
    twice = logistic_regression(torch.cat([x, x, 0 * x[:, :1]], 1), labels, 4, l2, tolerance=1e-9)
    once = logistic_regression(x, labels, 4, l2 / 2, tolerance=1e-9)  # halves of W on each copy: half the penalty
    assert twice.converged and once.converged
    torch.testing.assert_close(twice.weight[:6] + twice.weight[6:12], once.weight, rtol=1e-3, atol=1e-6)
    assert (twice.weight[12] == 0).all()


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    x, labels = samples(400, 20)
    strong = logistic_regression(x, labels, 4, 1e-3, tolerance=1e-9)
    cold = logistic_regression(x, labels, 4, 5e-4, tolerance=1e-9)
    warm = logistic_regression(x, labels, 4, 5e-4, tolerance=1e-9, start=strong)
    torch.testing.assert_close(warm.weight, cold.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(warm.bias, cold.bias, rtol=1e-4, atol=1e-6)
    again = logistic_regression(x, labels, 4, 5e-4, tolerance=1e-9, start=cold)
    assert again.iterations == 0 and warm.iterations < cold.iterations


def test_what_was_reached_is_said_when_the_iterations_end() -> None:
    x, labels = samples()
    solution = logistic_regression(x, labels, 4, 1e-4, tolerance=1e-9, max_iterations=3)
    assert solution.iterations == 3 and not solution.converged
    assert solution.gradient == pytest.approx(np.abs(at(solution, x, labels)[1]).max())


def test_a_tolerance_beyond_float64_ends_in_time() -> None:
    x, labels = samples()
    solution = logistic_regression(x, labels, 4, 1e-3, tolerance=0, max_iterations=300)
    assert not solution.converged and solution.gradient < 1e-13


def test_the_search_meets_both_conditions_from_any_first_length() -> None:
    for scale in (1e-6, 1e-3, 1 / 1.4, 1.0, 1e3, 1e6):  # at 1.4 the value is low enough, but the slope too steep

        def line(t: float, scale: float = scale) -> tuple[float, float]:  # minimum at t = scale
            u = t / scale
            return u**4 / 4 - u, (u**3 - 1) / scale

        t = logistic._search(line)
        (value_0, slope_0), (value, slope) = line(0.0), line(t)
        assert value <= value_0 + 1e-4 * t * slope_0 and abs(slope) <= 0.5 * abs(slope_0)


@pytest.mark.parametrize("l2", [1e-8, 1e-2, 10.0])
def test_ridge_is_least_squares_with_rows_for_the_penalty(l2: float) -> None:
    x, _ = samples()
    y = torch.from_numpy(np.random.default_rng(1).normal(size=(120, 3))) + 5
    solution = ridge_regression(x, y, l2)
    # mean over 120 * 3 errors: sqrt(l2 * 360) in a row for every weight, none for the bias.
    ones, rows = np.ones((120, 1)), np.sqrt(l2 * 360) * np.eye(6, 7)
    a, b = np.concatenate([np.concatenate([x, ones], 1), rows]), np.concatenate([y, np.zeros((6, 3))])
    expected = np.linalg.lstsq(a, b, rcond=None)[0]
    np.testing.assert_allclose(torch.cat([solution.weight, solution.bias[None]]), expected, rtol=1e-8, atol=1e-10)
    assert solution.gradient < 1e-12


def test_ridge_without_a_penalty_takes_the_smallest_weights() -> None:
    x, _ = samples()
    y = x[:, :2] @ torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) + 7
    solution = ridge_regression(torch.cat([x, x], 1), y, 0)
    torch.testing.assert_close(solution.weight[:6], solution.weight[6:])
    torch.testing.assert_close(solution.predict(torch.cat([x, x], 1)), y)


def test_the_strength_is_chosen_on_the_held_out_and_refitted_to_all() -> None:
    x, labels = samples(400, 60, seed=3)
    x = (x - x.mean(0)) / x.std(0)
    held = torch.arange(400) % 4 == 0
    strengths = [1e-5, 1e-1, 1e-3, 10.0, 1e-2]
    solution, tried = choose(x, labels, held, strengths, classes=4, tolerance=1e-8)
    assert [t.l2 for t in tried] == sorted(strengths, reverse=True)
    for t in tried:
        alone = logistic_regression(x[~held], labels[~held], 4, t.l2, tolerance=1e-8)
        assert t.score == (alone.predict(x[held]).argmax(1) == labels[held]).double().mean()
    best = max(t.score for t in tried)
    assert best > min(t.score for t in tried)
    assert solution.l2 == next(t.l2 for t in tried if t.score == best)
    everything = logistic_regression(x, labels, 4, solution.l2, tolerance=1e-8)
    torch.testing.assert_close(solution.weight, everything.weight, rtol=1e-4, atol=1e-6)


def test_held_out_labels_do_not_reach_the_fits_that_they_judge() -> None:
    x, labels = samples(200)
    held = torch.arange(200) < 50
    wrong = torch.where(held, (labels + 1) % 4, labels)
    (_, tried), (_, judged) = (choose(x, y, held, [1e-1, 1e-3], classes=4) for y in (labels, wrong))
    assert [t.gradient for t in tried] == [t.gradient for t in judged]
    assert all(a.score > b.score for a, b in zip(tried, judged, strict=True))


def test_of_equal_strengths_the_strongest_and_of_one_no_choice() -> None:
    x, labels = samples(sharpness=0)
    labels[:] = (x[:, 5] > x[:, 5].median()).long()
    x[:, 5] += 100 * labels
    solution, tried = choose(x, labels, torch.arange(120) < 30, [1e-3, 1e-2, 1e-4], classes=2)
    assert {t.score for t in tried} == {1.0} and solution.l2 == 1e-2
    solution, tried = choose(x, labels, torch.zeros(120, dtype=torch.bool), [1e-3], classes=2)
    assert tried == [] and solution.l2 == 1e-3


@pytest.mark.parametrize("judging", [True, False])
def test_a_class_may_be_missing_on_either_side_of_the_split(judging: bool) -> None:
    x, labels = samples()
    held = (torch.arange(120) % 3 == 0) & (labels != 3) if judging else labels == 3
    _, tried = choose(x, labels, held, [1e-2, 1e-4], classes=4)
    assert all(t.converged for t in tried)
    assert all((t.score == 0) is not judging for t in tried)


def test_numbers_are_chosen_by_mean_squared_error() -> None:
    x, _ = samples(80, 40)
    y = torch.from_numpy(np.random.default_rng(1).normal(size=(80, 2))) + x[:, -2:] / 10
    held = torch.arange(80) % 4 == 0
    solution, tried = choose(x, y, held, [1e-9, 1e-2, 1e-1, 1e4], classes=0)
    for t in tried:
        alone = ridge_regression(x[~held], y[~held], t.l2)
        assert t.score == pytest.approx(((alone.predict(x[held]) - y[held]) ** 2).mean().item())
    assert solution.l2 == min(tried, key=lambda t: t.score).l2
    assert solution.l2 not in (1e-9, 1e4)
    torch.testing.assert_close(solution.weight, ridge_regression(x, y, solution.l2).weight)


def test_top_k_and_squared_errors() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 2, 0]])
    labels = torch.tensor([1, 3, 3])
    assert logistic.top_k(logits, labels, 1) == pytest.approx(1 / 3)
    assert logistic.top_k(logits, labels, 2) == pytest.approx(2 / 3)
    errors = logistic.squared_errors(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[0.0, 2], [0, 2]]))
    assert errors.tolist() == [5, 2]

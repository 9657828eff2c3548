from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_ddp.evaluation import logistic
from simclr_ddp.evaluation.chunks import CHUNK, Features
from simclr_ddp.evaluation.cross_entropy import CrossEntropy
from simclr_ddp.evaluation.lbfgs import Place, line_search
from simclr_ddp.evaluation.logistic import Solution, choose, ridge, solutions


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


def fit(x: Tensor, labels: Tensor, l2: float, classes: int = 4, **more: Any) -> Solution:
    """The linear model of all samples at one l2."""
    (solution,) = solutions(Features(x), labels, torch.arange(len(x)), [l2], classes=classes, **more)
    return solution


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


def at(solution: Solution, x: Tensor, labels: Tensor, l2: float) -> tuple[float, float]:
    """The objective, and the norm of its gradient relative to that at zero weights."""
    w = torch.cat([solution.weight, solution.bias[None]]).numpy().ravel()
    arguments = (x.numpy(), labels.numpy(), solution.weight.shape[1], l2)
    (value, gradient), (_, at_zero) = oracle(w, *arguments), oracle(0 * w, *arguments)
    return value, float(np.linalg.norm(gradient) / np.linalg.norm(at_zero))


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_it_is_the_minimum_that_scipy_finds(l2: float) -> None:
    x, labels = samples(50)
    solution = fit(x, labels, l2, tolerance=1e-9)
    value, gradient = at(solution, x, labels, l2)
    assert solution.converged and gradient < 1.1e-9 and solution.gradient == pytest.approx(gradient, abs=1e-12)
    arguments = (x.numpy(), labels.numpy(), 4, l2)
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 0, "gtol": 1e-8}
    found = minimize(oracle, np.zeros(28), arguments, "L-BFGS-B", jac=True, options=options)
    assert value <= found.fun + 1e-12 and value == pytest.approx(found.fun, abs=1e-8)


def stated(convention: str, strength: float, losses: Tensor, weight: Tensor) -> Tensor:
    """What the options promise to minimise."""
    if convention == "C":
        return weight.square().sum() / 2 + strength * losses.sum()
    return losses.mean() + strength * weight.square().sum()


@pytest.mark.parametrize("convention", logistic.CONVENTIONS)
@pytest.mark.parametrize("classes", [4, 0])
@pytest.mark.parametrize("strength", [1e-3, 0.1, 3.0])
def test_the_gradient_of_the_stated_objective_is_zero(convention: str, classes: int, strength: float) -> None:
    x, labels = samples(90)
    if not classes:
        labels = torch.from_numpy(np.random.default_rng(1).normal(size=(90, 3))) + x[:, :3]
    solution = fit(x, labels, ridge(convention, strength, 90), classes, tolerance=1e-11)
    weight, bias = (t.clone().requires_grad_() for t in (solution.weight, solution.bias))
    norms = []
    for w, b in ((weight, bias), (0 * weight, 0 * bias)):
        logits = x @ w + b
        losses = (logits - labels).square().mean(1) if not classes else -logits.log_softmax(1)[range(90), labels]
        gradients = torch.autograd.grad(stated(convention, strength, losses, w), (w, b))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
    assert norms[0] < 1e-10 * norms[1]


def test_c_is_the_minimum_that_scipy_finds_for_its_objective() -> None:
    x, labels = samples(50)
    c = 0.7

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.from_numpy(w.reshape(7, 4)).requires_grad_()
        losses = torch.nn.functional.cross_entropy(x @ leaf[:-1] + leaf[-1], labels, reduction="none")
        value = stated("C", c, losses, leaf[:-1])
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad.numpy().ravel()

    options = {"maxiter": 5000, "maxfun": 9000, "ftol": 0, "gtol": 1e-9}
    found = minimize(objective, np.zeros(28), method="L-BFGS-B", jac=True, options=options).x.reshape(7, 4)
    solution = fit(x, labels, ridge("C", c, 50), tolerance=1e-11)
    np.testing.assert_allclose(solution.weight, found[:-1], rtol=1e-4, atol=1e-5)


def test_the_strengths_by_default_are_45_in_11_decades() -> None:
    np.testing.assert_allclose(logistic.strengths_of("C"), np.logspace(-6, 5, 45), rtol=1e-12)
    np.testing.assert_allclose(logistic.strengths_of("mean"), np.logspace(-10, 1, 45), rtol=1e-12)
    both = ([ridge(c, s, 50_000) for s in logistic.strengths_of(c)] for c in ("C", "mean"))
    np.testing.assert_allclose(*(sorted(l2) for l2 in both), rtol=1e-12)


@pytest.mark.parametrize("tolerance", [1e-5, 1e-8, 1e-11])
def test_it_reaches_the_tolerance_on_separable_data(tolerance: float) -> None:
    x, labels = samples(sharpness=100)
    solution = fit(x, labels, 1e-6, tolerance=tolerance)
    assert solution.converged and solution.gradient <= tolerance
    assert at(solution, x, labels, 1e-6)[1] <= tolerance + 1e-13
    assert (solution.predict(x).argmax(1) == labels).all()


@pytest.mark.parametrize("l2", [0.0, 1e-4, 1e-2])
def test_collinear_and_constant_features(l2: float) -> None:
    x, labels = samples(sharpness=0.1)  # not separable: without a penalty there would be no minimum
    twice = fit(torch.cat([x, x, 0 * x[:, :1]], 1), labels, l2, tolerance=1e-9)
    once = fit(x, labels, l2 / 2, tolerance=1e-9)  # halves of W on each copy: half the penalty
    assert twice.converged and once.converged
    torch.testing.assert_close(twice.weight[:6] + twice.weight[6:12], once.weight, rtol=1e-3, atol=1e-6)
    assert (twice.weight[12] == 0).all()


def test_features_that_say_nothing_leave_the_frequencies() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10)
    solution = fit(torch.zeros(40, 3), labels, 1e-3, 2, tolerance=1e-9)
    torch.testing.assert_close(solution.bias.softmax(0), torch.tensor([0.75, 0.25], dtype=torch.float64))
    balanced = fit(torch.zeros(40, 3), torch.arange(40) % 2, 1e-3, 2)  # zero weights are the minimum
    assert balanced.converged and balanced.gradient == 0 and balanced.iterations == 0


def test_a_path_ends_where_cold_starts_do() -> None:
    x, labels = samples(400, 10)
    rows, path = torch.arange(400), [1e-2, 1e-3, 5e-4, 1e-4, 1e-5]
    warm = list(solutions(Features(x), labels, rows, path, classes=4, tolerance=1e-10))
    cold = [fit(x, labels, l2, tolerance=1e-10) for l2 in path]
    for one, other in zip(warm, cold, strict=True):
        assert one.converged and other.converged
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.bias, other.bias, rtol=1e-4, atol=1e-6)
    assert sum(s.iterations for s in warm) < sum(s.iterations for s in cold)
    assert fit(x, labels, path[-1], tolerance=1e-10, start=cold[-1]).iterations == 0


def test_what_was_reached_is_said_when_the_iterations_end() -> None:
    x, labels = samples()
    solution = fit(x, labels, 1e-4, tolerance=1e-9, max_iterations=3)
    assert solution.iterations == 3 and not solution.converged
    assert solution.gradient == pytest.approx(at(solution, x, labels, 1e-4)[1])


def test_a_tolerance_beyond_float64_ends_in_time() -> None:
    x, labels = samples()
    solution = fit(x, labels, 1e-3, tolerance=0, max_iterations=300)
    assert not solution.converged and solution.gradient < 1e-12


def test_the_search_meets_both_conditions_from_any_first_length() -> None:
    for scale in (1e-6, 1e-3, 1 / 1.4, 1.0, 1e3, 1e6):

        def function(w: Tensor, scale: float = scale) -> tuple[float, Tensor]:  # minimum at w = scale
            u = w.item() / scale
            return u**4 / 4 - u, torch.tensor([(u**3 - 1) / scale], dtype=torch.float64)

        w, direction = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        value_0, gradient_0 = function(w)
        slope_0 = gradient_0.item()
        search = line_search(Place(w, value_0, gradient_0), direction, slope_0, exact=True)
        trial, _ = next(search)
        while True:
            try:
                trial, _ = search.send(function(trial))
            except StopIteration as stop:
                t, value, gradient = stop.value
                break
        assert (value, gradient) == function(t)
        assert value <= value_0 + 1e-4 * t.item() * slope_0 and abs(gradient.item()) <= 0.9 * abs(slope_0)


# --- ridge regression -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [1e-8, 1e-2, 10.0])
def test_ridge_is_least_squares_with_rows_for_the_penalty(l2: float) -> None:
    x, _ = samples()
    y = torch.from_numpy(np.random.default_rng(1).normal(size=(120, 3))) + 5
    solution = fit(x, y, l2, 0)
    # mean over 120 * 3 errors: sqrt(l2 * 360) in a row for every weight, none for the bias.
    ones, rows = np.ones((120, 1)), np.sqrt(l2 * 360) * np.eye(6, 7)
    a, b = np.concatenate([np.concatenate([x, ones], 1), rows]), np.concatenate([y, np.zeros((6, 3))])
    expected = np.linalg.lstsq(a, b, rcond=None)[0]
    np.testing.assert_allclose(torch.cat([solution.weight, solution.bias[None]]), expected, rtol=1e-8, atol=1e-10)
    assert solution.gradient < 1e-12 and solution.converged


def test_ridge_without_a_penalty_takes_the_smallest_weights() -> None:
    x, _ = samples()
    y = x[:, :2] @ torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) + 7
    solution = fit(torch.cat([x, x], 1), y, 0, 0)
    torch.testing.assert_close(solution.weight[:6], solution.weight[6:])
    torch.testing.assert_close(solution.predict(torch.cat([x, x], 1)), y)


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", logistic.CONVENTIONS)
def test_the_strength_is_chosen_on_the_held_out_and_refitted_to_all(convention: str) -> None:
    x, labels = samples(400, 60, seed=3)
    x = (x - x.mean(0)) / x.std(0)
    held = torch.arange(400) % 4 == 0
    strengths = [1e-5, 1e-1, 1e-3, 10.0, 1e-2]
    chosen, solution, tried = choose(Features(x), labels, held, strengths, convention, classes=4, tolerance=1e-8)
    assert [t.strength for t in tried] == sorted(strengths, reverse=convention == "mean")
    assert [t.l2 for t in tried] == sorted((ridge(convention, s, 300) for s in strengths), reverse=True)
    for t in tried:
        alone = fit(x[~held], labels[~held], t.l2, tolerance=1e-8)
        assert t.score == (alone.predict(x[held]).argmax(1) == labels[held]).double().mean()
        assert t.converged and t.gradient <= 1e-8
    best = max(t.score for t in tried)
    assert best > min(t.score for t in tried)
    assert chosen == next(t.strength for t in tried if t.score == best)
    everything = fit(x, labels, ridge(convention, chosen, 400), tolerance=1e-8)
    torch.testing.assert_close(solution.weight, everything.weight, rtol=1e-4, atol=1e-6)


def test_held_out_labels_do_not_reach_the_fits_that_they_judge() -> None:
    x, labels = samples(200)
    held = torch.arange(200) < 50
    wrong = torch.where(held, (labels + 1) % 4, labels)
    (*_, tried), (*_, judged) = (choose(Features(x), y, held, [1e-1, 1e-3], "mean", classes=4) for y in (labels, wrong))
    assert [t.gradient for t in tried] == [t.gradient for t in judged]
    assert all(a.score > b.score for a, b in zip(tried, judged, strict=True))


def test_of_equal_strengths_the_strongest_penalty_and_of_one_no_choice() -> None:
    x, labels = samples(sharpness=0)
    labels[:] = (x[:, 5] > x[:, 5].median()).long()
    x[:, 5] += 100 * labels
    for convention, strengths, strongest in (("mean", [1e-3, 1e-2, 1e-4], 1e-2), ("C", [10.0, 100.0, 1000.0], 10.0)):
        chosen, _, tried = choose(Features(x), labels, torch.arange(120) < 30, strengths, convention, classes=2)
        assert {t.score for t in tried} == {1.0} and chosen == strongest
    chosen, solution, tried = choose(Features(x), labels, torch.zeros(120, dtype=torch.bool), [1e-3], "mean", classes=2)
    assert tried == [] and chosen == 1e-3 and solution.converged


@pytest.mark.parametrize("judging", [True, False])
def test_a_class_may_be_missing_on_either_side_of_the_split(judging: bool) -> None:
    x, labels = samples()
    held = (torch.arange(120) % 3 == 0) & (labels != 3) if judging else labels == 3
    *_, tried = choose(Features(x), labels, held, [1e-2, 1e-4], "mean", classes=4)
    assert all(t.converged for t in tried)
    assert all((t.score == 0) is not judging for t in tried)


def test_numbers_are_chosen_by_mean_squared_error() -> None:
    x, _ = samples(80, 40)
    y = torch.from_numpy(np.random.default_rng(1).normal(size=(80, 2))) + x[:, -2:] / 10
    held = torch.arange(80) % 4 == 0
    chosen, solution, tried = choose(Features(x), y, held, [1e-9, 1e-2, 1e-1, 1e4], "mean", classes=0)
    for t in tried:
        alone = fit(x[~held], y[~held], t.l2, 0)
        assert t.score == pytest.approx(((alone.predict(x[held]) - y[held]) ** 2).mean().item())
    assert chosen == min(tried, key=lambda t: t.score).strength
    assert chosen not in (1e-9, 1e4)
    torch.testing.assert_close(solution.weight, fit(x, y, chosen, 0).weight)


def almost_separable(n: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    """Collinear features that separate all classes, if the weights are large enough."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(k, (n,), generator=generator)
    scale = torch.arange(1, d + 1) ** -0.7
    centres, mixed = torch.randn(k, d, generator=generator) / 4, torch.randn(d, d, generator=generator) / d**0.5
    x = ((torch.randn(n, d, generator=generator) + centres[labels]) * scale @ mixed + 0.3).relu()
    return (x - x.mean(0)) / x.std(0), labels


def test_weak_penalties_on_almost_separable_classes_converge() -> None:
    """With the averaged Hessian alone, the weakest penalty needs more than 600 iterations."""
    x, labels = almost_separable(2000, 128, 10)
    l2 = [1 / (2 * c * 2000) for c in (1e-2, 1, 100, 1e5)]
    found = solutions(Features(x), labels, torch.arange(2000), l2, classes=10)
    assert all(solution.converged and solution.iterations < 250 for solution in found)
    assert (found[-1].predict(x.double()).argmax(1) == labels).all()


@pytest.mark.parametrize("scale", [0.1, 30.0])  # classes that are uncertain, and certain
def test_the_complete_hessian_is_that_of_the_mean_cross_entropy(scale: float) -> None:
    x, labels = samples(80, 5, 3)
    x = (x / x.std(0)).float().double()
    w = (scale * torch.linspace(-1, 1, 18).view(3, 6)).float().double()

    def loss(w: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x @ w[:, :-1].T + w[:, -1], labels)

    expected = torch.autograd.functional.hessian(loss, w)
    found = CrossEntropy(Features(x), labels, torch.arange(80), 3).coupled_hessian(w)
    gauge = expected.diagonal(dim1=0, dim2=2).sum(2) / 9  # where all classes shift alike, it is made regular
    expected = (expected + gauge[None, :, None, :]).view(18, 18)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_saturated_probabilities_end() -> None:
    """Without a penalty, on separable samples, the Hessian vanishes."""
    x = torch.tensor([[-1.0], [1.0]]).repeat(10, 1)
    labels = torch.arange(20) % 2
    found = solutions(Features(x), labels, torch.arange(20), [0.0, 1e-14], classes=2, tolerance=0)
    assert all(s.predict(x.double()).argmax(1).equal(labels) for s in found)


# --- features that fill the memory ----------------------------------------------------------------------------------


def test_features_are_standardised() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64) * torch.tensor([2, 1, 1e-7]) + 5
    x_test = torch.ones(2, 3, dtype=torch.float64)
    expected = (1 - x.mean(0)) / x.std(0, correction=0)
    kept, fitted = x.clone(), logistic.standardized(x)
    ((_, z),) = fitted.chunks(torch.arange(50))
    ((_, z_test),) = Features(x_test, fitted.mean, fitted.factor).chunks(torch.arange(2))
    assert torch.equal(x, kept)
    x, x_test = z, z_test
    torch.testing.assert_close(x[:, :2].mean(0), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(x[:, :2].square().mean(0), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(x_test[0, :2], expected[:2])
    assert (x[:, 2] == 0).all() and (x_test[:, 2] == 0).all()  # constant, but for rounding


@pytest.mark.parametrize("classes", [4, 0])
def test_chunks_and_float32_change_nothing(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = samples(200, 12)
    if not classes:
        labels = x[:, :2].square()
    x = x.float()
    arguments = (labels, torch.arange(200) % 5 == 0, [1.0, 1e-2, 1e-4], "mean")
    chosen, solution, tried = choose(Features(x), *arguments, classes=classes, tolerance=1e-9)
    exact = choose(Features(x.double()), *arguments, classes=classes, tolerance=1e-9)
    assert torch.equal(solution.weight, exact[1].weight) and tried == exact[2]
    monkeypatch.setitem(CHUNK, "cpu", 7 * 12)
    again, other, retried = choose(Features(x), *arguments, classes=classes, tolerance=1e-9)
    assert again == chosen and [t.score for t in retried] == pytest.approx([t.score for t in tried])
    torch.testing.assert_close(other.weight, solution.weight, rtol=1e-5, atol=1e-7)


class Largest(TorchDispatchMode):
    """Size in bytes of the largest tensor that any operation makes, besides those that share x's memory."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.own, self.bytes = x.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else [made]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() != self.own:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("classes", [3, 0])
def test_features_are_never_copied(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", 2**12)
    n, d = 20_000, 32
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % classes if classes else x[:, :2].double()
    with Largest(x) as largest:
        assert logistic.finite(x)
        features = logistic.standardized(x)
        _, solution, _ = choose(features, labels, torch.arange(n) % 10 == 0, [1e-1, 1e-3], "mean", classes=classes)
        if classes:
            logistic.label_ranks(solution, features, labels, torch.arange(n))
    # A chunk in float64 is 2^15 bytes, an index or two columns of numbers less than 2^19; the features are over 2^21.
    assert 2**15 <= largest.bytes < 2**19 and x.nbytes > 2**21

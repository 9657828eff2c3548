import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import simclr_ddp
from simclr_ddp import fit_logistic_path
from simclr_ddp.evaluation import logistic_fit, logistic_path
from simclr_ddp.evaluation.chunks import CHUNK
from tests.evaluation.test_logistic import samples


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def objective(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, strength: float, convention: str) -> Tensor:
    """What is minimised, written as in the docstring."""
    losses = torch.nn.functional.cross_entropy(x.double() @ weight + bias, y, reduction="none")
    if convention == "C":
        return weight.square().sum() / 2 + strength * losses.sum()
    return losses.mean() + strength * weight.square().sum()


def relative_gradient(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, strength: float, convention: str) -> float:
    norms = []
    for w, b in ((weight, bias), (0 * weight, 0 * bias)):
        w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
        gradients = torch.autograd.grad(objective(x, y, w, b, strength, convention), (w, b))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
    return norms[0] / norms[1]


@pytest.mark.parametrize("convention", ["C", "mean"])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_it_is_the_optimum_of_scikit_learn(convention: str, kind: str) -> None:
    x, y = samples(150)
    x = x.to(getattr(torch, kind))
    strengths = [1e-3, 1e-1, 1.0, 30.0]
    weights, biases, norms = fit_logistic_path(x, y, strengths, convention=convention)
    assert weights.shape == (4, 6, 4) and biases.shape == (4, 4) and norms.dtype == torch.float64
    for strength, weight, bias, norm in zip(strengths, weights, biases, norms, strict=True):
        c = strength if convention == "C" else 1 / (2 * strength * len(x))
        theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x.double().numpy(), y.numpy())
        values = [
            objective(x, y, w, b, strength, convention).item()
            for w, b in ((weight, bias), (torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_)))
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-6)
        assert norm <= 1e-6
        assert norm == pytest.approx(relative_gradient(x, y, weight, bias, strength, convention), rel=1e-6, abs=1e-13)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(2, 5),
    st.integers(1, 8),
    st.lists(st.floats(-4, 3), min_size=1, max_size=7, unique=True),
    st.booleans(),
)
def test_norms_are_those_of_the_stated_gradient(seed: int, k: int, d: int, powers: list[float], single: bool) -> None:
    generator = np.random.default_rng(seed)
    y = torch.from_numpy(np.arange(60) % k)
    x = torch.from_numpy(generator.normal(size=(60, d)) + generator.normal(size=(k, d))[y])
    x = x.float() if single else x
    strengths = [10**p for p in powers]
    for weight, bias, norm, strength in zip(
        *fit_logistic_path(x, y, strengths, tolerance=1e-7), strengths, strict=True
    ):
        assert norm <= 1e-7
        assert norm == pytest.approx(relative_gradient(x, y, weight, bias, strength, "C"), rel=1e-3, abs=1e-13)
        assert weight.sum(1).abs().max() < 1e-9 * (1 + weight.abs().max())  # classes share no common weights


def test_strengths_in_any_order_and_twice_are_each_the_model_of_that_strength() -> None:
    x, y = samples(100)
    strengths = [1.0, 1e-3, 1.0, 10.0, 1e-2]
    weights, biases, _ = fit_logistic_path(x, y, strengths, tolerance=1e-10)
    assert torch.equal(weights[0], weights[2])
    for strength, weight, bias in zip(strengths, weights, biases, strict=True):
        alone = fit_logistic_path(x, y, [strength], tolerance=1e-10)
        torch.testing.assert_close(weight, alone[0][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(bias, alone[1][0], rtol=1e-6, atol=1e-7)


def test_columns_are_the_labels_that_occur_in_their_order() -> None:
    x, y = samples(100)
    names = np.array([7, -3, 100, 4])
    weights, _, _ = fit_logistic_path(x.numpy(), names[y.numpy()], [1.0], tolerance=1e-10)
    expected, _, _ = fit_logistic_path(x, y, [1.0], tolerance=1e-10)
    assert isinstance(weights, np.ndarray)
    np.testing.assert_allclose(weights[0], expected[0][:, [1, 3, 0, 2]], rtol=1e-6, atol=1e-8)


def test_a_memory_mapped_array_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = samples(200)
    np.save(tmp_path / "x.npy", x.float().numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    before = (tmp_path / "x.npy").read_bytes()
    monkeypatch.setitem(CHUNK, "cpu", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights, _, norms = fit_logistic_path(mapped, y.numpy(), [1e-2, 1.0])
    expected = fit_logistic_path(x.float(), y, [1e-2, 1.0])
    np.testing.assert_allclose(weights, expected[0], rtol=1e-3, atol=1e-5)
    assert norms.max() <= 1e-6 and (tmp_path / "x.npy").read_bytes() == before


def test_a_tolerance_that_is_not_reached_is_a_warning() -> None:
    x, y = samples(100)
    with pytest.warns(UserWarning, match="1 of 1 strengths did not reach tolerance=0"):
        _, _, norms = fit_logistic_path(x, y, [1.0], tolerance=0)
    assert 0 < norms[0] < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.full((20, 3), np.nan)}, "x: some features are NaN or infinite"),
        ({"x": np.ones(20)}, r"x: \[20\] float64; must be floating-point features"),
        ({"x": np.ones((20, 3), dtype=np.int64)}, "x: .* int64; must be"),
        ({"y": np.arange(19) % 2}, r"y: \[19\] int64; must be 20 integers"),
        ({"y": np.arange(20) / 2}, r"y: \[20\] float64; must be 20 integers"),
        ({"y": np.full(20, 5)}, "y: all 20 labels are 5; samples of at least two classes"),
        ({"strengths": []}, "strengths=.*: nothing to fit"),
        ({"strengths": [1.0, 0.0]}, "strengths: 0.0 is no penalty with convention=C; must be above 0"),
        ({"strengths": [-1.0], "convention": "mean"}, "strengths: -1.0 is no penalty with convention=mean"),
        ({"strengths": [float("nan")]}, "strengths: nan is no penalty"),
        ({"convention": "D"}, "convention=D: unknown value; choose one of C, mean"),
        ({"tolerance": -1.0}, "tolerance=-1.0: must be 0 or above"),
    ],
)
def test_errors_are_one_line(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": np.random.default_rng(0).normal(size=(20, 3)),
        "y": np.arange(20) % 2,
        "strengths": [1.0],
    } | change
    with pytest.raises(ValueError, match=message) as error:
        fit_logistic_path(arguments.pop("x"), arguments.pop("y"), arguments.pop("strengths"), **arguments)
    assert "\n" not in str(error.value)


def test_more_strengths_than_fit_in_memory_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = samples()
    monkeypatch.setattr(logistic_path, "available_bytes", lambda: 10_000)
    with pytest.raises(ValueError, match=r"strengths: 90 of them with 6 features and 4 classes need .* give fewer"):
        fit_logistic_path(x, y, [10.0**-i for i in range(90)])
    monkeypatch.setattr(logistic_path, "available_bytes", lambda: None)
    fit_logistic_path(x, y, [1.0])


def test_it_is_public() -> None:
    assert simclr_ddp.fit_logistic_path is logistic_fit.fit_logistic_path and "fit_logistic_path" in simclr_ddp.__all__

import numpy as np
import pytest
import torch

from benchmarks import linear_eval
from tests.evaluation.test_logistic import samples


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["ours", "scikit-learn", "torch"])
def test_solvers_reach_the_same_gradient_at_the_same_objective(name: str) -> None:
    features, labels = samples(200)
    x, y = ((features - features.mean(0)) / features.std(0)).float().numpy(), labels.numpy()
    strengths = [1e-2, 1.0]
    found = linear_eval.chosen(name)[name](x, y, strengths, 1e-6)
    exact = linear_eval.ours(x, y, strengths, 1e-10)
    assert max(linear_eval.relative_gradients(x, y, strengths, found)) < 5e-6
    assert max(linear_eval.relative_gradients(x, y, strengths, exact)) < 1.1e-10
    for (weight, _), (expected, _) in zip(found, exact, strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-4)
    assert max(linear_eval.relative_gradients(x, y, [c * 1.01 for c in strengths], exact)) > 1e-5


def test_a_hundred_classes_are_the_class_and_the_decile_of_brightness() -> None:
    images = torch.linspace(0, 1, 40).view(40, 1, 1, 1).expand(-1, 3, 2, 2)
    labels = linear_eval.labels_of(images, np.arange(40) % 10, 100)
    assert labels.tolist() == [(i % 10) * 10 + i // 4 for i in range(40)]


def test_unknown_solvers_and_missing_images_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--only", "libsvm"], "error: --only libsvm: no such solver; choose from"),
        (["--only", "ours", "--data", "nowhere.tar"], "error: --data nowhere.tar: there is no such file"),
        (["now"], "error: unknown argument now"),
    ):
        assert linear_eval.main(flags) == 2
        assert message in capsys.readouterr().err

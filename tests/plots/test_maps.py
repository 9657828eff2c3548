"""PCA, t-SNE, the colours of a map and the pictures on it."""

import sys
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from simclr_ddp.data.dataset import Dataset
from simclr_ddp.plots.maps import Colouring, Map, apart, colouring, maps, pca, scatter, thumbnails, tsne


def clusters(count: int, width: int = 20, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Representations [count, width] around three far centres, and which of them each belongs to."""
    generator = np.random.default_rng(seed)
    which = generator.integers(0, 3, count)
    h = 8 * generator.normal(size=(3, width))[which] + generator.normal(size=(count, width)) * np.linspace(
        2, 0.1, width
    )
    return torch.from_numpy(h).float(), which


def labelled(labels: np.ndarray | None, classes: list[str] | None = None) -> Dataset:
    return Dataset("somewhere", 0 if labels is None else len(labels), labels, classes, "")


def plain(points: np.ndarray) -> Map:
    return Map("m", points, "title", [])


ONE = Colouring(np.ones((1, 4)), {}, None, "no labels")


@pytest.mark.parametrize("shape", [(50, 20), (12, 30)])
def test_pca_equals_numpys_singular_values_up_to_sign(shape: tuple[int, int]) -> None:
    h = clusters(*shape)[0]
    scores, shares = pca(h, 3)
    x = h.numpy().astype(np.float64)
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(scores), np.abs(u * s)[:, :3], atol=1e-9)
    np.testing.assert_allclose(shares, (s**2 / (s**2).sum())[:3], rtol=1e-12)


def test_the_signs_of_pca_do_not_depend_on_the_order_of_the_images() -> None:
    h = clusters(50)[0]
    order = torch.from_numpy(np.random.default_rng(1).permutation(50))
    np.testing.assert_allclose(pca(h[order], 3)[0], pca(h, 3)[0][order], atol=1e-9)
    direction = torch.linalg.lstsq(h.double() - h.double().mean(0), torch.from_numpy(pca(h, 3)[0])).solution
    assert (direction.gather(0, direction.abs().argmax(0, keepdim=True)) > 0).all()


def test_pca_of_nothing_to_see_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="not finite"):
        pca(torch.full((10, 3), torch.nan), 2)
    for h in (torch.full((10, 3), 0.1), torch.zeros(10, 3)):
        with pytest.raises(ValueError, match="every image the same representation"):
            pca(h, 2)


def test_tsne_keeps_clusters_and_comes_out_the_same_again() -> None:
    pytest.importorskip("sklearn")
    h, which = clusters(60)
    scores = pca(h, 50)[0]
    points = tsne(scores, 2)
    assert points.shape == (60, 2)
    distances = np.linalg.norm(points[:, None] - points, axis=2) + np.diag(np.full(60, np.inf))
    assert (which[distances.argmin(1)] == which).all()
    assert np.array_equal(points, tsne(scores, 2))


def test_maps_without_scikit_learn_are_those_of_pca(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    h = clusters(12)[0]
    assert [m.name for m in maps(h, "pca")] == ["pca_2d", "pca_3d"]
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert [m.name for m in maps(h, "all")] == ["pca_2d", "pca_3d"]
    assert "pip install scikit-learn" in capsys.readouterr().err


def test_maps_say_how_much_of_the_variance_they_show() -> None:
    h = clusters(30)[0]
    shares = pca(h, 3)[1]
    flat, deep = maps(h, "pca")
    assert f"{shares[:2].sum():.1%}" in flat.title and f"{shares.sum():.1%}" in deep.title
    assert deep.axes == [f"component {i + 1}: {shares[i]:.1%}" for i in range(3)]
    np.testing.assert_array_equal(flat.points, deep.points[:, :2])


def legend_of(figure: Figure) -> dict[str, tuple[float, ...]]:
    (legend,) = figure.legends
    colours = [to_rgba(handle.get_color()) for handle in legend.legend_handles]  # type: ignore[union-attr]
    return dict(zip([text.get_text() for text in legend.get_texts()], colours, strict=True))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_points_and_legend_have_the_colours_of_their_classes(dimensions: int) -> None:
    labels, index = np.array([0, 2, 1, 2, 0, 4]), np.array([5, 1, 0, 3])
    names = ["ship", "_odd", "$frog$", "never", "a class of a very, very long name"]
    colours = colouring(labelled(labels, names), index, "")
    tab10 = matplotlib.colormaps["tab10"]
    np.testing.assert_array_equal(colours.rgba, tab10(labels[index]))
    points = np.random.default_rng(0).normal(size=(4, dimensions))
    figure = scatter(plain(points), colours, "subtitle")
    assert legend_of(figure) == {"ship": tab10(0), "$frog$": tab10(2), "a class of a very, very…": tab10(4)}
    assert len(figure.axes) == dimensions - 1 and figure.get_suptitle() == "title\nsubtitle"
    if dimensions == 2:
        (drawn,) = figure.axes[0].collections
        np.testing.assert_array_equal(drawn.get_offsets(), points)
        np.testing.assert_array_equal(np.asarray(drawn.get_facecolors())[:, :3], tab10(labels[index])[:, :3])
    figure.canvas.draw()


def test_colours_of_other_labels() -> None:
    index = np.arange(30)
    points = plain(np.random.default_rng(0).normal(size=(30, 2)))

    many = colouring(labelled(np.arange(30)), index, "")
    assert len(np.unique(many.rgba, axis=0)) == 30 and not many.legend and many.bar is None
    assert scatter(points, many, "run").get_suptitle().endswith("coloured by class (30)")

    twenty = colouring(labelled(index % 13), index, "")
    assert list(twenty.legend) == [f"class {i}" for i in range(13)] and len(np.unique(twenty.rgba, axis=0)) == 13

    numbers = np.stack([np.linspace(2, 5, 30), np.zeros(30)], axis=1).astype(np.float32)
    measured = colouring(labelled(numbers), index, "m")
    assert measured.bar is not None and measured.bar.get_clim() == (2, 5) and not measured.legend
    figure = scatter(points, measured, "run")
    assert [axis.get_ylabel() for axis in figure.axes] == ["", "m"] and not figure.legends

    none = colouring(labelled(None), index, "")
    assert none.rgba.shape == (30, 4) and len(np.unique(none.rgba, axis=0)) == 1 and not none.legend
    assert scatter(points, none, "run").get_suptitle().endswith("no labels")


def test_apart_takes_the_first_of_those_that_overlap() -> None:
    points = np.array([[0, 0], [0.5, 0.9], [1, 0], [1.5, 3], [0.9, 0.9]])
    assert apart(points, 1.0).tolist() == [0, 2, 3]
    points = np.random.default_rng(0).uniform(size=(300, 2))
    taken = apart(points, 0.1)
    gaps = np.abs(points[taken][:, None] - points[taken]).max(2) + np.eye(len(taken))
    assert gaps.min() >= 0.1
    left = np.setdiff1d(np.arange(300), taken)
    assert (np.abs(points[left][:, None] - points[taken]).max(2).min(1) < 0.1).all()


def test_thumbnails_lie_where_their_images_are() -> None:
    points = np.array([[0.0, 0.0], [0.01, 0.0], [10.0, 0.0], [0.0, 5.0]])
    asked: list[list[int]] = []

    def pictures(chosen: np.ndarray) -> np.ndarray:
        asked.append(chosen.tolist())
        return np.stack([np.full((4, 4, 3), i / 4) for i in chosen])

    figure: Any = thumbnails(plain(points), ONE._replace(rgba=np.eye(4)), "run", pictures)
    assert asked == [[0, 2, 3]]
    for i, shown in zip(asked[0], figure.axes[0].images, strict=True):
        left, right, low, high = shown.get_extent()
        assert ((left + right) / 2, (low + high) / 2) == pytest.approx(tuple(points[i]))
        assert shown.get_array()[0, 0, 0] == i / 4
    (frames,) = figure.axes[0].collections
    np.testing.assert_array_equal(frames.get_edgecolors(), np.eye(4)[asked[0]])

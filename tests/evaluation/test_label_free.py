import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simclr_ddp.distributed import collectives
from simclr_ddp.evaluation import label_free
from tests.support.ranks import Ranks

RANKS = ("rankme", "effective_rank", "participation_ratio")


def made(n: int = 60, width: int = 24, q: int = 4, seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Representations [n, D] with a decaying spectrum and a mean, and views [n, q, D] around them."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -0.7
    h = torch.randn(n, width, generator=g, dtype=torch.float64) * scale + 1
    if rank is not None:
        h = h[:, :rank] @ torch.randn(rank, width, generator=g, dtype=torch.float64)
    return h, h[:, None] + 0.3 * torch.randn(n, q, width, generator=g, dtype=torch.float64)


def by_definition(h: np.ndarray, views: np.ndarray) -> dict[str, float]:
    """From the matrices themselves, in plain loops over images and pairs."""
    n, width = h.shape
    s = np.linalg.svd(h, compute_uv=False)
    p = s / s.sum() + 1e-7
    found = {"rankme": np.exp(-(p * np.log(p)).sum())}
    s = np.linalg.svd(h - h.mean(0), compute_uv=False)
    p = s[s > 1e-12] / s.sum()
    found["effective_rank"] = np.exp(-(p * np.log(p)).sum())
    values = np.sort(np.linalg.eigvalsh(np.cov(h.T, bias=True)))[::-1]
    found["participation_ratio"] = values.sum() ** 2 / (values**2).sum()
    last = min(width, 100)
    i = np.arange(6, last + 1)
    found["alpha_req"] = -np.polyfit(np.log(i), np.log(values[5:last]), 1, w=i**-0.5)[0]
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((unit[a] - unit[b]) ** 2).sum()) for a in range(n) for b in range(a)]
    found["uniformity"] = np.log(np.mean(pairs))
    means = views.mean(1)
    between = np.mean([np.outer(m, m) for m in means - means.mean(0)], axis=0)
    within = np.mean([np.outer(v - m, v - m) for x, m in zip(views, means, strict=True) for v in x], axis=0)
    w, vectors = np.linalg.eigh(within + 1e-4 * np.eye(width))
    root = vectors @ np.diag(w**-0.5) @ vectors.T
    values = np.linalg.eigvalsh(root @ between @ root).clip(0)
    p = values / values.sum() + 1e-7
    found["lidar"] = np.exp(-(p * np.log(p)).sum())
    unit = views / np.linalg.norm(views, axis=2, keepdims=True)
    q = views.shape[1]
    distances = [((x[a] - x[b]) ** 2).sum() for x in unit for a in range(q) for b in range(a)]
    return found | {"alignment": np.mean(distances)}


@pytest.mark.parametrize(("n", "width"), [(60, 24), (130, 120), (24, 24)])
def test_equals_the_definitions(n: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    h, views = made(n, width)
    expected = by_definition(h.numpy(), views.numpy())
    if n <= width:
        del expected["alpha_req"]  # its last eigenvalue is 0
    for block, rows in ((1024, 4096), (7, 11)):
        monkeypatch.setattr(label_free, "BLOCK", block)
        monkeypatch.setattr(label_free, "ROWS", rows)
        found = label_free.measure(h, views)
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-9)
    assert label_free.measure(h).keys() == found.keys() - {"lidar", "alignment"}


def test_fewer_images_than_dimensions() -> None:
    """The matrix [n, D] has n singular values, and the epsilon of RankMe is added to these only."""
    h, views = made(10, 24)
    found, expected = label_free.measure(h, views), by_definition(h.numpy(), views.numpy())
    for key in (*RANKS, "uniformity", "alignment", "lidar"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6), key


def test_alpha_is_the_exponent_of_a_power_law() -> None:
    i = torch.arange(1, 513, dtype=torch.float64)
    noisy = torch.where((i < 6) | (i > 100), 1.0, 3 * i**-1.3)  # only the positions 6 .. 100 count
    assert label_free.alpha_req(noisy) == pytest.approx(1.3)
    assert label_free.alpha_req(i[:7].flip(0)) == pytest.approx(np.log(2) / np.log(7 / 6))
    assert label_free.alpha_req(i[:6].flip(0)) is None


def _share(world: tuple[int, ...], h: Tensor, views: Tensor) -> dict[str, float]:
    rank = collectives.rank() if collectives.world_size() > 1 else 0
    part = slice(sum(world[:rank]), sum(world[: rank + 1]))
    return label_free.measure(h[part], views[part])


@pytest.mark.parametrize("counts", [(60,), (37, 23), (60, 0), (20, 1, 0, 39), (15, 15, 15, 15)])
def test_any_division_among_ranks_gives_the_same(counts: tuple[int, ...], ranks: Ranks) -> None:
    h, views = made()
    expected = label_free.measure(h, views)
    for found in ranks.run(len(counts), _share, counts, h, views):
        assert found == pytest.approx(expected, rel=1e-11)


def _fault(h: Tensor) -> str:
    with pytest.raises(ValueError) as error:
        label_free.measure(h if collectives.rank() else h[:0])
    return str(error.value)


def test_all_ranks_refuse_what_one_of_them_has(ranks: Ranks) -> None:
    h, _ = made()
    h[3, 2] = float("nan")
    assert ranks.run(2, _fault, h) == ["h: contains values that are not finite; use an earlier checkpoint"] * 2
    assert all("1 images have no spread" in text for text in ranks.run(2, _fault, h[:1]))
    with pytest.raises(ValueError, match="an image has one view; give at least two"):
        label_free.measure(h, h[:, None])


sizes = st.tuples(st.integers(8, 40), st.integers(2, 16), st.integers(2, 4), st.integers(0, 10**6))


@settings(max_examples=30)
@given(sizes)
def test_bounds(size: tuple[int, int, int, int]) -> None:
    n, width, q, seed = size
    found = label_free.measure(*made(n, width, q, seed))
    for key in (*RANKS, "lidar"):
        assert 1 - 1e-9 <= found[key] <= width * (1 + 1e-5), key
    assert found["participation_ratio"] <= found["effective_rank"] * (1 + 1e-9)
    assert -8 <= found["uniformity"] <= 0 <= found["alignment"] <= 4


@settings(max_examples=30)
@given(sizes, st.floats(0.01, 100))
def test_rotations_and_scale_change_nothing(size: tuple[int, int, int, int], scale: float) -> None:
    n, width, q, seed = size
    h, views = made(n, width, q, seed)
    rotation = torch.linalg.qr(
        torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    turned = label_free.measure(h @ rotation.Q, views @ rotation.Q)
    found = label_free.measure(h, views)
    assert turned == pytest.approx(found, rel=1e-5)
    scaled = label_free.measure(scale * h, views)
    assert {key: scaled[key] for key in RANKS} == pytest.approx({key: found[key] for key in RANKS}, rel=1e-6)
    assert scaled["uniformity"] == pytest.approx(found["uniformity"])


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_a_subspace_limits_the_ranks(rank: int, seed: int) -> None:
    """Of the centred representations; RankMe adds 1e-7 to the shares that are 0."""
    found = label_free.measure(made(40, 12, seed=seed, rank=rank)[0])
    for key in RANKS:
        assert 1 - 1e-9 <= found[key] <= rank * (1 + 1e-4) + 1e-3, key


def test_collapse() -> None:
    """To one point the ranks of the centred representations are 0, and RankMe is 1; nothing is infinite or NaN."""
    point = torch.full((30, 8), 0.3)
    found = label_free.measure(point, point[:, None].expand(-1, 3, -1))
    assert found["rankme"] == pytest.approx(1, abs=1e-4)
    assert found["effective_rank"] == found["participation_ratio"] == found["lidar"] == 0
    assert found["uniformity"] == pytest.approx(0, abs=1e-9) and found["alignment"] == pytest.approx(0, abs=1e-9)
    assert "alpha_req" not in found
    zero = label_free.measure(torch.zeros(30, 8), torch.zeros(30, 3, 8))
    assert all(zero[key] == 0 for key in (*RANKS, "lidar", "alignment")) and zero["uniformity"] == pytest.approx(-4)


def test_white_representations_have_full_rank() -> None:
    h = torch.cat([torch.eye(8), -torch.eye(8)])
    found = label_free.measure(h)
    assert all(found[key] == pytest.approx(8) for key in RANKS)
    assert found["uniformity"] == pytest.approx(np.log((14 * np.exp(-4) + np.exp(-8)) / 15))


def test_lidar_counts_directions_that_views_agree_on() -> None:
    """RankMe counts noise of the augmentation too, LiDAR does not."""
    g = torch.Generator().manual_seed(0)
    content = torch.zeros(500, 1, 32, dtype=torch.float64)
    content[..., :4] = torch.randn(500, 1, 4, generator=g, dtype=torch.float64)
    views = content + 0.1 * torch.randn(500, 50, 32, generator=g, dtype=torch.float64)
    found = label_free.measure(views[:, 0], views)
    assert found["lidar"] == pytest.approx(4, rel=0.02) and found["rankme"] > 9


def test_overlap() -> None:
    h, _ = made(50, 6)
    own, same = label_free.neighbours(h, 5), label_free.neighbours(3 * h, 5)
    assert own.shape == (50, 5) and not (own == torch.arange(50)[:, None]).any()
    assert label_free.overlap(own, same.flip(1)) == 1
    other = label_free.neighbours(made(50, 6, seed=1)[0], 5)
    expected = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(own.tolist(), other.tolist(), strict=True)])
    assert 0 < expected < 0.5 and label_free.overlap(own, other) == pytest.approx(expected)

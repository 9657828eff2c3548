"""Kernels of p-norm distances against whole matrices of differences and autograd."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from simclr_ddp import KernelInfoNCE
from simclr_ddp.distributed import collectives
from simclr_ddp.losses import contrastive, tile_kernels, tiling
from simclr_ddp.losses import p_norm as p_distance
from simclr_ddp.losses.contrastive import contrastive_accuracy, contrastive_loss, info_nce
from simclr_ddp.losses.contrastive import normalize as normalized
from simclr_ddp.losses.kernels import Objective, log_kernel
from simclr_ddp.losses.p_norm import PDistance, p_norm
from tests.losses.test_tiled import Largest, name, views
from tests.support.ranks import Ranks

P = (1.0, 1.5, 3.0, math.inf)
MEMBERS = [Objective("exponential", 0.5, gamma=gamma, distance_p=p) for p in P for gamma in (0.5, 1.0, 2.0)]


def named(value: Any) -> str | None:
    return f"{name(value)}-d{value.distance_p}" if isinstance(value, Objective) else None


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 3 to 5 rows, in blocks of 2 of them."""
    monkeypatch.setattr(tiling, "TILE", 5)
    monkeypatch.setattr(p_distance, "BLOCK", 50)


def brute_force(z: Tensor, z_all: Tensor, first: int, objective: Objective) -> Tensor:
    """The loss of the formula, from all differences at once."""
    batch, total = z.shape[1], z_all.shape[1]
    u = z.flatten(0, 1)[:, None] - z_all.flatten(0, 1)
    anchor = torch.cat([torch.arange(batch) + first, torch.arange(batch) + first + total])
    itself = anchor[:, None] == torch.arange(2 * total)
    size = u.masked_fill(itself[..., None], 1).abs()
    p = objective.distance_p
    distance = size.amax(-1) if p == math.inf else size.pow(p).sum(-1).pow(1 / p)
    log_k = -distance.pow(objective.gamma) / objective.temperature
    positive = log_k[torch.arange(2 * batch), (anchor + total) % (2 * total)]
    return (log_k.masked_fill(itself, -math.inf).logsumexp(1) - positive).mean()


def value_and_gradient(y: Tensor, objective: Objective, loss: Any = contrastive_loss) -> tuple[Tensor, Tensor]:
    y = y.detach().clone().requires_grad_()
    z = normalized(y, objective.squared_radius, objective.norm_p)
    value = loss(z, z, 0, objective)
    return value.detach(), torch.autograd.grad(value, y)[0]


def by_definition(z: Tensor, z_all: Tensor, first: int, objective: Objective) -> Tensor:
    return info_nce(z, z_all, first, log_kernel(objective))


@pytest.mark.parametrize("objective", MEMBERS, ids=named)
def test_equals_brute_force(objective: Objective) -> None:
    for total in (1, 2, 11):
        expected, slope = value_and_gradient(views(total), objective, brute_force)
        for loss in (contrastive_loss, by_definition):
            value, gradient = value_and_gradient(views(total), objective, loss)
            assert value.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
            assert (gradient - slope).norm() <= 1e-11 * slope.norm() + 1e-12


@pytest.mark.parametrize("objective", MEMBERS, ids=named)
def test_rows_and_columns_apart(objective: Objective) -> None:
    z_all, results = normalized(views(11)), []
    for loss in (contrastive_loss, brute_force):
        rows, columns = z_all[:, 2:9].clone().requires_grad_(), z_all.clone().requires_grad_()
        value = loss(rows, columns, 2, objective)
        results.append((value.detach(), *torch.autograd.grad(value, (rows, columns))))
    whole = [r[2].index_add(1, torch.arange(2, 9), r[1]) for r in results]  # however positives are shared among both
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-12)
    assert (whole[0] - whole[1]).norm() <= 1e-11 * whole[1].norm()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_two_is_the_euclidean_kernel(gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    y = views(11)
    y[:, 7] = y[:, 1] + 1e-5 * views(11, seed=1)[:, 1]  # within the floor of gamma < 2
    results = []
    for _ in ("Euclidean", "of any norm"):
        own = y.clone().requires_grad_()
        z = normalized(own)
        value = contrastive_loss(z, z, 0, Objective("exponential", 0.1, gamma=gamma))
        monkeypatch.setattr(contrastive, "log_kernel", lambda objective: PDistance(0.1, gamma, 2.0, 1e-3))
        monkeypatch.setattr(contrastive, "tile_kernel", contrastive.log_kernel)
        results.append((value.detach(), torch.autograd.grad(value, own)[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=0)
    assert (results[0][1] - results[1][1]).norm() <= 1e-8 * results[1][1].norm()


def test_maximum_norm_goes_by_the_first_of_equal_coordinates() -> None:
    rows = torch.zeros(1, 4, dtype=torch.float64)
    columns = torch.tensor([[0.1, -0.5, 0.5, 0.5], [0.5, 0.5, 0.5, -0.5]], dtype=torch.float64)
    vectors = [tile_kernels.Vectors(z, z.square().sum(-1), z) for z in (rows, columns)]
    _, slope = PDistance(1.0, 1.0, math.inf, 1e-3).tile(vectors[0], vectors[1], [], torch.empty(1, 2).double())
    in_rows, in_columns = slope(torch.tensor([[1.0, 10.0]]).double())
    # log k = -|u_k|, u = -column: from column 0 through coordinate 1, where u is positive, from 1 through coordinate 0
    assert in_rows.tolist() == [[10.0, -1.0, 0.0, 0.0]]
    assert in_columns is not None and in_columns.tolist() == [[0.0, 1.0, 0.0, 0.0], [-10.0, 0.0, 0.0, 0.0]]
    u = (rows - columns).requires_grad_()
    (plain,) = torch.autograd.grad(p_norm(u, math.inf).sum(), u)
    assert plain.tolist() == [[0.0, 1.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("objective", MEMBERS, ids=named)
def test_coincident_vectors(objective: Objective) -> None:
    y = views(11)
    y[:, 7], y[:, 2] = y[:, 1], y[:, 1]  # far off in another tile, and in the same
    y[1, 5], y[1, 1] = y[0, 5], y[0, 1]
    expected, slope = value_and_gradient(y, objective, by_definition)
    value, gradient = value_and_gradient(y, objective)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert gradient.isfinite().all() and (gradient - slope).norm() <= 1e-11 * slope.norm()
    collapsed = torch.ones(2, 5, 6, dtype=torch.float64)
    value, gradient = value_and_gradient(collapsed, objective)
    assert value.item() == pytest.approx(math.log(9)) and gradient.abs().max() == 0


@pytest.mark.parametrize("p", [1.0, 1.5, 2.5, math.inf])
@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.0])
def test_second_derivatives_at_equal_coordinates(p: float, gamma: float) -> None:
    """Of all of two vectors, and of one."""
    y = views(5)
    y[1, 0] = y[0, 0]
    y[:, 2, 1] = 0
    y.requires_grad_()
    z = normalized(y)
    loss = contrastive_loss(z, z, 0, Objective("exponential", 0.5, gamma=gamma, distance_p=p))
    (gradient,) = torch.autograd.grad(loss, y, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), y)[0].isfinite().all()


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0, 60.0, math.inf])
def test_accuracy_in_float32(p: float) -> None:
    """At p = 60 the powers of all coordinates are 0 in float32."""
    objective, y = Objective("laplacian", 0.2, distance_p=p), views(40, 32)
    exact, slope = value_and_gradient(y, objective)
    value, gradient = value_and_gradient(y.float(), objective)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (gradient - slope).norm() <= (1e-5 if p < 60 else 1e-4) * slope.norm()


@pytest.mark.parametrize("objective", [m for m in MEMBERS if m.gamma != 2 or m.distance_p == 3], ids=named)
def test_gradcheck(objective: Objective) -> None:
    def loss(y: Tensor) -> Tensor:
        z = normalized(y)
        return contrastive_loss(z, z, 0, objective)

    assert torch.autograd.gradcheck(loss, views(4, 3).requires_grad_())


@pytest.mark.parametrize("objective", MEMBERS, ids=named)
def test_second_derivatives(objective: Objective) -> None:
    results = []
    for loss in (contrastive_loss, brute_force):
        y = views(5).requires_grad_()
        z = normalized(y)
        (gradient,) = torch.autograd.grad(loss(z, z, 0, objective), y, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), y)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("objective", MEMBERS, ids=named)
def test_top1(objective: Objective) -> None:
    z = normalized(views(23, noise=0.8))
    flat, p = z.flatten(0, 1), objective.distance_p
    distance = torch.linalg.vector_norm(flat[:, None] - flat, p, dim=-1)
    image = torch.arange(46) % 23
    negatives = distance.masked_fill(image[:, None] == image, math.inf).amin(1)
    expected = (distance[torch.arange(46), (torch.arange(46) + 23) % 46] < negatives).double().mean()
    assert 0 < expected < 1
    assert contrastive_accuracy(z, z, 0, objective) == expected


@pytest.mark.parametrize("p", P)
def test_no_tensor_grows_with_the_square(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE", 16)
    monkeypatch.setattr(p_distance, "BLOCK", 1000)
    objective, y = Objective("laplacian", distance_p=p), views(48, 12)
    with Largest() as seen:
        value_and_gradient(y, objective)
        z = normalized(y)
        contrastive_accuracy(z, z, 0, objective)
    assert y.numel() <= seen.elements <= 2 * y.numel()


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "laplacian", "distance_p": 0.5}, "distance_p=0.5: must be a number of at least 1"),
        ({"kernel": "laplacian", "distance_p": math.nan}, "distance_p=nan"),
        ({"kernel": "cosine", "distance_p": 1.0}, "choose gaussian, laplacian, exponential"),
        ({"kernel": "simple_sum", "distance_p": 3.0}, "set distance_p=2"),
        ({"kernel": "laplacian", "distance_p": 3.0, "precision": "bf16"}, "set 'fp32'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


@pytest.mark.parametrize(("kernel", "gamma"), [("gaussian", 2.0), ("laplacian", 1.0), ("exponential", 1.5)])
def test_kernels_of_any_distance(kernel: str, gamma: float) -> None:
    found = log_kernel(Objective(kernel, 0.3, gamma=1.5, distance_p=3.0, squared_radius=4.0))
    assert isinstance(found, PDistance) and (found.temperature, found.gamma, found.p) == (0.3, gamma, 3.0)
    assert found.floor == (0.002 if gamma < 2 else 0)


@pytest.mark.parametrize("p", P)
def test_untrained_and_attainable_loss(p: float) -> None:
    objective = KernelInfoNCE("laplacian", 0.3, distance_p=p)
    alike, orthogonal = torch.ones(8, 8).double(), torch.eye(8).double()
    assert objective(alike, alike).item() == pytest.approx(objective.untrained_loss(8), rel=1e-12)
    assert objective(orthogonal, orthogonal).item() == pytest.approx(objective.attainable_loss(8), rel=1e-9)


# --- across ranks ---------------------------------------------------------------------------------------------------

IMAGES = 12


def on_ranks(second: bool) -> dict[str, Any]:
    tiling.TILE, p_distance.BLOCK, answers = 4, 50, {}
    try:
        for objective in MEMBERS:
            module = KernelInfoNCE("exponential", 0.5, gamma=objective.gamma, distance_p=objective.distance_p)
            y = views(IMAGES)[:, collectives.local_slice(IMAGES)].requires_grad_()
            (gradient,) = torch.autograd.grad(module(y[0], y[1]), y, create_graph=second)
            if second:
                (gradient,) = torch.autograd.grad(gradient.square().sum(), y)
            loss = collectives.all_reduce_sum(module(y[0], y[1]).detach()) / collectives.world_size()
            answers[str(named(objective))] = (loss, gradient.detach())
    finally:
        tiling.TILE, p_distance.BLOCK = 1024, 2**19
    return answers


@pytest.mark.parametrize(("world_size", "second"), [(2, False), (4, False), (2, True)])
def test_any_number_of_ranks(world_size: int, second: bool, ranks: Ranks) -> None:
    (alone,) = ranks.run(1, on_ranks, second)
    answers = ranks.run(world_size, on_ranks, second)
    for member, (loss, gradient) in alone.items():
        whole = torch.cat([answer[member][1] for answer in answers], dim=1) / world_size ** (2 if second else 1)
        torch.testing.assert_close(whole, gradient, rtol=1e-9, atol=1e-11)
        for answer in answers:
            torch.testing.assert_close(answer[member][0], loss, rtol=1e-12, atol=1e-12)

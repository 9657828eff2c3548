"""The losses by tiles against the plain form, which tests/losses/test_contrastive.py holds against an oracle."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_ddp import KernelInfoNCE
from simclr_ddp.distributed import collectives
from simclr_ddp.losses import log_sums, tile_kernels, tiled, tiling
from simclr_ddp.losses.contrastive import (
    contrastive_accuracy,
    contrastive_loss,
    info_nce,
    largest_norm,
    normalize,
    split_halves,
)
from simclr_ddp.losses.kernels import MIXTURES, Objective, log_kernel, mixture_components, tile_kernel
from tests.support.ranks import Ranks


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["kept", "computed again"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 3 to 5 rows, and both ways in which the backward pass comes to them."""
    monkeypatch.setattr(tiling, "TILE", 5)
    monkeypatch.setattr(tiling, "TRIANGLE", 2)
    monkeypatch.setattr(tiling, "KEPT", 10**6 if request.param == "kept" else 0)


def members(temperature: float) -> list[Objective]:
    found = [Objective(k, temperature) for k in ("cosine", "gaussian", "laplacian", "spectral")]
    found += [Objective("exponential", temperature, gamma=gamma) for gamma in (0.5, 1.5, 2.0, 3.0)]
    found += [Objective("gaussian", temperature, squared_radius=4.0, norm_p=3.0)]
    for kernel in MIXTURES:
        found += [Objective(kernel, temperature, mix_level=level, mix_weight=0.3) for level in ("loss", "kernel")]
    return found + [Objective("arccos", temperature, order=order) for order in (1, 2, 3)]


def name(value: Any) -> str | None:
    if not isinstance(value, Objective):
        return None
    return f"{value.kernel}-t{value.temperature}-g{value.gamma}-o{value.order}-{value.mix_level}-p{value.norm_p}"


def views(total: int, width: int = 6, noise: float = 0.5, seed: int = 0) -> Tensor:
    """[2, N, D] before normalisation: the second view near the first."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(total, width, generator=generator, dtype=torch.float64)
    return torch.stack([first, first + noise * torch.randn(total, width, generator=generator, dtype=torch.float64)])


def plain(z: Tensor, z_all: Tensor, first: int, objective: Objective) -> Tensor:
    """The loss by whole matrices."""
    if objective.kernel == "spectral":
        dot = z.flatten(0, 1) @ z_all.flatten(0, 1).T
        batch, total = z.shape[1], z_all.shape[1]
        own = torch.arange(batch) + first
        itself = torch.cat([own, own + total])[:, None] == torch.arange(2 * total)
        positive = (z * z_all[:, first : first + batch].flip(0)).sum(-1)
        return dot.masked_fill(itself, 0).square().sum(1).mean() / (2 * total - 1) - 2 * positive.mean()
    if objective.kernel == "concat_sum":
        z, z_all = split_halves(z), split_halves(z_all)
    if objective.kernel in MIXTURES and objective.mix_level == "loss":
        halves = [(z[i], z_all[i]) if objective.kernel == "concat_sum" else (z, z_all) for i in range(2)]
        first_loss, second_loss = (
            info_nce(*pair, first, log_kernel(part))
            for pair, part in zip(halves, mixture_components(objective), strict=True)
        )
        return objective.mix_weight * first_loss + (1 - objective.mix_weight) * second_loss
    return info_nce(z, z_all, first, log_kernel(objective))


def loss_and_gradient(y: Tensor, objective: Objective, loss: Any = contrastive_loss) -> tuple[Tensor, Tensor]:
    y = y.detach().clone().requires_grad_()
    z = normalize(y, objective.squared_radius, objective.norm_p)
    value = loss(z, z, 0, objective)
    return value.detach(), torch.autograd.grad(value, y)[0]


def agree(y: Tensor, objective: Objective) -> None:
    expected, expected_gradient = loss_and_gradient(y, objective, plain)
    value, gradient = loss_and_gradient(y, objective)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    assert (gradient - expected_gradient).norm() <= 1e-11 * expected_gradient.norm() + 1e-12


# --- one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [*members(0.1), *members(0.01), *members(1.0)], ids=name)
def test_equals_the_plain_form(objective: Objective, small_tiles: None) -> None:
    for total in (1, 2, 11):
        agree(views(total), objective)
    assert len(tiling.tiles(11, 11, 0, True)) == 15 + 6 * 3  # of six runs of three or four rows; triangles have 3 parts


@pytest.mark.parametrize("objective", [*members(0.1), *members(0.01)], ids=name)
def test_rows_and_columns_apart(objective: Objective, small_tiles: None) -> None:
    """Some anchors against all columns, with a gradient each."""
    z_all = normalize(views(11), objective.squared_radius, objective.norm_p)
    results = []
    for loss in (contrastive_loss, plain):
        rows, columns = z_all[:, 2:9].clone().requires_grad_(), z_all.clone().requires_grad_()
        value = loss(rows, columns, 2, objective)
        results.append((value.detach(), *torch.autograd.grad(value, (rows, columns))))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 1e-11 * expected.norm() + 1e-12


@pytest.mark.parametrize("objective", [*members(0.1), *members(0.01)], ids=name)
def test_duplicates_and_identical_views(objective: Objective, small_tiles: None) -> None:
    y = views(11)
    y[:, 7] = y[:, 1]  # far off in another tile
    y[:, 2] = y[:, 1]  # in the same
    y[1, 5] = y[0, 5]
    y[1, 1] = y[0, 1]
    z = normalize(y, objective.squared_radius, objective.norm_p).float()
    value = contrastive_loss(z, z, 0, objective)
    exact = plain(z.double(), z.double(), 0, objective)
    assert value.isfinite() and loss_and_gradient(y.float(), objective)[1].isfinite().all()
    if objective.gamma >= 1:  # else a rounding of the squared distance of duplicates is a large part of the kernel
        assert value.item() == pytest.approx(exact.item(), rel=2e-2)
    if objective.kernel in ("cosine", "gaussian", "spectral"):
        agree(y, objective)


@pytest.mark.parametrize("objective", members(0.1), ids=name)
def test_pairs_within_the_floor_have_no_gradient(objective: Objective, small_tiles: None) -> None:
    """Not equal, so that a slope would show: some 1e-5 apart."""
    y = views(11)
    y[:, 7], y[:, 2] = y[:, 1] + 1e-5 * views(11, seed=1)[:, 1], y[:, 0] + 1e-5 * views(11, seed=2)[:, 0]
    agree(y, objective)


@pytest.mark.parametrize("width", [6, 64])
@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "exponential", "simple_sum", "concat_sum"])
def test_nearly_collapsed_embeddings_keep_their_gradient(kernel: str, width: int) -> None:
    """Vectors 0.003 apart: in float32 their squares and products agree in all but two digits."""
    y = 3.0 + 0.003 * views(48, width)
    objective = Objective(kernel, 0.1, gamma=1.5)
    exact, exact_gradient = loss_and_gradient(y, objective, plain)
    value, gradient = loss_and_gradient(y.float(), objective)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (gradient - exact_gradient).norm() <= 1e-3 * exact_gradient.norm()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("temperature", "spread"), [(1.0, 0.01), (0.1, 0.03)])
def test_nearly_collapsed_embeddings_keep_their_gradient_in_arccos(
    order: int, temperature: float, spread: float
) -> None:
    """Whose cosines are 1 in all but two digits of float32, and more than the kernel's EDGE from it."""
    y = 3.0 + spread * views(48, 64)
    objective = Objective("arccos", temperature, order=order)
    exact, exact_gradient = loss_and_gradient(y, objective, plain)
    value, gradient = loss_and_gradient(y.float(), objective)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (gradient - exact_gradient).norm() <= 1e-4 * exact_gradient.norm()


@pytest.mark.parametrize(("gamma", "temperature"), [(0.05, 0.1), (0.01, 0.1), (0.01, 3.0), (1.0, 1e-8), (0.5, 1e15)])
def test_powers_beyond_the_exponents_of_float32(gamma: float, temperature: float) -> None:
    objective = Objective("exponential", temperature, gamma=gamma)
    exact, exact_gradient = loss_and_gradient(views(11), objective, plain)
    wide = temperature < 1e-6  # one rounding of a distance in float32 is many units of the exponent
    value, gradient = loss_and_gradient(views(11) if wide else views(11).float(), objective)
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)
    assert (gradient - exact_gradient).norm() <= 1e-3 * exact_gradient.norm() + 1e-12


def test_the_backward_pass_frees_what_was_kept() -> None:
    z = normalize(views(11)).requires_grad_()
    problem = tile_kernels.Problem(tile_kernels.Cosine(10.0), lambda z, z_all: z, 0, "fp32", None)
    sums = log_sums.log_sums(z, z, problem)
    (first,) = torch.autograd.grad(sums.sum(), z, retain_graph=True)
    assert sums.grad_fn.kept is None  # type: ignore[union-attr]
    (again,) = torch.autograd.grad(sums.sum(), z)
    torch.testing.assert_close(again, first, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kernel", ["cosine", "gaussian", "laplacian"])
def test_no_row_underflows_beside_a_near_one(kernel: str, small_tiles: None) -> None:
    """Pairs of one image's copies are 2^280 times the others: one shift for all rows would leave those nothing."""
    y = views(11, 16)
    y[:, 3] = y[:, 2] + 0.01 * views(11, 16, seed=1)[:, 3]
    objective = Objective(kernel, 0.005)
    exact, exact_gradient = loss_and_gradient(y, objective, plain)
    value, gradient = loss_and_gradient(y.float(), objective)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (gradient - exact_gradient).norm() <= 1e-3 * exact_gradient.norm()


@pytest.mark.parametrize("kernel", ["cosine", "gaussian", "laplacian"])
def test_ways_of_adding_agree(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are and relative to the largest: the choice follows from the temperature, the result doesn't."""
    monkeypatch.setattr(tiling, "TILE", 5)
    y, objective = views(11), Objective(kernel, 0.1)
    direct = loss_and_gradient(y, objective)
    monkeypatch.setattr(tiled, "SAFE", 0.0)
    for got, expected in zip(loss_and_gradient(y, objective), direct, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 4),
    st.floats(0.02, 1.0),
    st.sampled_from(range(len(members(1.0)))),
    st.integers(0, 99),
)
def test_any_shape_and_tile(total: int, tile: int, half: int, temperature: float, member: int, seed: int) -> None:
    before = tiling.TILE
    tiling.TILE = tile
    try:
        agree(views(total, 2 * half, seed=seed), members(temperature)[member])
    finally:
        tiling.TILE = before


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("kernel", ["cosine", "gaussian", "laplacian", "simple_sum", "concat_sum", "arccos"])
@pytest.mark.parametrize("kind", ["random", "near", "clusters", "collapsed"])
def test_accuracy_in_float32(kernel: str, temperature: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    y = views(256, 128, 2.0 if kind == "random" else 0.5)
    if kind == "clusters":
        y += 2 * torch.randn(8, 128, generator=generator, dtype=torch.float64)[torch.arange(256) % 8]
    if kind == "collapsed":
        y += 10 * torch.randn(128, generator=generator, dtype=torch.float64)
    exact, exact_gradient = loss_and_gradient(y, Objective(kernel, temperature))
    for precision, allowed in (("fp32", 5e-5), ("bf16", 5e-3)):
        value, gradient = loss_and_gradient(y.float(), Objective(kernel, temperature, precision=precision))
        assert value.item() == pytest.approx(exact.item(), rel=1e-4 if exact > 1e-3 else 1e-3)
        error = (gradient - exact_gradient).norm() / exact_gradient.norm()
        assert error < allowed
        assert precision == "fp32" or error > 1e-6  # it was bfloat16


def test_float64_is_exact_at_any_precision() -> None:
    expected = loss_and_gradient(views(11), Objective("laplacian"))
    for got, wanted in zip(
        loss_and_gradient(views(11), Objective("laplacian", precision="bf16")), expected, strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("objective", members(0.1), ids=name)
def test_second_derivatives(objective: Objective, small_tiles: None) -> None:
    results = []
    for loss in (contrastive_loss, plain):
        y = views(7).requires_grad_()
        z = normalize(y, objective.squared_radius, objective.norm_p)
        (gradient,) = torch.autograd.grad(loss(z, z, 0, objective), y, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), y)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 3.0])
def test_gradients_of_either_sign_arrive(scale: float, small_tiles: None) -> None:
    y = views(7).requires_grad_()
    z = normalize(y)
    (gradient,) = torch.autograd.grad(scale * contrastive_loss(z, z, 0, Objective()), y)
    torch.testing.assert_close(gradient, scale * loss_and_gradient(y, Objective())[1])


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed where the host can't ask for values, as on a GPU."""
    for module in (tile_kernels, tiled):
        monkeypatch.setattr(module, "can_ask", lambda z: False)


@pytest.mark.parametrize("objective", [*members(0.1), *members(0.01)], ids=name)
def test_without_a_test_of_values(objective: Objective, small_tiles: None, unasked: None) -> None:
    for total in (1, 2, 11):
        agree(views(total), objective)
    near = views(11, noise=1e-5)
    near[:, 5] = near[:, 2] * (1 + 1e-9)  # closer than the kernels' floor
    agree(near, objective)


@pytest.mark.parametrize("kernel", ["cosine", "laplacian"])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_any_signs_without_a_test_of_values(kernel: str, temperature: float, small_tiles: None, unasked: None) -> None:
    """A negated loss, one of no weight, and log-sums of which each has its own."""
    z, objective = normalize(views(7)).requires_grad_(), Objective(kernel, temperature)

    def gradient(weights: Tensor) -> Tensor:
        kernel, radius = tile_kernel(objective), 1.0
        problem = tile_kernels.Problem(kernel, lambda z, z_all: z, 0, "fp32", None, radius=radius)
        return torch.autograd.grad((log_sums.log_sums(z, z, problem) * weights).sum(), z)[0]

    for scale in (-1.0, 0.0, 3.0):
        (found,) = torch.autograd.grad(scale * contrastive_loss(z, z, 0, objective), z)
        (expected,) = torch.autograd.grad(plain(z, z, 0, objective), z)
        torch.testing.assert_close(found, scale * expected, rtol=1e-9, atol=1e-12)
    weights = torch.linspace(-1, 2, 14, dtype=torch.float64)
    expected = gradient(weights.clamp(min=0)) - gradient(-weights.clamp(max=0))
    torch.testing.assert_close(gradient(weights), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm_p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_no_embedding_is_longer_than_its_objective_says(norm_p: float) -> None:
    """By which it is decided on a GPU how exponentials are added."""
    objective = Objective("gaussian", squared_radius=4.0, norm_p=norm_p)
    y = torch.cat([views(300, 16).flatten(0, 1), torch.ones(1, 16), torch.eye(16)[:1]])
    longest = normalize(y, 4.0, norm_p).norm(dim=-1).max().item()
    assert longest == pytest.approx(largest_norm(objective, 16), rel=1e-6)


def test_backward_twice(small_tiles: None) -> None:
    for objective in (Objective(), Objective("laplacian")):
        y = views(11).requires_grad_()
        z = normalize(y)
        loss = contrastive_loss(z, z, 0, objective)
        once, twice = (torch.autograd.grad(loss, y, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, twice)  # kept, or computed again


@pytest.mark.parametrize("objective", members(0.1), ids=name)
def test_top1_by_tiles(objective: Objective, small_tiles: None) -> None:
    z = normalize(views(23, noise=0.8), objective.squared_radius, objective.norm_p)
    views_of = split_halves(z) if objective.kernel == "concat_sum" else z
    a, b = views_of, views_of.flip(-3)
    by = log_kernel(objective)
    flat = views_of.flatten(-3, -2)
    log_k = by(flat @ flat.mT, torch.cdist(flat, flat).square())
    image = torch.arange(46) % 23
    log_k[image[:, None] == image] = -math.inf
    expected = (by((a * b).sum(-1), (a - b).square().sum(-1)).flatten() > log_k.amax(1)).double().mean()
    assert 0 < expected < 1
    assert contrastive_accuracy(z, z, 0, objective) == expected
    assert contrastive_accuracy(z, z.clone(), 0, objective) == expected


# --- memory and work ------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("objective", members(0.1), ids=name)
def test_no_tensor_grows_with_the_square(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE", 16)
    monkeypatch.setattr(tiling, "KEPT", 0)
    y = views(128, 6)
    with Largest() as seen:
        loss_and_gradient(y, objective)
        z = normalize(y, objective.squared_radius, objective.norm_p)
        contrastive_accuracy(z, z, 0, objective)
    assert y.numel() <= seen.elements <= 2 * y.numel()
    with Largest() as seen:
        if objective.kernel != "spectral":
            loss_and_gradient(y, objective, plain)
            assert seen.elements >= 256**2  # what this would find


def test_what_is_kept_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes, of any dtype."""
    monkeypatch.setattr(tiling, "TILE", 16)
    numbers = sum(map(area, tiling.tiles(64, 64, 0, True)))
    for dtype, limit, kept in (
        (torch.float32, 4 * numbers, True),
        (torch.float32, 4 * numbers - 1, False),
        (torch.float64, 8 * numbers, True),
        (torch.float64, 8 * numbers - 1, False),
    ):
        z = normalize(views(64).to(dtype)).requires_grad_()
        monkeypatch.setattr(tiling, "KEPT", limit)
        problem = tile_kernels.Problem(tile_kernels.Cosine(10.0), lambda z, z_all: z, 0, "fp32", None)
        assert (log_sums.log_sums(z, z, problem).grad_fn.kept is not None) == kept  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 64])
def test_ranks_share_the_tiles_evenly(count: int) -> None:
    for total in (8 * count, 96 * count, 2048 * count):
        shares = [tiling.tiles(total, total, 0, True, index, count) for index in range(count)]
        areas = [sum(map(area, share)) for share in shares]
        assert max(areas) == min(areas)


def test_losses_may_be_alive_together() -> None:
    """Each has kept its own tiles, in whatever order the backward passes come."""
    alone = [loss_and_gradient(views(11, seed=seed), Objective()) for seed in range(3)]
    leaves = [views(11, seed=seed).requires_grad_() for seed in range(3)]
    losses = [contrastive_loss(z, z, 0, Objective()) for z in map(normalize, leaves)]
    for seed in (1, 0, 2):
        assert torch.equal(torch.autograd.grad(losses[seed], leaves[seed])[0], alone[seed][1])


def test_buffers_fit_whatever_comes() -> None:
    """After a smaller batch, another dtype, and inference mode, whose tensors nothing may be written to later."""
    y = views(40)
    expected = loss_and_gradient(y, Objective())
    loss_and_gradient(views(2), Objective())
    tiled.buffers.idle.clear()
    with torch.inference_mode():
        z = normalize(y)
        contrastive_loss(z, z, 0, Objective())
    for _ in range(2):
        for got, wanted in zip(loss_and_gradient(y, Objective()), expected, strict=True):
            assert torch.equal(got, wanted)
        loss_and_gradient(y.float(), Objective())
    assert tiled.buffers.idle["kept"].dtype == torch.float32


@pytest.mark.parametrize("count", [63, 64])
def test_many_ranks_have_few_tiles(count: int) -> None:
    """64 images each, against all others: a call for every 64 of them would cost more than its work."""
    share = tiling.tiles(64 * count, 64 * count, 0, True, 5, count)
    assert len(share) <= 16 and max(map(area, share)) <= tiling.TILE**2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("total", [1, 2, 5, 24, 61])
def test_every_pair_is_in_one_tile(total: int, count: int, small_tiles: None) -> None:
    times = torch.zeros(2 * total, 2 * total)
    for index in range(count):
        for tile in tiling.tiles(total, total, 0, True, index, count):
            times[tile.rows, tile.columns] += 1
            if tile.mirrored:
                times[tile.columns, tile.rows] += 1
    assert times.eq(1).all()


def test_half_of_the_pairs_are_computed() -> None:
    areas = map(area, tiling.tiles(8192, 8192, 0, True))
    assert sum(areas) <= 0.52 * 16384**2


def area(tile: tiling.Tile) -> int:
    return (tile.rows.stop - tile.rows.start) * (tile.columns.stop - tile.columns.start)


# --- across ranks ---------------------------------------------------------------------------------------------------

IMAGES = 12


def on_ranks(second: bool, spread: bool) -> dict[str, Any]:
    """Of the mean loss over ranks, or of one weighted by rank: value, and gradient in this rank's projections."""
    tiling.TILE, answers = 4, {}
    try:
        for objective in [*members(0.1), Objective("laplacian", 0.01)]:
            settings = {k: v for k, v in vars(objective).items() if k != "squared_radius"}
            module = KernelInfoNCE(**settings, radius=math.sqrt(objective.squared_radius))
            y = views(IMAGES)[:, collectives.local_slice(IMAGES)].requires_grad_()
            weight = 1.0 + collectives.rank() if spread else 1.0
            (gradient,) = torch.autograd.grad(weight * module(y[0], y[1]), y, create_graph=second)
            if second:
                (gradient,) = torch.autograd.grad(gradient.square().sum(), y)
            loss = collectives.all_reduce_sum(weight * module(y[0], y[1]).detach()) / collectives.world_size()
            answers[name(objective)] = (loss, gradient.detach())
    finally:
        tiling.TILE = 1024
    return answers


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks(world_size: int, ranks: Ranks) -> None:
    (alone,) = ranks.run(1, on_ranks, False, False)
    answers = ranks.run(world_size, on_ranks, False, False)
    for member, (loss, gradient) in alone.items():
        whole = torch.cat([answer[member][1] for answer in answers], dim=1) / world_size
        torch.testing.assert_close(whole, gradient, rtol=1e-10, atol=1e-12)
        for answer in answers:
            torch.testing.assert_close(answer[member][0], loss, rtol=1e-12, atol=1e-12)


def test_second_derivatives_across_ranks(ranks: Ranks) -> None:
    """Of Σ |gradient|², gradients being W times those of one process: the sum over ranks is W² times its."""
    (alone,) = ranks.run(1, on_ranks, True, False)
    answers = ranks.run(2, on_ranks, True, False)
    for member, (_, gradient) in alone.items():
        whole = torch.cat([answer[member][1] for answer in answers], dim=1) / 2**2
        torch.testing.assert_close(whole, gradient, rtol=1e-8, atol=1e-10)


def test_ranks_may_weigh_their_losses(ranks: Ranks) -> None:
    answers = ranks.run(2, on_ranks, False, True)
    for objective in members(0.1):
        y = views(IMAGES).requires_grad_()
        z = normalize(y, objective.squared_radius, objective.norm_p)
        half = IMAGES // 2
        loss = sum((r + 1) * plain(z[:, r * half : (r + 1) * half], z, r * half, objective) for r in range(2))
        (expected,) = torch.autograd.grad(loss, y)  # type: ignore[arg-type]
        got = torch.cat([answer[name(objective)][1] for answer in answers], dim=1)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)

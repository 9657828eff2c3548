"""The losses against a slow oracle, their invariances, and the published defects they must not share.

The oracle is written from the formulas with Python floats and double loops. Defects carry the names of the table in
which they were collected (K: Kernel-InfoNCE, B: lightning-bolts, L: leftthomas, SL: solo-learn, S: a seed text, G:
common patterns of gathering); each test shows that the defective formula differs where ours is exact.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from simclr_ddp import KernelInfoNCE
from simclr_ddp.losses.arc_cosine import arccos
from simclr_ddp.losses.contrastive import contrastive_accuracy, contrastive_loss, info_nce, normalize, spectral
from simclr_ddp.losses.kernels import KERNELS, Objective, cosine, exponential, gaussian, temperature_equivalent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TEMPERATURES = (0.01, 0.05, 0.1, 0.5, 1.0)


def members(temperature, squared_radius=1.0):
    """Every kernel at one temperature."""
    common = {"temperature": temperature, "squared_radius": squared_radius}
    yield Objective("cosine", **common)
    yield Objective("gaussian", **common)
    yield Objective("laplacian", **common)
    for gamma in (0.5, 1.0, 1.5, 2.0):
        yield Objective("exponential", gamma=gamma, **common)
    for kernel in ("simple_sum", "concat_sum"):
        for mix_level in ("loss", "kernel"):
            yield Objective(kernel, mix_level=mix_level, mix_weight=0.3, second_temperature=0.3, **common)
            yield Objective(kernel, mix_level=mix_level, gamma=0.5, **common)
    if squared_radius == 1:
        for order in (1, 2, 3):
            yield Objective("arccos", order=order, **common)
    yield Objective("spectral", **common)


def name(value):
    if not isinstance(value, Objective):
        return None
    parts = [value.kernel, f"t{value.temperature}", f"g{value.gamma}", f"mu{value.squared_radius}"]
    parts += [value.mix_level, f"w{value.mix_weight}"] if "sum" in value.kernel else []
    return "-".join([*parts, f"o{value.order}"] if value.kernel == "arccos" else parts)


GRID = [objective for temperature in TEMPERATURES for objective in members(temperature)]
INFO_NCE = [objective for objective in members(0.1) if objective.kernel != "spectral"]
both_ways = pytest.mark.parametrize("objective", [*members(0.1), *members(0.05, 3.0)], ids=name)


def embeddings(total, width, positive_cosine=None, seed=0, dtype=torch.float64):
    """[2, N, D] on the unit sphere: independent views, or views at one angle."""
    generator = torch.Generator().manual_seed(seed)
    a, b = normalize(torch.randn(2, total, width, generator=generator, dtype=torch.float64))
    if positive_cosine is not None:
        b = normalize(b - (a * b).sum(-1, keepdim=True) * a)
        b = positive_cosine * a + math.sqrt(1 - positive_cosine**2) * b
    return torch.stack([a, b]).to(dtype)


def loss_and_gradient(z, loss):
    z = z.detach().clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


def whole(objective):
    return lambda z: contrastive_loss(z, z, 0, objective)


# --- the oracle -----------------------------------------------------------------------------------------------------


def oracle_power(a, b, temperature, gamma, mu):
    """log k and its gradient in a, of exp(-|a-b|^γ/τ)."""
    distance = math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    near = gamma < 2 and distance < 1e-3 * math.sqrt(mu)
    clamped = 1e-3 * math.sqrt(mu) if near else distance
    slope = np.zeros(len(a)) if near or distance == 0 else gamma * distance ** (gamma - 2) * (a - b)
    return -(clamped**gamma) / temperature, -slope / temperature


def oracle_arccos(a, b, temperature, order):
    c = 1 - temperature * math.fsum((a - b) ** 2) / 2
    inside = -1 + 1e-6 < c < 1 - 1e-6
    theta = math.acos(min(max(c, -1 + 1e-6), 1 - 1e-6))
    j1 = math.pi - theta
    j2 = math.sin(theta) + j1 * math.cos(theta)
    j3 = 3 * math.sin(theta) * math.cos(theta) + j1 * (1 + 2 * math.cos(theta) ** 2)
    j = (j1, j2, j3)[order - 1]
    slope = (1 / math.sin(theta), j1, 4 * j2)[order - 1]
    return math.log(j), inside * temperature * slope / j * (b - a)


def oracle_pair(a, b, o):
    """log k(a, b) and its gradient in a."""
    if o.kernel == "cosine":
        return math.fsum(a * b) / o.squared_radius / o.temperature, b / o.squared_radius / o.temperature
    if o.kernel == "arccos":
        return oracle_arccos(a, b, o.temperature, o.order)
    if o.kernel in ("gaussian", "laplacian", "exponential"):
        gamma = {"gaussian": 2, "laplacian": 1}.get(o.kernel, o.gamma)
        return oracle_power(a, b, o.temperature, gamma, o.squared_radius)
    # a mixture of two kernels
    half = len(a) // 2 if o.kernel == "concat_sum" else 0
    zeros = np.zeros(half)
    stop = half or len(a)
    log_1, slope_1 = oracle_power(a[:stop], b[:stop], o.temperature, o.gamma, o.squared_radius)
    log_2, slope_2 = oracle_power(a[half:], b[half:], o.second_temperature or o.temperature, 2, o.squared_radius)
    log_1, log_2 = math.log(o.mix_weight) + log_1, math.log(1 - o.mix_weight) + log_2
    log_k = max(log_1, log_2) + math.log1p(math.exp(-abs(log_1 - log_2)))
    share = math.exp(log_1 - log_k)
    return log_k, share * np.concatenate([slope_1, zeros]) + (1 - share) * np.concatenate([zeros, slope_2])


def oracle(z, o):
    """Loss of all 2N anchors and its gradient, by the definitions."""
    views, total, width = z.shape
    if o.kernel in ("simple_sum", "concat_sum") and o.mix_level == "loss":
        half = width // 2 if o.kernel == "concat_sum" else 0
        first, second = slice(0, half or width), slice(half, width)
        loss_1, grad_1 = oracle(z[..., first], replace(o, kernel="exponential"))
        second_objective = replace(o, kernel="gaussian", temperature=o.second_temperature or o.temperature)
        loss_2, grad_2 = oracle(z[..., second], second_objective)
        gradient = np.zeros(z.shape)
        gradient[..., first] += o.mix_weight * grad_1
        gradient[..., second] += (1 - o.mix_weight) * grad_2
        return o.mix_weight * loss_1 + (1 - o.mix_weight) * loss_2, gradient

    flat = z.reshape(views * total, width).double().numpy()
    size = len(flat)
    gradient = np.zeros(flat.shape)
    losses = []
    for i in range(size):
        positive = (i + total) % size
        others = [j for j in range(size) if j != i]
        if o.kernel == "spectral":
            dots = {j: math.fsum(flat[i] * flat[j]) for j in others}
            losses.append(math.fsum(dot**2 for dot in dots.values()) / (size - 1) - 2 * dots[positive])
            gradient[i] += 4 / (size * (size - 1)) * sum(dots[j] * flat[j] for j in others) - 4 / size * flat[positive]
            continue
        pairs = {j: oracle_pair(flat[i], flat[j], o) for j in others}
        largest = max(log_k for log_k, _ in pairs.values())
        total_k = math.fsum(math.exp(log_k - largest) for log_k, _ in pairs.values())
        losses.append(largest + math.log(total_k) - pairs[positive][0])
        for j, (log_k, slope) in pairs.items():
            share = math.exp(log_k - largest) / total_k - (j == positive)
            gradient[i] += share * slope / size
            gradient[j] += share * oracle_pair(flat[j], flat[i], o)[1] / size
    return math.fsum(losses) / size, gradient.reshape(z.shape)


@pytest.mark.parametrize("objective", [*GRID, *members(0.1, 3.0)], ids=name)
def test_value_and_gradient_equal_the_oracle(objective):
    for total, positive_cosine in ((1, None), (2, 0.8), (7, None)):
        z = normalize(embeddings(total, 6, positive_cosine, seed=total), objective.squared_radius)
        expected, expected_gradient = oracle(z, objective)
        value, gradient = loss_and_gradient(z, whole(objective))
        assert value.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        scale = max(1.0, abs(expected_gradient).max())
        np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("objective", list(members(0.1)), ids=name)
def test_value_equals_the_oracle_at_larger_batches(objective):
    z = embeddings(17, 8, 0.5, seed=3)
    assert contrastive_loss(z, z, 0, objective).item() == pytest.approx(oracle(z, objective)[0], rel=1e-12)


@pytest.mark.parametrize("norm_p", [1.0, 3.0, math.inf])
def test_other_norms_leave_the_unit_sphere_and_equal_the_oracle(norm_p):
    z = normalize(embeddings(5, 6, seed=4) * 3, 2.0, norm_p)
    torch.testing.assert_close(torch.linalg.vector_norm(z, norm_p, dim=-1), torch.full((2, 5), 2**0.5).double())
    for kernel in ("gaussian", "laplacian", "simple_sum", "concat_sum", "spectral"):
        objective = Objective(kernel, squared_radius=2.0, norm_p=norm_p)
        assert contrastive_loss(z, z, 0, objective).item() == pytest.approx(oracle(z, objective)[0], rel=1e-12)


@both_ways
def test_gradcheck_of_rows_columns_and_normalisation(objective):
    y = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(own, everything):
        own, everything = normalize(own, objective.squared_radius), normalize(everything, objective.squared_radius)
        return contrastive_loss(own, everything, 1, objective)

    assert torch.autograd.gradcheck(loss, (y[:, 1:2].clone().requires_grad_(), y.clone().requires_grad_()))


# 1e-6 relative isn't attainable where the loss is nearly 0: it is then exp(-x) for an x that float32 rounds, by about
# 1e-7 of a distance or cosine over the temperature. Nor for `spectral`, a difference that may cancel.
@pytest.mark.parametrize("positive_cosine", [None, 0.8])
@pytest.mark.parametrize("objective", GRID, ids=name)
def test_float32_is_close_to_float64(objective, positive_cosine):
    z = embeddings(64, 128, positive_cosine, seed=6, dtype=torch.float32)
    exact, exact_gradient = loss_and_gradient(z.double(), whole(objective))
    value, gradient = loss_and_gradient(z, whole(objective))
    assert value.dtype == gradient.dtype == torch.float32
    relative = 1e-6 if exact > 1e-4 else max(1e-6, 2e-7 / objective.temperature)
    absolute = 1e-8 if objective.kernel == "spectral" else 1e-36
    assert value.item() == pytest.approx(exact.item(), rel=relative, abs=absolute)
    assert (gradient - exact_gradient).norm() <= max(1e-5, relative) * exact_gradient.norm() + 1e-36


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5])
def test_nearly_equal_views_keep_their_distance_in_float32(gamma):
    """From the Gram matrix such a distance would be noise: off by 0.1 and more at γ = 0.5, τ = 0.1."""
    a, noise = embeddings(32, 128, seed=7, dtype=torch.float32)
    z = torch.stack([a, a + 3e-3 * noise])
    objective = Objective("exponential", temperature=1.0, gamma=gamma)
    exact = contrastive_loss(z.double(), z.double(), 0, objective)
    assert contrastive_loss(z, z, 0, objective).item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("case", ["untrained", "identical views", "collapsed", "zero", "opposite"])
@pytest.mark.parametrize("objective", [*members(0.01), *members(1.0)], ids=name)
def test_nothing_is_infinite_or_nan(objective, case):
    for total, dtype in ((1, torch.float32), (8, torch.float32), (8, torch.float64)):
        y = embeddings(total, 6, seed=8, dtype=dtype)
        if case == "identical views":
            y[1] = y[0]
        elif case == "collapsed":
            y[:] = y[0, 0].clone()
        elif case == "zero":
            y.zero_()
        elif case == "opposite":
            y[1] = -y[0]
        value, gradient = loss_and_gradient(y, lambda y: whole(objective)(normalize(y, objective.squared_radius)))
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("objective", INFO_NCE, ids=name)
def test_one_image_has_loss_zero_and_no_gradient(objective):
    value, gradient = loss_and_gradient(embeddings(1, 6), whole(objective))
    assert value == 0
    assert (gradient == 0).all()


def test_a_slope_infinite_at_the_anchor_itself_stays_masked():
    z = torch.eye(8, dtype=torch.float64).reshape(2, 4, 8)  # a product with oneself is exactly 1
    _, gradient = loss_and_gradient(z, lambda z: info_nce(z, z, 0, lambda dot, squared: -(1 - dot).sqrt()))
    assert gradient.isfinite().all()


def test_a_tiny_loss_keeps_its_digits_in_float32():
    z = embeddings(16, 64, 0.95, seed=9, dtype=torch.float32)
    objective = Objective("cosine", 0.02)
    exact, exact_gradient = loss_and_gradient(z.double(), whole(objective))
    value, gradient = loss_and_gradient(z, whole(objective))
    assert 0 < exact < 1e-10
    assert value.item() == pytest.approx(exact.item(), rel=1e-4, abs=0)
    assert (gradient - exact_gradient).norm() <= 1e-4 * exact_gradient.norm()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arccos_is_exact_down_to_opposite_vectors(order, dtype):
    """J₂ and J₃ as integrals, which don't cancel: dJ₂/dφ = φ sin φ and dJ₃/dφ = 4 J₂ sin φ with φ = π - θ."""

    def j2(phi):
        return quad(lambda t: t * math.sin(t), 0, phi, epsabs=0, epsrel=1e-12)[0]

    for one_plus_cosine in (1e-5, 1e-3, 0.1, 0.9, 0.95, 1.1, 1.9):
        squared = torch.tensor(4 - 2 * one_plus_cosine, dtype=dtype)
        phi = 2 * math.asin(math.sqrt(1 - squared.item() / 4))
        j3 = quad(lambda t: 4 * j2(t) * math.sin(t), 0, phi, epsabs=0, epsrel=1e-12)[0]
        expected = math.log((phi, j2(phi), j3)[order - 1])
        got = arccos(1 - squared / 2, squared, 1.0, order).item()
        assert got == pytest.approx(expected, abs=3e-6 if dtype == torch.float32 else 1e-11), one_plus_cosine
    opposite = torch.tensor([-1.0, 4.0], dtype=dtype)  # where 1 + cos θ is held at 1e-6
    small = math.sqrt(2e-6)
    leading = (small, small**3 / 3, 4 * small**5 / 15)[order - 1]
    assert arccos(*opposite, 1.0, order).item() == pytest.approx(math.log(leading), abs=3e-6)


# --- one loss, any number of ranks ----------------------------------------------------------------------------------


def over_ranks(z, ranks, objective, columns_have_gradient=True, loss=contrastive_loss):
    """Mean loss of emulated ranks and its gradient: that of the rows, plus what all ranks' columns got."""
    total = z.shape[1]
    batch = total // ranks
    value, gradient = torch.zeros((), dtype=z.dtype), torch.zeros_like(z)
    for rank in range(ranks):
        first = rank * batch
        rows = z[:, first : first + batch].detach().clone().requires_grad_()
        columns = z.detach().clone().requires_grad_()
        rank_loss = loss(rows, columns, first, objective)
        rows_gradient, columns_gradient = torch.autograd.grad(rank_loss, (rows, columns))
        value += rank_loss.detach() / ranks
        gradient[:, first : first + batch] += rows_gradient / ranks
        gradient += columns_gradient / ranks * columns_have_gradient
    return value, gradient


@both_ways
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_mean_over_ranks_is_the_single_process_loss(objective, ranks):
    z = normalize(embeddings(16, 6, 0.7, seed=10), objective.squared_radius)
    exact, exact_gradient = loss_and_gradient(z, whole(objective))
    value, gradient = over_ranks(z, ranks, objective)
    assert value.item() == pytest.approx(exact.item(), rel=1e-12)
    assert (gradient - exact_gradient).norm() <= 1e-12 * exact_gradient.norm()
    accuracy = [contrastive_accuracy(z[:, i : i + 16 // ranks], z, i, objective) for i in range(0, 16, 16 // ranks)]
    assert torch.stack(accuracy).mean() == contrastive_accuracy(z, z, 0, objective)


def test_g1_columns_without_gradient_give_a_wrong_direction():
    z = embeddings(32, 8, 0.6, seed=11)
    objective = Objective("gaussian", 0.5)
    _, exact = loss_and_gradient(z, whole(objective))
    value, gradient = over_ranks(z, 4, objective, columns_have_gradient=False)
    assert value.item() == pytest.approx(contrastive_loss(z, z, 0, objective).item(), rel=1e-12)  # the loss hides it
    assert (gradient - exact).norm() > 0.3 * exact.norm()


def test_g2_own_block_alone_gives_the_gradient_over_the_world_size():
    z = embeddings(32, 8, 0.6, seed=11)
    objective = Objective("gaussian", 0.5)
    _, exact = loss_and_gradient(z, whole(objective))
    defective = torch.zeros_like(z)
    for rank in range(4):  # the full loss on every rank, gradient for its own block only, mean over ranks
        own = slice(8 * rank, 8 * rank + 8)
        defective[:, own] = exact[:, own] / 4
    torch.testing.assert_close(defective, exact / 4)
    assert (over_ranks(z, 4, objective)[1] - exact).norm() < 1e-12 * exact.norm()


def test_g3_negatives_of_the_own_rank_alone_are_too_few():
    z = embeddings(32, 8, 0.6, seed=11)
    objective = Objective("gaussian", 0.5)
    exact, _ = over_ranks(z, 4, objective)
    local = torch.stack([whole(objective)(z[:, i : i + 8]) for i in range(0, 32, 8)]).mean()
    assert local < exact - 0.9  # about log(63 / 15)


def test_k1_the_own_column_moves_with_the_rank():
    """The diagonal of a rank's (2n x 2N) rectangle isn't its anchors' own columns."""

    def defective(z, rank, ranks, gamma):
        batch = z.shape[1] // ranks
        rows = z[:, rank * batch : (rank + 1) * batch].flatten(0, 1)
        log_k = -torch.cdist(rows, z.flatten(0, 1)).pow(gamma) / 0.1
        k = log_k.exp()
        positive = z[:, rank * batch : (rank + 1) * batch].flip(0).flatten(0, 1)
        log_positive = -(rows - positive).norm(dim=1).pow(gamma) / 0.1
        return ((k.sum(1) - k.diagonal()).log() - log_positive).mean()

    z = embeddings(512, 128, 0.8, seed=12)
    # gamma: exact, the defective mean over two ranks
    published = {2.0: (0.0005, (2.009 + 4.009) / 2), 1.0: (0.4126, 4.847), 0.5: (3.081, 6.673)}
    for gamma, (exact, published_wrong) in published.items():
        objective = Objective("exponential", 0.1, gamma=gamma)
        value, _ = over_ranks(z, 2, objective)
        assert value.item() == pytest.approx(exact, abs=5e-5 if gamma == 2 else 4e-3)
        assert value.item() == pytest.approx(contrastive_loss(z, z, 0, objective).item(), rel=1e-12)
        wrong = [defective(z, rank, 2, gamma).item() for rank in (0, 1)]
        assert np.mean(wrong) == pytest.approx(published_wrong, abs=0.1 if gamma == 0.5 else 0.03)
        assert min(wrong) > value.item() + 1.9


# --- more defects of others -----------------------------------------------------------------------------------------


def test_k2_exponents_stay_logarithms():
    """exp of raw logits, the sum held above 1e-6: far from the loss where kernels are small, inf at low temperature."""

    def defective(z, temperature):
        flat = z.flatten(0, 1)
        k = (-torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square() / temperature).exp()
        total = (k.sum(1) - k.diagonal()).clamp(min=1e-6)
        return -(k.diagonal(256).repeat(2) / (total + 1e-6)).log().mean()

    untrained = embeddings(256, 128, 0.0, seed=13, dtype=torch.float32)
    exact = contrastive_loss(untrained.double(), untrained.double(), 0, Objective("gaussian", 0.05)).item()
    assert exact == pytest.approx(11.70, abs=0.1)
    assert contrastive_loss(untrained, untrained, 0, Objective("gaussian", 0.05)).item() == pytest.approx(exact, 1e-6)
    assert defective(untrained, 0.05).item() == pytest.approx(26.88, abs=0.05)
    assert not defective(untrained, 0.015).isfinite()
    assert contrastive_loss(untrained, untrained, 0, Objective("gaussian", 0.015)).isfinite()

    aligned = embeddings(256, 128, 0.8, seed=13, dtype=torch.float32)
    for temperature, published in ((0.1, 0.14), (0.08, 8.0)):
        _, right = loss_and_gradient(aligned.double(), whole(Objective("gaussian", temperature)))
        _, ours = loss_and_gradient(aligned, whole(Objective("gaussian", temperature)))
        _, wrong = loss_and_gradient(aligned, lambda z, t=temperature: defective(z, t))
        assert (ours - right).norm() < 1e-4 * right.norm()
        assert (wrong - right).norm() > 0.5 * published * right.norm()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_k3_arccos_trains(order):
    z = embeddings(64, 32, seed=14, dtype=torch.float32)
    itself = (z * z).sum(-1)
    assert (0.5 * itself + 1 - 0.5 + 1e-6).arccos().isnan().all()  # the published argument
    objective = Objective("arccos", 0.5, order=order)
    value, gradient = loss_and_gradient(z, whole(objective))
    assert value.item() == pytest.approx(contrastive_loss(z.double(), z.double(), 0, objective).item(), rel=1e-6)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def test_k4_spectral_is_a_mean_over_pairs_on_any_number_of_ranks():
    z = embeddings(32, 8, 0.6, seed=15)
    dot = z.flatten(0, 1) @ z.flatten(0, 1).T
    squares = dot.square().sum() - dot.diagonal().square().sum()
    linear = 2 * dot.diagonal(32).mean()
    value, _ = over_ranks(z, 4, Objective("spectral"))
    assert value.item() == pytest.approx((squares / (64 * 63) - linear).item(), rel=1e-12)
    assert abs(value + linear) < 0.3 * squares / (32 * 31)  # the published divisor: a quadratic part 4 times as large


@pytest.mark.parametrize("kernel", ["simple_sum", "concat_sum"])
@pytest.mark.parametrize("mix_level", ["loss", "kernel"])
def test_k6_a_mixture_has_two_parts(kernel, mix_level):
    z = embeddings(8, 6, 0.6, seed=16)
    value, gradient = loss_and_gradient(z, whole(Objective(kernel, mix_level=mix_level)))
    for half in (z, z[..., :3], z[..., 3:]):
        for part in (Objective("laplacian"), Objective("gaussian")):
            assert abs(contrastive_loss(half, half, 0, part) - value) > 1e-3
    assert (gradient.abs() > 1e-9).all()
    for weight in (0, 1, 0.0, 1.0):
        with pytest.raises(ValueError, match=r"mix_weight=\S+: .* only one component"):
            Objective(kernel, mix_level=mix_level, mix_weight=weight)


def test_b1_the_own_term_is_left_out_not_subtracted():
    z = embeddings(256, 128, 0.2, seed=17, dtype=torch.float32)
    for temperature, published in ((0.05, 3.786), (0.02, 4.10)):
        flat = z.flatten(0, 1)
        k = (flat @ flat.T / temperature).exp()
        wrong = (k.sum(1) - math.exp(1 / temperature)).log().mean() - (k.diagonal(256).log()).mean()
        exact = contrastive_loss(z.double(), z.double(), 0, Objective("cosine", temperature)).item()
        assert exact == pytest.approx(published, abs=0.1)
        assert contrastive_loss(z, z, 0, Objective("cosine", temperature)).item() == pytest.approx(exact, rel=2e-6)
        assert not abs(wrong - exact) < 1


def test_l1_no_overflow_at_low_temperature():
    assert torch.tensor(1 / 0.09).half().exp().isinf()
    assert torch.tensor(1 / 0.0112).exp().isinf()
    z = embeddings(32, 16, 0.9, seed=18)
    for dtype, temperature in ((torch.float16, 0.05), (torch.bfloat16, 0.05), (torch.float32, 0.0112)):
        narrow = z.to(dtype)
        value, gradient = loss_and_gradient(narrow, whole(Objective("cosine", temperature)))
        exact = contrastive_loss(narrow.double(), narrow.double(), 0, Objective("cosine", temperature))
        assert value.dtype == torch.float32  # promoted
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("objective", list(members(0.1)), ids=name)
def test_sl1_a_duplicate_of_an_image_is_an_ordinary_negative(objective):
    """By index: equal images are no positives of one another, nor is anything equal to an anchor the anchor itself."""
    z = embeddings(4, 6, seed=19)
    z[:, 2] = z[:, 0]
    z[1, 3] = z[0, 3]
    expected, _ = oracle(z, objective)
    value, gradient = loss_and_gradient(z, whole(objective))
    assert value.item() == pytest.approx(expected, rel=1e-7)  # the duplicates' distances come from the Gram matrix
    assert gradient.isfinite().all()


def test_s3_every_anchor_has_its_own_row():
    """An off-diagonal (2n x 2n-1) matrix reshaped to n rows mixes two anchors: 254 columns, not 126, for n = 64."""
    z = embeddings(64, 128, 0.885, seed=20)  # an angle that gives about the published values; theirs isn't known
    flat = z.flatten(0, 1)
    similarity = flat @ flat.T / 0.5
    off_diagonal = similarity[~torch.eye(128, dtype=torch.bool)].reshape(64, -1)
    positive = similarity.diagonal(64)
    wrong = (torch.cat([positive[:, None], off_diagonal], 1).logsumexp(1) - positive).mean()
    exact = contrastive_loss(z, z, 0, Objective("cosine", 0.5))
    assert off_diagonal.shape[1] == 254
    assert exact.item() == pytest.approx(3.127, abs=0.03)
    assert (wrong - exact).item() == pytest.approx(3.842 - 3.127, abs=0.01)


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("squared_radius", [1.0, 0.5, 10.0])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.2, 0.5])
def test_gaussian_and_cosine_are_one_loss_at_converted_temperatures(temperature, squared_radius):
    y = embeddings(12, 8, 0.5, seed=21) * 2
    converted = temperature_equivalent(temperature, "cosine", "gaussian", squared_radius)
    assert converted == pytest.approx(2 * squared_radius * temperature)
    assert temperature_equivalent(converted, "gaussian", "cosine", squared_radius) == pytest.approx(temperature)
    results = [
        loss_and_gradient(y, lambda y, o=objective: whole(o)(normalize(y, squared_radius)))
        for objective in (
            Objective("cosine", temperature, squared_radius=squared_radius),
            Objective("gaussian", converted, squared_radius=squared_radius),
        )
    ]
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-13)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-14)


def test_no_temperature_of_another_kernel_is_equivalent():
    assert temperature_equivalent(0.1, "gaussian", "gaussian", 7.0) == 0.1
    with pytest.raises(ValueError, match="laplacian"):
        temperature_equivalent(0.1, "laplacian", "cosine")


@pytest.mark.parametrize("objective", INFO_NCE, ids=name)
def test_pairs_all_alike_give_log_of_their_number(objective):
    # the corners of a regular simplex, all at one distance
    corners = torch.eye(16, dtype=torch.float64) - 1 / 16
    z = normalize(corners).reshape(2, 8, 16)
    if objective.kernel == "concat_sum":
        z = torch.cat([z, z], -1) / 2**0.5
    assert contrastive_loss(z, z, 0, objective).item() == pytest.approx(math.log(15), rel=1e-12)
    assert info_nce(z, z, 0, lambda dot, squared: 0 * dot).item() == pytest.approx(math.log(15), rel=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([*members(0.1), *members(0.02), *members(0.5, 2.0)]),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_order_of_images_and_views_and_rotations_change_nothing(objective, total, half_width, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(2, total, 2 * half_width, generator=generator, dtype=torch.float64)
    z = normalize(y, objective.squared_radius)
    value, gradient = loss_and_gradient(z, whole(objective))
    close = {"rtol": 1e-9, "atol": 1e-9}

    order = torch.randperm(total, generator=generator)
    permuted, permuted_gradient = loss_and_gradient(z[:, order], whole(objective))
    torch.testing.assert_close(permuted, value, **close)
    torch.testing.assert_close(permuted_gradient, gradient[:, order], **close)

    swapped, swapped_gradient = loss_and_gradient(z.flip(0), whole(objective))
    torch.testing.assert_close(swapped, value, **close)
    torch.testing.assert_close(swapped_gradient, gradient.flip(0), **close)

    # one rotation of both halves, so that concat_sum is invariant as well
    rotation = torch.linalg.qr(torch.randn(half_width, half_width, generator=generator, dtype=torch.float64))[0]
    rotated = (z.unflatten(-1, (2, -1)) @ rotation).flatten(-2)
    torch.testing.assert_close(contrastive_loss(rotated, rotated, 0, objective), value, **close)
    if objective.kernel != "spectral":
        assert value >= 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 4), st.sampled_from(INFO_NCE), st.integers(0, 2**31))
def test_any_slice_of_the_rows_gives_the_mean_of_its_anchors(batch, before, after, objective, seed):
    total = before + batch + after
    z = embeddings(total, 4, seed=seed)
    one_by_one = [contrastive_loss(z[:, i : i + 1], z, i, objective) for i in range(before, before + batch)]
    value = contrastive_loss(z[:, before : before + batch], z, before, objective)
    torch.testing.assert_close(value, torch.stack(one_by_one).mean(), rtol=1e-12, atol=1e-12)


def test_accuracy_counts_the_anchors_whose_positive_is_nearest():
    z = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0.9, 0.1, 0], [0, 0.9, 0.1], [0, 0.8, 0.2]]])
    z = normalize(z.double())
    # all find their partner, but for image 2 in view b, which is nearer to image 1's view b than to its own view a
    for kernel in KERNELS:
        if kernel != "concat_sum":
            assert contrastive_accuracy(z, z, 0, Objective(kernel)).item() == pytest.approx(5 / 6), kernel
    assert contrastive_accuracy(z[:, 1:2], z, 1, Objective("cosine")) == 1
    assert contrastive_accuracy(z[:, 2:], z, 2, Objective("cosine")) == 0.5
    for mix_level in ("loss", "kernel"):
        doubled = torch.cat([z, z], -1)
        assert contrastive_accuracy(doubled, doubled, 0, Objective("concat_sum", mix_level=mix_level)) == 5 / 6
    assert contrastive_accuracy(z[:, :1], z[:, :1], 0, Objective("cosine")) == 1
    equal = torch.ones(2, 4, 4).double() / 2
    assert contrastive_accuracy(equal, equal, 0, Objective("gaussian")) == 0
    assert not contrastive_accuracy(z.requires_grad_(), z, 0, Objective("cosine")).requires_grad


# --- precision, types, errors ---------------------------------------------------------------------------------------


def test_normalize_scales_widens_and_keeps_zero():
    y = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    torch.testing.assert_close(normalize(y, 4.0, 2.0), torch.tensor([[1.2, -1.6], [0, 0]]))
    torch.testing.assert_close(normalize(y, 1.0, 1.0), torch.tensor([[3 / 7, -4 / 7], [0, 0]]))
    torch.testing.assert_close(normalize(y, 1.0, math.inf), torch.tensor([[0.75, -1.0], [0, 0]]))
    assert normalize(y.half()).dtype == normalize(y.bfloat16()).dtype == torch.float32
    assert normalize(y.double()).dtype == torch.float64
    assert normalize(torch.full((1, 4), 6e4, dtype=torch.float16)).tolist() == [[0.5] * 4]


@pytest.mark.parametrize("norm_p", [1.0, 2.0, 3.0, math.inf])
def test_normalize_has_the_gradient_of_its_formula(norm_p):
    y = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(22)).requires_grad_()
    upstream = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(23))
    (gradient,) = torch.autograd.grad((normalize(y, 3.0, norm_p) * upstream).sum(), y)
    norm = torch.linalg.vector_norm(y, norm_p, dim=-1, keepdim=True)
    unit = (y / norm).detach()
    v = unit.sign() * (unit.abs() == 1 if norm_p == math.inf else unit.abs() ** (norm_p - 1))
    expected = 3**0.5 / norm * (upstream - (upstream * unit).sum(-1, keepdim=True) * v)
    torch.testing.assert_close(gradient, expected.detach())


@pytest.mark.parametrize("scales", [(1e-37, 1e-14, 1e-6, 1.0, 1e6, 1e20, 1e30), (1e-37, 1e-14, 1e-6, 1.0, 1e6)])
@pytest.mark.parametrize("norm_p", [1.0, 2.0, 3.0, 10.0, math.inf])
def test_normalize_takes_vectors_of_any_length(norm_p, scales):
    """Of which powers leave float32's exponents; the formula in float64 has them at length 1. The guard is at 1e-12."""
    scale = torch.tensor(scales, dtype=torch.float64)[:, None]
    generator = torch.Generator().manual_seed(25)
    y = (torch.randn(len(scales), 6, generator=generator, dtype=torch.float64) * scale).float().requires_grad_()
    upstream = torch.randn(len(scales), 6, generator=generator, dtype=torch.float64)
    z = normalize(y, 3.0, norm_p)
    (gradient,) = torch.autograd.grad((z * upstream).sum(), y)

    leaf = (y.detach().double() / scale).requires_grad_()
    norm = torch.linalg.vector_norm(leaf, norm_p, dim=-1, keepdim=True)
    exact = 3**0.5 * leaf / torch.where(scale < 1e-12, 1e-12 / scale, norm)
    (wanted,) = torch.autograd.grad((exact * upstream).sum(), leaf)
    torch.testing.assert_close(z.double(), exact.detach(), rtol=1e-6, atol=0)
    assert ((gradient * scale - wanted).norm(dim=-1) <= 2e-6 * wanted.norm(dim=-1)).all()


@pytest.mark.parametrize("gamma", [2.01, 2.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_at_identical_views(gamma, dtype):
    """Where a power of the squared distance between 1 and 2 has an infinite one."""
    y = embeddings(3, 4, seed=28, dtype=dtype)
    y[1] = y[0]
    y.requires_grad_()
    objective = Objective("exponential", 1.0, gamma=gamma)
    (gradient,) = torch.autograd.grad(whole(objective)(normalize(y)), y, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), y)[0].isfinite().all()
    if gamma == 3 and dtype == torch.float64:  # of less the differences are too steep for finite ones
        assert torch.autograd.gradgradcheck(lambda y: whole(objective)(normalize(y)), y)


def test_normalize_of_the_largest_numbers_there_are():
    for dtype in (torch.float32, torch.float64):
        longest = torch.full((1, 4), torch.finfo(dtype).max, dtype=dtype)
        assert normalize(longest).tolist() == [[0.5] * 4]
    y = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(26)).requires_grad_()
    for scale in (1e200, 1e-8, 1e-13):  # of the last lengths are some 2e-13, below the guard: no part of the slope
        assert torch.autograd.gradcheck(lambda y, s=scale: normalize(s * y), y)
        assert torch.autograd.gradgradcheck(lambda y, s=scale: normalize(s * y), y)
    for broken in (math.nan, math.inf):
        assert normalize(torch.tensor([[broken, 1.0], [3.0, 4.0]])).isnan().any(-1).tolist() == [True, False]


def test_a_vector_beyond_the_norm_leaves_others_their_bits():
    """It may be on another rank, or, on one rank, beside them."""
    y = embeddings(64, 128, seed=27, dtype=torch.float32)
    beside = torch.cat([y, torch.full_like(y[:, :1], 1e30)], dim=1)
    assert torch.equal(normalize(beside)[:, :-1], normalize(y))


@pytest.mark.parametrize("objective", list(members(0.05)), ids=name)
def test_autocast_and_reduced_matrix_precision_are_ignored(objective):
    z = embeddings(64, 256, 0.5, seed=24, dtype=torch.float32)
    value, gradient = loss_and_gradient(z, whole(objective))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, under_gradient = loss_and_gradient(z, whole(objective))  # its backward runs under autocast as well
    assert under.dtype == torch.float32
    assert under == value
    assert torch.equal(under_gradient, gradient)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        reduced, reduced_gradient = loss_and_gradient(z, whole(objective))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert reduced == value
    assert torch.equal(reduced_gradient, gradient)


def test_mixed_types_take_the_wider():
    z = embeddings(4, 6)
    assert contrastive_loss(z.float(), z, 0, Objective("cosine")).dtype == torch.float64
    assert contrastive_loss(z.half(), z.float(), 0, Objective("cosine")).dtype == torch.float32


def test_log_kernels_by_hand():
    dot, squared = torch.tensor([0.5]).double(), torch.tensor([0.25]).double()
    assert cosine(dot, squared, 0.1).item() == pytest.approx(5)
    assert cosine(dot, squared, 0.1, 2.0).item() == pytest.approx(2.5)
    assert gaussian(dot, squared, 0.1).item() == pytest.approx(-2.5)
    assert exponential(dot, squared, 0.1, 1.0).item() == pytest.approx(-5)
    assert exponential(dot, 0 * squared, 0.1, 1.0).item() == pytest.approx(-0.01)  # 0.001 radii
    assert exponential(dot, 0 * squared, 0.1, 1.0, 4.0).item() == pytest.approx(-0.02)
    assert arccos(dot, 4 * squared, 1.0, 1).item() == pytest.approx(math.log(2 * math.pi / 3))  # unit vectors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "gausian"}, "kernel='gausian': unknown value; did you mean 'gaussian'"),
        ({"kernel": "NT-Xent"}, "Choose one of cosine, gaussian"),
        ({"mix_level": "losses"}, "did you mean 'loss'"),
        ({"temperature": 0.0}, "temperature=0.0: must be a finite number above 0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"second_temperature": 0.0}, "second_temperature=0.0"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"gamma": 65.0}, "gamma=65.0: must be a number above 0 and at most 64"),
        ({"squared_radius": 0.0}, "squared_radius=0.0: must be a finite number above 0"),
        ({"norm_p": -1.0}, "norm_p=-1.0: .* inf is the maximum norm"),
        ({"mix_weight": 1.1}, "mix_weight=1.1"),
        ({"mix_weight": math.nan}, "mix_weight=nan"),
        ({"order": 4}, "order=4: the order of the arc-cosine kernel must be 1, 2 or 3"),
        ({"kernel": "cosine", "norm_p": 1.0}, "set norm_p=2"),
        ({"kernel": "arccos", "norm_p": math.inf}, "set norm_p=2"),
        ({"kernel": "arccos", "squared_radius": 2.0}, "squared_radius=2.0"),
        ({"kernel": "arccos", "temperature": 1.5}, "temperature=1.5"),
        ({"temperature": "0.1"}, "temperature='0.1': must be a finite number above 0"),
        ({"temperature": None}, "temperature=None: must be"),
        ({"temperature": True}, "temperature=True: must be"),
        ({"second_temperature": "0.1"}, "second_temperature='0.1': must be"),
        ({"gamma": "1"}, "gamma='1': must be a number above 0"),
        ({"gamma": None}, "gamma=None: must be"),
        ({"gamma": math.nan}, "gamma=nan: must be"),
        ({"gamma": True}, "gamma=True: must be"),
        ({"squared_radius": None}, "squared_radius=None: must be"),
        ({"norm_p": "inf"}, "norm_p='inf': must be a number of at least 1"),
        ({"norm_p": math.nan}, "norm_p=nan"),
        ({"distance_p": None}, "distance_p=None: must be a number of at least 1"),
        ({"distance_p": True}, "distance_p=True: must be"),
        ({"mix_weight": "half"}, "mix_weight='half': must be a number from 0 to 1"),
        ({"order": True}, "order=True: the order of the arc-cosine kernel must be 1, 2 or 3"),
        ({"kernel": "spectral", "precision": "bf16"}, "precision='bf16': the kernel spectral .* set precision='fp32'"),
        ({"kernel": "spectral", "backend": "triton"}, "backend='triton': the kernel spectral .* set backend='tiled'"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Objective(**options)
    assert "\n" not in str(caught.value)


def test_impossible_shapes_are_refused():
    z = embeddings(4, 5)
    with pytest.raises(ValueError, match="width 5 is odd"):
        contrastive_loss(z, z, 0, Objective("concat_sum"))
    for loss in (lambda *a: contrastive_loss(*a, Objective("cosine")), spectral):
        for rows, columns, first in ((z, z, 1), (z[:, :2], z, 3), (z, z, -1)):
            with pytest.raises(ValueError, match=r"first=-?\d+: "):
                loss(rows, columns, first)
        for rows, columns in ((z[0], z), (z[0], z[0]), (z[:1], z[:1]), (z[..., :3], z)):
            with pytest.raises(ValueError, match="don't fit"):
                loss(rows, columns, 0)


@pytest.mark.parametrize("kernel", ["exponential", "simple_sum", "concat_sum"])
def test_the_largest_gamma_is_computed_in_float32(kernel):
    z = embeddings(16, 8, seed=27, dtype=torch.float32)
    z[1, 3] = -z[0, 3]  # 2 apart, 2^64 / τ
    for temperature in (1e-6, 1.0):
        objective = Objective(kernel, temperature, gamma=64)
        value, gradient = loss_and_gradient(z, whole(objective))
        assert value.item() == pytest.approx(whole(objective)(z.double()).item(), rel=1e-4)
        assert gradient.isfinite().all()


def test_numbers_of_other_types_are_numbers():
    assert Objective(temperature=1, gamma=np.float32(0.5), norm_p=np.float64(2), order=np.int64(2)).temperature == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_embeddings_that_are_no_real_numbers_are_refused(dtype):
    ones = torch.ones(2, 4, 6)
    y = ones.to(dtype)
    calls = [normalize, lambda y: spectral(y, y, 0), lambda y: info_nce(y, y, 0, lambda dot, squared: dot)]
    for function in (contrastive_loss, contrastive_accuracy):
        calls += [lambda y, f=function: f(y, y, 0, Objective()), lambda y, f=function: f(ones, y, 0, Objective())]
    for call in calls:
        with pytest.raises(ValueError, match=rf"embeddings have dtype {dtype}; give a real floating-point .*[^\n]$"):
            call(y)


@pytest.mark.parametrize("objective", [*members(0.1), Objective("laplacian", distance_p=1.0)], ids=name)
def test_a_batch_of_no_image_is_refused(objective):
    z = torch.zeros(2, 0, 6)
    message = r"embeddings of shape \(2, 0, 6\) contain no image; give at least one"
    for rows, columns in ((z, z), (z, torch.ones(2, 3, 6))):
        for call in (contrastive_loss, contrastive_accuracy):
            with pytest.raises(ValueError, match=message):
                call(rows, columns, 0, objective)
    with pytest.raises(ValueError, match=message):
        KernelInfoNCE()(z[0], z[1])

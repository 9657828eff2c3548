"""Collectives and cross-rank batch norm on real gloo ranks, against the same computation in one process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.distributed import batch_norm, collectives, ddp, rendezvous
from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.training.state import State
from tests.support import cuda_kernels
from tests.support.ranks import Ranks
from tests.test_gpu import assert_two_ranks_are_one

WORLDS = (1, 2, 4)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- collectives ----------------------------------------------------------------------------------------------------


def gathered(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """gather of this rank's images, and the gradient of a cubic function of it that is different on every rank."""
    own = z[:, collectives.local_slice(z.shape[1])].clone().requires_grad_()
    everything = collectives.gather(own)
    (weights[collectives.rank()] * everything**3).sum().backward()
    return everything.detach(), own.grad


@pytest.mark.parametrize("world_size", WORLDS)
def test_gather_is_in_rank_order_and_sums_gradients(world_size: int, ranks: Ranks) -> None:
    z, weights = random(2, 8, 3), random(world_size, 2, 8, 3, seed=1)
    answers = ranks.run(world_size, gathered, z, weights)
    expected = (weights.sum(0) * 3 * z**2).chunk(world_size, dim=1)
    for rank, (everything, gradient) in enumerate(answers):
        assert torch.equal(everything, z)
        torch.testing.assert_close(gradient, expected[rank], rtol=1e-14, atol=1e-14)


def of_rank_0() -> dict[str, Tensor]:
    tensors = {"weight": random(2, 3).t(), "count": torch.tensor(7), "none": torch.zeros(0)}
    return collectives.broadcast_tensors(tensors if collectives.is_main() else {})


def test_tensors_of_rank_0_reach_all_ranks(ranks: Ranks) -> None:
    for world_size in (1, 3):
        for found in ranks.run(world_size, of_rank_0):
            assert list(found) == ["weight", "count", "none"] and torch.equal(found["weight"], random(2, 3).t())
            assert torch.equal(found["count"], torch.tensor(7)) and found["none"].shape == (0,)


def gathered_from_strides(z: Tensor) -> Tensor:
    own = z[:, collectives.local_slice(z.shape[1])]
    return collectives.gather(own.transpose(0, 2).contiguous().transpose(0, 2))


def test_gather_of_a_transposed_tensor(ranks: Ranks) -> None:
    for everything in ranks.run(2, gathered_from_strides, random(2, 4, 3)):
        assert torch.equal(everything, random(2, 4, 3))


def summed(values: Tensor, weights: Tensor) -> list[Tensor]:
    """differentiable_sum of each rank's row, with first, second and third derivatives."""
    own = values[collectives.rank()].clone().requires_grad_()
    total = collectives.differentiable_sum(own**2)
    answers = [total]
    for _ in range(3):
        (gradient,) = torch.autograd.grad(
            (weights[collectives.rank()] * answers[-1] ** 2).sum(), own, create_graph=True
        )
        answers.append(gradient)
    return [a.detach() for a in answers]


@pytest.mark.parametrize("world_size", WORLDS)
def test_differentiable_sum_any_number_of_times(world_size: int, ranks: Ranks) -> None:
    values, weights = random(world_size, 3), random(world_size, 3, seed=1)
    x = values.clone().requires_grad_()
    last = (x**2).sum(0).expand(world_size, 3)
    expected = [last]
    for _ in range(3):
        (last,) = torch.autograd.grad((weights * last**2).sum(), x, create_graph=True)
        expected.append(last)
    for rank, answers in enumerate(ranks.run(world_size, summed, values, weights)):
        for got, wanted in zip(answers, expected, strict=True):
            torch.testing.assert_close(got, wanted[rank].detach(), rtol=1e-12, atol=1e-12)


def facts() -> dict:
    value = {"name": "é \"' \n", "numbers": [1, 2.5, None, True], "rank": collectives.rank()}
    ones = torch.ones(3)
    total = collectives.all_reduce_sum(ones)
    collectives.barrier()
    return {
        "broadcast_object": collectives.broadcast_object(value if collectives.is_main() else None),
        "empty": collectives.broadcast_object(""),
        "in_place": total is ones,
        "sum": total,
        "slice": list(range(12))[collectives.local_slice(12)],
        "rank": collectives.rank(),
        "world_size": collectives.world_size(),
        "is_main": collectives.is_main(),
    }


@pytest.mark.parametrize("world_size", WORLDS)
def test_from_main_own_slice_and_the_facade(world_size: int, ranks: Ranks) -> None:
    answers = ranks.run(world_size, facts)
    assert [i for answer in answers for i in answer["slice"]] == list(range(12))
    for rank, answer in enumerate(answers):
        assert answer["broadcast_object"] == {"name": "é \"' \n", "numbers": [1, 2.5, None, True], "rank": 0}
        assert answer["empty"] == ""
        assert answer["in_place"] and answer["sum"].tolist() == [world_size] * 3
        assert (answer["rank"], answer["world_size"], answer["is_main"]) == (rank, world_size, rank == 0)


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rendezvous.start(torch.device("cpu"))
    assert not dist.is_initialized() and collectives.world_size() == 1 and collectives.is_main()
    z = random(2, 4, 3)
    assert collectives.gather(z) is z and collectives.differentiable_sum(z) is z and collectives.all_reduce_sum(z) is z
    model = nn.Linear(2, 2)
    assert ddp.data_parallel(model, torch.device("cpu")) is model


def test_own_slice_without_a_group_is_everything_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program under torchrun that has made no process group is one rank of one."""
    monkeypatch.setenv("RANK", "1")
    assert list(range(6))[collectives.local_slice(6)] == list(range(6))


@pytest.mark.parametrize(("backend", "wanted"), [("nccl", [1]), ("gloo", None)])
def test_nccl_is_told_the_device_of_a_barrier(
    backend: str, wanted: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would guess, and warn at every start; gloo takes none."""
    given: list[list[int] | None] = []
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(dist, "barrier", lambda device_ids: given.append(device_ids))
    collectives.barrier()
    assert given == [wanted]


def ended_together() -> str:
    try:
        collectives.fail_together("it diverges")
    except ValueError as error:
        return f"ValueError: {error}"
    except SystemExit as error:
        return f"exit {error.code}"
    return "nothing"


def test_fail_together_tells_once(ranks: Ranks) -> None:
    assert ranks.run(4, ended_together) == ["ValueError: it diverges", "exit 2", "exit 2", "exit 2"]


def leaving_times(seconds: float) -> tuple[float, float]:
    """When rank 0 had done its work, on its clock, and when this rank went on."""
    done = 0.0
    with collectives.while_main_works():
        if collectives.is_main():
            time.sleep(seconds)
            done = time.monotonic()
    return done, time.monotonic()


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_ranks_wait_while_rank_0_works(world_size: int, ranks: Ranks) -> None:
    answers = ranks.run(world_size, leaving_times, 0.3)
    assert all(left >= answers[0][0] > 0 for _, left in answers)


# --- batch norm -----------------------------------------------------------------------------------------------------


def fill(norm: nn.Module) -> None:
    """Scale, shift and running statistics that are not those of a new layer."""
    channels = norm.num_features
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * random(channels, seed=7))
        if norm.bias is not None:
            norm.bias.copy_(random(channels, seed=8))
        norm.running_mean.copy_(random(channels, seed=9))
        norm.running_var.copy_(random(channels, seed=10).exp())


def derivatives(norm: nn.Module, x: Tensor, c: Tensor) -> dict[str, Tensor]:
    """Value, gradients of a sine of it, and those of a gradient penalty (sums over the samples of `x`)."""
    fill(norm)
    x = x.clone().requires_grad_()
    out = norm(x)
    first = torch.autograd.grad((c * out.sin()).sum(), x, create_graph=True)[0]
    penalty = first.square().sum()
    answers = {"out": out, "first": first, "penalty": penalty, "mean": norm.running_mean, "var": norm.running_var}
    answers["count"] = norm.num_batches_tracked
    names, parameters = zip(*norm.named_parameters(), strict=True)
    # Without create_graph: training takes this way, which need not be that of the differentiable gradient.
    plain, *by_value = torch.autograd.grad((c * out.sin()).sum(), (x, *parameters), retain_graph=True)
    answers["plain"] = plain
    by_penalty = torch.autograd.grad(penalty, (x, *parameters))
    answers |= {f"first {n}": g for n, g in zip(names, by_value, strict=True)}
    answers |= {f"second {n}": g for n, g in zip(("x", *names), by_penalty, strict=True)}
    return {k: v.detach() for k, v in answers.items()}


@contextmanager
def as_on_a_gpu(fused: bool = True) -> Iterator[None]:
    """Within, batch norm takes the way it takes on CUDA, whose kernels are stand-ins."""
    before = batch_norm.uses_fused_kernels
    batch_norm.uses_fused_kernels = lambda _: fused
    try:
        with cuda_kernels.on("CPU") if fused else nullcontext():
            yield
    finally:
        batch_norm.uses_fused_kernels = before


def cross_rank(x: Tensor, c: Tensor, shift: bool, fused: bool) -> dict[str, Tensor]:
    own = collectives.local_slice(len(x))
    with as_on_a_gpu(fused):
        return derivatives(CrossRankBatchNorm(x.shape[1], shift=shift).double(), x[own], c[own])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 3, 2)])
def test_batch_norm_is_that_of_the_whole_batch(shape: tuple[int, ...], shift: bool, fused: bool, ranks: Ranks) -> None:
    x, c = 1 + 2 * random(*shape), random(*shape, seed=1)
    reference = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], dtype=torch.float64)
    if not shift:
        reference.bias = None
    expected = derivatives(reference, x, c)
    assert min(expected[k].abs().max() for k in ("first", "second x", "second weight")) > 1e-3
    for world_size in WORLDS:
        answers = ranks.run(world_size, cross_rank, x, c, shift, fused)
        for key, wanted in expected.items():
            of_ranks = [a[key] for a in answers]
            if key in ("out", "first", "plain", "second x"):
                got = torch.cat(of_ranks)
            elif key in ("mean", "var", "count"):
                assert all(torch.equal(v, of_ranks[0]) for v in of_ranks)
                got = of_ranks[0]
            else:
                got = torch.stack(of_ranks).sum(0)
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


def several_steps(x: Tensor) -> dict[str, Tensor]:
    norm = CrossRankBatchNorm(x.shape[2]).double()
    for batch in x:
        norm(batch[collectives.local_slice(len(batch))])
    return norm.state_dict()


def test_running_statistics_after_several_steps(ranks: Ranks) -> None:
    x = 3 + random(5, 8, 4, 3, 3)
    reference = nn.BatchNorm2d(4, dtype=torch.float64)
    for batch in x:
        reference(batch)
    for world_size in (2, 4):
        for state in ranks.run(world_size, several_steps, x):
            torch.testing.assert_close(state, dict(reference.state_dict()), rtol=1e-12, atol=1e-12)


def test_state_dict_keys_are_those_of_torch() -> None:
    ours, theirs = CrossRankBatchNorm(3).state_dict(), nn.BatchNorm2d(3).state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [(k, v.shape, v.dtype) for k, v in theirs.items()]
    assert "bias" not in CrossRankBatchNorm(3, shift=False).state_dict()


def evaluated(x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    norm = CrossRankBatchNorm(x.shape[1]).double()
    fill(norm)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    # Ranks evaluate unequally many images, so nothing may be reduced here.
    return norm.eval()(x[: 2 + collectives.rank()]).detach(), before, norm.state_dict()


def test_eval_mode_uses_running_statistics_and_no_collective(ranks: Ranks) -> None:
    x = random(8, 3, 2, 2)
    reference = nn.BatchNorm2d(3, dtype=torch.float64)
    fill(reference)
    for rank, (out, before, after) in enumerate(ranks.run(2, evaluated, x)):
        torch.testing.assert_close(out, reference.eval()(x[: 2 + rank]).detach(), rtol=1e-12, atol=1e-12)
        assert all(torch.equal(before[k], after[k]) for k in before)


def in_float32(x: Tensor, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    norm = CrossRankBatchNorm(x.shape[1])
    with as_on_a_gpu(fused):
        out = norm(x[collectives.local_slice(len(x))])
    return out.detach(), norm.running_mean, norm.running_var


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("mean", "deviation"), [(1000.0, 1.0), (-30.0, 0.01)])
def test_large_mean_and_small_variance_in_float32(mean: float, deviation: float, fused: bool, ranks: Ranks) -> None:
    """In the first step, where running statistics are no help yet. The input itself is rounded, so is the output."""
    x = (mean + deviation * random(64, 3)).float()
    wanted = nn.BatchNorm1d(3, dtype=torch.float64)
    out = wanted(x.double()).detach()
    rounding = 2**-23 * abs(mean) / deviation
    for world_size in WORLDS:
        answers = ranks.run(world_size, in_float32, x, fused)
        assert (torch.cat([a[0] for a in answers]) - out).abs().max() < 4 * rounding
        torch.testing.assert_close(answers[0][1].double(), wanted.running_mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(answers[0][2].double(), wanted.running_var, rtol=1e-5, atol=0)


def under_autocast(x: Tensor, fused: bool) -> tuple[Tensor, ...]:
    norm = CrossRankBatchNorm(x.shape[1])
    own = x[collectives.local_slice(len(x))].bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    with as_on_a_gpu(fused):
        with torch.autocast("cpu", torch.bfloat16):
            out = norm(own)
        out.float().pow(3).sum().backward()
    return out.detach(), norm.running_mean, norm.running_var, own.grad


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("world_size", WORLDS)
def test_bf16_input_has_float32_statistics(world_size: int, fused: bool, ranks: Ranks) -> None:
    x = 3 + random(16, 4, 5, 5, dtype=torch.float32)
    wanted = nn.BatchNorm2d(4)
    wide = x.bfloat16().float().requires_grad_()
    expected = wanted(wide)
    expected.pow(3).sum().backward()
    answers = ranks.run(world_size, under_autocast, x, fused)
    out = torch.cat([a[0] for a in answers])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.detach().bfloat16(), rtol=2**-7, atol=2**-7)
    gradient = torch.cat([a[3] for a in answers]).float()
    assert ((gradient - wide.grad).norm() / wide.grad.norm()).item() < 0.02
    for _, mean, var, _ in answers:
        assert mean.dtype == var.dtype == torch.float32
        torch.testing.assert_close(mean, wanted.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, wanted.running_var, rtol=1e-5, atol=1e-6)


def of_a_layer(form: str, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """Value, gradients and statistics of a layer whose input and gradient lie in memory as `form` says."""
    norm = CrossRankBatchNorm(4).to(torch.promote_types(dtype, torch.float32))
    fill(norm)
    x, dy = (
        random(8, 4, 5, 5)[collectives.local_slice(8)].to(dtype),
        random(8, 4, 5, 5, seed=1)[collectives.local_slice(8)],
    )
    if form == "channels last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    if form == "both":
        dy = dy.contiguous(memory_format=torch.channels_last)
    if form == "one pixel":
        x, dy = x[..., :1, :1].contiguous(memory_format=torch.channels_last), dy[..., :1, :1].contiguous()
    if form == "mean":
        dy = dy.mean((2, 3), keepdim=True).expand(dy.shape)
    if form == "transposed":
        x, dy = x.transpose(2, 3), dy.transpose(0, 1).contiguous().transpose(0, 1)
    x = x.requires_grad_()
    with as_on_a_gpu(fused):
        out = norm(x)
        gradients = torch.autograd.grad(out, (x, norm.weight, norm.bias), dy.to(dtype))
    return [out.detach(), *gradients, norm.running_mean, norm.running_var]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["rows", "channels last", "both", "one pixel", "mean", "transposed"])
def test_the_way_of_a_gpu_gives_its_kernels_what_they_take(form: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """The stand-ins assert types and layouts; the results are those of the CPU."""
    here = ranks.run(2, of_a_layer, form, dtype, False)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float64: 1e-12}[dtype]
    for there, expected in zip(ranks.run(2, of_a_layer, form, dtype, True), here, strict=True):
        for got, wanted in zip(there, expected, strict=True):
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_simclr_on_two_ranks_is_that_on_one(precision: str, ranks: Ranks) -> None:
    """The comparison that tests/test_gpu.py makes on a GPU, on the CPU."""
    assert_two_ranks_are_one("cpu", precision, "ours", ranks)


class _OptionalTensors(TorchDispatchMode):
    """Collects the calls of batch-norm operators with the names of their optional tensors that are None."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: dict[str, set[str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if "batch_norm" in str(function):
            given = dict(zip((a.name for a in function._schema.arguments), arguments, strict=False)) | (keywords or {})
            optional = {a.name for a in function._schema.arguments if str(a.type) == "Optional[Tensor]"}
            self.missing.setdefault(str(function), set()).update(n for n in optional if given.get(n) is None)
        return function(*arguments, **(keywords or {}))


def optional_tensors(shape: tuple[int, ...], dtype: torch.dtype, shift: bool) -> list[tuple[str, list[str]]]:
    x = random(*shape).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    with _OptionalTensors() as seen:
        CrossRankBatchNorm(shape[1], shift=shift).to(torch.promote_types(dtype, torch.float32))(
            x.requires_grad_()
        ).float().square().sum().backward()
    return [(name, sorted(missing)) for name, missing in seen.missing.items()]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3, 3)])
def test_batch_norm_gives_torch_every_optional_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, shift: bool, ranks: Ranks
) -> None:
    """CUDA asserts that some are defined which the CPU never looks at (save_mean of the backward pass)."""
    for calls in ranks.run(2, optional_tensors, shape, dtype, shift):
        assert any("backward" in name for name, _ in calls)
        assert [(name, missing) for name, missing in calls if missing] == []


class _Layers(nn.Module):
    """Batch norm as a ResNet and a projection head have it, of five widths."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 4, 5, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, bias=False), CrossRankBatchNorm(b), nn.ReLU(inplace=True))
            for a, b in pairwise(widths)
        )
        self.head = nn.Sequential(nn.Linear(6, 7), CrossRankBatchNorm(7, shift=False))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def compiled_steps(x: Tensor, compiled: bool) -> tuple[Tensor, list[dict[str, int]]]:
    """Gradients and running statistics of four steps, and after each what torch.compile has made until then."""
    from torch._dynamo.utils import counters  # slow to import, for every rank of every other test too

    torch.manual_seed(0)
    model = _Layers().double().to(memory_format=torch.channels_last)
    trained = ddp.data_parallel(model, torch.device("cpu"))
    torch._dynamo.reset()
    counters.clear()
    if compiled:
        trained = torch.compile(trained, backend="aot_eager")  # type: ignore[assignment]
    found, made = [], []
    own = collectives.local_slice(x.shape[1])
    for batch in x:
        begun = collectives.place["count"]
        trained(batch[own].contiguous(memory_format=torch.channels_last)).sin().square().sum().backward()
        found += [t.detach().clone().flatten() for t in (*(p.grad for p in model.parameters()), *model.buffers())]
        model.zero_grad(set_to_none=True)
        made.append({"graphs": counters["stats"]["unique_graphs"], "collectives": collectives.place["count"] - begun})
    torch._dynamo.reset()
    return torch.cat([f.double() for f in found]), made


def test_a_compiled_step_is_the_same_and_compiled_once(ranks: Ranks) -> None:
    x = random(4, 8, 3, 9, 9)
    plain = ranks.run(2, compiled_steps, x, False)
    for (values, made), (wanted, _) in zip(ranks.run(2, compiled_steps, x, True), plain, strict=True):
        torch.testing.assert_close(values, wanted, rtol=1e-9, atol=1e-11)
        assert made[0]["graphs"] >= 1
        assert [m["graphs"] for m in made] == [made[0]["graphs"]] * len(made)
        assert [m["collectives"] for m in made] == [8] * len(made)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expects \[B, C, ...\], got shape \(3,\)"):
        CrossRankBatchNorm(3)(torch.zeros(3))


# --- DDP ------------------------------------------------------------------------------------------------------------


def settled(x: Tensor) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), CrossRankBatchNorm(6), nn.ReLU(), nn.Linear(6, 2)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = ddp.data_parallel(model, torch.device("cpu"))
    own = x[collectives.local_slice(len(x))]
    ddp.settle_buckets(wrapped, lambda: wrapped(own).square().mean().backward())
    unchanged = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    no_gradients = all(p.grad is None for p in model.parameters())
    wrapped(own).square().mean().backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    return {"unchanged": unchanged, "no_gradients": no_gradients, "gradients": gradients}


def test_settling_leaves_no_trace_and_ddp_averages(ranks: Ranks) -> None:
    x = random(8, 4)
    (alone,) = ranks.run(1, settled, x)
    for world_size in (2, 4):
        for answer in ranks.run(world_size, settled, x):
            assert answer["unchanged"] and answer["no_gradients"]
            torch.testing.assert_close(answer["gradients"], alone["gradients"], rtol=1e-12, atol=1e-12)
    assert alone["gradients"]["0.weight"].abs().max() > 1e-3


def told_by_all() -> list:
    return collectives.all_gather_object({"rank": collectives.rank(), "text": "ü" * collectives.rank()})


def test_every_ranks_value_on_every_rank(ranks: Ranks) -> None:
    wanted = [{"rank": r, "text": "ü" * r} for r in range(4)]
    assert ranks.run(4, told_by_all) == [wanted] * 4
    assert collectives.all_gather_object(3) == [3]


def differing_after_a_flip(name: str, bit: int, dtype: torch.dtype) -> list[str]:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(30, 7).to(dtype), "b": torch.randn(5, 3, 3, 2).to(dtype), "count": torch.tensor(3)}
    if collectives.rank() == 1 and name:
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensors[name].element_size()]
        tensors[name].view(-1).view(integers)[-1] ^= 1 << bit
    return collectives.differing(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_flipped_bit_on_one_rank_is_found_and_named(dtype: torch.dtype, ranks: Ranks) -> None:
    assert ranks.run(4, differing_after_a_flip, "", 0, dtype) == [[]] * 4
    assert ranks.run(4, differing_after_a_flip, "b", 0, dtype) == [["b"]] * 4
    assert ranks.run(2, differing_after_a_flip, "a", 14, dtype) == [["a"]] * 2
    assert ranks.run(2, differing_after_a_flip, "count", 0, dtype) == [["count"]] * 2


def ended_by_the_check(disturbed: int) -> str:
    wanted = options.build(Pretrain, [("here", {"device": "cpu", "model.width": 0.0625, "head.out": 8})])
    state = State(wanted, Runtime(torch.device("cpu"), "fp32", 1), open_dataset("spirograph", "train"))
    if collectives.rank() == disturbed:
        with torch.no_grad():
            state.model.encoder.conv1.weight[0, 0, 0, 0] += 1e-3
    try:
        state.check_ranks(7)
    except ValueError as error:
        return str(error)
    except SystemExit as end:
        return f"exit {end.code}"
    return "alike"


def test_ranks_whose_parameters_differ_end_the_run(ranks: Ranks) -> None:
    assert ranks.run(2, ended_by_the_check, -1) == ["alike", "alike"]
    said, other = ranks.run(2, ended_by_the_check, 1)
    assert said.startswith(
        "after step 7 the ranks hold different values of encoder.conv1.weight, one of 1 such tensors"
    )
    assert "the same command resumes from the last checkpoint" in said and other == "exit 2"

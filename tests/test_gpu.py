"""What only a GPU can show; skipped where there is none. `benchmarks/gpu/plan.sh` runs them by name."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simclr_ddp import KernelInfoNCE
from simclr_ddp.data.batches import Batch, Share, training_batches
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.losses import log_sums, tile_kernels
from simclr_ddp.losses.contrastive import contrastive_loss, normalize
from simclr_ddp.losses.kernels import KERNELS, Objective, tile_kernel
from simclr_ddp.training.optim import make_optimizer, set_learning_rate
from tests.models import test_checkpoint_stages
from tests.support import processes
from tests.support.objectives import MEMBERS, member
from tests.support.ranks import Ranks
from tests.support.tiny_run import assert_same_run, settings
from tests.test_devices import (
    WAITING,
    assert_draws_are_numpys,
    assert_fp16_learns,
    assert_linear_figures_agree,
    assert_the_other_loader_resumes,
    calls,
    linear_figures,
    nothing_waits,
    predicted_and_taken,
    ten_steps,
)
from tests.training import test_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def cuda_settings(images: Path, run_dir: Path, *more: str) -> list[str]:
    return [a for a in settings(images, run_dir, *more) if a != "device=cpu"] + ["device=cuda"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_killed_and_resumed_on_the_gpu_is_bitwise_equal(precision: str, images: Path, tmp_path: Path) -> None:
    option = f"precision={precision}"
    status, output = processes.run("simclr_ddp.pretrain", *cuda_settings(images, tmp_path / "unbroken", option))
    assert status == 0, output
    process = processes.start("simclr_ddp.pretrain", *cuda_settings(images, tmp_path / "killed", option))
    processes.wait_for_step(tmp_path / "killed", 8, process)
    os.kill(process.pid, signal.SIGKILL)
    processes.finish(process)
    status, output = processes.run("simclr_ddp.pretrain", *cuda_settings(images, tmp_path / "killed", option))
    assert status == 0, output
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


def test_batches_reach_a_busy_gpu_as_they_are(images: Path, loader: str) -> None:
    """Their copies wait behind other work while the next batches are decoded."""

    def batches(device: str) -> Iterator[Batch]:
        dataset, share = open_dataset(str(images), "train"), Share(0, 8, 0, 1)
        options = {"size": 16, "crop_scale": (0.2, 1.0), "workers": 2, "loader": loader}
        return training_batches(dataset, share, range(50), device=torch.device(device), **options)

    busy, found = torch.randn(4096, 4096, device="cuda"), []
    for batch in batches("cuda"):
        found.append(batch.inputs)
        for _ in range(4):
            busy = busy @ busy / 64
    for ours, wanted in zip(found, batches("cpu"), strict=True):
        assert torch.equal(ours.cpu(), wanted.inputs)


@pytest.mark.parametrize("kernel", ["cosine", "laplacian", "simple_sum", "concat_sum", "arccos", "spectral"])
def test_loss_and_gradient_are_those_of_the_cpu(kernel: str) -> None:
    torch.manual_seed(0)
    y = torch.randn(2, 300, 64)
    objective = KernelInfoNCE(kernel, 0.1)
    results = []
    for device in ("cpu", "cuda"):
        leaf = y.to(device).requires_grad_()
        with torch.autocast(device, torch.bfloat16):  # must not reach the loss
            loss = objective(leaf[0], leaf[1])
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach().cpu(), leaf.grad.cpu()))
    (loss_cpu, gradient_cpu), (loss_gpu, gradient_gpu) = results
    assert torch.allclose(loss_gpu, loss_cpu, rtol=1e-5)
    assert (gradient_gpu - gradient_cpu).norm() < 1e-3 * gradient_cpu.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_ten_steps_do_not_wait_for_the_gpu(
    kernel: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"loss.kernel={kernel}", "precision=bf16")
    assert len(ten_steps("cuda", images, tmp_path / "run", nothing_waits, monkeypatch, *options)) == 10


@pytest.mark.parametrize("options", ["", "precision=fp16", "optim.name=sgd", "optim.name=adamw"])
def test_the_other_optimizers_and_fp16_do_not_wait_either(
    options: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [options] * bool(options)
    assert len(ten_steps("cuda", images, tmp_path / "run", nothing_waits, monkeypatch, *more)) == 10


def test_only_the_step_before_is_waited_for(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its event, which is read one step late; as the profiler sees it, which misses no function of the runtime."""
    found = calls("cuda", images, tmp_path / "run", monkeypatch, "precision=bf16")
    assert found["cudaLaunchKernel"] > 1000, "the profiler sees the runtime's functions"
    waits = {name: found[name] for name in WAITING if name in found}
    # report.push and the line's own writing both read the step before; after the first, the event has passed.
    assert set(waits) <= {"cudaEventSynchronize"} and waits.get("cudaEventSynchronize", 0) <= 30, waits


def test_draws_are_numpys_bits() -> None:
    assert_draws_are_numpys("cuda")


def test_linear_figures_are_those_of_the_cpu() -> None:
    assert_linear_figures_agree(linear_figures("cuda"), linear_figures("cpu"))


@pytest.mark.parametrize(
    "given",
    [
        {"precision": "bf16", "optim__global_batch_size": 512, "model__width": 1.0, "model__stem": "cifar"},
        {"precision": "fp32", "optim__global_batch_size": 256, "model__width": 1.0, "model__stem": "cifar"},
        {
            "precision": "bf16",
            "optim__global_batch_size": 64,
            "model__arch": "resnet50",
            "model__width": 1.0,
            "model__stem": "imagenet",
            "data__size": 224,
        },
    ],
    ids=["resnet18-bf16", "resnet18-fp32", "resnet50-224-bf16"],
)
def test_the_doctor_predicts_the_memory(given: dict[str, object]) -> None:
    predicted, taken = predicted_and_taken("cuda", **given)
    assert 0.75 < predicted / taken < 1.25, f"{predicted / 1e9:.2f} GB predicted, {taken / 1e9:.2f} GB taken"


def test_micro_batches_give_the_gradients_of_the_undivided_step(images: Path) -> None:
    """Without batch norm, in float64."""
    whole, divided = (test_step.step(images, normalized=False, micro=m, device="cuda")[2] for m in (None, 4))
    assert distance(divided, whole) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_checkpoint_stages_give_the_same_gradients(dtype: torch.dtype) -> None:
    """And the same statistics, in less memory: other algorithms may be chosen, so not bit for bit."""
    whole, less = (test_checkpoint_stages.step(stages, dtype, device="cuda") for stages in (False, True))
    limit = 1e-10 if dtype == torch.float64 else 1e-4
    assert distance(less[0], whole[0]) < limit and distance(less[1], whole[1]) < limit
    assert less[2] < 0.5 * whole[2]


def test_fp16_learns(images: Path, tmp_path: Path) -> None:
    assert_fp16_learns("cuda", images, tmp_path / "run")


@pytest.mark.parametrize("first", ["torch", "ffcv"])
def test_the_other_loader_resumes(first: str, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    assert_the_other_loader_resumes("cuda", first, images, tmp_path)


# Few: every kernel and width is compiled anew.
TRITON_CASES = [(kernel, *shape) for kernel in ("cosine", "laplacian") for shape in ((1, 16), (100, 100), (1500, 128))]
TRITON_CASES += [("gaussian", 100, 100), ("exponential", 100, 100), ("laplacian", 300, 512)]


@pytest.mark.parametrize("temperature", [0.2, 0.01])
@pytest.mark.parametrize(("kernel", "images", "width"), TRITON_CASES)
def test_triton_equals_float64(kernel: str, images: int, width: int, temperature: float) -> None:
    pytest.importorskip("triton")
    z, gamma = embeddings(images, width), 0.5 if kernel == "exponential" else 1.0
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "tiled")):
        objective = Objective(kernel, temperature, gamma=gamma, backend=backend)
        leaf = z.to(dtype).requires_grad_()
        loss = contrastive_loss(leaf, leaf, 0, objective)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    (loss, gradient), (expected, expected_gradient) = results
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert (gradient - expected_gradient).norm() <= 1e-3 * expected_gradient.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["cosine", "laplacian"])
def test_triton_takes_anchors_of_a_part_of_the_batch(kernel: str, precision: str) -> None:
    pytest.importorskip("triton")
    z_all, results = embeddings(300, 128), []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "tiled")):
        objective = Objective(kernel, 0.2, precision=precision, backend=backend)
        columns = z_all.to(dtype).requires_grad_()
        rows = columns.detach()[:, 100:170].clone().requires_grad_()
        results.append(torch.autograd.grad(contrastive_loss(rows, columns, 100, objective), (rows, columns)))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= (1e-3 if precision == "fp32" else 5e-3) * expected.norm()


@pytest.mark.parametrize(
    ("kernel", "width", "precision"),
    [("cosine", 128, "fp32"), ("laplacian", 128, "fp32"), ("laplacian", 128, "bf16"), ("laplacian", 512, "fp32")],
)
def test_what_autotuning_chooses_changes_no_bit(
    kernel: str, width: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a resumed run, which is timed anew, would not be the unbroken one."""
    OutOfResources = pytest.importorskip("triton").OutOfResources
    from simclr_ddp.losses import triton_log_sums
    from simclr_ddp.losses.triton_log_sums import STAGES, Side

    z, of = embeddings(1000, width), tile_kernel(Objective(kernel, 0.2))
    assert triton_log_sums.usable(z, of)
    results = []
    for stages in (*STAGES, STAGES[-1]):
        monkeypatch.setattr(triton_log_sums, "STAGES", (stages,))
        triton_log_sums.tuned.cache_clear()
        with suppress(OutOfResources):  # autotuning leaves it out, too
            sums = triton_log_sums.log_sums(Side(z, 0), Side(z, 0), of)
            side = Side(z, 0, sums, torch.full_like(sums, 1e-3))
            results.append((sums, triton_log_sums.gradient(side, side, of, precision)))
    triton_log_sums.tuned.cache_clear()
    assert len(results) > 1
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)


def test_triton_does_not_wait_for_the_gpu() -> None:
    pytest.importorskip("triton")
    z = embeddings(300, 128)
    leaf, problem = (
        z.clone().requires_grad_(),
        tile_kernels.Problem(tile_kernels.Cosine(5.0), max, 0, "fp32", None, "triton"),
    )
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            torch.autograd.grad(log_sums.log_sums(leaf, leaf, problem).mean(), leaf)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def embeddings(images: int, width: int) -> Tensor:
    """[2, N, D] float32 on the GPU: views so far apart that the loss isn't 0 at low temperatures either."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(images, width, generator=generator)
    return normalize(torch.stack([first, first + 3 * torch.randn(first.shape, generator=generator)])).cuda()


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_an_update_does_not_wait_for_the_gpu(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), CrossRankBatchNorm(8), nn.Flatten(), nn.Linear(8 * 36, 16)).cuda()
    optimizer = make_optimizer(model, name, weight_decay=1e-4, momentum=0.9, trust_coefficient=0.001)
    set_learning_rate(optimizer, 0.1)
    images = torch.randn(4, 3, 8, 8, device="cuda")

    def step(skip: Tensor) -> None:
        model(images).square().mean().backward()
        optimizer.found_inf, optimizer.grad_scale = skip, None  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    flags = [torch.zeros((), device="cuda"), torch.ones((), device="cuda")]
    step(flags[0])
    before = [p.clone() for p in model.parameters()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(flags[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "a skipped step changed it"


def batch_norms() -> list[Tensor]:
    """On a GPU that two gloo ranks share: ours, and torch's over the whole batch on this rank alone."""
    from simclr_ddp.distributed import collectives

    torch.manual_seed(0)
    whole = torch.randn(8, 6, 4, 4, dtype=torch.float64, device="cuda") + 3
    share = whole[collectives.local_slice(8)].clone().requires_grad_()
    ours, reference = CrossRankBatchNorm(6).cuda().double(), nn.BatchNorm2d(6).cuda().double()
    leaf = whole.clone().requires_grad_()
    out, expected = ours(share), reference(leaf)
    (out.pow(3).sum()).backward()
    (expected.pow(3).sum()).backward()
    assert share.grad is not None and leaf.grad is not None
    assert ours.running_var is not None and reference.running_var is not None
    return [
        (out - expected[collectives.local_slice(8)]).abs().max().cpu(),
        (share.grad - leaf.grad[collectives.local_slice(8)]).abs().max().cpu(),
        (ours.running_var - reference.running_var).abs().max().cpu(),
    ]


def test_cross_rank_batch_norm_on_a_shared_gpu(ranks: Ranks) -> None:
    for differences in ranks.run(2, batch_norms):
        assert max(d.item() for d in differences) < 1e-10


def test_a_compiled_run_trains(images: Path, tmp_path: Path) -> None:
    arguments = cuda_settings(images, tmp_path / "run", "precision=bf16", "compile=true", "optim.steps=6")
    status, output = processes.run("simclr_ddp.pretrain", *arguments)
    assert status == 0 and "finished" in output, output


def simclr_gradients(device: str, precision: str, norm: str) -> dict[str, Tensor]:
    """Loss, gradients averaged over ranks and running statistics of a small SimCLR: this rank's share of one batch.

    norm  `ours`, or `torch`: the same model with SyncBatchNorm
    """
    from simclr_ddp.distributed import collectives
    from simclr_ddp.models.resnet import Encoder
    from simclr_ddp.models.simclr import SimCLR, projection_head

    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    encoder = Encoder("resnet18", 0.125, "cifar")
    for name, parameter in encoder.named_parameters():  # blocks begin as identities, whose gradients are mostly 0
        if name.endswith("bn2.weight"):
            nn.init.ones_(parameter)
    model: nn.Module = SimCLR(encoder, projection_head("nonlinear", encoder.width_out, out=16)).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if norm == "torch":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    views = torch.rand(2, 16, 3, 16, 16)[:, collectives.local_slice(16)].to(device)
    if precision == "fp64":
        model, views = model.double(), views.double()
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(device, low, enabled=low is not None):
        y = model(views).y
    loss = KernelInfoNCE("cosine", 0.5)(y[0], y[1])
    (loss * (1024 if precision == "fp16" else 1)).backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if precision == "fp16":
        found = {name: value if name == "loss" else value / 1024 for name, value in found.items()}
    averaged = {name: collectives.all_reduce_sum(v.clone()) / collectives.world_size() for name, v in found.items()}
    averaged |= {name: v.clone() for name, v in model.named_buffers() if "running" in name}
    return {name: value.cpu() for name, value in averaged.items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Between all tensors of two of them together, relative to the norm of the second."""
    assert found.keys() == expected.keys()
    of, to = (torch.cat([values[name].double().flatten() for name in expected]) for values in (found, expected))
    return ((of - to).norm() / to.norm()).item()


def assert_two_ranks_are_one(device: str, precision: str, norm: str, ranks: Ranks) -> None:
    """Two ranks are no further from one rank in float64 than one rank in this precision is, but for luck."""
    (exact,) = ranks.run(1, simclr_gradients, device, "fp64", "ours")
    (alone,) = ranks.run(1, simclr_gradients, device, precision, "ours")
    limit = max(1e-9, 2 * distance(alone, exact))
    assert limit < 0.8, "too much is lost on one rank to tell anything"
    for shared in ranks.run(2, simclr_gradients, device, precision, norm):
        assert distance(shared, exact) < limit


@pytest.mark.parametrize("norm", ["ours", "torch"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_simclr_on_two_ranks_is_that_on_one_on_the_gpu(precision: str, norm: str, ranks: Ranks) -> None:
    """Forward and backward, channels-last: the first thing that several GPUs do. Gloo ranks can share a GPU.

    With torch's SyncBatchNorm in place of ours as well.
    """
    assert_two_ranks_are_one("cuda", precision, norm, ranks)


@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_loss_does_not_wait_for_the_gpu(name: str, temperature: float) -> None:
    """Nor do its gradient, of either sign, and its accuracy; tests/losses/test_fake_cuda.py asks without a GPU."""
    torch.manual_seed(0)
    y, objective = torch.randn(2, 300, 64, device="cuda", requires_grad=True), member(name, temperature)
    for mode in ("default", "error"):  # the first call loads libraries
        torch.cuda.set_sync_debug_mode(mode)
        try:
            (-objective(y[0], y[1])).backward()
            objective.top1(y[0], y[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert y.grad is not None and y.grad.isfinite().all()

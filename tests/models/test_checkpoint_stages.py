"""model.checkpoint_stages: the same gradients and statistics from fewer kept activations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simclr_ddp.config import schema
from simclr_ddp.config.options import build
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.distributed import collectives, ddp
from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.models.resnet import Encoder
from simclr_ddp.models.simclr import SimCLR, projection_head
from simclr_ddp.training import forecast
from simclr_ddp.training.plan import make_plan
from tests.support.parity_run import model_at, settings, train
from tests.support.ranks import Ranks


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Step = tuple[dict[str, Tensor], dict[str, Tensor], int]


def step(
    checkpoint_stages: bool,
    dtype: torch.dtype = torch.float64,
    low: bool = False,
    twice: bool = False,
    device: str = "cpu",
) -> Step:
    """(gradients, buffers, bytes that autograd kept beside the weights) of two passes over this rank's images"""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 1 / 16, "cifar", checkpoint_stages)
    model = SimCLR(encoder, projection_head("nonlinear", encoder.width_out, out=8)).to(dtype)
    model.to(memory_format=model.encoder.memory_format)
    for module in model.modules():
        if isinstance(module, CrossRankBatchNorm):
            torch.nn.init.normal_(module.weight)  # the blocks' last ones start at 0
    parallel = ddp.data_parallel(model.to(device), torch.device(device))
    images = torch.rand(2, 8, 3, 16, 16, dtype=dtype)[:, collectives.local_slice(8)].to(device)
    kept: dict[int, int] = {}
    alive, weights = [], {p.data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    for _ in range(2):  # the second starts from other statistics
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(device, enabled=low):
            loss = parallel(images).y.to(dtype).square().mul(torch.linspace(0, 1, 8, dtype=dtype, device=device)).sum()
        loss.backward(retain_graph=twice)
        if twice:
            loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients, {n: b.clone() for n, b in model.named_buffers()}, sum(kept.values())


def assert_same(one: Step, other: Step) -> None:
    for mine, theirs in zip(one[:2], other[:2], strict=True):
        assert mine.keys() == theirs.keys() and len(mine) > 40
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float32}, {"dtype": torch.float32, "low": True}, {"twice": True}], ids=str
)
def test_the_same_bits_from_less_memory(options: dict[str, Any]) -> None:
    whole, less = step(False, **options), step(True, **options)
    assert_same(whole, less)
    assert all(int(v) == 2 for k, v in less[1].items() if k.endswith("num_batches_tracked"))
    assert all(v.abs().max() > 0 for v in whole[0].values())
    assert less[2] < 0.5 * whole[2]


def test_without_a_graph_nothing_is_kept_or_done_twice() -> None:
    encoder = Encoder("resnet18", 1 / 16, "stl", True)
    passes: list[int] = []
    encoder.layer1.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        encoder(torch.rand(2, 3, 24, 24))
    assert passes == [1]
    encoder(torch.rand(2, 3, 24, 24)).sum().backward()
    assert len(passes) >= 2


def test_on_two_ranks(ranks: Ranks) -> None:
    whole, less = ranks.run(2, step, False), ranks.run(2, step, True)
    for one, other in zip(whole, less, strict=True):
        assert_same(one, other)
    assert_same(less[0], less[1])
    (alone,) = ranks.run(1, step, True)
    for key, value in alone[0].items():
        torch.testing.assert_close(less[0][0][key] * 2, value, rtol=1e-8, atol=1e-9)


def test_a_run_is_the_same_with_and_without(images: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks and micro-batches, in float64."""
    for stages in ("false", "true"):
        given = ["optim.micro_batch_size=8", f"model.checkpoint_stages={stages}", "optim.steps=3"]
        ranks.run(2, train, settings(images, tmp_path / stages, *given))
    whole, less = (model_at(tmp_path / stages, 3) for stages in ("false", "true"))
    assert less["encoder.bn1.num_batches_tracked"] == 6
    for key, value in whole.items():
        assert torch.equal(value, less[key]), key


def test_it_is_no_other_run_and_not_compiled(images: Path) -> None:
    with_it = build(Pretrain, [("here", {"model.checkpoint_stages": True, "data.train": str(images)})])
    without = build(Pretrain, [("here", {"data.train": str(images)})])
    assert schema.result_keys(with_it) == schema.result_keys(without)
    with_it.compile = True
    with pytest.raises(ValueError, match=r"model.checkpoint_stages=true: it can't be compiled; set compile=false"):
        make_plan(with_it, open_dataset(str(images), "train"))


def test_the_doctor_counts_it() -> None:
    def predicted(stages: bool) -> int:
        given = {"model.arch": "resnet50", "model.width": 1.0, "model.checkpoint_stages": stages, "data.size": 64}
        return forecast.activation_bytes(build(Pretrain, [("here", given)]))

    assert 0.2 * predicted(False) < predicted(True) < 0.6 * predicted(False)

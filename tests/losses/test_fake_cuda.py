"""The losses on CUDA tensors without a GPU: whatever would make the host wait for the device raises.

Under FakeTensorMode tensors have a device, a type and a shape, and no values: `.item()`, `bool()` and indices by a mask
raise, and so do operations on tensors of two devices.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_ddp.distributed import collectives
from simclr_ddp.losses import tiled, tiling
from tests.support.objectives import MEMBERS, member


@pytest.fixture(params=[1, 2])
def world_size(request: pytest.FixtureRequest) -> Iterator[int]:
    if request.param > 1:
        dist.init_process_group("fake", rank=1, world_size=request.param, store=FakeStore())
    yield request.param
    if request.param > 1:
        dist.destroy_process_group()


class Launches(TorchDispatchMode):
    """Operations that run a kernel on a GPU: all but views and new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and func.namespace == "aten" and "empty" not in func.__name__:
            self.count += 1
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def backward(loss: Tensor) -> dict[str, Tensor]:
    """What loss.backward() does, for leaves by shape: torch's engine wants a real device for its threads."""
    grad_fn: Any = loss.grad_fn
    order: list[Any] = []
    seen = set()

    def visit(node: Any) -> None:
        if node is None or node in seen:
            return
        seen.add(node)
        for following, _ in node.next_functions:
            visit(following)
        order.append(node)

    visit(grad_fn)
    arrived: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    arrived[grad_fn][0] = torch.ones_like(loss)
    leaves: dict[str, Tensor] = {}
    with torch.no_grad():
        for node in reversed(order):
            inputs = [arrived[node].get(i) for i in range(len(node._input_metadata))]
            if type(node).__name__ == "AccumulateGrad":
                leaves[str(len(leaves))] = inputs[0]  # type: ignore[assignment]
                continue
            found = node.apply(*inputs) if hasattr(node, "_forward_cls") else node(*inputs)
            found = found if isinstance(found, tuple) else (found,)
            for gradient, (following, index) in zip(found, node.next_functions, strict=False):
                if gradient is not None and following is not None:
                    before = arrived[following].get(index)
                    arrived[following][index] = gradient if before is None else before + gradient
    return leaves


@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize("name", MEMBERS)
def test_the_host_does_not_wait(name: str, temperature: float, world_size: int) -> None:
    """In a loss, its gradient and its accuracy, on one rank and on several; sums with and without a shift."""
    if temperature < 0.1 and "order" in MEMBERS[name]:
        pytest.skip("its range does not depend on the temperature")
    with FakeTensorMode():
        y = torch.randn(2, 24, 16, device="cuda", requires_grad=True)
        objective = member(name, temperature)
        loss = objective(y[0], y[1])
        (gradient,) = backward(loss).values()
        assert loss.device.type == gradient.device.type == "cuda" and gradient.shape == y.shape
        assert objective.top1(y[0], y[1]).device.type == "cuda"


def test_a_wait_is_found() -> None:
    """What the tests here rely on."""
    with FakeTensorMode():
        values = torch.randn(4, device="cuda")
        for wait in (lambda: values.sum().item(), lambda: bool((values < 0).any()), lambda: values[values < 0]):
            with pytest.raises(Exception, match=r"aten\.(_local_scalar_dense|nonzero|equal)"):
                wait()


@pytest.mark.parametrize(
    ("name", "temperature", "forward_most", "backward_most"),
    [("cosine", 0.1, 80, 60), ("laplacian", 0.1, 160, 95), ("laplacian", 0.005, 180, 210)],
)
def test_few_kernels_and_bounded_scratch(name: str, temperature: float, forward_most: int, backward_most: int) -> None:
    """At N = 4,096. In float32 the scratch is three tiles, and what is kept has a bound, however large the batch."""
    with FakeTensorMode():
        y = torch.randn(2, 4096, 128, device="cuda", requires_grad=True)
        with Launches() as forward:
            loss = member(name, temperature)(y[0], y[1])
        with Launches() as back:
            backward(loss)
        assert 20 < forward.count <= forward_most and 20 < back.count <= backward_most
        y = torch.randn(2, 8192, 128, device="cuda", requires_grad=True)
        with Launches() as large:
            backward(member(name, temperature)(y[0], y[1]))
        assert 3 * 4 * tiling.GPU.tile**2 <= large.largest <= max(3 * 4 * tiling.GPU.tile**2, tiling.GPU.kept)


class Memory(TorchDispatchMode):
    """Bytes of tensors alive at their peak, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("name", ["cosine", "laplacian"])
def test_rank_0_of_512(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run for real, on the CPU, in a group whose other ranks are played: memory as O(N d), pairs as 1 / W."""
    sent: list[int] = []

    def counted(function: Any, times: int, values: Tensor) -> Any:
        sent.append(times * values.nbytes)
        return function(values)

    for collective, times in (("all_gather", 512), ("all_reduce_sum", 1), ("all_reduce_max", 1)):
        monkeypatch.setattr(collectives, collective, partial(counted, getattr(collectives, collective), times))
    dist.init_process_group("fake", rank=0, world_size=512, store=FakeStore())
    try:
        for images in (1, 4):  # per rank
            total, sent[:] = 512 * images, []
            y = torch.randn(2, images, 128, requires_grad=True)
            embeddings = 4 * 2 * total * 128
            tiled.buffers.idle.clear()
            with Memory() as memory:
                member(name)(y[0], y[1]).backward()
            assert y.grad is not None and y.grad.isfinite().all()
            assert memory.peak <= 6 * embeddings
            assert sent == [embeddings, 4 * 2 * total, 4 * 2 * total, embeddings]
    finally:
        dist.destroy_process_group()
    areas = [
        sum((t.rows.stop - t.rows.start) * (t.columns.stop - t.columns.start) for t in share)
        for share in (tiling.tiles(32768, 32768, 0, True, 0, count, tiling.GPU) for count in (1, 512))
    ]
    assert areas[1] <= areas[0] / 512
    assert len(tiling.tiles(32768, 32768, 0, True, 0, 512, tiling.GPU)) <= 16

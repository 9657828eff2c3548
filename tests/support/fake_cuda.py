"""Run CUDA code paths on a machine without a GPU: fake tensors have a shape, dtype and device, but no numbers.

Under `fake_cuda()` an operation raises if it needs a number of the device on the host (`.item()`, a mask) or takes
tensors of two devices; under `NoHostWaits()` also if it copies between them and makes the host wait. `backward` and
`gradients` replace torch's engine for the backward pass, because that asks the driver for streams. Only a real GPU
shows what the kernels assert, and how fast they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import cuda_kernels

CUDA = torch.device("cuda", 0)


class HostWait(RuntimeError):
    """Raised for a copy between host and device that the host waits for."""


class NoHostWaits(TorchDispatchMode):
    """Raises HostWait for such copies in this context; code that prepares a run may make them outside of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            source, target, awaited = args[0], out, not kwargs.get("non_blocking")
        elif func is torch.ops.aten.copy_.default:
            source, target, awaited = args[1], args[0], not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            return out
        if awaited and source.device.type != target.device.type:
            raise HostWait(f"{func} of {list(source.shape)} from {source.device.type} to {target.device.type}")
        return out


class FakeEvent:
    """Replaces torch.cuda.Event, which needs the driver."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded = self.waited_for = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded
        self.waited_for = True


@contextmanager
def fake_cuda() -> Iterator[None]:
    """In this context new tensors are fake, and torch's backward passes and all calls of the driver are replaced."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.cuda, "Event", FakeEvent)
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(nn.Module, "to", _to)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        patch.setattr(Tensor, "backward", lambda tensor, gradient=None: backward([tensor], [gradient]))
        patch.setattr(torch.autograd, "grad", gradients)
        patch.setattr(torch._C, "_current_graph_task_id", lambda: _pass[-1])
        stack.enter_context(cuda_kernels.on("Meta"))
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        library.impl("_fused_sgd_", lambda *_, **__: None, "Meta")  # torch has none
        stack.enter_context(FakeTensorMode())
        yield


def _to(module: nn.Module, *args: Any, memory_format: torch.memory_format | None = None) -> nn.Module:
    """Replace nn.Module.to, which swaps the contents of fake parameters and fails if anything else refers to them."""
    for part in module.modules():
        for name, value in [*part._parameters.items(), *part._buffers.items()]:
            if value is None:
                continue
            moved = value.detach()
            if args:
                moved = moved.to(*(args if moved.is_floating_point() else args[:1]))
            if memory_format is not None and moved.dim() == 4:
                moved = moved.contiguous(memory_format=memory_format)
            if name in part._parameters:
                part._parameters[name] = nn.Parameter(moved, value.requires_grad)
            else:
                part._buffers[name] = moved
    return module


@contextmanager
def fake_group(size: int) -> Iterator[None]:
    """Join, as rank 0, a process group whose collectives do nothing; with size 1 there is no group."""
    if size > 1:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        if size > 1:
            dist.destroy_process_group()


_pass = [-1]  # numbers of the running backward passes, for torch.utils.checkpoint


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Any = None,
    create_graph: bool = False,
    **_: Any,
) -> tuple[Tensor, ...]:
    """Replace torch.autograd.grad, on this thread and without streams."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    given = grad_outputs if isinstance(grad_outputs, list | tuple) else [grad_outputs] * len(outputs)
    found = _run(outputs, list(given), create_graph)
    return tuple(found[_edge(tensor)] for tensor in inputs)


def backward(outputs: list[Tensor], given: list[Tensor | None]) -> None:
    """Replace torch.autograd.backward, on this thread and without streams."""
    for (node, _), gradient in _run(outputs, given, False).items():
        if hasattr(node, "variable"):
            leaf = node.variable
            assert leaf.device == gradient.device and leaf.shape == gradient.shape and leaf.dtype == gradient.dtype
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


Edge = tuple[Any, int]


def _edge(tensor: Tensor) -> Edge:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _run(outputs: list[Tensor], given: list[Tensor | None], create_graph: bool) -> dict[Edge, Tensor]:
    """Return the gradient that arrives at every edge of the graph."""
    roots = [_edge(output) for output in outputs]
    waits: dict[Any, int] = {}
    stack = [node for node, _ in roots]
    seen = set(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waits[node] = waits.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    arrived: dict[Edge, Tensor] = {}

    def add(edge: Edge, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        value = edge[0]._input_metadata[edge[1]]
        if gradient.device != value.device:
            raise RuntimeError(f"{edge[0].name()}: a gradient on {gradient.device} of a value on {value.device}")
        gradient = gradient.sum_to_size(value.shape).to(value.dtype)  # as the engine does
        arrived[edge] = arrived[edge] + gradient if edge in arrived else gradient

    _pass.append(max(_pass) + 1)
    try:
        with torch.set_grad_enabled(create_graph):
            for edge, output, gradient in zip(roots, outputs, given, strict=True):
                add(edge, torch.ones_like(output) if gradient is None else gradient)
            ready = [node for node in dict.fromkeys(node for node, _ in roots) if not waits.get(node)]
            while ready:
                node = ready.pop()
                for edge, gradient in zip(node.next_functions, _called(node, arrived), strict=False):
                    if edge[0] is None:
                        continue
                    add(edge, gradient)
                    waits[edge[0]] -= 1
                    if not waits[edge[0]]:
                        ready.append(edge[0])
    finally:
        _pass.pop()
    return arrived


def _called(node: Any, arrived: dict[Edge, Tensor]) -> tuple[Tensor | None, ...]:
    if hasattr(node, "variable"):
        return ()
    count = len(node._input_metadata)
    inputs = [arrived.get((node, number)) for number in range(count)]
    if all(gradient is None for gradient in inputs):
        return (None,) * len(node.next_functions)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        if not getattr(node, "_keeps_none", False):
            inputs = [
                torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g
                for g, m in zip(inputs, node._input_metadata, strict=True)
            ]
        found = node.apply(*inputs)
    else:
        found = node(*inputs)
    return found if isinstance(found, tuple) else (found,)

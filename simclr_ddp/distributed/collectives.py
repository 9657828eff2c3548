"""Ranks and collectives, with and without gradients.

Ranks are defined by torchrun's environment variables. Without them there is one rank and no process group, and every
function returns its input: the same code runs on one process.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

# Position of this rank in the program, for the watchdog: see `note` and `_begin`. `begun` counts the steps that this
# rank has begun since the watchdog started.
place: dict[str, Any] = {"step": 0, "begun": 0, "count": 0, "what": "the start", "collective": "none"}
place["patient"] = False


def note(what: str, step: int | None = None) -> None:
    """Record what this rank does next, for messages of the watchdog; `step` if it begins that step."""
    place["what"], place["count"] = what, place["count"] + 1
    if step is not None:
        place["step"], place["begun"] = step, place["begun"] + 1


def _begin(collective: str) -> None:
    """Record the collective that this rank begins, for messages of the watchdog."""
    place["collective"], place["count"] = collective, place["count"] + 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        _begin("barrier")
        # Without device_ids NCCL guesses the device and warns.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


@contextmanager
def while_main_works() -> Iterator[Callable[[], None]]:
    """Let all ranks wait until rank 0 leaves the block, which may take days, unlike other collectives.

    The block receives a barrier that waits as long; other collectives in it are watched as usual. The barrier uses a
    group of gloo, which waits without using a processor and, unlike NCCL, without a watchdog.
    """
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world_size() > 1 else None

    def wait() -> None:
        place["patient"] = True
        if isinstance(patient, dist.ProcessGroup):
            dist.barrier(patient)
        place["patient"] = False

    place["patient"] = patient is None  # a single rank works while nobody waits
    yield wait
    wait()
    if isinstance(patient, dist.ProcessGroup):
        dist.destroy_process_group(patient)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place and without a gradient."""
    if world_size() > 1:
        _begin(f"all_reduce of {list(values.shape)}")
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """Elementwise maximum over all ranks, in place and without a gradient."""
    if world_size() > 1:
        _begin(f"all_reduce of {list(values.shape)}")
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


# torch 2.14 renamed this function.
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(values: Tensor) -> list[Tensor]:
    """Gather a tensor of one shape from all ranks, in rank order and without a gradient."""
    if world_size() == 1:
        return [values]
    _begin(f"all_gather of {list(values.shape)}")
    # Gather into one tensor, since NCCL copies once per rank into a list of tensors.
    gathered = values.new_empty(world_size() * values.numel())
    _gather_into(gathered, values.detach().contiguous().view(-1))
    return [block.view(values.shape) for block in gathered.chunk(world_size())]


def broadcast_object(value: Any) -> Any:
    """Broadcast rank 0's value, which must be representable in JSON (no pickle)."""
    if world_size() == 1:
        return value
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    text = json.dumps(value).encode() if is_main() else b""
    length = all_reduce_sum(torch.tensor([len(text)], device=device))
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if is_main():
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    _begin("broadcast")
    dist.broadcast(buffer, 0)
    return json.loads(bytes(buffer.tolist()))


def broadcast_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Broadcast rank 0's tensors, which are on the CPU; other ranks pass none."""
    if world_size() == 1:
        return tensors
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    found = {}
    shapes = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    for name, (dtype, shape) in broadcast_object(shapes).items():
        buffer = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if is_main():
            buffer.copy_(tensors[name])
        _begin("broadcast")
        dist.broadcast(buffer, 0)
        found[name] = buffer.cpu()
    return found


def all_gather_object(value: Any) -> list[Any]:
    """Gather the values of all ranks, in rank order; they must be representable in JSON."""
    if world_size() == 1:
        return [value]
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    text = json.dumps(value).encode()
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=device)
    lengths[rank()] = len(text)
    all_reduce_sum(lengths)
    buffer = torch.zeros(world_size(), int(lengths.max()), dtype=torch.uint8, device=device)
    buffer[rank(), : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = all_reduce_sum(buffer).tolist()
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths.tolist(), strict=True)]


def differing(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits differ between ranks."""
    if world_size() == 1:
        return []
    low = torch.stack([_digest(t) for t in tensors.values()])
    high = low.clone()
    _begin("all_reduce of the tensors' digests")
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return [name for name, same in zip(tensors, (low == high).tolist(), strict=True) if not same]


def _digest(values: Tensor) -> Tensor:
    """Sum of the values' bits times odd numbers, modulo 2^64 (0-dim int64); any single flipped bit changes it."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.detach().flatten().view(integers).long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        _begin(f"all_reduce of {list(values.shape)}")
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def differentiable_sum(values: Tensor) -> Tensor:
    """Sum over ranks; its gradient is the sum of all ranks' gradients, differentiable any number of times."""
    return _Sum.apply(values) if world_size() > 1 else values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return torch.cat(all_gather(z), dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = _Sum.apply(gradient)
        return total[:, local_slice(total.shape[1])]


def gather(z: Tensor) -> Tensor:
    """Gather [V, B, ...] of each rank into [V, N, ...], in rank order.

    The backward pass sums over ranks, DDP then averages, and each rank's loss is the mean over its local anchors:
    together this is the gradient of the single-process loss (Chen et al. 2020 trained on the same sum over replicas).
    """
    return _Gather.apply(z) if world_size() > 1 else z


def fail_together(message: str) -> NoReturn:
    """End all ranks after an error that all have detected: rank 0 raises ValueError, the others exit."""
    if not is_main():
        time.sleep(1)  # launchers end all ranks when the first exits; let rank 0 print its message
        sys.exit(2)
    raise ValueError(message)


def local_slice(count: int) -> slice:
    """Slice of `count` entries in rank order that belongs to this rank; world_size must divide count."""
    share, position = count // world_size(), rank() if world_size() > 1 else 0
    return slice(position * share, (position + 1) * share)

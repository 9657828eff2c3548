"""Ranks, collectives with gradients, cross-rank batch norm, and the DDP wrapper: the only user of torch.distributed.

torchrun's environment variables are the only contract. Without them there is one rank, no process group, and every
function here returns its input: the same code runs on one process.
"""

import json
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from inspect import signature
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ARRIVAL = 120.0  # seconds that the ranks wait for each other at the start
met = False  # whether this process has been one of several ranks; stays so after `stop`
_met_at: tuple[str, int, str] | None = None  # address and port of the store that all ranks have met at, and its part
# Where this rank is: see `note` and `_begin`.
place: dict[str, Any] = {"step": 0, "count": 0, "what": "the start", "collective": "none", "patient": False}


def start(device: torch.device, limit: float = 600) -> None:
    """Join the process group that torchrun's variables describe, if they do: NCCL on CUDA, gloo on CPU.

    limit  seconds after which a rank that does not come to a collective is given up: twice that by the collective
           itself, since the watch, which can name the rank, comes first. At the start two minutes are the most.

    Raises ConnectionError in one sentence if the ranks can't meet.
    """
    global met
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        refuse_launchers_side_by_side()
        store = dist.PrefixStore("group", _meet(size, min(limit, ARRIVAL)))
        backend, longest = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=2 * limit)
        dist.init_process_group(backend, store=store, rank=rank(), world_size=size, timeout=longest)
        met = True


def refuse_launchers_side_by_side() -> None:
    """ValueError where several tasks of a SLURM step on a node each run a torchrun, which starts all its ranks."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or local_world_size() == 1:
        return
    # A batch script, where torchrun runs once whatever --ntasks-per-node says, is in no step of srun.
    asked = os.environ.get("SLURM_NTASKS_PER_NODE", "") if "SLURM_STEP_ID" in os.environ else ""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or asked  # 4, or 4(x2),3 for three nodes
    if any(int(count) > 1 for count in re.findall(r"(?:^|,)(\d+)", tasks)):
        raise ValueError(
            f"srun has started {tasks} tasks a node, and torchrun in each of them {local_world_size()} ranks, so all "
            "are there several times: srun --ntasks-per-node=1 torchrun ..., or python -m launch.slurm, which needs no "
            "torchrun"
        )


def start_here(rank: int, size: int, file: str) -> None:
    """Join a gloo group of processes of this machine that meet in a file."""
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=size, timeout=timedelta(minutes=10))


def _meet(size: int, limit: float) -> dist.Store:
    """The store of all ranks, once all have come to it."""
    global _met_at
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the launcher does
    within = timedelta(seconds=limit)
    try:
        store = dist.TCPStore(
            address, port, size, is_master=serves, timeout=within, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        does = "opened" if serves else "reached"
        raise ConnectionError(
            f"the ranks can't meet at {address}:{port}, which rank {rank()} has not {does} ({str(error)[:120]}): "
            "--master-addr and --master-port, or MASTER_ADDR and MASTER_PORT, name a free port of rank 0's machine"
        ) from error
    token = _token(store, size, within)
    _met_at = (address, port, token)
    return dist.PrefixStore(token, store)


def _token(store: dist.Store, size: int, within: timedelta) -> str:
    """A name for this start that rank 0 draws, once all ranks know it.

    torchrun's store outlives a start, and its TORCHELASTIC_RESTART_COUNT differs between nodes of which one has seen
    a failure and the other only a new member: what an earlier start has left must not be taken for this one's.
    """
    token, end = "", time.monotonic() + within.total_seconds()
    try:
        if rank() == 0:
            token = secrets.token_hex(4)
            store.set(f"{token}/here/0", "")
            store.set("start", token)
        while time.monotonic() < end:
            if rank() == 0:
                if store.check([f"{token}/here/{r}" for r in range(size)]):
                    store.set("start", "")  # nobody may come to it later
                    store.set(f"{token}/all", "")
                    return token
            elif store.check(["start"]) and (now := store.get("start").decode()) not in ("", token):
                token = now
                store.set(f"{token}/here/{rank()}", "")
            elif token and store.check([f"{token}/all"]):
                return token
            time.sleep(0.02)
        missing = [r for r in range(size) if not store.check([f"{token}/here/{r}"])] if token else [0]
    except RuntimeError:  # rank 0 has given up first, and the store is gone with it
        missing = []
    shown = ", ".join(map(str, missing[:8])) + " ..." * (len(missing) > 8) or "another"
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    raise ConnectionError(
        f"rank {shown} of {size} did not come to {address}:{port} within {within.total_seconds():.0f} s: start all "
        f"{size} processes, each with its own RANK"
    )


def note(what: str, step: int | None = None) -> None:
    """Remember what this rank does next, for the watch to tell."""
    place["what"], place["count"] = what, place["count"] + 1
    if step is not None:
        place["step"] = step


def _begin(collective: str) -> None:
    """Remember the collective that this rank begins, for the watch to tell."""
    place["collective"], place["count"] = collective, place["count"] + 1


def watch_store(limit: float) -> dist.Store | None:
    """A connection of its own to the store of the ranks, for them to tell each other where they are.

    None where the process group was made by others: nothing is known of its store. ConnectionError if it does not
    answer within `limit` seconds.
    """
    if world_size() == 1 or _met_at is None:
        return None
    address, port, token = _met_at
    made: list[dist.Store] = []

    def connect() -> None:
        with suppress(RuntimeError):
            made.append(dist.TCPStore(address, port, is_master=False))

    # In a thread, since its greeting waits without a limit for a store that does not answer.
    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(limit)
    if not made:
        raise ConnectionError(
            f"the store of the ranks at {address}:{port} does not answer: rank 0, which holds it without torchrun, or "
            "the launcher's machine stands still or is gone"
        )
    return dist.PrefixStore(f"{token}/watch", made[0])


def stop() -> None:
    """Leave the process group; not while an exception passes, whose process `cli.run` ends without that.

    Under NCCL it waits for every collective that this rank has begun. Where one rank fails alone, the others never come
    to some of them: it would wait for ever, with its error untold.
    """
    if dist.is_initialized() and (sys.exc_info()[0] is None or not met):
        dist.destroy_process_group()


def is_left_behind() -> bool:
    """Whether there is still the process group that `start` joined."""
    return met and dist.is_initialized()


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
        # Else NCCL guesses the device, and warns of it.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


@contextmanager
def while_main_works() -> Iterator[None]:
    """All ranks enter together; none leaves before rank 0 does, which may take days, unlike in other collectives.

    Its group is of gloo, whose waiting costs no processor and, unlike NCCL's, is not watched.
    """
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world_size() > 1 else None
    place["patient"] = True
    yield
    place["patient"] = False
    if isinstance(patient, dist.ProcessGroup):
        dist.barrier(patient)
        dist.destroy_process_group(patient)


def all_sum(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place and without a gradient."""
    if world_size() > 1:
        _begin(f"all_reduce of {list(values.shape)}")
        dist.all_reduce(values)
    return values


def all_max(values: Tensor) -> Tensor:
    """The largest over all ranks, elementwise, in place and without a gradient."""
    if world_size() > 1:
        _begin(f"all_reduce of {list(values.shape)}")
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


# torch 2.14 renamed it.
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def of_all(values: Tensor) -> list[Tensor]:
    """A tensor of one shape on all ranks -> that of each, in rank order, without a gradient."""
    if world_size() == 1:
        return [values]
    _begin(f"all_gather of {list(values.shape)}")
    # Into one tensor: into a list of them NCCL copies W times, once per rank.
    gathered = values.new_empty(world_size() * values.numel())
    _gather_into(gathered, values.detach().contiguous().view(-1))
    return [block.view(values.shape) for block in gathered.chunk(world_size())]


def from_main(value: Any) -> Any:
    """Rank 0's value on every rank; anything JSON can hold (no pickle)."""
    if world_size() == 1:
        return value
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    text = json.dumps(value).encode() if is_main() else b""
    length = all_sum(torch.tensor([len(text)], device=device))
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if is_main():
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    _begin("broadcast")
    dist.broadcast(buffer, 0)
    return json.loads(bytes(buffer.tolist()))


def from_all(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank; anything JSON can hold."""
    if world_size() == 1:
        return [value]
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    text = json.dumps(value).encode()
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=device)
    lengths[rank()] = len(text)
    all_sum(lengths)
    buffer = torch.zeros(world_size(), int(lengths.max()), dtype=torch.uint8, device=device)
    buffer[rank(), : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = all_sum(buffer).tolist()
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths.tolist(), strict=True)]


def differing(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits are not the same on all ranks."""
    if world_size() == 1:
        return []
    low = torch.stack([_digest(t) for t in tensors.values()])
    high = low.clone()
    _begin("all_reduce of the tensors' digests")
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return [name for name, same in zip(tensors, (low == high).tolist(), strict=True) if not same]


def _digest(values: Tensor) -> Tensor:
    """0-dim int64: the sum of the values' bits times odd numbers, modulo 2^64; every single flipped bit changes it."""
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
    """Sum over ranks; its gradient is the sum of all ranks' gradients, any number of times differentiable."""
    return _Sum.apply(values) if world_size() > 1 else values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return torch.cat(of_all(z), dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = _Sum.apply(gradient)
        return total[:, own_slice(total.shape[1])]


def gather(z: Tensor) -> Tensor:
    """[V, B, ...] of this rank -> [V, N, ...] of all ranks, in rank order.

    Its backward sums over ranks, DDP then averages, and each rank's loss is the mean over its own anchors: together
    that is the gradient of the single-process loss (Chen et al. 2020 trained on the same sum over replicas).
    """
    return _Gather.apply(z) if world_size() > 1 else z


def fail_together(message: str) -> NoReturn:
    """End all ranks over a fault that all have seen: rank 0 raises ValueError with the message, the others exit."""
    if not is_main():
        time.sleep(1)  # a launcher ends all ranks when the first exits, and rank 0 has something to say
        sys.exit(2)
    raise ValueError(message)


def own_slice(count: int) -> slice:
    """Which of `count` entries in rank order are this rank's; world_size must divide count. Without a group, all."""
    share, position = count // world_size(), rank() if world_size() > 1 else 0
    return slice(position * share, (position + 1) * share)


MOMENTUM = 0.1  # of the running statistics; TensorFlow's 0.9


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of this rank's samples, float32 or wider."""
    # One fused pass over x as it is, where torch.var_mean needs a float32 copy first. The running statistics that it
    # updates as well are thrown away.
    unused = torch.zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)


def _global_statistics(mean: Tensor, var: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all ranks from those of each, by one differentiable all-reduce of 2C numbers.

    Every rank holds the same running mean, so it can serve as the origin: sums taken around it cancel little. In the
    first steps the running mean is not there yet: float64 for these few numbers.
    """
    offset = mean.double() - origin.double()
    moments = differentiable_sum(torch.stack([offset, var + offset.square()])) / world_size()
    total_var = (moments[1] - moments[0].square()).clamp_min(0)
    return (origin.double() + moments[0]).to(mean.dtype), total_var.to(var.dtype)


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, origin: Tensor, eps: float) -> Tensor:
    """Cross-rank batch norm in ordinary differentiable operations: the definition, and slow."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    local_var, local_mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    mean, var = _global_statistics(local_mean, local_var, origin)
    shape = [1, -1] + [1] * (x.dim() - 2)
    scale = weight * torch.rsqrt(var + eps)
    shift = -mean * scale if bias is None else bias - mean * scale
    return (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)


def _fused(x: Tensor) -> bool:
    """Whether torch has the kernels of its SyncBatchNorm for x, which do a layer in a third of the launches."""
    return x.is_cuda


def _fused_statistics(x: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """`_global_statistics` of `_local_statistics`, without a gradient and in few operations."""
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)  # CUDA needs no running statistics for it
    moments = torch.empty(2, len(mean), dtype=torch.float64, device=x.device)
    offset, square = moments.unbind()
    torch.sub(mean.double(), origin, out=offset)
    torch.addcmul(var, offset, offset, out=square)
    all_sum(moments).div_(world_size())
    torch.add(offset, origin, out=mean)
    torch.addcmul(square, offset, offset, value=-1, out=var)
    return mean, var.clamp_min_(0)


class _CrossRankNormalize(torch.autograd.Function):
    """`_normalize` by torch's fused kernels, and by definition where its gradient is to be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, origin: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.eps, ctx.fused = eps, _fused(x)
        shift = torch.zeros_like(weight) if bias is None else bias
        if ctx.fused:
            mean, var = _fused_statistics(x, origin)
            inverse_deviation = torch.rsqrt(var + eps)
            out = torch.batch_norm_elemt(x, weight, shift, mean, inverse_deviation, eps)
            # The definition's origin may be any that all ranks share, and the running mean is about to change.
            ctx.save_for_backward(x, weight, bias, mean, mean, inverse_deviation)
        else:
            mean, var = _global_statistics(*_local_statistics(x), origin)
            ctx.save_for_backward(x, weight, bias, origin, mean, var)
            out = F.batch_norm(x, mean, var, weight, shift, training=False, eps=eps)
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, origin, mean, spread = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
            found = iter(
                torch.autograd.grad(_normalize(x, weight, bias, origin, ctx.eps), inputs, gradient, create_graph=True)
            )
            return *(next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias)), None, None
        if ctx.fused:
            return _CrossRankNormalize._fused_backward(gradient, x, weight, bias is not None, mean, spread)
        var = spread
        # The gradient for constant statistics, then the part that flows through them:
        # weight / std * (mean over all samples of dy + xhat * mean over all samples of dy * xhat).
        # CUDA reads the saved mean and inverse deviation even for constant statistics, where the CPU ignores them: its
        # kernels for channels-last and for [B, C] inputs fail without them.
        inverse_deviation = torch.rsqrt(var + ctx.eps)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, mean, inverse_deviation, False, ctx.eps, [True, True, True]
        )
        samples = x.numel() // x.shape[1] * world_size()
        means = all_sum(torch.stack([dbias, dweight])) / samples * weight * inverse_deviation
        dx -= F.batch_norm(x, mean, var, means[1], means[0], training=False, eps=ctx.eps)
        return dx, dweight, dbias if bias is not None else None, None, None

    @staticmethod
    def _fused_backward(
        gradient: Tensor, x: Tensor, weight: Tensor, shifted: bool, mean: Tensor, inverse_deviation: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradient = gradient.contiguous(memory_format=_layout(x))  # the kernels take both to lie in memory alike
        *sums, dweight, dbias = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse_deviation, weight, True, True, True
        )
        sum_dy, sum_dy_xmu = all_sum(torch.stack(sums)).unbind()
        # int32, as the kernel reads it, of each rank: of all together they can be too many for it.
        samples = torch.full((world_size(),), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
        dx = torch.batch_norm_backward_elemt(gradient, x, mean, inverse_deviation, weight, sum_dy, sum_dy_xmu, samples)
        return dx, dweight, dbias if shifted else None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    """That of x, or the default one if it is neither."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class CrossRankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose mean and variance are those of all ranks' samples together; [B, C] or [B, C, H, W].

    One all-reduce of 2C numbers forward and one backward, on CPU and CUDA. Differentiable twice, unlike torch's
    SyncBatchNorm, whose backward reduces behind autograd's back. Statistics are float32 or wider; every rank must
    hold equally many samples. State-dict keys are BatchNorm's. `shift=False` leaves out the bias (the last layer of
    SimCLR's projection head).
    """

    counts = True  # itself, in num_batches_tracked; or `count_batches` does so for many at once

    def __init__(self, num_features: int, shift: bool = True) -> None:
        super().__init__(num_features, momentum=MOMENTUM)
        if not shift:
            self.register_parameter("bias", None)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"batch norm takes [B, C] or [B, C, H, W], got a shape of {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        if self.counts:
            self.num_batches_tracked.add_(1)
        if world_size() == 1:
            statistics = self.running_mean, self.running_var
            return F.batch_norm(input, *statistics, self.weight, self.bias, True, MOMENTUM, self.eps)
        return self._over_ranks(input)

    # torch.compile would compile a layer anew at every call, since collectives are counted for the watch: it leaves its
    # graph here and enters the next one behind it.
    @torch._disable_dynamo
    def _over_ranks(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        fused = _fused(input)
        input = input.contiguous(memory_format=_layout(input)) if fused else input
        origin = self.running_mean if fused else self.running_mean.clone()
        out, mean, var = _CrossRankNormalize.apply(input, self.weight, self.bias, origin, self.eps)
        with torch.no_grad():
            samples = input.numel() // input.shape[1] * world_size()
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(var * (samples / max(samples - 1, 1)), MOMENTUM)
        return out


def count_together(module: nn.Module) -> list[CrossRankBatchNorm]:
    """The batch norms of a module, which from now on leave it to `count_batches` to count their batches."""
    norms = [m for m in module.modules() if isinstance(m, CrossRankBatchNorm)]
    for norm in norms:
        norm.counts = False
    return norms


@torch.no_grad()
def count_batches(norms: list[CrossRankBatchNorm]) -> None:
    """One more batch of each, in one launch."""
    torch._foreach_add_([norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None], 1)


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model under DistributedDataParallel, or the model itself where there is one rank."""
    if world_size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel
    # Buffers are batch-norm statistics, which CrossRankBatchNorm keeps equal on all ranks. torch renamed the option.
    name = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
    options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True, name: False}
    return ddp(model, **options)


def settle_buckets(model: nn.Module, forward_and_backward: Any) -> None:
    """Throw-away passes, after which DDP's gradient buckets no longer change.

    DDP regroups its buckets after the first backward pass, in the order in which gradients became ready. That changes
    the order of the ring's additions from the second step on, so a resumed run would differ from the unbroken one in
    its first step. Two passes before the first step of every start make the buckets final; batch-norm statistics are
    put back and gradients dropped.
    """
    if world_size() == 1:
        return
    buffers = [b.clone() for b in model.buffers()]
    for _ in range(2):
        forward_and_backward()
        model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(kept)

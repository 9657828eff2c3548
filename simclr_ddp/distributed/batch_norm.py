"""Batch norm over the images of all ranks, differentiable twice."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_ddp.distributed.collectives import all_reduce_sum, differentiable_sum, world_size

MOMENTUM = 0.1  # of the running statistics; 0.9 in TensorFlow's convention


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of this rank's samples, float32 or wider."""
    # One fused pass over x, while torch.var_mean first needs a float32 copy. It also updates running statistics, which
    # are discarded.
    unused = torch.zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)


def _global_statistics(mean: Tensor, var: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all ranks from those of each rank, by one differentiable all-reduce of 2C numbers.

    All ranks hold the same running mean, so it can be the origin of the sums, which reduces cancellation. It is not
    accurate yet in the first steps, so these few numbers are float64.
    """
    offset = mean.double() - origin.double()
    moments = differentiable_sum(torch.stack([offset, var + offset.square()])) / world_size()
    total_var = (moments[1] - moments[0].square()).clamp_min(0)
    return (origin.double() + moments[0]).to(mean.dtype), total_var.to(var.dtype)


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, origin: Tensor, eps: float) -> Tensor:
    """Cross-rank batch norm by definition, in ordinary differentiable operations; slow."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    local_var, local_mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    mean, var = _global_statistics(local_mean, local_var, origin)
    shape = [1, -1] + [1] * (x.dim() - 2)
    scale = weight * torch.rsqrt(var + eps)
    shift = -mean * scale if bias is None else bias - mean * scale
    return (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)


def uses_fused_kernels(x: Tensor) -> bool:
    """Whether torch's SyncBatchNorm kernels support x; they need a third of the launches per layer."""
    return x.is_cuda


def _fused_statistics(x: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `_global_statistics(*_local_statistics(x), origin)` without a gradient, in few operations."""
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)  # CUDA needs no running statistics
    moments = torch.empty(2, len(mean), dtype=torch.float64, device=x.device)
    offset, square = moments.unbind()
    torch.sub(mean.double(), origin, out=offset)
    torch.addcmul(var, offset, offset, out=square)
    all_reduce_sum(moments).div_(world_size())
    torch.add(offset, origin, out=mean)
    torch.addcmul(square, offset, offset, value=-1, out=var)
    return mean, var.clamp_min_(0)


class _CrossRankNormalize(torch.autograd.Function):
    """`_normalize` by fused kernels, and by definition if its gradient is differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, origin: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.eps, ctx.fused = eps, uses_fused_kernels(x)
        shift = torch.zeros_like(weight) if bias is None else bias
        if ctx.fused:
            mean, var = _fused_statistics(x, origin)
            inverse_deviation = torch.rsqrt(var + eps)
            out = torch.batch_norm_elemt(x, weight, shift, mean, inverse_deviation, eps)
            # Any origin that all ranks share is valid, and the running mean is about to change.
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
        # CUDA reads the saved mean and inverse deviation even for constant statistics, unlike the CPU: its kernels for
        # channels-last and for [B, C] inputs fail without them.
        inverse_deviation = torch.rsqrt(var + ctx.eps)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, mean, inverse_deviation, False, ctx.eps, [True, True, True]
        )
        samples = x.numel() // x.shape[1] * world_size()
        means = all_reduce_sum(torch.stack([dbias, dweight])) / samples * weight * inverse_deviation
        dx -= F.batch_norm(x, mean, var, means[1], means[0], training=False, eps=ctx.eps)
        return dx, dweight, dbias if bias is not None else None, None, None

    @staticmethod
    def _fused_backward(
        gradient: Tensor, x: Tensor, weight: Tensor, shifted: bool, mean: Tensor, inverse_deviation: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradient = gradient.contiguous(memory_format=_layout(x))  # the kernels expect both in one layout
        *sums, dweight, dbias = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse_deviation, weight, True, True, True
        )
        sum_dy, sum_dy_xmu = all_reduce_sum(torch.stack(sums)).unbind()
        # The kernel reads int32 counts per rank: the count of all ranks could overflow.
        samples = torch.full((world_size(),), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
        dx = torch.batch_norm_backward_elemt(gradient, x, mean, inverse_deviation, weight, sum_dy, sum_dy_xmu, samples)
        return dx, dweight, dbias if shifted else None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    """Memory format of x: channels-last, or else contiguous."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class CrossRankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with mean and variance over the samples of all ranks, for [B, C, ...]; `convert` puts it into a model.

    It needs one all-reduce of 2C numbers in each direction, on CPU and CUDA. It is differentiable twice, unlike torch's
    SyncBatchNorm, whose backward all-reduce is hidden from autograd. Statistics are float32 or wider; all ranks must
    have equal numbers of samples. State-dict keys are those of BatchNorm. `shift=False` omits the bias (used in the
    last layer of SimCLR's projection head).
    """

    counts = True  # whether it updates num_batches_tracked itself; `count_batches` does so for many layers at once
    momentum: float

    def __init__(self, num_features: int, shift: bool = True) -> None:
        super().__init__(num_features, momentum=MOMENTUM)
        if not shift:
            self.register_parameter("bias", None)

    @classmethod
    def convert(cls, model: nn.Module) -> nn.Module:
        """Replace the BatchNorm1d, 2d, 3d and SyncBatchNorm of a model by this class; return the model.

        Parameters and running statistics are kept, as the same tensors. If the model is such a layer itself, its
        replacement is returned. Raises ValueError for layers without running statistics or with a cumulative average
        (momentum=None), which it does not have, and for subclasses of batch norm with a forward of their own.
        """
        return _convert(model, "model", {})

    def take(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        """Take over the settings, parameters and statistics of another batch norm."""
        assert norm.momentum is not None
        self.eps, self.momentum, self.affine = norm.eps, norm.momentum, norm.affine
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm expects [B, C, ...], got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        if self.counts:
            self.num_batches_tracked.add_(1)
        if world_size() == 1:
            statistics = self.running_mean, self.running_var
            return F.batch_norm(input, *statistics, self.weight, self.bias, True, self.momentum, self.eps)
        return self._over_ranks(input)

    # Collectives are counted for the watchdog, so torch.compile would recompile the layer at every call: break the
    # graph here instead.
    @torch._disable_dynamo
    def _over_ranks(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        fused = uses_fused_kernels(input)
        input = input.contiguous(memory_format=_layout(input)) if fused else input
        origin = self.running_mean if fused else self.running_mean.clone()
        weight = torch.ones_like(origin) if self.weight is None else self.weight
        out, mean, var = _CrossRankNormalize.apply(input, weight, self.bias, origin, self.eps)
        with torch.no_grad():
            samples = input.numel() // input.shape[1] * world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (samples / max(samples - 1, 1)), self.momentum)
        return out


def _convert(module: nn.Module, name: str, known: dict[int, nn.Module]) -> nn.Module:
    """Convert a module below `name`; `known` holds what was converted, since a layer may be in several places."""
    if id(module) in known:
        return known[id(module)]
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, CrossRankBatchNorm):
        known[id(module)] = _replacement(module, name)
        return known[id(module)]
    known[id(module)] = module
    for child_name, child in list(module._modules.items()):
        if child is not None:
            module._modules[child_name] = _convert(child, f"{name}.{child_name}", known)
    return module


def _replacement(norm: nn.modules.batchnorm._BatchNorm, name: str) -> CrossRankBatchNorm:
    if type(norm).forward not in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward):
        raise ValueError(f"{name}: {type(norm).__name__} has a forward of its own; replace it by a plain batch norm")
    if norm.running_mean is None or norm.running_var is None or norm.momentum is None:
        raise ValueError(
            f"{name}: {type(norm).__name__} with track_running_stats={norm.track_running_stats}, "
            f"momentum={norm.momentum}; give it running statistics and a momentum such as {MOMENTUM}"
        )
    new = CrossRankBatchNorm(norm.num_features)
    new.take(norm)
    return new


def count_together(module: nn.Module) -> list[CrossRankBatchNorm]:
    """Return the batch norms of a module, whose batches `count_batches` must count from now on."""
    norms = [m for m in module.modules() if isinstance(m, CrossRankBatchNorm)]
    for norm in norms:
        norm.counts = False
    return norms


@torch.no_grad()
def count_batches(norms: list[CrossRankBatchNorm]) -> None:
    """Increment num_batches_tracked of all layers in one launch."""
    torch._foreach_add_([norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None], 1)

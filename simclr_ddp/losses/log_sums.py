"""Log-sum-exp over all negatives of each anchor, computed in tiles or by Triton kernels."""

from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from simclr_ddp.losses.tile_kernels import LOG2_E, Problem
from simclr_ddp.losses.tiled import Pairs, buffers, centred


def log_sums(z: Tensor, z_all: Tensor, problem: Problem) -> Tensor:
    """Log of the sum of the kernel over each anchor's negatives, [2B]; a large negative number if N = 1.

    z      [*, 2, B, D]  the anchors' embeddings, float32 or float64
    z_all  [*, 2, N, D]  embeddings of the global batch; if it is the object z, every pair is computed once

    Memory grows with N. Second derivatives use the plain form (`Problem.plain`) and its memory.
    """
    result: Tensor = _LogSums.apply(z, z.detach() if z is z_all else z_all, z is z_all, problem)
    return result


class _LogSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, z_all: Tensor, symmetric: bool, problem: Problem) -> Tensor:
        ctx.save_for_backward(z, z_all)
        ctx.symmetric, ctx.problem, ctx.kernels = symmetric, problem, _triton(z, problem)
        if ctx.kernels is not None:
            ctx.sums = ctx.kernels.forward(*centred(z, z_all, symmetric, problem.kernel), problem)
            return ctx.sums / LOG2_E
        work = Pairs(z, z_all, symmetric, problem)
        sums, ctx.kept = work.log_sums(any(ctx.needs_input_grad))
        ctx.sums = sums
        return work.local_rows(sums[:, None]).flatten() / LOG2_E

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        z, z_all = ctx.saved_tensors
        ranks = ctx.problem.ranks
        if torch.is_grad_enabled():
            columns = z if ctx.symmetric else z_all if ranks is None else ranks.gather(z)
            inputs = [t for t, needed in zip((z, z_all), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(ctx.problem.plain(z, columns), inputs, gradient, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None

        if ctx.kernels is not None:
            columns_too = ctx.needs_input_grad[1]
            shifted = centred(z, z_all, ctx.symmetric, ctx.problem.kernel)
            both = ctx.kernels.backward(*shifted, ctx.sums, gradient, ctx.problem, ctx.symmetric, columns_too)
            return *both, None, None
        if ranks is not None:
            gradient = ranks.all_rows(gradient.view(2, -1)).flatten()
        work = Pairs(z, z_all, ctx.symmetric, ctx.problem)
        columns_too = ctx.needs_input_grad[1]
        rows, columns = work.gradients(ctx.sums, gradient, ctx.kept, columns_too)
        if ctx.kept is not None:  # the loss may outlive this pass; a second one recomputes them
            buffers.give_back("kept", ctx.kept)
            ctx.kept = None
        if ranks is not None:
            rows = ranks.sum(rows)
        in_z = work.local_rows(rows).view(z.shape)
        return in_z, columns.view(z_all.shape) if columns_too else None, None, None


def _triton(z: Tensor, problem: Problem) -> ModuleType | None:
    """Module of the Triton kernels if `problem` selects them; ValueError if they can't compute it."""
    if problem.backend != "triton":
        return None
    if find_spec("triton") is None:
        raise ValueError("backend='triton': Triton is not installed; backend='tiled' computes the same without it")
    from simclr_ddp.losses import triton_log_sums

    if not triton_log_sums.usable(z, problem.kernel):
        raise ValueError(
            f"backend='triton': no kernel for {type(problem.kernel).__name__.lower()} in {z.dtype} of width "
            f"{z.shape[-1]} on {z.device.type}; backend='tiled' computes the same"
        )
    return triton_log_sums

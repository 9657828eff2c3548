"""One training step up to the update: forward, loss and backward, and the values that all ranks agree on.

With micro-batches the encoder holds one of them at a time, and the loss still uses all negatives of the complete batch:
first the embeddings of all images are computed without a graph, then the loss and its gradient with respect to them,
and then each micro-batch is computed again with a graph, through which its part of that gradient is propagated (Gao et
al. 2021, arXiv 2101.06983). Views are functions of the sample, so both passes see the same views. Batch norm sees one
micro-batch at a time: the run differs from the run with one batch, and is the same on any number of ranks.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simclr_ddp.data.batches import Batch
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
from simclr_ddp.models.simclr import Output
from simclr_ddp.training.state import State, TrainingState


def unmarked(part: str) -> None:
    """Do nothing: the default of `mark`, which measures nothing."""


def forward_backward(
    model: nn.Module,
    state: State,
    runtime: Runtime,
    objective: KernelInfoNCE,
    augment: Callable[..., Tensor],
    batch: Batch,
    epoch: int,
    micro_batches: int = 1,
    mark: Callable[[str], None] = unmarked,
) -> tuple[Tensor, Tensor]:
    """Return this rank's mean loss, a scalar, and its raw projections y [V, B, d]; leave scaled gradients in `.grad`.

    model          state's model as it is trained: compiled, or in DistributedDataParallel, which reduces once
    micro_batches  the image at position i of the batch is in micro-batch i modulo micro_batches
    mark           is called with the name of each part of a step (not of micro-batches) when that part has ended
    """

    def project(model: nn.Module, part: Batch) -> Output:
        with runtime.autocast():
            views = augment(part.inputs, epoch, part.sample)
            mark("augmentation")
            return model(views)

    def probe_loss(output: Output, part: Batch) -> Tensor | int:
        return 0 if state.probe is None else state.probe.loss(output.logits, part.labels, part.sample)

    if micro_batches == 1:
        output = project(model, batch)
        mark("forward")
        loss = objective(output.y[0], output.y[1])  # normalises, gathers, never below float32
        total = loss + probe_loss(output, batch)
        mark("loss")
        state.zero_grad()
        state.scaler.scale(total).backward()
        mark("backward")
        return loss.detach(), output.y.detach()

    micro = [every(batch, first, micro_batches) for first in range(micro_batches)]
    buffers = [b.clone() for b in state.model.buffers()]
    with torch.no_grad():
        # [V, B / micro_batches, micro_batches]: image i is in micro-batch i modulo micro_batches
        y = torch.stack([project(model, part).y for part in micro], dim=2).flatten(1, 2)
        for buffer, before in zip(state.model.buffers(), buffers, strict=True):
            buffer.copy_(before)  # so that batch norm's running statistics count each micro-batch once
    y = y.to(torch.promote_types(y.dtype, torch.float32)).requires_grad_()
    loss = objective(y[0], y[1])
    (gradient,) = torch.autograd.grad(state.scaler.scale(loss), y)
    state.zero_grad()
    for number, part in enumerate(micro):
        later = number + 1 < micro_batches and hasattr(model, "no_sync")
        with model.no_sync() if later else nullcontext():  # type: ignore[operator]
            output = project(model, part)
            total, share = (output.y * gradient[:, number::micro_batches]).sum(), probe_loss(output, part)
            if isinstance(share, Tensor):
                total = total + state.scaler.scale(share / micro_batches)
            total.backward()
    return loss.detach(), y.detach()


def every(batch: Batch, first: int, stride: int) -> Batch:
    """Select the images of the batch whose position is `first` modulo `stride`."""
    where = slice(first, None, stride)
    inputs = batch.inputs[where] if batch.inputs.dim() == 2 else batch.inputs[:, where]
    return Batch(inputs, batch.sample[where], None if batch.labels is None else batch.labels[where])


@dataclass(frozen=True)
class Record:
    """The metrics of a step, equal on all ranks and still on the device; `on_host` names the values."""

    values: Tensor  # [4]: loss and (contrastive) top-1, means over ranks; stop requests / ranks; gradient norm
    failed: Tensor  # 0-dim bool: whether any of the values is not finite

    @staticmethod
    def on_host(values: list[float]) -> "Numbers":
        return Numbers(*values)


@dataclass(frozen=True)
class Numbers:
    """The values of a Record on the host."""

    loss: float
    top1: float
    stop: float  # share of ranks that were asked to stop
    gradient_norm: float


def agree(loss: Tensor, top1: Tensor, stop: bool, state: TrainingState) -> Record:
    """Average the loss and accuracy (0-dim) over ranks, and combine them with whether any rank was asked to stop."""
    local = torch.stack([loss, top1, torch.full_like(loss, stop)])
    mean = collectives.all_reduce_sum(local) / collectives.world_size()
    values = torch.cat([mean, state.gradient_norm()[None]])
    return Record(values, ~values.isfinite().all())

"""Forward and backward of one training step, of the whole batch at once or in micro-batches.

In micro-batches the encoder never holds more than one, while all negatives of the whole batch take part: embeddings of
all without a graph, the loss and its gradient in them over the whole batch, then each micro-batch once more, with a
graph, through which its part of that gradient goes back (Gao et al. 2021, arXiv 2101.06983). Views are functions of
the sample, so both times see the same. Batch norm sees a micro-batch at a time: with it, this is another run than with
the whole batch at once, and the same on any number of ranks.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from simclr_ddp.data import Batch
from simclr_ddp.info_nce import KernelInfoNCE
from simclr_ddp.model import Output
from simclr_ddp.runtime import Runtime
from simclr_ddp.state import State


def forward_backward(
    model: nn.Module,
    state: State,
    runtime: Runtime,
    objective: KernelInfoNCE,
    augment: Callable[..., Tensor],
    batch: Batch,
    epoch: int,
    parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """This rank's mean loss, a scalar, and its raw projections y [V, B, d]; gradients, scaled, are in the parameters.

    model  state's, as it is trained: under DistributedDataParallel, which reduces once, or compiled
    parts  micro-batches; the image at position i of the whole batch is in micro-batch i modulo parts
    """

    def project(model: nn.Module, part: Batch) -> Output:
        with runtime.autocast():
            return model(augment(part.inputs, epoch, part.sample))

    def probe_loss(output: Output, part: Batch) -> Tensor | int:
        return 0 if state.probe is None else state.probe.loss(output.logits, part.labels, part.sample)

    if parts == 1:
        output = project(model, batch)
        loss = objective(output.y[0], output.y[1])  # normalises, gathers, never below float32
        total = loss + probe_loss(output, batch)
        state.zero_grad()
        state.scaler.scale(total).backward()
        return loss.detach(), output.y.detach()

    micro = [_every(batch, part, parts) for part in range(parts)]
    buffers = [b.clone() for b in state.model.buffers()]
    with torch.no_grad():
        # [V, B / parts, parts]: image i is in micro-batch i modulo parts
        y = torch.stack([project(model, part).y for part in micro], dim=2).flatten(1, 2)
        for buffer, before in zip(state.model.buffers(), buffers, strict=True):
            buffer.copy_(before)  # batch norm's running statistics take each micro-batch once
    y = y.to(torch.promote_types(y.dtype, torch.float32)).requires_grad_()
    loss = objective(y[0], y[1])
    (gradient,) = torch.autograd.grad(state.scaler.scale(loss), y)
    state.zero_grad()
    for number, part in enumerate(micro):
        later = number + 1 < parts and hasattr(model, "no_sync")
        with model.no_sync() if later else nullcontext():  # type: ignore[operator]
            output = project(model, part)
            total, share = (output.y * gradient[:, number::parts]).sum(), probe_loss(output, part)
            if isinstance(share, Tensor):
                total = total + state.scaler.scale(share / parts)
            total.backward()
    return loss.detach(), y.detach()


def _every(batch: Batch, first: int, parts: int) -> Batch:
    """Every image of the batch whose position is `first` modulo `parts`."""
    where = slice(first, None, parts)
    inputs = batch.inputs[where] if batch.inputs.dim() == 2 else batch.inputs[:, where]
    return Batch(inputs, batch.sample[where], None if batch.labels is None else batch.labels[where])

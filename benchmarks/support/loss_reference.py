"""Float64 references for `benchmarks.loss`: value and gradient, for large batches only some rows of the gradient."""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.support.loss_tools import KERNELS
from simclr_ddp import KernelInfoNCE
from simclr_ddp.losses.contrastive import contrastive_loss, log_kernels, normalize, pairwise, split_halves
from simclr_ddp.losses.kernels import Objective, log_kernel
from simclr_ddp.losses.p_norm import PDistance

COMPLETE = 16384  # most images for which the complete gradient is computed
SAMPLE = 128  # number of images whose gradient rows are computed for larger batches
LONGEST = 1800.0  # seconds above which no reference is computed
BLOCK = 1024  # rows and columns of a block of pairs


class Reference(NamedTuple):
    """The loss, and rows [n, D] of its gradient [2N, D]: all, or those at the positions `rows`."""

    value: float
    gradient: Tensor
    rows: Tensor | None = None


def reference(kernel: str, y_a: Tensor, y_b: Tensor) -> Reference | None:
    """Compute the reference of one process with the complete batch; None if it would take too long.

    Up to COMPLETE images it uses tiles, which tests compare with the definition. Beyond, it uses the definition, block
    by block: the value from all anchors, then, with their normalisers, the gradient of randomly drawn images.
    """
    objective, y = KernelInfoNCE(**KERNELS[kernel]).objective, torch.stack([y_a, y_b]).double()
    if len(y_a) > COMPLETE and objective.kernel != "spectral":  # spectral does not compute pairs
        return _sampled(y, objective)
    y.requires_grad_()
    z = _normalized(y, objective)
    value = contrastive_loss(z, z, 0, objective)
    return Reference(value.item(), torch.autograd.grad(value, y)[0].flatten(0, 1))


def _sampled(y: Tensor, objective: Objective) -> Reference | None:
    images = y.shape[1]
    norms = _all_normalisers(y, objective)
    if norms is None:
        return None
    normalisers, positives = norms
    chosen = torch.randperm(images, generator=torch.Generator().manual_seed(1))[:SAMPLE].sort().values
    everything = _in_halves(_normalized(y, objective), objective)
    gradients = []
    for image in chosen.tolist():
        own = y[:, image : image + 1].clone().requires_grad_()
        positive, negatives = log_kernels(
            _in_halves(_normalized(own, objective), objective), everything, image, log_kernel(objective)
        )
        # The image counts as a row and as a column: exp(log k - log of the row's sum), for both rows of a pair.
        as_row = (negatives - normalisers[:, image, None]).exp() + (negatives - normalisers.flatten()).exp()
        both = (positive - normalisers[:, image]).exp() + (positive - normalisers[:, image].flip(0)).exp() - 2
        pairs = (as_row.detach() * negatives.masked_fill(negatives == -math.inf, 0)).sum()
        total = (pairs + (both.detach() * positive).sum()) / (2 * images)
        gradients.append(torch.autograd.grad(total, own)[0])
    value = (normalisers - positives).mean().item()
    return Reference(value, torch.cat(gradients, 1).flatten(0, 1), torch.cat([chosen, chosen + images]))


@torch.no_grad()
def _all_normalisers(y: Tensor, objective: Objective) -> tuple[Tensor, Tensor] | None:
    """Return the log of the sum of k over each anchor's positive and negatives, and log k of its positive, [2, N]."""
    z, kernel = _in_halves(_normalized(y, objective), objective), log_kernel(objective)
    positives = pairwise(kernel, *z.unbind(-3)).repeat(2)
    image = torch.arange(y.shape[1]).repeat(2)
    found, begin = positives.clone(), time.perf_counter()
    blocks = [
        (flat, flat.square().sum(-1), own)
        for flat, own in zip(z.flatten(-3, -2).split(BLOCK, -2), image.split(BLOCK), strict=True)
    ]
    for done, (total, (rows, row_squares, row_image)) in enumerate(zip(found.split(BLOCK), blocks, strict=True), 1):
        for columns, column_squares, column_image in blocks:
            if isinstance(kernel, PDistance):
                log_k = kernel.between(rows, columns)
            else:
                dot = rows @ columns.mT
                squares = row_squares[..., :, None] + column_squares[..., None, :]
                log_k = kernel(dot, (squares - 2 * dot).clamp(min=0))
            log_k.masked_fill_(row_image[:, None] == column_image, -math.inf)
            torch.logaddexp(total, log_k.logsumexp(dim=1), out=total)
        if (time.perf_counter() - begin) / done * len(blocks) > LONGEST:
            return None
    return found.view(2, -1), positives.view(2, -1)


def _normalized(y: Tensor, objective: Objective) -> Tensor:
    return normalize(y, objective.squared_radius, objective.norm_p)


def _in_halves(z: Tensor, objective: Objective) -> Tensor:
    return split_halves(z) if objective.kernel == "concat_sum" else z

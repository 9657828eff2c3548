"""Predictions of a classifier for a data set, computed by all ranks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from simclr_ddp.data.batches import evaluation_batches, evaluation_images
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.evaluation.scores import label_ranks
from simclr_ddp.system import console
from simclr_ddp.system.machine import usable_workers


@torch.no_grad()
def classify(
    model: nn.Module,
    dataset: Dataset,
    index: np.ndarray,
    runtime: Runtime,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    workers: int,
    loader: str,
    title: str,
) -> tuple[Tensor, Tensor]:
    """Compute the rank of the correct class among the logits, and the predicted class, of the images `index` [n].

    Both are int64 [n] on the CPU of every rank. Each image has one, central view; the model is in evaluation mode here.
    Batches of batch_size images are dealt to the ranks in turn: every batch holds the same images on any number of
    ranks, so with the same threads per rank they compute the same bits.
    """
    images = evaluation_images(dataset, list(mean), list(std), runtime.dtype)
    firsts = range(0, len(index), batch_size)[collectives.rank() :: collectives.world_size()]
    local = np.concatenate([index[:0], *(index[first : first + batch_size] for first in firsts)])
    found = torch.zeros(2, len(index), dtype=torch.int64, device=runtime.device)
    was_training = model.training
    model.eval()
    batches = evaluation_batches(
        dataset,
        local,
        size=size,
        batch_size=batch_size,
        workers=usable_workers(workers, collectives.local_world_size()),
        loader=loader,
        device=runtime.device,
    )
    with console.Progress(len(local), title=title) as progress:
        for first, batch in zip(firsts, batches, strict=True):
            collectives.note("the forward passes of the evaluation")
            assert batch.labels is not None
            with runtime.autocast():
                logits = model(images(batch.inputs)[0])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            place = slice(first, first + len(logits))
            found[0, place], found[1, place] = label_ranks(logits, batch.labels), logits.argmax(1)
            progress.advance(len(logits))
    model.train(was_training)
    ranks, predictions = collectives.all_reduce_sum(found).cpu()
    return ranks, predictions

"""The online linear probe: a running estimate of the quality of the representation.

A linear classifier learns on the detached representations of the augmented training views, so its labels never reach
the encoder. A fixed part of the training images is held out and scored at the end of every epoch; test images are never
used.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ddp.data.batches import evaluation_batches, evaluation_images
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.data.draws import holdout
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.models.simclr import SimCLR
from simclr_ddp.system.machine import usable_workers


class Probe:
    """Selects the held-out images, and computes the loss on the others and the accuracy on the held-out ones."""

    def __init__(self, dataset: Dataset, fraction: float, seed: int, device: torch.device) -> None:
        held = holdout(seed, dataset.count, fraction)
        if held.all() or not held.any():
            raise ValueError(
                f"probe.validation_fraction={fraction:g}: of {dataset.count} images none is left to "
                f"{'train the probe' if held.all() else 'score it'} on; 0.1 is usual, or set probe.enabled=false"
            )
        self._dataset = dataset
        self._validation_index = np.flatnonzero(held)
        self._trained = torch.from_numpy(~held).to(device)

    def loss(self, logits: Tensor | None, labels: Tensor | None, sample: Tensor) -> Tensor:
        """Cross-entropy of this rank's views, 0 for held-out images; its mean over ranks is the global mean.

        logits [V, B, classes], labels [B], sample [B]: positions in the data set
        """
        assert logits is not None and labels is not None, "there is no probe without classes"
        targets = labels.expand(logits.shape[:2])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return (losses.view_as(targets) * self._trained[sample]).mean()

    @torch.no_grad()
    def validation_top1(
        self,
        model: SimCLR,
        runtime: Runtime,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        workers: int,
        loader: str,
        batch_size: int = 256,
    ) -> float:
        """Compute the accuracy on the held-out images, in [0, 1]; all ranks share the work and get the same value."""
        images = evaluation_images(self._dataset, list(mean), list(std), runtime.dtype)
        workers = usable_workers(workers, collectives.local_world_size())
        share = np.array_split(self._validation_index, collectives.world_size())[collectives.rank()]
        correct = torch.zeros((), dtype=torch.int64, device=runtime.device)
        model.eval()
        for inputs, _, labels in evaluation_batches(
            self._dataset,
            share,
            size=size,
            batch_size=batch_size,
            workers=workers,
            loader=loader,
            device=runtime.device,
        ):
            assert labels is not None
            with runtime.autocast():
                logits = model(images(inputs)).logits
            assert logits is not None
            correct += (logits[0].argmax(1) == labels).sum()
        model.train()
        return int(collectives.all_reduce_sum(correct)) / max(1, len(self._validation_index))

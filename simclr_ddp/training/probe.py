"""The online linear probe: a running estimate of what the representation is worth, from labels the encoder never sees.

A linear classifier learns on the detached representations of the augmented training views. A fixed part of the
training images is kept from it, and scored at the end of every epoch; the test images are never touched.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ddp import distributed
from simclr_ddp.config import Data
from simclr_ddp.data import Dataset, evaluation_batches, evaluation_images, usable_workers
from simclr_ddp.draws import holdout
from simclr_ddp.model import SimCLR
from simclr_ddp.runtime import Runtime


class Probe:
    """Which images are held out, with the loss on the others and the score on the held-out ones."""

    def __init__(self, dataset: Dataset, fraction: float, seed: int, device: torch.device) -> None:
        held = holdout(seed, dataset.count, fraction)
        if held.all() or not held.any():
            raise ValueError(
                f"probe.validation_fraction={fraction:g} of {dataset.count} images leaves none to "
                f"{'train the probe' if held.all() else 'score it'} on: 0.1 is usual, probe.enabled=false does without"
            )
        self._dataset = dataset
        self._validation_index = np.flatnonzero(held)
        self._trained = torch.from_numpy(~held).to(device)

    def loss(self, logits: Tensor | None, labels: Tensor | None, sample: Tensor) -> Tensor:
        """Cross-entropy of this rank's views, held-out images counting 0; its mean over ranks is the global mean.

        logits [V, B, classes], labels [B], sample [B]: positions in the data set
        """
        assert logits is not None and labels is not None, "there is no probe without classes"
        targets = labels.expand(logits.shape[:2])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return (losses.view_as(targets) * self._trained[sample]).mean()

    @torch.no_grad()
    def validation_top1(self, model: SimCLR, settings: Data, runtime: Runtime, batch_size: int = 256) -> float:
        """Accuracy on the held-out images, the ranks sharing the forward passes; in [0, 1], equal on all ranks."""
        images = evaluation_images(self._dataset, settings.augmentation.mean, settings.augmentation.std, runtime.dtype)
        workers = usable_workers(settings.workers, distributed.local_world_size())
        share = np.array_split(self._validation_index, distributed.world_size())[distributed.rank()]
        correct = torch.zeros((), dtype=torch.int64, device=runtime.device)
        model.eval()
        for inputs, _, labels in evaluation_batches(
            self._dataset,
            share,
            size=settings.size,
            batch_size=batch_size,
            workers=workers,
            loader=settings.loader,
            device=runtime.device,
        ):
            assert labels is not None
            with runtime.autocast():
                logits = model(images(inputs)).logits
            assert logits is not None
            correct += (logits[0].argmax(1) == labels).sum()
        model.train()
        return int(distributed.all_sum(correct)) / max(1, len(self._validation_index))

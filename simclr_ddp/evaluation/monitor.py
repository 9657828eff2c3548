"""Metrics of the representations of a fixed part of the training images, while a run trains.

Measuring changes nothing that training depends on: the encoder is in evaluation mode without gradients, and all draws
are functions of the seed. Labels are used for the accuracy of nearest neighbours only, and test images never.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_ddp.data.batches import VIEWS, evaluation_batches, evaluation_images, view_batches
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.data.draws import monitored
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.evaluation import knn, label_free
from simclr_ddp.models.backbone import Backbone
from simclr_ddp.system import console
from simclr_ddp.system.machine import usable_workers

BATCH = 256  # images per forward pass and rank
EPOCH = 2**33  # first of the epochs whose draws are those of the views; training reaches none of them


class Monitor:
    """Measures an encoder every N epochs, always on the same images and the same augmented views of them.

    augment       (batch inputs, epoch, index) -> float views [V, B, 3, H, W], as in training
    every_epochs, images, views, k  options of pretrain: monitor.*
    saved         `saved` of the checkpoint that the run resumes from
    """

    def __init__(
        self,
        dataset: Dataset,
        runtime: Runtime,
        augment: Callable[..., Tensor],
        *,
        every_epochs: int,
        images: int,
        views: int,
        k: int,
        seed: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        crop_scale: tuple[float, float],
        workers: int,
        loader: str,
        saved: dict[str, Tensor] | None = None,
    ) -> None:
        self._dataset, self._runtime, self._augment = dataset, runtime, augment
        self._every_epochs, self._pairs, self._k = every_epochs, views // VIEWS, k
        self._index = monitored(seed, dataset.count, images)
        self._seed, self._crop_scale = seed, crop_scale
        self._images = evaluation_images(dataset, list(mean), list(std), runtime.dtype)
        workers = usable_workers(workers, collectives.local_world_size())
        self._loading: dict[str, Any] = {"size": size, "workers": workers, "loader": loader, "device": runtime.device}
        # What a checkpoint must hold: the neighbours [n, k] at the last measurement, int32 on the CPU.
        self.saved: dict[str, Tensor] = {}
        if saved and saved.get("neighbours", torch.empty(0)).shape == (images, k):  # else the options have changed
            self.saved["neighbours"] = saved["neighbours"].cpu()

    def due(self, done: int, steps_per_epoch: int, total_steps: int) -> bool:
        """Return whether to measure after `done` steps: at the end of every N-th epoch, and of the run."""
        return done % (self._every_epochs * steps_per_epoch) == 0 or done == total_steps

    @torch.no_grad()
    def measure(self, encoder: Backbone) -> dict[str, float]:
        """Return the metrics, for metrics.jsonl; all ranks share the work and get the same values.

        The encoder is in training mode before and after.
        """
        shares = np.array_split(self._index, collectives.world_size())
        share = shares[collectives.rank()]
        encoder.eval()
        h = torch.cat([encoded[0] for encoded in self._evaluation_views(encoder, share)])
        pairs = [torch.cat(list(self._training_views(encoder, share, pair)), dim=1) for pair in range(self._pairs)]
        encoder.train()
        collectives.note("the metrics of the monitor")
        try:
            found = label_free.measure(h, torch.cat(pairs).transpose(0, 1) if pairs else None)
            h_all = _gathered(h, [len(s) for s in shares])
            found |= self._neighbours(h_all)
        except ValueError as error:  # of values that are not finite: the next step fails, or fp16 is too narrow
            console.warn(f"monitor: nothing is measured in this epoch, {error}")
            return {}
        return {f"monitor_{name}": value for name, value in found.items()}

    def _neighbours(self, h: Tensor) -> dict[str, float]:
        """The metrics of nearest neighbours, from the representations [n, D] of all images."""
        found = {}
        if self._dataset.labels is not None and self._dataset.has_classes:
            classes = np.unique(self._dataset.labels[self._index], return_inverse=True)[1]
            labels = torch.from_numpy(classes).to(h.device)
            predicted = knn.leave_one_out_predict(h, labels, k=self._k)[:, 0]
            found["knn_top1"] = (predicted == labels).double().mean().item()
        now = label_free.neighbours(h, self._k).to("cpu", torch.int32)
        if "neighbours" in self.saved:
            found["neighbour_overlap"] = label_free.overlap(self.saved["neighbours"], now)
        self.saved["neighbours"] = now
        return found

    def _evaluation_views(self, encoder: Backbone, index: np.ndarray) -> Iterator[Tensor]:
        """Representations [1, b, D] of batches of the images."""
        yield torch.empty(1, 0, encoder.width_out, dtype=self._runtime.dtype, device=self._runtime.device)
        for inputs, _, _ in evaluation_batches(self._dataset, index, batch_size=BATCH, **self._loading):
            yield self._encoded(encoder, self._images(inputs))

    def _training_views(self, encoder: Backbone, index: np.ndarray, pair: int) -> Iterator[Tensor]:
        """Representations [V, b, D] of the pair of augmented views with this number, of batches of the images."""
        yield torch.empty(VIEWS, 0, encoder.width_out, dtype=self._runtime.dtype, device=self._runtime.device)
        loading = self._loading | {"crop_scale": self._crop_scale, "batch_size": BATCH}
        for inputs, sample, _ in view_batches(self._dataset, index, self._seed, EPOCH + pair, **loading):
            yield self._encoded(encoder, self._augment(inputs, EPOCH + pair, sample))

    def _encoded(self, encoder: Backbone, images: Tensor) -> Tensor:
        """Representations [V, b, D] of views [V, b, 3, H, W], in the dtype of the runtime."""
        collectives.note("the forward passes of the monitor")
        with self._runtime.autocast():
            h = encoder(images.flatten(0, 1).contiguous(memory_format=encoder.memory_format))
        return h.to(self._runtime.dtype).unflatten(0, images.shape[:2])


def _gathered(h: Tensor, counts: Sequence[int]) -> Tensor:
    """Gather the rows [n, D] of all ranks, in rank order; counts has the number of rows of each rank."""
    rows = h.new_zeros(max(counts), h.shape[1])
    rows[: len(h)] = h
    return torch.cat([block[:count] for block, count in zip(collectives.all_gather(rows), counts, strict=True)])

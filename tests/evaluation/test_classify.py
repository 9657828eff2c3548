"""Predictions for a data set: the same batches, and so the same bits, on any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.evaluation.classify import classify
from tests.support.ranks import Ranks


class Batchwise(nn.Module):
    """Logits [B, 8] that depend on which images are in the batch, so that they show it."""

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        values = images.flatten(1)
        return (values - values.mean(0))[:, :8]


def predictions(images: Path, index: list[int], batch_size: int) -> tuple[Tensor, Tensor]:
    return classify(
        Batchwise(),
        open_dataset(str(images), "test"),
        np.array(index),
        Runtime(torch.device("cpu"), "fp64", 1),
        size=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        batch_size=batch_size,
        workers=0,
        loader="torch",
        title="test",
    )


@pytest.mark.parametrize("count", [3, 37])
def test_every_batch_holds_the_same_images_on_any_number_of_ranks(count: int, images: Path, ranks: Ranks) -> None:
    index = np.random.default_rng(0).permutation(40)[:count].tolist()
    expected = predictions(images, index, 5)
    parts = [predictions(images, index[first : first + 5], 5) for first in range(0, count, 5)]
    for metric, of_parts in zip(expected, zip(*parts, strict=True), strict=True):
        assert torch.equal(metric, torch.cat(of_parts)), "in the order of the index"
    assert count < 5 or not torch.equal(expected[1], predictions(images, index, 7)[1])
    for world_size in (2, 4):
        for found in ranks.run(world_size, predictions, images, index, 5):
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])

"""Which images a rank sees, in which order, cut where: functions of (seed, step) alone."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_ddp.data import spirograph
from simclr_ddp.data.augmentations import Augmentation
from simclr_ddp.data.batches import (
    Batch,
    Share,
    evaluation_batches,
    evaluation_images,
    training_batches,
    training_images,
    training_index,
)
from simclr_ddp.data.beton import Beton
from simclr_ddp.data.crops import crop_boxes, resize_crop
from simclr_ddp.data.dataset import Dataset, open_dataset
from simclr_ddp.data.draws import permutation
from simclr_ddp.data.write import write_dataset
from simclr_ddp.system import machine
from simclr_ddp.system.machine import usable_workers
from tests.conftest import write_images
from tests.support import processes

CPU = torch.device("cpu")


def batches(
    images: Path, rank: int, world_size: int, steps: range, loader: str = "torch", workers: int = 0
) -> list[Batch]:
    dataset = open_dataset(str(images), "train")
    share = Share(seed=3, global_batch_size=8, rank=rank, world_size=world_size)
    found = training_batches(
        dataset, share, steps, size=16, crop_scale=(0.2, 1.0), workers=workers, loader=loader, device=CPU
    )
    return list(found)


def test_a_batch_is_its_slice_of_the_permutation_and_the_tail_is_dropped(images: Path, loader: str) -> None:
    count = Beton(images).count  # 40 images: 5 batches of 8
    found = batches(images, 0, 1, range(11), loader)
    for step, batch in enumerate(found):
        epoch, s = divmod(step, count // 8)
        assert batch.sample.tolist() == permutation(3, epoch, count)[s * 8 : (s + 1) * 8].tolist()
        assert batch.inputs.shape == (2, 8, 3, 16, 16) and batch.inputs.dtype == torch.uint8
    odd = training_index(Share(0, 7, 0, 1), count, 0, 10)  # 5 batches of 7, 5 images left over
    epochs = [(epoch, index.shape) for epoch, index in odd]
    assert epochs == [(0, (5, 7)), (1, (5, 7))]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_the_batches_of_one(images: Path, loader: str, world_size: int, workers: int) -> None:
    whole = batches(images, 0, 1, range(7))
    shares = [batches(images, rank, world_size, range(7), loader, workers) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for field, dim in (("inputs", 1), ("sample", 0), ("labels", 0)):
            together = torch.cat([getattr(share[step], field) for share in shares], dim)
            assert torch.equal(together, getattr(batch, field)), field


@pytest.mark.parametrize("start", [1, 4, 5, 9])
def test_it_starts_anywhere_as_if_it_had_never_stopped(images: Path, loader: str, start: int) -> None:
    unbroken, resumed = batches(images, 1, 2, range(11), loader), batches(images, 1, 2, range(start, 11), loader)
    assert len(resumed) == 11 - start
    for a, b in zip(unbroken[start:], resumed, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.sample, b.sample)


def test_views_are_the_crops_of_the_table(images: Path, loader: str) -> None:
    beton = Beton(images)
    for step, batch in enumerate(batches(images, 0, 1, range(7), loader)):
        index = batch.sample.numpy()
        boxes = crop_boxes(3, step // 5, index, beton.sizes[index], 2, (0.2, 1.0))
        for i, sample in enumerate(index):
            for view in range(2):
                expected = resize_crop(beton.jpeg(int(sample)), boxes[i, view], 16)
                assert np.array_equal(batch.inputs[view, i].permute(1, 2, 0).numpy(), expected)
        assert batch.labels is not None and beton.labels is not None
        assert batch.labels.tolist() == beton.labels[index].tolist()


def test_batches_stay_as_they_were(images: Path, loader: str) -> None:
    dataset, share = open_dataset(str(images), "train"), Share(3, 8, 0, 1)
    options = {"size": 16, "crop_scale": (0.2, 1.0), "workers": 1, "loader": loader, "device": CPU}
    found, kept = [], []
    for batch in training_batches(dataset, share, range(25), **options):
        found.append(batch)
        kept.append(batch.inputs.clone())
    assert all(torch.equal(a, b.inputs) for a, b in zip(kept, found, strict=True)), "memory was used again"
    again = batches(images, 0, 1, range(25), loader, workers=1)
    assert all(torch.equal(a, b.inputs) for a, b in zip(kept, again, strict=True))


def test_batches_left_open_do_not_keep_the_process(images: Path, loader: str) -> None:
    script = (
        "import torch\nfrom simclr_ddp.data import batches as data, dataset as d\n"
        f"dataset = d.open_dataset({str(images)!r}, 'train')\n"
        "batches = data.training_batches(dataset, data.Share(0, 8, 0, 1), range(1000), size=16, crop_scale=(1, 1),\n"
        f"                                workers=1, loader={loader!r}, device=torch.device('cpu'))\n"
        "next(batches)\nif LATER: del dataset; batches.throw(ValueError('an error that is kept'))"
    )
    for later in (False, True):
        process = processes.start_command([sys.executable, "-c", script.replace("LATER", str(later))])
        status, output = processes.finish(process, limit=60)
        assert (status, "that is kept" in output) == (int(later), later), output


def test_a_broken_image_ends_the_run_with_one_sentence(tmp_path: Path, loader: str) -> None:
    write_dataset(str(write_images(tmp_path / "in", 8)), tmp_path / "x.beton")
    content = bytearray((tmp_path / "x.beton").read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start : start + 400] = bytes(400)
    (tmp_path / "x.beton").write_bytes(content)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^image \d of .* can't be decoded") as error:
            batches(tmp_path / "x.beton", 0, 1, range(1), loader, workers)
        assert "\n" not in str(error.value)


def test_a_full_shared_memory_is_an_error_and_no_hang(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in decoding processes, which are forked
    dataset = open_dataset(str(images), "train")
    with pytest.raises(ValueError, match=r"through /dev/shm .*No space left.*--shm-size"):
        next(evaluation_batches(
            dataset, np.arange(8), size=16, batch_size=8, workers=1, loader="torch", device=torch.device("cpu")
        ))  # fmt: skip


def test_evaluation_sees_each_image_once_in_order(images: Path, loader: str) -> None:
    dataset = open_dataset(str(images), "test")
    index = np.array([5, 3, 39, 0, 11])
    found = list(evaluation_batches(dataset, index, size=16, batch_size=2, workers=0, loader=loader, device=CPU))
    assert [b.sample.tolist() for b in found] == [[5, 3], [39, 0], [11]]
    beton = Beton(images)
    height, width = beton.sizes[39].tolist()
    expected = resize_crop(beton.jpeg(39), (0, 0, height, width), 16)  # small views show the whole image
    assert np.array_equal(found[1].inputs[0, 0].permute(1, 2, 0).numpy(), expected)
    whole = evaluation_images(dataset, [0.5] * 3, [0.25] * 3, torch.float64)(found[0].inputs)
    assert whole.dtype == torch.float64 and torch.equal(whole, (found[0].inputs.double() / 255 - 0.5) / 0.25)


def test_spirograph_from_a_file_is_the_generated_set(tmp_path: Path) -> None:
    write_dataset("spirograph", tmp_path / "s.beton", images=32)
    generated, stored = open_dataset("spirograph", "train"), open_dataset(str(tmp_path / "s.beton"), "train")
    assert stored.numbers is not None and generated.numbers is not None
    assert np.array_equal(stored.numbers, generated.numbers[:32])
    assert stored.labels is not None and stored.labels.shape == (32, 4) and not stored.has_classes
    share = Share(0, 8, 0, 1)
    (batch,) = training_batches(
        stored, share, range(1), size=32, crop_scale=(1, 1), workers=0, loader="auto", device=CPU
    )
    render = training_images(stored, Augmentation(), 0, torch.float64)
    views = render(batch.inputs, 0, batch.sample)
    assert views.shape == (2, 8, 3, 32, 32) and views.dtype == torch.float64
    assert not torch.equal(views[0], views[1]), "the two views have nuisance numbers of their own"
    assert torch.equal(views, render(batch.inputs, 0, batch.sample))
    assert not torch.equal(views, render(batch.inputs, 1, batch.sample)), "a new epoch has new ones"
    plain = evaluation_images(stored, [0.0], [1.0], torch.float32)(batch.inputs)
    expected = spirograph.render(torch.from_numpy(stored.numbers[batch.sample.numpy()]))
    assert torch.allclose(plain[0], expected)


def test_workers_are_never_more_than_this_ranks_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert [usable_workers(wanted, ranks) for wanted, ranks in ((4, 1), (16, 1), (4, 4), (4, 16), (0, 1))] == [
        4,
        8,
        2,
        1,
        0,
    ]


@pytest.mark.parametrize("label", [-1, 1_000_000_000])
def test_labels_that_are_no_classes_are_named(label: int) -> None:
    dataset = Dataset("x.beton", 3, np.array([0, 1, label]), None, "")
    with pytest.raises(ValueError, match=r"are not class numbers.*probe.enabled=false"):
        _ = dataset.class_count


@pytest.mark.parametrize("source", ["", "."])
def test_no_file_named(source: str) -> None:
    with pytest.raises(ValueError, match=r"data.train.* (is empty|is a folder)"):
        open_dataset(source, "train")

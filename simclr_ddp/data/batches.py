"""From a .beton file, or the generated Spirograph set, to batches of views on this rank's device.

What a batch holds depends only on (seed, step): step s of an epoch takes entries [s*N, (s+1)*N) of the epoch's
permutation, rank r of them [r*B, (r+1)*B). The tail that does not fill a batch is dropped: padding would put
duplicates, which are false negatives, into a batch.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr_ddp import device_loader, spirograph, torch_loader
from simclr_ddp.augmentations import Augmentation, normalize
from simclr_ddp.beton import Beton
from simclr_ddp.crops import crop_boxes, cut_views, evaluation_box
from simclr_ddp.draws import Draw, permutation, view_uniforms

SPIROGRAPH_IMAGES = {"train": 10_000, "test": 2_000}
VIEWS = 2
PREFETCH = 2  # batches decoded ahead of the one in use, by all of FFCV's threads or by each of torch's processes


@dataclass(frozen=True)
class Dataset:
    """Images to be decoded (`images`) or Spirograph numbers to be rendered (`numbers`), with their labels."""

    source: str
    count: int
    labels: np.ndarray | None  # int64 [n] classes, float32 [n, k] numbers, or None
    classes: list[str] | None
    fingerprint: str
    images: Beton | None = None
    numbers: np.ndarray | None = None  # float32 [n, 10]

    @property
    def decoded(self) -> bool:
        """Whether its images are decoded and cut, and not rendered."""
        return self.images is not None and self.numbers is None

    @property
    def has_classes(self) -> bool:
        return self.labels is not None and self.labels.ndim == 1

    @property
    def class_count(self) -> int:
        """0 without classes. Raises ValueError for labels that can't be numbers of classes."""
        if self.labels is None or self.labels.ndim != 1:
            return 0
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= max(1000, 10 * self.count):
            raise ValueError(
                f"{self.source} has labels from {low} to {high}, which are no class numbers (0, 1, ...): write it "
                "again, or pretrain without them: probe.enabled=false"
            )
        return max(len(self.classes or ()), high + 1)


def open_dataset(source: str, split: str) -> Dataset:
    """A .beton file, or the generated set if source is "spirograph"; split is train or test.

    Raises ValueError or FileNotFoundError in one sentence if the file is missing, no .beton, or truncated.
    """
    if source == "spirograph":
        numbers = spirograph.numbers(SPIROGRAPH_IMAGES[split], split)
        name = f"spirograph-{split}-{len(numbers)}"
        return Dataset(source, len(numbers), numbers[:, :4], None, name, numbers=numbers)
    if not source or Path(source).is_dir():
        what = f"data.{split}={source} is a folder" if source else f"data.{split} is empty"
        raise ValueError(f"{what}: `python -m simclr_ddp.write_dataset FOLDER OUT.beton` makes the file that is wanted")
    beton = Beton(Path(source))
    drawn: np.ndarray | None = None
    if beton.nuisance is not None and beton.labels is not None:
        drawn = np.concatenate([beton.labels, beton.nuisance], 1).astype(np.float32)
    return Dataset(source, beton.count, beton.labels, beton.classes, beton.fingerprint(), beton, drawn)


class Batch(NamedTuple):
    inputs: Tensor  # uint8 [V, B, 3, H, W] views, or float32 [B, 10] Spirograph numbers
    sample: Tensor  # int64 [B] position in the data set
    labels: Tensor | None  # int64 [B] or float32 [B, k]


def steps_per_epoch(dataset: Dataset, global_batch_size: int) -> int:
    if dataset.count < global_batch_size:
        raise ValueError(
            f"data.train={dataset.source} holds {dataset.count} images, fewer than "
            f"optim.global_batch_size={global_batch_size}: lower the batch size or bring more images"
        )
    return dataset.count // global_batch_size


class Share(NamedTuple):
    """Which part of every global batch is read here."""

    seed: int
    global_batch_size: int
    rank: int
    world_size: int


def training_index(share: Share, count: int, start_step: int, total_steps: int) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, indices of all of this rank's batches from that step of the epoch on) of every epoch of the run.

    indices  int64 [steps, B]
    """
    n, b = share.global_batch_size, share.global_batch_size // share.world_size
    steps = count // n
    step = start_step
    while step < total_steps:
        epoch, first = divmod(step, steps)
        last = min(steps, first + total_steps - step)
        order = permutation(share.seed, epoch, count)[: steps * n].reshape(steps, n)
        yield epoch, order[first:last, share.rank * b : (share.rank + 1) * b]
        step += last - first


class _TrainingCuts:
    """Sampler of a DataLoader: (indices [B], crop boxes [B, V, 4]) for every step from start_step on."""

    def __init__(self, dataset: Dataset, share: Share, steps: range, crop_scale: tuple[float, float]) -> None:
        self.dataset, self.share, self.steps, self.crop_scale = dataset, share, steps, crop_scale

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for index, boxes in self.epochs():
            yield from zip(index, boxes, strict=True)

    def epochs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(indices [steps, B], boxes [steps, B, V, 4]) of each epoch, computed for all of its steps together."""
        assert self.dataset.images is not None
        sizes = self.dataset.images.sizes
        for epoch, index in training_index(self.share, self.dataset.count, self.steps.start, self.steps.stop):
            flat = index.reshape(-1)
            boxes = crop_boxes(self.share.seed, epoch, flat, sizes[flat], VIEWS, self.crop_scale)
            yield index, boxes.reshape(*index.shape, VIEWS, 4)


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on the device; a GPU gets them without the host waiting for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@cache
def usable_loader(wanted: str) -> tuple[str, str]:
    """(`ffcv`, `torch` or `device`, why not FFCV): what `wanted` (one of these, or auto) comes to here.

    Raises ValueError if FFCV is wanted and can't be imported.
    """
    if wanted in ("torch", "device"):
        return wanted, ""
    try:
        import simclr_ddp.ffcv_loader  # noqa: F401
    except Exception as error:  # a missing library is an OSError, numba raises errors of its own
        reason = " ".join(str(error).split())
        if wanted == "ffcv":
            hint = "make setup installs it, " if isinstance(error, ModuleNotFoundError) else ""
            raise ValueError(f"FFCV can't be imported ({reason}): {hint}the loader torch does without") from error
        return "torch", f"FFCV can't be imported ({reason})"
    return "ffcv", ""


def describe_loader(images: Beton, wanted: str, workers: int, batch_size: int, views: int, size: int) -> str:
    """One line: who decodes, why not FFCV, and the memory it takes, from the sizes in the file's tables."""
    loader, reason = usable_loader(wanted)
    if loader == "device":
        height, width = (int(side) for side in images.sizes.max(axis=0))
        return (
            f"images are decoded once and kept on the device, {device_loader.kept_bytes(images, size) / 1e6:,.0f} MB "
            f"a rank: {images.count:,} of up to {width} x {height} pixels"
        )
    if loader == "ffcv":
        who, kind, workers, ahead = "FFCV", "thread", max(1, workers), PREFETCH + 2  # one of them is in use
    else:
        who, kind, ahead = "torch's DataLoader", "process", PREFETCH * workers + 2
    height, width = (int(side) for side in images.sizes[images.sizes.prod(axis=1).argmax()])
    # To decode a pixel takes 3 bytes, and 6 more in a progressive JPEG; then the rows are resized, and the columns.
    scratch = max(1, workers) * height * (9 * width + 3 * size)
    megabytes = (ahead * batch_size * views * size**2 * 3 + scratch) / 1e6
    plural = "" if workers == 1 else "es" if kind == "process" else "s"
    return (
        f"{reason + ': ' if reason else ''}images are decoded by {who}, {workers} {kind}{plural}, in up to "
        f"{megabytes:,.0f} MB a rank: {ahead} batches of {batch_size} x {views} views, and images of up to "
        f"{width} x {height} pixels"
    )


def training_batches(
    dataset: Dataset,
    share: Share,
    steps: range,
    *,
    size: int,
    crop_scale: tuple[float, float],
    workers: int,
    loader: str,
    device: torch.device,
) -> Generator[Batch, None, None]:
    """This rank's batches of the steps (counted from the start of the run), B = N / world_size images each.

    loader  `auto`, `ffcv`, `torch` or `device`: all give the same views

    Raises ValueError if the device has no room for a set that is to be kept there.
    """
    rows = (row for _, index in training_index(share, dataset.count, steps.start, steps.stop) for row in index)
    cuts = _TrainingCuts(dataset, share, steps, crop_scale)
    if loader == "device" and dataset.decoded:
        return _device_batches(dataset, cuts.epochs(), size, workers, device)
    return _batches(dataset, rows, cuts, size, workers, loader, device)


def views_at(
    dataset: Dataset, seed: int, epoch: int, index: np.ndarray, *, size: int, crop_scale: tuple[float, float]
) -> Tensor:
    """The inputs that training gets of the images `index` [n] in an epoch: uint8 [V, n, 3, size, size], or numbers."""
    if dataset.numbers is not None:
        return torch.from_numpy(dataset.numbers[index])
    assert dataset.images is not None
    boxes = crop_boxes(seed, epoch, index, dataset.images.sizes[index], VIEWS, crop_scale)
    views = [cut_views(dataset.images, int(sample), cut, size) for sample, cut in zip(index, boxes, strict=True)]
    return _views_first(torch.from_numpy(np.stack(views)))


def evaluation_batches(
    dataset: Dataset, index: np.ndarray, *, size: int, batch_size: int, workers: int, loader: str, device: torch.device
) -> Iterator[Batch]:
    """The images of `index` [n] in that order, one central view each: inputs are uint8 [1, b, 3, size, size].

    Raises ValueError if the device has no room for a set that is to be kept there.
    """
    rows = [index[i : i + batch_size] for i in range(0, len(index), batch_size)]
    cuts = []
    if dataset.images is not None:
        sizes = dataset.images.sizes
        boxes = np.array([[evaluation_box(h, w, size)] for h, w in sizes[index].tolist()], np.int32)
        cuts = [(row, boxes[i * batch_size :][: len(row)]) for i, row in enumerate(rows)]
        if loader == "device" and dataset.decoded:
            return _device_batches(dataset, ((row[None], box[None]) for row, box in cuts), size, workers, device)
    return _batches(dataset, rows, cuts, size, workers, loader, device)


def _views_first(views: Tensor) -> Tensor:
    """[B, V, H, W, 3] -> [V, B, 3, H, W], not copied."""
    return views.permute(1, 0, 4, 2, 3)


def _batches(
    dataset: Dataset, rows: Iterable[np.ndarray], cuts: Any, size: int, workers: int, loader: str, device: torch.device
) -> Generator[Batch, None, None]:
    """A batch for each row of indices. `cuts` has the same rows with their crop boxes; Spirograph looks at no image."""

    def batch(inputs: Tensor, row: np.ndarray) -> Batch:
        labels = None if dataset.labels is None else _sent(dataset.labels[row], device)
        return Batch(inputs, _sent(row, device), labels)

    if not dataset.decoded:
        assert dataset.numbers is not None
        for row in rows:
            yield batch(_sent(dataset.numbers[row], device), row)
        return
    assert dataset.images is not None
    read_views = torch_loader.read_views
    if usable_loader(loader)[0] == "ffcv":
        from simclr_ddp import ffcv_loader  # takes a second to import

        read_views = ffcv_loader.read_views
    with closing(read_views(dataset.images, size, cuts, workers, PREFETCH, device.type == "cuda")) as decoded:
        for row, views in zip(rows, decoded, strict=True):
            yield batch(_views_first(views.to(device, non_blocking=True)), row)


def _device_batches(
    dataset: Dataset, tables: Iterable[tuple[np.ndarray, np.ndarray]], size: int, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """The batches of `tables`, (indices [steps, b], crop boxes [steps, b, V, 4]) each, from images kept on the device.

    A table goes there as a whole, and the next one is made meanwhile: a step sends nothing.
    """
    images = dataset.images
    assert images is not None
    device_loader.check_room(images, size, device)

    def batches() -> Generator[Batch, None, None]:
        kept = device_loader.resident(images, size, device, workers)
        labels = None if dataset.labels is None else _sent(dataset.labels, device)
        places = ((index, *device_loader.entries(images, index, boxes)) for index, boxes in tables)
        with closing(device_loader.ahead(places)) as tables_ahead:
            for table in tables_ahead:
                for index, columns, rows in zip(*(_sent(part, device) for part in table), strict=True):
                    inputs = device_loader.cut(kept, index, columns, rows)
                    yield Batch(inputs, index, None if labels is None else labels.index_select(0, index))

    return batches()


def training_images(dataset: Dataset, augmentation: Augmentation, seed: int, dtype: torch.dtype) -> Callable:
    """(batch inputs, epoch, index) -> augmented float views [V, B, 3, H, W].

    Spirograph views are rendered from the four targets and fresh nuisance numbers; they are neither cropped nor
    recoloured, which would destroy the targets.
    """
    if dataset.numbers is not None:

        def render(numbers: Tensor, epoch: int, index: Tensor) -> Tensor:
            draws = view_uniforms(seed, epoch, index, VIEWS, Draw.NUISANCE, 6, dtype)
            return spirograph.views(numbers[:, :4].to(dtype), draws)

        return render

    def augment(views: Tensor, epoch: int, index: Tensor) -> Tensor:
        return augmentation(views, view_uniforms(seed, epoch, index, VIEWS, 0, Draw.SOLARIZE + 1, dtype))

    return augment


def evaluation_images(dataset: Dataset, mean: list[float], std: list[float], dtype: torch.dtype) -> Callable:
    """Batch inputs of `evaluation_batches` -> float images [1, B, 3, H, W], normalised as in training."""
    if dataset.numbers is not None:
        return lambda numbers: spirograph.render(numbers.to(dtype))[None]
    return partial(normalize, mean=mean, std=std, dtype=dtype)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_workers(wanted: int, local_ranks: int) -> int:
    """Decoding workers of a rank: at most its share of the cores, at least one unless none are wanted."""
    return min(wanted, max(1, cores() // local_ranks))

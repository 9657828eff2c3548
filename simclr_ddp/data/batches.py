"""Batches of views on this rank's device, from a .beton file or the generated Spirograph set.

The content of a batch depends only on (seed, step): step s of an epoch takes entries [s*N, (s+1)*N) of the epoch's
permutation, of which rank r takes [r*B, (r+1)*B). A last incomplete batch is dropped: padding would add duplicates,
which are false negatives.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr_ddp.data import device_loader, spirograph, torch_loader
from simclr_ddp.data.augmentations import Augmentation, normalize
from simclr_ddp.data.beton import Beton
from simclr_ddp.data.crops import crop_boxes, cut_views, evaluation_box
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.data.draws import Draw, permutation, view_uniforms
from simclr_ddp.system.errors import one_line

VIEWS = 2
PREFETCH = 2  # batches decoded in advance, by all FFCV threads together or by each torch process


class Batch(NamedTuple):
    inputs: Tensor  # uint8 [V, B, 3, H, W] views, or float32 [B, 10] Spirograph numbers
    sample: Tensor  # int64 [B] position in the data set
    labels: Tensor | None  # int64 [B] or float32 [B, k]


def steps_per_epoch(dataset: Dataset, global_batch_size: int) -> int:
    if dataset.count < global_batch_size:
        raise ValueError(
            f"data.train={dataset.source}: {dataset.count} images are fewer than "
            f"optim.global_batch_size={global_batch_size}; lower the batch size or use more images"
        )
    return dataset.count // global_batch_size


class Share(NamedTuple):
    """The part of every global batch that this rank reads."""

    seed: int
    global_batch_size: int
    rank: int
    world_size: int


def training_index(
    share: Share, count: int, start_step: int, total_steps: int, subset: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (epoch, indices of this rank's batches in the epoch, from start_step on) for every epoch of the run.

    indices  int64 [steps, B]
    subset   int64 [count] the images to train on; None: all `count` images of the data set
    """
    n, b = share.global_batch_size, share.global_batch_size // share.world_size
    steps = count // n
    step = start_step
    while step < total_steps:
        epoch, first = divmod(step, steps)
        last = min(steps, first + total_steps - step)
        order = permutation(share.seed, epoch, count)[: steps * n].reshape(steps, n)
        order = order if subset is None else subset[order]
        yield epoch, order[first:last, share.rank * b : (share.rank + 1) * b]
        step += last - first


class _TrainingCuts:
    """DataLoader sampler that yields (indices [B], crop boxes [B, V, 4]) for every step."""

    def __init__(
        self,
        dataset: Dataset,
        share: Share,
        steps: range,
        crop_scale: tuple[float, float],
        views: int,
        subset: np.ndarray | None,
    ) -> None:
        self.dataset, self.share, self.steps, self.crop_scale = dataset, share, steps, crop_scale
        self.views, self.subset = views, subset

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for index, boxes in self.epochs():
            yield from zip(index, boxes, strict=True)

    def epochs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (indices [steps, B], boxes [steps, B, V, 4]) per epoch, computed for all its steps at once."""
        sizes = self.dataset.file.sizes
        for epoch, index in _indices(self.dataset, self.share, self.steps, self.subset):
            flat = index.reshape(-1)
            boxes = crop_boxes(self.share.seed, epoch, flat, sizes[flat], self.views, self.crop_scale)
            yield index, boxes.reshape(*index.shape, self.views, 4)


def _indices(
    dataset: Dataset, share: Share, steps: range, subset: np.ndarray | None
) -> Iterator[tuple[int, np.ndarray]]:
    count = dataset.count if subset is None else len(subset)
    return training_index(share, count, steps.start, steps.stop, subset)


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy the values to the device; the host doesn't wait for a GPU."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@cache
def usable_loader(requested: str) -> tuple[str, str]:
    """Resolve `requested` (auto, ffcv, torch or device) to (loader, reason why FFCV is not used).

    Raises ValueError if FFCV is requested and can't be imported.
    """
    if requested in ("torch", "device"):
        return requested, ""
    try:
        import simclr_ddp.data.ffcv_loader  # noqa: F401
    except Exception as error:  # a missing library raises OSError, numba other errors
        reason = one_line(error)
        if requested == "ffcv":
            hint = "run make setup, or " if isinstance(error, ModuleNotFoundError) else ""
            raise ValueError(f"loader=ffcv: FFCV can't be imported ({reason}); {hint}use the loader torch") from error
        return "torch", f"FFCV can't be imported ({reason})"
    return "ffcv", ""


def describe_loader(images: Beton, requested: str, workers: int, batch_size: int, views: int, size: int) -> str:
    """One line with the loader, why it is not FFCV, and its memory, from the sizes in the file's tables."""
    loader, reason = usable_loader(requested)
    if loader == "device":
        height, width = (int(side) for side in images.sizes.max(axis=0))
        return (
            f"images are decoded once and kept on the device, {device_loader.kept_bytes(images, size) / 1e6:,.0f} MB "
            f"per rank: {images.count:,} of up to {width} x {height} pixels"
        )
    if loader == "ffcv":
        who, kind, workers, ahead = "FFCV", "thread", max(1, workers), PREFETCH + 2  # one is in use
    else:
        who, kind, ahead = "torch's DataLoader", "process", PREFETCH * workers + 2
    height, width = (int(side) for side in images.sizes[images.sizes.prod(axis=1).argmax()])
    # Decoding a pixel takes 3 bytes, and 6 more for a progressive JPEG; then rows are resized, then columns.
    scratch = max(1, workers) * height * (9 * width + 3 * size)
    megabytes = (ahead * batch_size * views * size**2 * 3 + scratch) / 1e6
    plural = "" if workers == 1 else "es" if kind == "process" else "s"
    return (
        f"{reason + ': ' if reason else ''}images are decoded by {who}, {workers} {kind}{plural}, in up to "
        f"{megabytes:,.0f} MB per rank: {ahead} batches of {batch_size} x {views} views, and images of up to "
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
    views: int = VIEWS,
    subset: np.ndarray | None = None,
) -> Generator[Batch, None, None]:
    """This rank's batches for `steps` (counted from the start of the run), of B = N / world_size images each.

    loader  `auto`, `ffcv`, `torch` or `device`: all give the same views
    subset  int64 [n] positions of the images to train on; None: all. The views of an image don't depend on it

    Raises ValueError if the loader is `device` and the data set does not fit there.
    """
    rows = (row for _, index in _indices(dataset, share, steps, subset) for row in index)
    cuts = _TrainingCuts(dataset, share, steps, crop_scale, views, subset)
    if loader == "device" and dataset.decoded:
        return _device_batches(dataset, cuts.epochs(), size, workers, device)
    return _batches(dataset, rows, cuts, size, workers, loader, device)


def views_at(
    dataset: Dataset, seed: int, epoch: int, index: np.ndarray, *, size: int, crop_scale: tuple[float, float]
) -> Tensor:
    """Training inputs for the images `index` [n] in an epoch: uint8 [V, n, 3, size, size], or numbers."""
    if dataset.rendered:
        return torch.from_numpy(dataset.numbers_of(index))
    boxes = crop_boxes(seed, epoch, index, dataset.file.sizes[index], VIEWS, crop_scale)
    views = [cut_views(dataset.file, int(sample), cut, size) for sample, cut in zip(index, boxes, strict=True)]
    return _views_first(torch.from_numpy(np.stack(views)))


def evaluation_batches(
    dataset: Dataset,
    index: np.ndarray,
    *,
    size: int,
    batch_size: int,
    workers: int,
    loader: str,
    device: torch.device,
    boxes: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Batches of views of each image of `index` [n], in order: inputs are uint8 [V, b, 3, size, size].

    boxes  int32 [n, V, 4] of the views of a data set that is decoded; None: one central view, V = 1

    Raises ValueError if the loader is `device` and the data set does not fit there.
    """
    if boxes is None and dataset.decoded:
        sizes = dataset.file.sizes[index].tolist()
        boxes = np.array([[evaluation_box(h, w, size)] for h, w in sizes], np.int32)
    return _listed(dataset, index, boxes, size, batch_size, workers, loader, device)


def view_batches(
    dataset: Dataset,
    index: np.ndarray,
    seed: int,
    epoch: int,
    *,
    size: int,
    crop_scale: tuple[float, float],
    batch_size: int,
    workers: int,
    loader: str,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of the views that each image of `index` [n] has in an epoch of training, in order: [V, b, 3, size, size].

    Raises ValueError if the loader is `device` and the data set does not fit there.
    """
    boxes = None
    if dataset.decoded:
        boxes = crop_boxes(seed, epoch, index, dataset.file.sizes[index], VIEWS, crop_scale)
    return _listed(dataset, index, boxes, size, batch_size, workers, loader, device)


def _listed(
    dataset: Dataset,
    index: np.ndarray,
    boxes: np.ndarray | None,
    size: int,
    batch_size: int,
    workers: int,
    loader: str,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of the images `index` [n], in order, cut by their boxes [n, V, 4]; None for images that are rendered."""
    rows = [index[i : i + batch_size] for i in range(0, len(index), batch_size)]
    cuts = []
    if boxes is not None:
        cuts = [(row, boxes[i * batch_size :][: len(row)]) for i, row in enumerate(rows)]
        if loader == "device":
            return _device_batches(dataset, ((row[None], box[None]) for row, box in cuts), size, workers, device)
    return _batches(dataset, rows, cuts, size, workers, loader, device)


def _views_first(views: Tensor) -> Tensor:
    """Permute [B, V, H, W, 3] to [V, B, 3, H, W] without a copy."""
    return views.permute(1, 0, 4, 2, 3)


def _batches(
    dataset: Dataset, rows: Iterable[np.ndarray], cuts: Any, size: int, workers: int, loader: str, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield a batch per row of indices; `cuts` has the same rows with their crop boxes (Spirograph needs none)."""

    def batch(inputs: Tensor, row: np.ndarray) -> Batch:
        labels = None if dataset.labels is None else _sent(dataset.labels[row], device)
        return Batch(inputs, _sent(row, device), labels)

    if dataset.rendered:
        for row in rows:
            yield batch(_sent(dataset.numbers_of(row), device), row)
        return
    read_views = torch_loader.read_views
    if usable_loader(loader)[0] == "ffcv":
        from simclr_ddp.data import ffcv_loader  # takes a second to import

        read_views = ffcv_loader.read_views
    with closing(read_views(dataset.file, size, cuts, workers, PREFETCH, device.type == "cuda")) as decoded:
        for row, views in zip(rows, decoded, strict=True):
            yield batch(_views_first(views.to(device, non_blocking=True)), row)


def _device_batches(
    dataset: Dataset, tables: Iterable[tuple[np.ndarray, np.ndarray]], size: int, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield the batches of `tables` (indices [steps, b], crop boxes [steps, b, V, 4]) from images kept on the device.

    Each table is sent at once while the next one is computed: a single step sends nothing.
    """
    images = dataset.file
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


def training_images(
    dataset: Dataset, augmentation: Augmentation, seed: int, dtype: torch.dtype, views: int = VIEWS
) -> Callable:
    """Return a function (batch inputs, epoch, index) -> augmented float views [V, B, 3, H, W].

    Spirograph views are rendered from the four targets and new nuisance numbers; crops and colour jitter would destroy
    the targets.
    """
    if dataset.rendered:

        def render(numbers: Tensor, epoch: int, index: Tensor) -> Tensor:
            draws = view_uniforms(seed, epoch, index, views, Draw.NUISANCE, 6, dtype)
            return spirograph.views(numbers[:, :4].to(dtype), draws, dataset.by_rows)

        return render

    def augment(cut: Tensor, epoch: int, index: Tensor) -> Tensor:
        return augmentation(cut, view_uniforms(seed, epoch, index, views, 0, Draw.SOLARIZE + 1, dtype))

    return augment


def evaluation_images(dataset: Dataset, mean: list[float], std: list[float], dtype: torch.dtype) -> Callable:
    """Return a function from inputs of `evaluation_batches` to normalised float images [1, B, 3, H, W]."""
    if dataset.rendered:
        return lambda numbers: spirograph.render(numbers.to(dtype), by_rows=dataset.by_rows)[None]
    return partial(normalize, mean=mean, std=std, dtype=dtype)

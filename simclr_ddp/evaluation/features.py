"""Representations of a data set by a frozen encoder, computed by all ranks and kept in a cache."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr_ddp.data.augmentations import Augmentation
from simclr_ddp.data.batches import evaluation_batches, evaluation_images, training_images
from simclr_ddp.data.crops import crop_boxes, evaluation_box
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.evaluation import cache
from simclr_ddp.losses.contrastive import normalize
from simclr_ddp.models.backbone import Backbone
from simclr_ddp.runs.encoder import Head, Spec
from simclr_ddp.system import console
from simclr_ddp.system.machine import usable_workers

EPOCH = 2**32  # of the draws of averaged views: no training reaches it, so that it has seen none of them


class Averaging(NamedTuple):
    """Augmented views of each image, whose representations are averaged: Foster et al. 2021 (InvCLR).

    A view is a function of (seed, view, image). Spirograph views have new nuisance numbers instead.
    """

    views: int
    seed: int
    crop_scale: list[float]
    distortion: dict[str, Any]  # flip and colour distortion: arguments of Augmentation


def averaging(views: int, seed: int, settings: dict[str, Any], spec: Spec) -> Averaging | None:
    """Average over `views` views of the crop, flip and colour distortion of a run; None for 0, the evaluation view.

    settings  of the run by dotted key. Raises ValueError if they are not known.
    """
    if not views:
        return None
    if spec.crop:
        raise ValueError(
            f"views={views}: these are random crops, so crop={spec.crop:g} would have no effect; set one of them"
        )
    section = "data.augmentation."
    a = {key.removeprefix(section): value for key, value in settings.items() if key.startswith(section)}
    if not a:
        raise ValueError(
            f"views={views}: the augmentation of the run is not known without its settings; give the run directory or "
            "a checkpoint (.pt), or set views=0"
        )
    distortion = {
        "flip": a["flip"],
        "strength": a["strength"],
        "jitter_probability": a["jitter"],
        "permuted": a["order"] == "permuted",
        "greyscale": a["greyscale"],
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
    return Averaging(views, seed, list(a["crop_scale"]), distortion)


def key_of(weights: str, dataset: Dataset, spec: Spec, runtime: Runtime, averaged: Averaging | None) -> dict[str, Any]:
    """Everything that representations depend on."""
    return {
        "weights": weights,
        "images": dataset.fingerprint,
        "encoder": {name: value for name, value in spec._asdict().items() if name != "crop" or value},
        "averaged": None if averaged is None else averaged._asdict(),
        "precision": runtime.precision,
        "by_rows": dataset.by_rows,
    }


def embed(
    encoder: Backbone,
    weights: str,
    dataset: Dataset,
    spec: Spec,
    runtime: Runtime,
    *,
    averaged: Averaging | None,
    folder: Path | None,
    batch_size: int,
    workers: int,
    loader: str,
    title: str,
) -> Tensor:
    """Return representations h like `representations`, from the cache if they are there; else fill it.

    weights   hash of the encoder's weights: runs.encoder.hash_of
    averaged  None: of the evaluation view; else the mean of the representations of augmented views
    folder    the cache; None to neither read nor write one
    """
    key = key_of(weights, dataset, spec, runtime, averaged)
    path = cache.path_of(folder, Path(dataset.source).stem, key) if folder else None
    shape = dataset.count, encoder.width_out
    main = collectives.is_main()
    kept = cache.read(path, key, shape) if path and main else None
    if collectives.broadcast_object(kept is not None):
        console.say(f"{title}: {dataset.count:,} representations are read from {path}")
        return torch.empty(0, encoder.width_out, dtype=runtime.dtype) if kept is None else kept
    filling = cache.filling(path, key, shape, runtime.dtype) if path and main else nullcontext(None)
    with filling as file:
        h = representations(
            encoder,
            dataset,
            spec,
            runtime,
            averaged=averaged,
            batch_size=batch_size,
            workers=workers,
            loader=loader,
            title=title,
            out=file,
        )
    kept = cache.read(path, key, shape) if path and main and path.exists() else None
    return h if kept is None else kept


@torch.no_grad()
def representations(
    encoder: Backbone,
    dataset: Dataset,
    spec: Spec,
    runtime: Runtime,
    *,
    batch_size: int,
    workers: int,
    loader: str,
    title: str,
    index: np.ndarray | None = None,
    averaged: Averaging | None = None,
    transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute representations h of evaluation views: [n, D] on the CPU of rank 0, [0, D] on other ranks.

    index      [n] positions in the file; None: all images, in the order of the file
    averaged   augmented views whose representations are averaged instead
    transform  function from evaluation views, uint8 [1, B, 3, H, W], and positions [B] to normalised float views
    out        tensor of rank 0 for the result; None: a new one

    The encoder is in evaluation mode, so batch norm uses its running statistics. The result is float32, or float64 with
    precision fp64. Batches of batch_size views are dealt to the ranks in turn and gathered as they finish: every batch
    holds the same images on any number of ranks, so with the same threads per rank they compute the same bits. `title`
    is the prefix of progress lines.
    """
    encoder = encoder.to(runtime.device, runtime.dtype).eval()
    encoder.to(memory_format=encoder.memory_format)
    index = np.arange(dataset.count) if index is None else index
    count = max(1, batch_size // (averaged.views if averaged else 1))  # images of a batch
    ranks, main = collectives.world_size(), collectives.is_main()
    rows = [index[first : first + count] for first in range(0, len(index), count)][collectives.rank() :: ranks]
    local = np.concatenate(rows) if rows else index[:0]
    batches = evaluation_batches(
        dataset,
        local,
        size=spec.size,
        batch_size=count,
        workers=usable_workers(workers, collectives.local_world_size()),
        loader=loader,
        device=runtime.device,
        boxes=_boxes(dataset, local, averaged, spec),
    )
    h_all = torch.empty(len(index) if main else 0, encoder.width_out, dtype=runtime.dtype) if out is None else out
    with console.Progress(len(index), title=title) as progress:
        for first in range(0, len(index), ranks * count):
            block = torch.zeros(1, count, encoder.width_out, dtype=runtime.dtype, device=runtime.device)
            collectives.note("its data", step=first // (ranks * count))
            batch = next(batches, None)  # the last batches may be fewer than the ranks
            collectives.note("the forward pass")
            if batch is not None:
                images = (transform or _images(dataset, spec, runtime, averaged))(batch.inputs, batch.sample)
                with runtime.autocast():
                    h = encoder(images.flatten(0, 1).contiguous(memory_format=encoder.memory_format))
                block[0, : images.shape[1]] = h.to(runtime.dtype).unflatten(0, images.shape[:2]).mean(0)
            gathered = collectives.gather(block)[0].cpu()
            if main:
                place = h_all[first : first + ranks * count]
                place.copy_(gathered[: len(place)])
                progress.advance(len(place))
    return h_all


def _boxes(dataset: Dataset, index: np.ndarray, averaged: Averaging | None, spec: Spec) -> np.ndarray | None:
    """Boxes [n, V, 4] of the views, unless they are those of `evaluation_batches`."""
    if spec.crop and averaged is None and dataset.decoded:
        sizes = dataset.file.sizes[index].tolist()
        return np.array([[evaluation_box(h, w, spec.size, spec.crop)] for h, w in sizes], np.int32).reshape(-1, 1, 4)
    if averaged is None or not dataset.decoded:
        return None
    low, high = averaged.crop_scale
    return crop_boxes(averaged.seed, EPOCH, index, dataset.file.sizes[index], averaged.views, (low, high))


def _images(dataset: Dataset, spec: Spec, runtime: Runtime, averaged: Averaging | None) -> Any:
    """Function from (inputs, positions [B]) of a batch to float views [V, B, 3, H, W]."""
    if averaged is None:
        plain = evaluation_images(dataset, spec.mean, spec.std, runtime.dtype)
        return lambda inputs, _: plain(inputs)
    augmentation = Augmentation(views=averaged.views, **averaged.distortion)
    augment = training_images(dataset, augmentation, averaged.seed, runtime.dtype, averaged.views)
    return lambda inputs, sample: augment(inputs, EPOCH, sample)


@torch.no_grad()
def project(h: Tensor, head: Head, runtime: Runtime, batch_size: int) -> Tensor:
    """Return embeddings z [n, d] of representations h [n, D]: projected, then normalised as in the loss of the run.

    The embedding of an average is that of the averaged representation.
    """
    module = head.module.to(runtime.device, runtime.dtype).eval()
    found = []
    for part in h.split(batch_size):
        with runtime.autocast():
            y = module(part.to(runtime.device))
        found.append(normalize(y.to(runtime.dtype), head.squared_radius, head.norm_p).cpu())
    return torch.cat(found)

"""The checks of simclr_ddp.doctor; each yields findings."""

import contextlib
import os
import platform
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from simclr_ddp.config.schema import Doctor, Pretrain
from simclr_ddp.data import device_loader
from simclr_ddp.data.augmentations import describe
from simclr_ddp.data.batches import VIEWS, describe_loader, usable_loader, views_at
from simclr_ddp.data.dataset import Dataset, in_classes_of, open_dataset
from simclr_ddp.data.draws import permutation
from simclr_ddp.distributed.runtime import Runtime, setup
from simclr_ddp.runs import checkpoint
from simclr_ddp.runs.directory import default_run_dir
from simclr_ddp.system.errors import one_line
from simclr_ddp.system.machine import usable_workers
from simclr_ddp.training.components import Training, make_augmentation, make_training
from simclr_ddp.training.forecast import arithmetic, checkpoint_bytes, gpu_memory
from simclr_ddp.training.plan import Plan, make_plan
from simclr_ddp.training.preflight import Finding, machine, memory, recipe

INPUTS = 32  # images of which views are computed
LEAST_DEVIATION = 0.05  # within a view; photographs have about 1


def examine(settings: Doctor) -> Iterator[Finding]:
    ranks = settings.doctor.ranks or max(1, torch.cuda.device_count())
    dataset, plan = None, None
    yield from guarded(software, settings)
    yield from guarded(machine, settings, ranks)
    try:
        dataset = open_dataset(settings.data.train, "train", settings.data.spirograph)
        plan = make_plan(settings, dataset)
    except (ValueError, OSError) as error:
        yield Finding("error", str(error))
    if dataset is not None:
        yield from guarded(images, settings, dataset)
        yield from guarded(test_images, settings, dataset)
        yield from guarded(memory, dataset)
        yield from guarded(decoding, settings, dataset, ranks)
        yield from guarded(inputs, settings, dataset)
    yield from guarded(batch, settings, ranks)
    if plan is not None:
        yield from guarded(recipe, settings, plan)
    yield from guarded(room, settings)
    if settings.device != "cpu":
        yield from guarded(gpu_memory, settings, ranks, dataset)
        yield from guarded(arithmetic, settings, ranks)
    if plan is not None and settings.doctor.steps:
        yield from guarded(duration, settings, dataset, plan)


def guarded(check: Callable[..., Finding | Iterator[Finding]], *arguments: Any) -> Iterator[Finding]:
    """Run a check and yield its findings; an exception in it becomes an error finding, so later checks still run."""
    try:
        found = check(*arguments)
        yield from [found] if isinstance(found, Finding) else found
    except (ValueError, OSError) as error:
        yield Finding("error", one_line(error))
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            traceback.print_exc()
        yield Finding("error", f"{check.__name__}: {type(error).__name__}: {one_line(error, 200)}")


def software(settings: Pretrain) -> Iterator[Finding]:
    names = ("torch", "torchvision", "numpy", "pillow", "numba", "submitit")
    versions = [f"{name} {_version(name)}" for name in names if _version(name)]
    yield Finding("ok", f"Python {platform.python_version()}, {', '.join(versions)}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler:
        yield Finding("ok", f"compiler: {compiler}")
    else:
        level = "error" if settings.compile else "warning"
        yield Finding(
            level, "no C++ compiler: compile=true and building FFCV need one: apt install g++, or conda's gxx"
        )
    _, reason = usable_loader("auto")
    if not reason:
        yield Finding("ok", f"FFCV {_version('ffcv')} can be imported")
    else:
        level = "error" if settings.data.loader == "ffcv" else "warning"
        instead = "torch's DataLoader decodes the same pixels instead, about half as fast"
        yield Finding(level, f"{reason}: {instead}; `make setup` builds FFCV")


def images(settings: Doctor, dataset: Dataset) -> Iterator[Finding]:
    """Check that the data file is complete, and report its labels."""
    labels = "no labels" if dataset.labels is None else f"{dataset.class_count} classes"
    if dataset.labels is not None and not dataset.has_classes:
        labels = f"{dataset.labels.shape[1]} numbers as labels"
    yield Finding("ok", f"{dataset.source}: {dataset.count:,} images, {labels}")
    if not dataset.stored:
        return
    complete = dataset.file.is_complete()
    if complete is None:
        yield Finding("warning", f"{dataset.source} was written by another tool: it has no checksum to compare")
    elif complete:
        yield Finding("ok", f"its checksum is correct ({dataset.fingerprint})")
    else:
        yield Finding("error", f"{dataset.source} is damaged: its checksum is wrong; copy or write it again")


def test_images(settings: Doctor, train: Dataset) -> Iterator[Finding]:
    """Check that classes of the test images, which only evaluation reads, are classes of the training images."""
    if not settings.data.test or not train.has_classes:
        return
    try:
        test = open_dataset(settings.data.test, "test", settings.data.spirograph)
        if test.has_classes:
            in_classes_of(train, test)
            yield Finding("ok", f"{test.source}: {test.count:,} test images, whose classes the training images have")
    except (ValueError, OSError) as error:
        yield Finding("warning", f"{one_line(error)} (training does not need data.test)")


def decoding(settings: Doctor, dataset: Dataset, ranks: int) -> Iterator[Finding]:
    """Report which loader decodes the images, and how much memory it needs."""
    if dataset.decoded:
        workers = usable_workers(settings.data.workers, ranks)
        share = settings.optim.global_batch_size // ranks
        if settings.data.loader == "device":
            on_gpu = settings.device != "cpu" and torch.cuda.is_available()
            device_loader.check_room(dataset.file, settings.data.size, torch.device("cuda" if on_gpu else "cpu"))
        text = describe_loader(dataset.file, settings.data.loader, workers, share, VIEWS, settings.data.size)
        yield Finding("ok", text)


def inputs(settings: Doctor, dataset: Dataset) -> Finding:
    """Compute some views as the model receives them, and check that each varies."""
    augmentation = make_augmentation(settings, dataset, Runtime(torch.device("cpu"), "fp32", torch.get_num_threads()))
    low, high = settings.data.augmentation.crop_scale
    index = permutation(0, 0, dataset.count)[:INPUTS]
    images = views_at(dataset, settings.seed, 0, index, size=settings.data.size, crop_scale=(low, high))
    views = augmentation(images, 0, torch.from_numpy(index))
    deviation = views.flatten(3).std(3).median().item()
    text = f"the model receives {describe(views)}"
    if deviation >= LEAST_DEVIATION or dataset.rendered:
        return Finding("ok", text)
    return Finding(
        "warning",
        f"{text}: views are nearly constant (a channel of a view has std {deviation:.2g}, and about 1 is "
        "usual); check data.augmentation.std, and whether the images are nearly black",
    )


def batch(settings: Pretrain, ranks: int) -> Iterator[Finding]:
    n, micro = settings.optim.global_batch_size, settings.optim.micro_batch_size
    if n % ranks:
        yield Finding(
            "error", f"optim.global_batch_size={n}: it does not divide among {ranks} processes; choose a multiple"
        )
    elif micro is not None and (n % micro or micro % ranks):
        rule = f"it must divide {n} and be a multiple of the {ranks} processes"
        yield Finding("error", f"optim.micro_batch_size={micro}: {rule}; choose another size")
    else:
        yield Finding("ok", f"batch of {n} images, {n // ranks} per process; {2 * n - 2:,} negatives per view")


def room(settings: Pretrain) -> Finding:
    """Check that checkpoints fit on the disk; remove the run directory again if it did not exist before."""
    run_dir = default_run_dir(settings)
    keep = run_dir.exists()
    size = (2 + settings.checkpoint.keep_last) * checkpoint_bytes(settings)
    parents = [p for p in (run_dir, *run_dir.parents) if not p.exists()]
    fault = checkpoint.trial_write(run_dir, size)
    if not keep:
        for folder in parents:
            with contextlib.suppress(OSError):
                folder.rmdir()
    if fault:
        return Finding("error", fault)
    free = shutil.disk_usage(next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())).free
    return Finding("ok", f"{run_dir} can be written, {free / 1e9:,.1f} GB are free, {size / 1e9:.2f} GB are needed")


def duration(settings: Doctor, dataset: Dataset, plan: Plan) -> Finding:
    """Predict the hours of the complete run from a few steps of one process, whose results are discarded."""
    runtime = setup(settings.device, settings.precision, settings.threads)
    rate = steps_per_second(settings, make_training(settings, runtime, dataset, plan))
    hours = plan.total_steps / rate / 3600
    images = settings.optim.global_batch_size * rate
    text = f"{plan.total_steps:,} steps at {images:,.0f} images/s take {hours:.2g} hours on one process"
    return Finding("ok", f"{text}; N processes are about N times as fast")


def steps_per_second(settings: Doctor, training: Training) -> float:
    count, device, begin = settings.doctor.steps, training.runtime.device, 0.0
    with contextlib.closing(training.batches(range(count + 2))) as batches:
        for step in range(count + 2):
            if step == 2:  # the first steps choose algorithms
                _synchronize(device)
                begin = time.perf_counter()
            loss, _ = training.forward_backward(next(batches), step)
            training.state.step(skip=~loss.isfinite())
    _synchronize(device)
    return count / (time.perf_counter() - begin)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

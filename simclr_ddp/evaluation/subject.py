"""What an evaluation command measures: an encoder and an untrained one like it, on labelled images."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr_ddp.data.batches import describe_loader
from simclr_ddp.data.dataset import Dataset, open_dataset
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.evaluation.features import Averaging, averaging, embed
from simclr_ddp.evaluation.labels import about, open_labelled, open_validation
from simclr_ddp.runs import evaluations
from simclr_ddp.runs.encoder import Loaded, hash_of, load_encoder, random_encoder
from simclr_ddp.system import console
from simclr_ddp.system.machine import usable_workers


class Subject(NamedTuple):
    loaded: Loaded  # of the size at which images are evaluated
    own_size: int  # data.size of the run
    train: Dataset
    test: Dataset
    validation: Dataset | None  # further training images, which choose a setting of the model
    split: str  # what the test images are: test, or train if the encoder or the model is trained on them
    averaged: Averaging | None
    folder: Path  # for results
    cache: Path | None  # folder of the cache


def open_encoder(run: str, size: int, crop: float = 0.0) -> tuple[Loaded, int]:
    """Load an encoder for images of `size` pixels, 0 for the size of its run, which is also returned.

    crop  of the images: see data.crops.evaluation_box
    """
    loaded = load_encoder(run)
    if loaded.encoder.fixed_size and size not in (0, loaded.spec.size):
        raise ValueError(
            f"size={size}: {loaded.spec.arch} takes images of {loaded.spec.size} pixels only; leave it out"
        )
    own_size = loaded.spec.size  # encoders trained on small views do better on larger images (Touvron et al. 2019)
    return loaded._replace(spec=loaded.spec._replace(size=size or own_size, crop=crop or loaded.spec.crop)), own_size


def open_images(given: str, split: str, option: str, loaded: Loaded) -> Dataset:
    """Open the images `given` by an option, or if it is empty, those of the encoder's run; they may have no labels."""
    key = f"data.{split}"
    source = given or loaded.settings.get(key, "")
    if not source:
        where = "is empty in the settings of the run" if loaded.settings else "is not known without the run's settings"
        raise ValueError(f"{key} {where}; give the images as {option}=FILE.beton")
    try:
        return open_dataset(source, split, loaded.settings.get("data.spirograph", "image"))
    except FileNotFoundError as error:
        if given:
            raise
        raise ValueError(f"{key}={source} of the run does not exist here; give it as {option}=FILE.beton") from error


def open_subject(
    run: str,
    train: str,
    test: str,
    *,
    size: int,
    crop: float,
    views: int,
    seed: int,
    output: str,
    cache: bool,
    validation: str = "",
    test_needed: bool = True,
) -> Subject:
    """Open everything, print what it is, and check that results can be written; all ranks end if they can't.

    test_needed  False: without test images, the training images are those too
    """
    loaded, own_size = open_encoder(run, size, crop)
    if not (test_needed or test or loaded.settings.get("data.test")):
        test = train or loaded.settings.get("data.train", "")
    train_set, test_set, split = open_labelled({"train": train, "test": test}, loaded)
    chosen_by = open_validation(validation, train_set, test_set, loaded) if validation else None
    check_crop(crop, train_set, test_set)
    averaged = averaging(views, seed, loaded.settings, loaded.spec)
    folder = Path(output) if output else loaded.folder
    on_main(lambda: evaluations.trial_write(folder / evaluations.FOLDER))
    at = "" if loaded.step is None else f" of step {loaded.step}"
    images = " + ".join(f"{found.count:,}" for found in (train_set, chosen_by, test_set) if found) + " images"
    console.say(f"{loaded.file}{at}: {loaded.spec.arch} x {loaded.spec.width:g}, {images}")
    return Subject(loaded, own_size, train_set, test_set, chosen_by, split, averaged, folder, folder if cache else None)


def check_crop(crop: float, *datasets: Dataset) -> None:
    """Raise ValueError if images that have no short side were to be cropped."""
    for dataset in datasets:
        if crop and not dataset.decoded:
            raise ValueError(f"crop={crop:g}: {dataset.source} is rendered at the size of a view; leave crop out")


def on_main(check: Callable[[], str]) -> None:
    """Let rank 0 make a check that returns an error message or "", or raises ValueError; all ranks end if it fails."""
    fault = ""
    if collectives.is_main():
        try:
            fault = check()
        except ValueError as error:
            fault = str(error)
    if fault := collectives.broadcast_object(fault):
        collectives.fail_together(fault)


def say_loader(dataset: Dataset, loader: str, workers: int, batch_size: int, views: int, size: int) -> None:
    """Print who decodes the images, if they are decoded."""
    if dataset.decoded:
        usable = usable_workers(workers, collectives.local_world_size())
        count = max(1, batch_size // max(1, views))
        console.say(describe_loader(dataset.file, loader, usable, count, max(1, views), size))


def encoders(
    subject: Subject, runtime: Runtime, *, random: bool, seed: int, batch_size: int, workers: int, loader: str
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Yield (name, representations of the training images, of the test images, seconds) for each encoder.

    Those of validation images follow those of the training images.
    One after the other, since representations may fill half of the memory: [n, D] on rank 0, [0, D] on other ranks.
    """
    found = {"trained": (subject.loaded.encoder, subject.loaded.hash)}
    if random:
        untrained = random_encoder(subject.loaded.spec, seed)
        found["random"] = untrained, hash_of(untrained.state_dict())
    of_images = partial(
        embed,
        spec=subject.loaded.spec,
        runtime=runtime,
        averaged=subject.averaged,
        folder=subject.cache,
        batch_size=batch_size,
        workers=workers,
        loader=loader,
    )
    same = subject.test.fingerprint == subject.train.fingerprint
    for name, (encoder, weights) in found.items():
        begin = time.perf_counter()
        x_train = of_images(encoder, weights, subject.train, title=f"{name} encoder, train")
        if subject.validation:
            x_held = of_images(encoder, weights, subject.validation, title=f"{name} encoder, validation")
            x_train = torch.cat([x_train, x_held])
        if same:
            x_test = x_train[: subject.train.count]
        else:
            x_test = of_images(encoder, weights, subject.test, title=f"{name} encoder, test")
        yield name, x_train, x_test, round(time.perf_counter() - begin, 3)
        del x_train, x_test


def describe_encoder(run: str, loaded: Loaded) -> dict[str, Any]:
    """The part of a record that names the encoder."""
    return {
        "run": run,
        "file": str(loaded.file),
        "step": loaded.step,
        "hash": loaded.hash,
        "encoder": loaded.spec._asdict(),
    }


def describe_subject(run: str, subject: Subject) -> dict[str, Any]:
    """The part of a record that says what was measured."""
    return (
        describe_encoder(run, subject.loaded)
        | {
            "own_size": subject.own_size,
            "averaged": None if subject.averaged is None else subject.averaged._asdict(),
            "train": about(subject.train, "train"),
            "test": about(subject.test, subject.split),
        }
        | ({"validation": about(subject.validation, "validation")} if subject.validation else {})
    )


def write_results(folder: Path, record: dict[str, Any], text: str, arrays: dict[str, np.ndarray] | None = None) -> None:
    """Print the table of an evaluation and write its record, even if nobody reads the output any more."""
    try:
        console.say(f"\n{text}\n")
    finally:
        try:
            path = evaluations.write(folder, record, arrays)
        except OSError as error:
            raise OSError(
                f"the results above are not written to {folder / evaluations.FOLDER} ({error.strerror}); free space "
                "there, or choose another folder with output=... and start the command again"
            ) from error
    console.say(f"written to {path}")

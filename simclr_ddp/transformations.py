"""Measure what the projection head discards: `python -m simclr_ddp.transformations RUN_OR_CHECKPOINT key=value ...`

Transforms each image in one of the ways of a task, drawn from (seed, image), and measures how well logistic regression
predicts which it was, from the representation h and from the embedding z. The tasks are greyscale (chance 80 %),
rotation by multiples of 90 degrees (25 %), Gaussian noise (50 %) and Sobel edges (50 %). Training makes z invariant to
the augmentation, so it should lose more than h (Chen et al. 2020, table 3, who train a small network instead of a
linear model).

The strength of the penalty is chosen on held-out training images, and the test images are used once, as in linear_eval.
h of an untrained encoder is measured too. Images need no labels. The results are written to evaluations/ in the run
directory.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_ddp.config import command, options
from simclr_ddp.config.schema import Transformations
from simclr_ddp.system import console

if TYPE_CHECKING:
    from torch import Tensor

    from simclr_ddp.data.dataset import Dataset
    from simclr_ddp.distributed.runtime import Runtime
    from simclr_ddp.evaluation.transformations import Task
    from simclr_ddp.models.backbone import Backbone
    from simclr_ddp.runs.encoder import Loaded


def main(argv: list[str] | None = None) -> int:
    return command.run(transformations, Transformations, "RUN", __doc__ or "", argv)


def transformations(settings: Transformations) -> int:
    """Predict the transformations of every task; print a table and write a file of results; return the exit status."""
    from simclr_ddp.distributed import collectives
    from simclr_ddp.distributed.watchdog import watching
    from simclr_ddp.evaluation.features import project
    from simclr_ddp.evaluation.linear import Protocol, evaluate, held_out
    from simclr_ddp.evaluation.shared_cross_entropy import helping
    from simclr_ddp.evaluation.subject import describe_encoder, on_main, open_encoder, open_images, write_results
    from simclr_ddp.evaluation.table import transformations_table
    from simclr_ddp.evaluation.transformations import NOISE, TASKS
    from simclr_ddp.runs import evaluations
    from simclr_ddp.runs.encoder import Head, load_head, random_encoder
    from simclr_ddp.runs.provenance import describe
    from simclr_ddp.training import lifecycle, preflight

    begin = time.perf_counter()
    protocol = Protocol(strengths=settings.strengths, seed=settings.seed)
    with lifecycle.joined(settings.device, settings.precision, settings.threads, settings.timeout) as runtime:
        loaded, _ = open_encoder(settings.run, 0)
        sets = {split: open_images(getattr(settings, split), split, split, loaded) for split in ("train", "test")}
        for split, dataset in sets.items():
            if not dataset.decoded:
                raise ValueError(f"{split}={dataset.source}: its images are rendered; give photographs, a .beton file")
        folder, heads = Path(settings.output) if settings.output else loaded.folder, list[Head]()

        def check() -> str:
            heads.append(load_head(loaded))
            return evaluations.trial_write(folder / evaluations.FOLDER)

        on_main(check)
        held = held_out(protocol, sets["train"])
        own = sets["train"].fingerprint == sets["test"].fingerprint
        if own:
            console.warn(
                f"test={sets['test'].source}: these are the training images; the metrics don't apply to new images"
            )
        preflight.evaluation(sets.values(), settings.workers, settings.loader, settings.batch_size, loaded.spec.size)
        results: dict[str, dict[str, float]] = {"trained": {}, "random": {}}
        encoders = {"trained": loaded.encoder, "random": random_encoder(loaded.spec, settings.seed)}
        with watching(settings.timeout, "start the command again"):
            for task in TASKS:
                train, test = (labelled(dataset, task, settings.seed) for dataset in sets.values())
                for name, encoder in encoders.items():
                    h_train, h_test = (
                        transformed_h(encoder, dataset, task, loaded, runtime, settings, f"{name} encoder, {task.name}")
                        for dataset in (train, test)
                    )
                    with helping(runtime.device) as helpers:
                        if not collectives.is_main():
                            continue
                        vectors = {"h": (h_train, h_test)}
                        if name == "trained":
                            z_train, z_test = (project(h, heads[0], runtime, 4096) for h in (h_train, h_test))
                            vectors = {"z": (z_train, z_test)} | vectors
                        for kind, (x_train, x_test) in vectors.items():
                            metrics, _ = evaluate(
                                x_train, x_test, train, test, held, protocol, runtime.device, name, helpers=helpers
                            )
                            results[name][f"{task.name}_{kind}_top1"] = metrics["top1"]
        hardware = describe(runtime)
    if not collectives.is_main():
        return 0
    chance = {task.name: max(task.shares) for task in TASKS}
    record = {
        **describe_encoder(settings.run, loaded),
        **{
            split: {
                "source": d.source,
                "split": "train" if own else split,
                "fingerprint": d.fingerprint,
                "images": d.count,
            }
            for split, d in sets.items()
        },
        "protocol": {
            "name": "transformations",
            "strengths": settings.strengths,
            "seed": settings.seed,
            "noise": NOISE,
            "precision": runtime.precision,
        },
        "settings": options.plain(settings),
        "chance": chance,
        "results": results,
        "runtime": hardware,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    write_results(folder, record, transformations_table(results, chance))
    return 0


def labelled(dataset: "Dataset", task: "Task", seed: int) -> "Dataset":
    """The images with their transformations as labels."""
    return replace(dataset, labels=task.labels(seed, dataset.count), classes=task.classes)


def transformed_h(
    encoder: "Backbone",
    dataset: "Dataset",
    task: "Task",
    loaded: "Loaded",
    runtime: "Runtime",
    settings: Transformations,
    title: str,
) -> "Tensor":
    """Representations of the images, each transformed as its label says: [n, D] on rank 0."""
    from simclr_ddp.evaluation.features import representations
    from simclr_ddp.evaluation.transformations import transformed

    assert dataset.labels is not None
    return representations(
        encoder,
        dataset,
        loaded.spec,
        runtime,
        batch_size=settings.batch_size,
        workers=settings.workers,
        loader=settings.loader,
        title=title,
        transform=transformed(task, dataset.labels, settings.seed, loaded.spec.mean, loaded.spec.std, runtime.dtype),
    )


if __name__ == "__main__":
    sys.exit(main())

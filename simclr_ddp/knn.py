"""Measure an encoder by its nearest neighbours: `python -m simclr_ddp.knn RUN_DIR_OR_CHECKPOINT key=value ...`

Classifies each test image by the votes of the k training images whose representations have the largest cosine
similarity to its own, with weights exp(cosine / temperature) (Wu et al. 2018). Nothing is fitted and no neighbour is
approximate. For comparison, an untrained encoder of the same architecture is evaluated too. Without test images, or if
they are the training images, each image is classified by all others (leave-one-out).

Each image has one representation, of its evaluation view or the mean over views=M augmented views. Under torchrun all
ranks share the forward passes and the test images, with the same result. The results are written to evaluations/ in the
run directory, as by linear_eval, with labels and predictions of each image in an .npz file.
"""

import sys
import time
from typing import Any

from simclr_ddp.config import command, options
from simclr_ddp.config.schema import Knn
from simclr_ddp.system import console

DEFINITIONS = {
    "top1_interval": "95 %, Wilson, over the test images",
    "mean_per_class": "accuracy per class, averaged over the classes",
}


def main(argv: list[str] | None = None) -> int:
    return command.run(knn, Knn, "RUN", __doc__ or "", argv)


def knn(settings: Knn) -> int:
    """Evaluate the encoder of `settings.run`, print a table and write a file of results; return the exit status."""
    from simclr_ddp.distributed import collectives
    from simclr_ddp.distributed.watchdog import watching
    from simclr_ddp.evaluation.knn import classify
    from simclr_ddp.evaluation.subject import describe_subject, encoders, open_subject, say_loader, write_results
    from simclr_ddp.evaluation.table import headline, knn_table
    from simclr_ddp.runs.provenance import describe
    from simclr_ddp.training import lifecycle, preflight

    begin = time.perf_counter()
    loading: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "loader": settings.loader,
    }
    with lifecycle.joined(settings.device, settings.precision, settings.threads, settings.timeout) as runtime:
        subject = open_subject(
            settings.run,
            settings.train,
            settings.test,
            size=settings.size,
            crop=settings.crop,
            views=settings.views,
            seed=settings.seed,
            output=settings.output,
            cache=settings.cache,
            test_needed=False,
        )
        train, test, size = subject.train, subject.test, subject.loaded.spec.size
        if not train.has_classes:
            raise ValueError(f"train={train.source}: its labels are numbers, not classes; use simclr_ddp.linear_eval")
        leave_one_out = test.fingerprint == train.fingerprint
        how = f"k={settings.k}, temperature={settings.temperature:g}" + ", leave-one-out" * leave_one_out
        say_loader(train, views=settings.views, size=size, **loading)
        preflight.evaluation((train, test), size=size, **loading)

        results: dict[str, dict[str, Any]] = {}
        arrays = {}
        with watching(settings.timeout, "start the command again"):
            measured = encoders(subject, runtime, random=settings.random_encoder, seed=settings.seed, **loading)
            for name, x_train, x_test, seconds in measured:
                metrics, predictions = classify(
                    x_train,
                    None if leave_one_out else x_test,
                    train,
                    test,
                    k=settings.k,
                    temperature=settings.temperature,
                    device=runtime.device,
                    name=name,
                )
                results[name] = metrics | {"forward_seconds": seconds}
                arrays[name] = predictions
                console.say(headline(name, metrics))
                del x_train, x_test
        hardware = describe(runtime)
    if not collectives.is_main():
        return 0

    assert test.labels is not None
    record = describe_subject(settings.run, subject) | {
        "protocol": {
            "name": "knn",
            "k": settings.k,
            "temperature": settings.temperature,
            "leave_one_out": leave_one_out,
            "views": settings.views,
            "seed": settings.seed if settings.views else 0,
            "size": size if size != subject.own_size else 0,
            "precision": runtime.precision,
        }
        | ({"crop": settings.crop} if settings.crop else {}),
        "settings": options.plain(settings),
        "definitions": DEFINITIONS,
        "results": results,
        "runtime": hardware,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    of_images = {"labels": test.labels, "predictions": arrays["trained"]}
    write_results(subject.folder, record, knn_table(results, train, test, how), of_images)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure an encoder with a linear model: `python -m simclr_ddp.linear_eval RUN_DIR_OR_CHECKPOINT key=value ...`

Measures how well a linear model predicts labels from the frozen representation: multinomial logistic regression if
labels are classes, ridge regression if they are numbers. Features are standardised. The strength of the penalty is
chosen on held-out training images, or on those of `validation`, along a path of 45 values, from strong to weak; the
model is then fitted to all training images, and the test images are used once. For comparison, an untrained encoder of
the same architecture is evaluated too and, for numbers, the mean of the training labels. (Chen et al. 2020, appendix
B.8; `convention` defines the meaning of a strength.)

Each image has one representation, of its evaluation view or the mean over views=M augmented views, by default in
float32; the linear model is certified in float64. Under torchrun all ranks share the forward passes, with the same
result, and the sums of logistic regression, with the same result up to `tolerance`. Representations are kept in the run
directory, where other evaluations read them again. The results are written to
evaluations/<checkpoint>-<data>-<protocol>.json in the run directory (output=... chooses another folder), or next to the
given file: each checkpoint, data set and protocol has its own file, which names all three. An .npz file beside it keeps
the prediction for each test image, by which `evaluate` compares two runs.
"""

import sys
import time
from typing import Any

from simclr_ddp.config import command, options
from simclr_ddp.config.schema import LinearEval
from simclr_ddp.system import console

DEFINITIONS = {
    "features": "mean 0 and variance 1 over all training images",
    "strength": "strength of the penalty in the objective above; l2 is its equivalent in mean of losses + l2 * |W|^2",
    "top1_interval": "95 %, Wilson, over the test images",
    "mse_interval": "95 %, normal approximation, over the test images",
    "mean_per_class": "accuracy per class, averaged over the classes",
    "gradient": "Euclidean norm of the objective's gradient, divided by that at zero weights",
}


def main(argv: list[str] | None = None) -> int:
    return command.run(linear_eval, LinearEval, "RUN", __doc__ or "", argv)


def linear_eval(settings: LinearEval) -> int:
    """Evaluate the encoder of `settings.run`, print a table and write a file of results; return the exit status."""
    from simclr_ddp.distributed import collectives
    from simclr_ddp.distributed.watchdog import watching
    from simclr_ddp.evaluation.linear import Protocol, evaluate, held_out, predict_the_mean
    from simclr_ddp.evaluation.logistic_path import memory_fault
    from simclr_ddp.evaluation.shared_cross_entropy import helping
    from simclr_ddp.evaluation.subject import (
        describe_subject,
        encoders,
        on_main,
        open_subject,
        say_loader,
        write_results,
    )
    from simclr_ddp.evaluation.table import headline, objective, table
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
            validation=settings.validation,
        )
        train, test, size = subject.train, subject.test, subject.loaded.spec.size
        protocol = Protocol(
            convention=settings.convention,
            strengths=settings.strengths,
            validation_fraction=settings.validation_fraction,
            seed=settings.seed,
            tolerance=settings.tolerance,
            max_iterations=settings.max_iterations,
            metric=settings.metric,
        )
        held = held_out(protocol, train, subject.validation)
        if train.has_classes:
            width, count = subject.loaded.encoder.width_out, len(protocol.path)
            on_main(lambda: memory_fault(width, train.class_count, count, runtime.device))
        say_loader(train, views=settings.views, size=size, **loading)
        fitted = [train, subject.validation] if subject.validation else [train]
        preflight.evaluation([*fitted, test], size=size, **loading)

        results: dict[str, dict[str, Any]] = {}
        arrays = {}
        with watching(settings.timeout, "start the command again"):
            measured = encoders(subject, runtime, random=settings.random_encoder, seed=settings.seed, **loading)
            for name, x_train, x_test, seconds in measured:
                with helping(runtime.device) as helpers:
                    if collectives.is_main():
                        metrics, arrays[name] = evaluate(
                            x_train,
                            x_test,
                            train,
                            test,
                            held,
                            protocol,
                            runtime.device,
                            name,
                            validation=subject.validation,
                            helpers=helpers,
                        )
                        results[name] = metrics | {"forward_seconds": seconds}
                        console.say(headline(name, metrics))
                    del x_train, x_test
        hardware = describe(runtime)
    if not collectives.is_main():
        return 0

    if not train.has_classes:
        results["predict_the_mean"] = predict_the_mean(fitted, test)
    record = describe_subject(settings.run, subject) | {
        "settings": options.plain(settings),
        "validation_images": int(held.sum()) if len(settings.strengths) != 1 or subject.validation else 0,
        "objective": objective(settings.convention, train),
        "definitions": DEFINITIONS,
        "results": results,
        "runtime": hardware,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    write_results(subject.folder, record, table(results, train, test, settings.convention), arrays["trained"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a classifier on top of an encoder: `python -m simclr_ddp.finetune RUN_OR_CHECKPOINT CONFIG.yaml key=value ...`

Trains the encoder together with a linear classifier that starts at zero, on images with classes; frozen=true trains
only the classifier. The encoder is that of a pretraining run, a checkpoint or an encoder.safetensors. Protocols of the
literature are the files in configs/finetune. labels.fraction=0.01 uses 1 % of the labels.

It is a training run as simclr_ddp.pretrain is: the same command resumes it, bit for bit, and any number of processes
started by torchrun takes the same steps. With several grid.learning_rates or grid.weight_decays each combination is
first trained without a held-out part of the training images, which then chooses one; the final model is trained on all
images. The test images are used once, at the end.

The run directory receives the classifier (classifier.safetensors), the trained encoder (encoder.safetensors) and
result.json; the same record, with the prediction for each test image, goes to the evaluations of the encoder's run.
Exit status: 0 finished, 75 saved and paused by a signal, 2 wrong settings or data, or a diverging loss.
"""

import json
import shutil
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from simclr_ddp.config import command
from simclr_ddp.config.schema import Finetune

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import torch

    from simclr_ddp.data.dataset import Dataset
    from simclr_ddp.distributed.runtime import Runtime
    from simclr_ddp.runs.encoder import Loaded
    from simclr_ddp.training.finetuning import Finetuning


CLASSIFIED = 256  # largest batch of the evaluation on one rank; on any number of ranks, so that predictions are equal
RESULT = "result.json"
RESULTS = RESULT, "classifier.safetensors", "encoder.safetensors"


def main(argv: list[str] | None = None) -> int:
    return command.run(finetune, Finetune, "RUN [CONFIG.yaml]", __doc__ or "", argv)


def finetune(settings: Finetune) -> int:
    """Start or resume the run that the settings describe; return the exit status."""
    # Imported here, so that --help needs no torch.
    from pathlib import Path

    from simclr_ddp.config.identity import finetune_without_effect, idle_options
    from simclr_ddp.data.batches import describe_loader
    from simclr_ddp.distributed import collectives
    from simclr_ddp.evaluation.labels import open_labelled
    from simclr_ddp.evaluation.subject import open_encoder
    from simclr_ddp.runs import evaluations
    from simclr_ddp.runs.directory import locked
    from simclr_ddp.runs.encoder import random_encoder
    from simclr_ddp.system.console import say, warn
    from simclr_ddp.system.machine import usable_workers
    from simclr_ddp.training import finetuning, lifecycle, preflight
    from simclr_ddp.training.resume import check_agreement

    with lifecycle.joined(settings.device, settings.precision, settings.threads, settings.timeout) as runtime:
        # --- Open encoder and data; all ranks agree on settings, versions and data ----------------------------------
        loaded, _ = open_encoder(settings.run, settings.size)
        if settings.random_init:
            loaded = loaded._replace(encoder=random_encoder(loaded.spec, settings.seed))
        train, test, split = open_labelled({"train": settings.train, "test": settings.test}, loaded)
        images = finetuning.labelled(settings, train)
        finetuning.load_neck(settings, loaded)  # here for its errors only, before a directory is made
        found = finetuning.identity(settings, loaded, train, images, runtime.precision)
        check_agreement(settings, found, train)
        for line in idle_options(settings, finetune_without_effect):
            warn(line)
        folder = Path(settings.output) if settings.output else loaded.folder
        run_dir = finetuning.default_run_dir(settings, loaded, found)
        plan = finetuning.make_plan(settings, images, run_dir)
        say(
            f"{loaded.file}: {loaded.spec.arch} x {loaded.spec.width:g}, {len(images):,} of {train.count:,} training "
            f"images of {train.class_count} classes, {test.count:,} test images"
        )
        batch_size = settings.optim.global_batch_size // collectives.world_size()
        workers = usable_workers(settings.workers, collectives.local_world_size())
        say(describe_loader(train.file, settings.loader, workers, batch_size, 1, loaded.spec.size))
        largest = max(batch_size, min(settings.optim.global_batch_size, CLASSIFIED))
        preflight.evaluation((train, test), settings.workers, settings.loader, largest, loaded.spec.size)
        fault = collectives.broadcast_object(evaluations.trial_write(folder) if collectives.is_main() else "")
        if fault:
            collectives.fail_together(fault)

        with locked(plan.run_dir):
            # --- Choose from the grid, if there is one, on held-out training images ---------------------------------
            status, choice, grid = choose(settings, loaded, train, images, plan.run_dir, runtime)
            if status:
                return status

            # --- Train on all images; the test images are used once, at the end -------------------------------------
            def export(run: "Finetuning") -> None:
                export_results(run, test, split, folder, grid)

            return fit(choice, loaded, train, images, plan.run_dir, runtime, export)


def choose(
    settings: Finetune,
    loaded: "Loaded",
    train: "Dataset",
    images: "np.ndarray",
    run_dir: "Path",
    runtime: "Runtime",
) -> tuple[int, Finetune, list[dict[str, Any]]]:
    """Train each combination of the grid without the held-out images, on which the best is chosen.

    Returns (exit status of a run that pauses or 0, the chosen settings, results of all combinations).
    """
    from simclr_ddp.system.console import say, warn
    from simclr_ddp.training import finetuning

    candidates, grid = finetuning.candidates(settings), list[dict[str, Any]]()
    if len(candidates) == 1:
        return 0, candidates[0], grid
    part, held = finetuning.held_out(settings, train, images)
    score = partial(score_held_out, held=held)
    export = partial(export_score, score=score)
    for candidate in candidates:
        folder = finetuning.grid_dir(candidate, loaded, train, part, run_dir, runtime.precision)
        result = read_score(folder)
        if result is None:
            status = fit(candidate, loaded, train, part, folder, runtime, export, score)
            if status:
                return status, settings, grid
            result = read_score(folder)
        assert result is not None
        grid.append(result)
    choice = candidates[finetuning.best(grid)]
    say(f"best of {len(grid)} on {len(held):,} held-out images: {finetuning.describe(choice)}")
    warn(finetuning.end_of_grid(choice, settings))
    return 0, choice, grid


def fit(
    settings: Finetune,
    loaded: "Loaded",
    train: "Dataset",
    images: "np.ndarray",
    run_dir: "Path",
    runtime: "Runtime",
    export: "Callable[[Finetuning], None]",
    score: "Callable[[Finetuning], float] | None" = None,
) -> int:
    """Start or resume the training on `images` in the directory; return the exit status.

    export  writes the results of the finished run, of which result.json is the last; called on all ranks
    score   returns the accuracy on held-out images, which metrics.jsonl holds every grid.validate_every_epochs
    """
    from contextlib import ExitStack, closing

    from simclr_ddp.config import options
    from simclr_ddp.config.identity import finetune_without_effect
    from simclr_ddp.distributed import collectives
    from simclr_ddp.system.console import say
    from simclr_ddp.system.signals import PAUSED
    from simclr_ddp.training import finetuning, lifecycle
    from simclr_ddp.training.components import open_reporter
    from simclr_ddp.training.optim import set_learning_rate
    from simclr_ddp.training.resume import find_checkpoint, is_finished

    with ExitStack() as run:
        # --- Resume or start ----------------------------------------------------------------------------------------
        found = finetuning.identity(settings, loaded, train, images, runtime.precision)
        plan = finetuning.make_plan(settings, images, run_dir)
        terms = {"identity": found, "config": options.plain(settings)}
        idle = finetune_without_effect(options.dotted(settings))
        saved = find_checkpoint(run_dir, plan.total_steps, settings, found, train, idle, RESULT)
        start = saved["step"] if saved else 0
        if is_finished(run_dir, start, plan.total_steps, RESULT):
            say(f"{run_dir} is finished ({start} steps); run_dir=... starts another run")
            return 0
        training = finetuning.make_finetuning(settings, runtime, train, images, loaded, plan, saved)
        state = training.state
        lifecycle.record(run_dir, settings, runtime, state, start, RESULTS)
        remedies = "a lower optim.base_learning_rate or precision=fp32"
        reporter = open_reporter(settings, plan, runtime, start, saved, accuracy="train_top1", remedies=remedies)
        save = lifecycle.make_save(plan, reporter, state, terms, settings.checkpoint, runtime.device)

        # --- Train --------------------------------------------------------------------------------------------------
        running = lifecycle.running(run_dir, reporter, state, terms, settings.timeout, repeats=False)
        stop_requested = run.enter_context(running)
        data = run.enter_context(closing(training.batches(range(start, plan.total_steps))))
        batches, done = reporter.timed(data, start), start
        for step in range(start, plan.total_steps):
            set_learning_rate(state.optimizer, plan.learning_rate(step))
            batch = next(batches)
            loss, top1 = training.forward_backward(batch, step)
            record = training.agree(loss, top1, stop=stop_requested())
            state.step(skip=record.failed)
            reporter.push(step, record)  # read one step late, so that the host never waits for the device

            done, every = step + 1, settings.grid.validate_every_epochs
            if score is not None and every and done % (every * plan.steps_per_epoch) == 0:
                reporter.add(validation_top1=score(training))
            if settings.debug.check_ranks_every and done % settings.debug.check_ranks_every == 0:
                state.check_ranks(done)
            if reporter.stop:
                break
            save(done)

        # --- Finish, or pause ---------------------------------------------------------------------------------------
        status = lifecycle.finish(plan, done, reporter, save, partial(export, training))
        if status == 0 and score is not None and any(collectives.all_gather_object(stop_requested())):
            say("paused; the same command continues with the next combination of the grid")
            return PAUSED
        return status


def score_held_out(run: "Finetuning", held: "np.ndarray") -> float:
    """Return the accuracy on the held-out training images."""
    from simclr_ddp.evaluation.scores import accuracy

    return accuracy(classify_all(run, run.dataset, held, "held-out images")[0] == 0)


def export_score(run: "Finetuning", score: "Callable[[Finetuning], float]") -> None:
    """Write the result of a candidate, and delete its checkpoints."""
    from simclr_ddp.distributed import collectives
    from simclr_ddp.system.console import say
    from simclr_ddp.training.finetuning import describe

    optim, top1 = run.settings.optim, score(run)
    say(f"{describe(run.settings)}: top-1 {top1:.2%} on held-out images")
    if collectives.is_main():
        found = {"learning_rate": optim.base_learning_rate, "weight_decay": optim.weight_decay}
        seconds = training_seconds(run.plan.run_dir)
        write_result(run.plan.run_dir, found | {"validation_top1": top1, "seconds": seconds})
        shutil.rmtree(run.plan.run_dir / "checkpoints", ignore_errors=True)  # the result replaces them


def training_seconds(run_dir: "Path") -> float:
    """Return the duration of the training up to the last line of metrics.jsonl, over all starts of the run.

    A start is recognised by fewer seconds than in the line before it.
    """
    from simclr_ddp.runs.metrics import read_metrics

    seconds = [line.get("seconds", 0.0) for line in read_metrics(run_dir / "metrics.jsonl")]
    ends = [now for now, following in zip(seconds, [*seconds[1:], 0.0], strict=True) if following < now]
    return round(sum(ends), 3)


def write_result(run_dir: "Path", result: dict[str, Any]) -> None:
    from simclr_ddp.system.files import replace_atomically

    text = json.dumps(result, indent=1) + "\n"
    replace_atomically(run_dir / RESULT, lambda temporary: temporary.write_text(text))


def read_score(run_dir: "Path") -> dict[str, float] | None:
    """Read the result of a candidate on rank 0, for all ranks; None if it has none. A damaged file is deleted."""
    from simclr_ddp.distributed import collectives
    from simclr_ddp.system.console import warn
    from simclr_ddp.system.errors import one_line

    path, found, fault = run_dir / RESULT, None, ""
    if collectives.is_main():
        try:
            result = json.loads(path.read_text())
            found = {key: float(result[key]) for key in ("learning_rate", "weight_decay", "validation_top1", "seconds")}
        except FileNotFoundError:
            pass
        except OSError as error:
            fault = f"{path} can't be read ({one_line(error, 80)}); make it readable, or delete {run_dir}"
        except (ValueError, KeyError, TypeError) as error:
            warn(f"{path} is damaged ({one_line(error, 80)}): its combination of the grid is trained again")
            path.unlink()
    found, fault = collectives.broadcast_object((found, fault))
    if fault:
        collectives.fail_together(fault)
    return found


def export_results(run: "Finetuning", test: "Dataset", split: str, folder: "Path", grid: list[dict[str, Any]]) -> None:
    """Classify the test images, print the metrics, and write them with the trained encoder and classifier."""
    import numpy as np
    import torch

    from simclr_ddp.config import options
    from simclr_ddp.distributed import collectives
    from simclr_ddp.evaluation.labels import about
    from simclr_ddp.evaluation.linear import classification_metrics
    from simclr_ddp.evaluation.subject import describe_encoder
    from simclr_ddp.runs import evaluations
    from simclr_ddp.runs.encoder import export_encoder, export_tensors, spec_metadata
    from simclr_ddp.runs.provenance import describe
    from simclr_ddp.system.console import say

    settings, loaded = run.settings, run.loaded
    ranks, predictions = classify_all(run, test, np.arange(test.count), "test")
    labels = torch.from_numpy(test.labels)
    metrics = classification_metrics(ranks, labels, run.dataset.class_count)
    name = "linear_sgd" if settings.frozen else "finetune"
    record = {
        **describe_encoder(settings.run, loaded),
        "settings": options.plain(settings),
        "protocol": {"name": name} | protocol(run),
        "train": about(run.dataset, "train") | {"labelled": len(run.images)},
        "test": about(test, split),
        "classes": run.dataset.classes,
        "grid": grid,
        "steps": run.plan.total_steps,
        "seconds": training_seconds(run.plan.run_dir) + sum(candidate["seconds"] for candidate in grid),
        "run_dir": str(run.plan.run_dir),
        "results": {"random" if settings.random_init else "trained": metrics},
        "runtime": describe(run.runtime),
    }
    if not collectives.is_main():
        return
    low, high = metrics["top1_interval"]
    interval, mean = f"{100 * low:.2f} .. {high:.2%}", metrics["mean_per_class"]
    say(f"test top-1 {metrics['top1']:.2%} (95 % interval {interval}), mean per class {mean:.2%}")
    if not settings.random_init:
        path = evaluations.write(folder, record, {"labels": labels.numpy(), "predictions": predictions.numpy()})
        say(f"written to {path}")
    run_dir, model = run.plan.run_dir, run.state.result
    classes = {"classes": json.dumps(run.dataset.classes)}
    export_tensors(run_dir / "classifier.safetensors", model.after_encoder(), classes)
    export_encoder(run_dir / "encoder.safetensors", model.encoder, spec_metadata(loaded.spec, run.plan.total_steps))
    write_result(run_dir, record)


def protocol(run: "Finetuning") -> dict[str, Any]:
    """Return the settings that can change the metrics: the main ones, and others that differ from their default.

    With several candidates these are the values to choose from, not the chosen ones, so that runs that choose
    differently have the same protocol.
    """
    from simclr_ddp.config.schema import result_keys
    from simclr_ddp.training.finetuning import candidates, identity

    main = {"optim.name", "optim.base_learning_rate", "optim.global_batch_size", "optim.epochs", "optim.weight_decay"}
    found = identity(run.settings, run.loaded, run.dataset, run.images, run.runtime.precision)
    defaults = {k: v for k, v in result_keys(Finetune()).items() if k not in main}
    apart = {"encoder": found["encoder"], "data fingerprint": found["data fingerprint"]}  # named by the record itself
    kept = {key: value for key, value in found.items() if (defaults | apart).get(key, "none") != value}
    grid = run.settings.grid
    if len(candidates(run.settings)) == 1:
        return kept
    if grid.learning_rates:
        kept["grid.learning_rates"] = sorted(grid.learning_rates)
        del kept["optim.base_learning_rate"]
    if grid.weight_decays:
        kept["grid.weight_decays"] = sorted(grid.weight_decays)
        del kept["optim.weight_decay"]
    return kept | {"grid.validation_fraction": grid.validation_fraction}


def classify_all(
    run: "Finetuning", dataset: "Dataset", index: "np.ndarray", title: str
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the rank of the correct class and the predicted class of the images `index` [n]: int64 [n] each."""
    from simclr_ddp.evaluation.classify import classify

    spec, optim = run.loaded.spec, run.settings.optim
    return classify(
        run.state.result,
        dataset,
        index,
        run.runtime,
        size=spec.size,
        mean=spec.mean,
        std=spec.std,
        batch_size=min(optim.micro_batch_size or optim.global_batch_size, CLASSIFIED),
        workers=run.settings.workers,
        loader=run.settings.loader,
        title=title,
    )


if __name__ == "__main__":
    sys.exit(main())

"""Train an encoder without labels: `torchrun --nproc_per_node=8 -m simclr_ddp.pretrain CONFIG.yaml key=value ...`

Without arguments it trains on the generated Spirograph set. The same command resumes a run that was stopped, and says
so if the run is finished. `python -m` starts one process; the processes that torchrun starts share each batch.
Exit status: 0 finished, 75 saved and paused by a signal, 2 wrong settings or data, or a diverging loss (torchrun
replaces every status but 0 by 1).
"""

import sys
from typing import TYPE_CHECKING, Any

from simclr_ddp.config import command
from simclr_ddp.config.schema import Pretrain

if TYPE_CHECKING:
    from simclr_ddp.evaluation.monitor import Monitor
    from simclr_ddp.training.components import Training


def main(argv: list[str] | None = None) -> int:
    return command.run(pretrain, Pretrain, "[CONFIG.yaml]", __doc__ or "", argv)


def pretrain(settings: Pretrain) -> int:
    """Start or resume the run that the settings describe; return the exit status."""
    # Imported here, so that --help needs no torch.
    from contextlib import ExitStack, closing

    from simclr_ddp.config import options
    from simclr_ddp.config.identity import without_effect
    from simclr_ddp.data.dataset import open_dataset
    from simclr_ddp.distributed import collectives
    from simclr_ddp.runs.directory import locked
    from simclr_ddp.runs.encoder import encoder_metadata, export_encoder
    from simclr_ddp.system.console import say
    from simclr_ddp.training import lifecycle, preflight
    from simclr_ddp.training.components import make_reporter, make_training
    from simclr_ddp.training.optim import set_learning_rate
    from simclr_ddp.training.resume import check_agreement, find_checkpoint, identity, is_finished
    from simclr_ddp.training.sanity import LearningRateGuard

    with ExitStack() as run:
        # --- Join the ranks -----------------------------------------------------------------------------------------
        runtime = run.enter_context(
            lifecycle.joined(settings.device, settings.precision, settings.threads, settings.timeout)
        )

        # --- Open the data; all ranks agree on settings, versions and data ------------------------------------------
        dataset = open_dataset(settings.data.train, "train", settings.data.spirograph)
        terms = {"identity": identity(settings, runtime, dataset), "config": options.plain(settings)}
        check_agreement(settings, terms["identity"], dataset)
        plan = preflight.check(settings, runtime, dataset)

        # --- Open the run -------------------------------------------------------------------------------------------
        # 1. Lock its directory, so that no second process trains in it.
        run.enter_context(locked(plan.run_dir))
        # 2. Look for the newest valid checkpoint: its settings and data must agree with this run's.
        idle = without_effect(options.dotted(settings))
        saved = find_checkpoint(plan.run_dir, plan.total_steps, settings, terms["identity"], dataset, idle)
        start = saved["step"] if saved else 0
        # 3. A finished run says so.
        if is_finished(plan.run_dir, start, plan.total_steps):
            say(f"{plan.run_dir} is finished ({start} steps); run_dir=... starts another run")
            return 0

        # --- Build everything that a step needs ---------------------------------------------------------------------
        training = make_training(settings, runtime, dataset, plan, saved)
        state = training.state
        if not saved:
            say(f"weights: {state.loaded}")
        # 4. Check that a checkpoint can be written, and record this start in config.yaml.
        lifecycle.record(plan.run_dir, settings, runtime, state, start)
        monitor = make_monitor(settings, training, saved)
        if monitor is not None:
            terms["monitor"] = monitor.saved
        reporter = make_reporter(training, start, saved)
        save = lifecycle.make_save(plan, reporter, state, terms, settings.checkpoint, runtime.device)
        guard = LearningRateGuard(state.optimizer, settings.optim.base_learning_rate, plan.peak_learning_rate, start)

        # --- Train --------------------------------------------------------------------------------------------------
        stop_requested = run.enter_context(lifecycle.running(plan.run_dir, reporter, state, terms, settings.timeout))
        data = run.enter_context(closing(training.batches(range(start, plan.total_steps))))
        batches, done = reporter.timed(data, start), start
        for step in range(start, plan.total_steps):
            learning_rate = plan.learning_rate(step)
            set_learning_rate(state.optimizer, learning_rate)
            batch = next(batches)
            loss, y = training.forward_backward(batch, step)
            record = training.agree(loss, y, accuracy=reporter.due(step), stop=stop_requested())
            with guard.update(learning_rate):
                state.step(skip=record.failed)
            reporter.push(step, record)  # read one step late, so that the host never waits for the device

            done = step + 1
            if plan.ends_epoch(step) and state.probe is not None:
                reporter.add(probe_top1=training.probe_top1())
            if monitor is not None and monitor.due(done, plan.steps_per_epoch, plan.total_steps):
                reporter.add(**monitor.measure(state.model.encoder))
            if settings.debug.check_ranks_every and done % settings.debug.check_ranks_every == 0:
                state.check_ranks(done)
            if reporter.stop:
                break
            save(done)

        # --- Finish, or pause ---------------------------------------------------------------------------------------
        def export() -> None:
            if collectives.is_main():
                path = plan.run_dir / "encoder.safetensors"
                export_encoder(path, state.model.encoder, encoder_metadata(settings, done))

        return lifecycle.finish(plan, done, reporter, save, export)


def make_monitor(settings: Pretrain, training: "Training", saved: dict[str, Any] | None) -> "Monitor | None":
    """Build the monitor of a run, which resumes from the checkpoint `saved`; None if it is off."""
    from dataclasses import replace

    from simclr_ddp.evaluation.monitor import Monitor
    from simclr_ddp.training.components import make_augmentation

    if not settings.monitor.every_epochs:
        return None
    data, dataset, runtime = settings.data, training.dataset, training.runtime
    return Monitor(
        dataset,
        runtime,
        # Not compiled: other batch sizes would compile the augmentation of the training steps anew.
        make_augmentation(replace(settings, compile=False), dataset, runtime),
        **vars(settings.monitor),
        seed=settings.seed,
        size=data.size,
        mean=data.augmentation.mean,
        std=data.augmentation.std,
        crop_scale=(data.augmentation.crop_scale[0], data.augmentation.crop_scale[1]),
        workers=data.workers,
        loader=data.loader,
        saved=saved.get("monitor") if saved else None,
    )


if __name__ == "__main__":
    sys.exit(main())

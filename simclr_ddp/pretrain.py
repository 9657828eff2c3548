"""Contrastive pretraining: `torchrun --nproc_per_node=8 -m simclr_ddp.pretrain CONFIG.yaml key=value ...`

Without arguments it trains on the generated Spirograph set. The same command goes on with a run that was stopped,
and says so if it is finished. Plain `python -m` runs one process; the processes of torchrun share each batch.
Exit status: 0 finished, 75 saved and paused by a signal, 2 settings, data or a diverging loss (torchrun makes 1 of
every status but 0).
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor, nn

from simclr_ddp import checkpoint, checks, cli, config, distributed
from simclr_ddp.augmentations import Augmentation
from simclr_ddp.config import Pretrain
from simclr_ddp.data import (
    VIEWS,
    Batch,
    Dataset,
    Share,
    describe_loader,
    open_dataset,
    training_batches,
    training_images,
    usable_workers,
)
from simclr_ddp.guard import LearningRateGuard, loss_warning
from simclr_ddp.info_nce import KernelInfoNCE
from simclr_ddp.metrics import MetricsLog
from simclr_ddp.optim import set_learning_rate
from simclr_ddp.report import Reporter, StepFailed
from simclr_ddp.run import Plan, check_agreement, find_checkpoint, identity, locked, make_plan, record_start
from simclr_ddp.runtime import Runtime, setup
from simclr_ddp.saver import Saver, dump
from simclr_ddp.state import State
from simclr_ddp.step import forward_backward
from simclr_ddp.watch import watching

PAUSED = 75
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def main(argv: list[str] | None = None) -> int:
    return cli.run(pretrain, Pretrain, "[CONFIG.yaml]", __doc__ or "", argv)


def pretrain(settings: Pretrain) -> int:
    """Start, or go on with, the run that the settings describe; returns the exit status."""
    runtime = setup(settings.device, settings.precision, settings.threads, settings.timeout)
    try:
        dataset = open_dataset(settings.data.train, "train")
        check_agreement(settings, runtime, dataset)
        objective, augment = make_objective(settings), make_augmentation(settings, dataset, runtime)
        try:
            checks.loss_backend(settings, runtime)
            plan = make_plan(settings, dataset)
        except ValueError as error:  # of all ranks: they agree in settings and data
            distributed.fail_together(str(error))
        cli.say(checks.negatives(settings.optim.global_batch_size, distributed.world_size()))
        checks.at_the_start(settings, plan, dataset)
        with locked(plan.run_dir):
            saved = find_checkpoint(plan, settings, identity(settings, runtime, dataset))
            start = saved["step"] if saved else 0
            if start >= plan.total_steps and (plan.run_dir / "encoder.safetensors").exists():
                cli.say(f"{plan.run_dir} is finished ({start} steps); run_dir=... starts another run")
                return 0
            state = State(settings, runtime, dataset, saved)
            if not saved:
                cli.say(f"weights: {state.loaded}")
            folder, size = plan.run_dir / "checkpoints", state.saved_bytes()
            fault = distributed.from_main(checkpoint.trial_write(folder, size) if distributed.is_main() else "")
            if fault:
                distributed.fail_together(fault)
            if distributed.is_main():
                cli.warn(checks.room_for(folder, size, settings.checkpoint.keep_last))
                (plan.run_dir / "encoder.safetensors").unlink(missing_ok=True)  # of an earlier end, if any
                record_start(settings, runtime, plan, start)
            try:
                metrics = (saved.get("metrics", []), saved.get("metric_count", 0)) if saved else ([], 0)
                return train(settings, runtime, dataset, plan, state, objective, augment, start, metrics)
            except StepFailed as failed:
                agreed = {"identity": identity(settings, runtime, dataset), "config": config.plain(settings)}
                told = dump(plan.run_dir, failed, agreed | state.to_save())
                distributed.barrier()  # a rank that left before would have its launcher end the one that writes
                distributed.fail_together(f"{failed}; {told}")
    finally:
        distributed.stop()


def train(
    settings: Pretrain,
    runtime: Runtime,
    dataset: Dataset,
    plan: Plan,
    state: State,
    objective: KernelInfoNCE,
    augment: Callable[..., Tensor],
    start: int,
    metrics: tuple[list[str], int],
) -> int:
    """The training loop, from step `start` to the last; returns the exit status.

    metrics  the newest lines of metrics.jsonl up to that step, and how many there were in all
    """
    device, n = runtime.device, settings.optim.global_batch_size
    batches = make_batches(settings, dataset, device, range(start, plan.total_steps))
    model = make_parallel(settings, runtime, state)
    guard = LearningRateGuard(state.optimizer, settings.optim.base_learning_rate, plan.peak_learning_rate, start)
    plain = config.plain(settings)
    log = MetricsLog(plan.run_dir, start, settings.log, plain, *metrics) if distributed.is_main() else None
    report = Reporter(log, start, plan.total_steps, n, device, runtime.precision == "fp16")
    save = make_saver(settings, plan, state, report, identity(settings, runtime, dataset))

    failures = report.closed_by_failures()
    with stop_signals() as told_to_stop, failures, watching(settings.timeout), closing(batches):
        for step in range(start, plan.total_steps):
            epoch, last_of_epoch = step // plan.steps_per_epoch, (step + 1) % plan.steps_per_epoch == 0
            due = (step + 1) % settings.log.every_steps == 0 or last_of_epoch or step + 1 == plan.total_steps
            rate = plan.learning_rate(step)
            set_learning_rate(state.optimizer, rate)
            distributed.note("its data", step + 1)
            with report.waiting():
                batch = next(batches)

            distributed.note("forward and backward")
            loss, y = forward_backward(model, state, runtime, objective, augment, batch, epoch, plan.micro_batches)

            distributed.note("the figures of the step")
            top1 = objective.top1(y[0], y[1]) if due else torch.zeros_like(loss)
            mine = torch.stack([loss, top1, torch.full_like(loss, told_to_stop())])
            vector = torch.cat([distributed.all_sum(mine) / distributed.world_size(), state.gradient_norm()[None]])
            guard.before(rate)
            state.step(skip=~vector.isfinite().all())
            cli.warn(guard.after(rate))

            line = {"step": step + 1, "epoch": (step + 1) / plan.steps_per_epoch, "learning_rate": rate}
            report.push(line, due, vector)
            if last_of_epoch and state.probe is not None:
                report.add(probe_top1=state.probe.validation_top1(state.model, settings.data, runtime))
            if step + 1 == plan.warmup_steps:
                report.epoch_loss()
            elif step + 1 == plan.warmup_steps + max(plan.steps_per_epoch, 20):
                cli.warn(loss_warning(report.epoch_loss(), objective, n, settings.optim.name))
            if settings.debug.check_ranks_every and (step + 1) % settings.debug.check_ranks_every == 0:
                state.check_ranks(step + 1)
            if report.stop and step + 1 < plan.total_steps:
                report.act()  # a step that failed is not to be saved
                save(step + 1, now=True)
                distributed.barrier()  # a rank that left before would have its launcher end the one that saves
                report.end()
                cli.say(f"paused at step {step + 1} of {plan.total_steps}: the same command goes on")
                return PAUSED
            save(step + 1)

        distributed.note("the last checkpoint")
        report.act()
        save(plan.total_steps, now=True)
        if distributed.is_main():
            metadata = encoder_metadata(settings, plan.total_steps)
            checkpoint.export_encoder(plan.run_dir / "encoder.safetensors", state.model.encoder, metadata)
        report.end()
        cli.say(f"finished: {plan.run_dir}")
        return 0


def make_objective(settings: Pretrain) -> KernelInfoNCE:
    loss = settings.loss
    return KernelInfoNCE(
        loss.kernel,
        loss.temperature,
        gamma=loss.gamma,
        mix_weight=loss.mix_weight,
        mix_level=loss.mix_level,
        second_temperature=loss.second_temperature,
        order=loss.order,
        radius=loss.radius,
        norm_p=loss.norm_p,
        distance_p=loss.distance_p,
        precision=loss.precision,
        backend=loss.backend,
        gather=loss.gather,
    )


def make_augmentation(settings: Pretrain, dataset: Dataset, runtime: Runtime) -> Callable[..., Tensor]:
    """(batch inputs, epoch, index) -> float views [V, B, 3, H, W]."""
    a = settings.data.augmentation
    augmentation = Augmentation(
        views=VIEWS,
        flip=a.flip,
        strength=a.strength,
        jitter_probability=a.jitter,
        permuted=a.order == "permuted",
        greyscale=a.greyscale,
        blur=a.blur,
        solarize=a.solarize,
        mean=a.mean,
        std=a.std,
    )
    made: Callable[..., Tensor] = torch.compile(augmentation, dynamic=False) if settings.compile else augmentation
    return training_images(dataset, made, settings.seed, runtime.dtype)  # type: ignore[arg-type]


def make_batches(
    settings: Pretrain, dataset: Dataset, device: torch.device, steps: range
) -> Generator[Batch, None, None]:
    """This rank's batches of those steps."""
    wanted = settings.data
    share = Share(settings.seed, settings.optim.global_batch_size, distributed.rank(), distributed.world_size())
    workers = usable_workers(wanted.workers, distributed.local_world_size())
    if dataset.images is not None and dataset.numbers is None:
        batch_size = share.global_batch_size // share.world_size
        cli.say(describe_loader(dataset.images, wanted.loader, workers, batch_size, VIEWS, wanted.size))
    return training_batches(
        dataset,
        share,
        steps,
        size=wanted.size,
        crop_scale=(wanted.augmentation.crop_scale[0], wanted.augmentation.crop_scale[1]),
        workers=workers,
        loader=wanted.loader,
        device=device,
    )


def make_parallel(settings: Pretrain, runtime: Runtime, state: State) -> nn.Module:
    """The model under DistributedDataParallel with final gradient buckets, compiled if asked for."""
    model = distributed.data_parallel(state.model, runtime.device)
    if settings.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    optim, size = settings.optim, settings.data.size
    batch = (optim.micro_batch_size or optim.global_batch_size) // distributed.world_size()
    blank = torch.zeros(VIEWS, batch, 3, size, size, device=runtime.device, dtype=runtime.dtype)

    def forward_and_backward() -> None:
        with runtime.autocast():
            output = model(blank)
        outputs = [output.y] if output.logits is None else [output.y, output.logits]
        torch.stack([o.float().square().mean() for o in outputs]).sum().backward()

    distributed.settle_buckets(model, forward_and_backward)
    return model


def make_saver(settings: Pretrain, plan: Plan, state: State, report: Reporter, agreed: dict) -> Callable[..., None]:
    """save(step, now=False): on rank 0 write a checkpoint if one is due, by steps or by the clock, or `now`."""
    folder, device = plan.run_dir / "checkpoints", next(state.model.parameters()).device
    saver = Saver(folder, settings.checkpoint, plan.steps_per_epoch, device)

    def save(step: int, now: bool = False) -> None:
        due = now or (step < plan.total_steps and saver.due(step))
        if not distributed.is_main() or not due:
            return
        if report.flush():
            saved = {"step": step, "identity": agreed, "config": config.plain(settings)} | report.to_save()
            saver.save(saved | {"world_size": distributed.world_size()} | state.to_save(), step)
            fault = saver.wait() if now else ""
        else:
            fault = f"metrics.jsonl in {plan.run_dir} can't be written"
        if now and fault:
            raise OSError(
                f"step {step} is not saved ({fault}): make room, and the same command goes on from the last checkpoint"
            )

    return save


def encoder_metadata(settings: Pretrain, step: int) -> dict[str, str]:
    """What it takes to build the encoder and feed it, and the step it is of."""
    model, data = settings.model, settings.data
    return {
        "arch": model.arch,
        "width": repr(model.width),
        "stem": model.stem,
        "size": str(data.size),
        "mean": repr(list(data.augmentation.mean)),
        "std": repr(list(data.augmentation.std)),
        "step": str(step),
    }


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM, SIGUSR1 and Ctrl-C only set a flag, which the yielded function tells; a later one kills.

    Ctrl-C reaches a process twice, from the terminal and from torchrun, so signals within three seconds count as one.
    A thread hears them, since Python calls handlers only between two of its own operations, and a rank that waits for
    another in a collective does none.
    """
    told, (hears, tells) = threading.Event(), socket.socketpair()
    tells.setblocking(False)

    def listen() -> None:
        first: float | None = None
        while number := hears.recv(1):
            if number[0] not in STOP:
                continue
            if first is None:
                first = time.monotonic()
                told.set()
                if distributed.is_main():
                    os.write(2, b"stopping at the end of this step; a second signal, in three seconds, kills\n")
            elif time.monotonic() - first > 3:
                os._exit(128 + number[0])

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    descriptor = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in STOP}
    try:
        yield told.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        tells.shutdown(socket.SHUT_WR)  # for forked processes too, which closing it here would not end
        listener.join()
        tells.close()
        hears.close()


if __name__ == "__main__":
    sys.exit(main())

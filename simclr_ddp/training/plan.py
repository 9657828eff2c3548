"""The plan of a run: its steps, warm-up and learning rates."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_ddp.config.schema import Monitor, Optim, Pretrain
from simclr_ddp.runs.directory import default_run_dir
from simclr_ddp.system import console
from simclr_ddp.training.schedule import learning_rate, peak_learning_rate

if TYPE_CHECKING:
    from simclr_ddp.data.dataset import Dataset


@dataclass(frozen=True)
class Plan:
    """The steps, learning rate and directory of a run; equal on all ranks."""

    run_dir: Path
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_learning_rate: float
    schedule: str
    micro_batches: int

    def ends_epoch(self, step: int) -> bool:
        """Return whether `step`, counted from 0, is the last of its epoch."""
        return (step + 1) % self.steps_per_epoch == 0

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.peak_learning_rate, self.warmup_steps, self.total_steps, self.schedule)


def make_plan(settings: Pretrain, dataset: "Dataset", ranks: int | None = None) -> Plan:
    """Plan a run on the present ranks, or on that many. Raises ValueError if settings and data do not fit together."""
    # Imported here, so that launch needs no torch for the rest of this module.
    from simclr_ddp.data.batches import steps_per_epoch

    check_batch(settings.optim, ranks)
    check_options(settings, dataset)
    steps = steps_per_epoch(dataset, settings.optim.global_batch_size)
    return plan_of(settings.optim, steps, default_run_dir(settings, dataset.fingerprint if dataset.stored else ""))


def check_batch(optim: Optim, ranks: int | None = None) -> None:
    """Raise ValueError unless batch and micro-batches divide among the present ranks, or that many."""
    from simclr_ddp.distributed import collectives

    world_size = ranks or collectives.world_size()
    if optim.global_batch_size % world_size:
        raise ValueError(
            f"optim.global_batch_size={optim.global_batch_size}: it does not divide among {world_size} ranks; "
            f"choose a multiple of {world_size}, or another number of processes"
        )
    micro = optim.micro_batch_size
    if micro is not None and (optim.global_batch_size % micro or micro % world_size):
        raise ValueError(
            f"optim.micro_batch_size={micro}: it must divide optim.global_batch_size={optim.global_batch_size} and be "
            f"a multiple of the {world_size} ranks; choose another size"
        )


def plan_of(optim: Optim, steps: int, run_dir: Path) -> Plan:
    """Plan a run with that many steps per epoch; the directory is that of rank 0."""
    from simclr_ddp.distributed import collectives

    total, warmup = optim.steps or optim.epochs * steps, round(optim.warmup_epochs * steps)
    if warmup >= total:
        console.warn(
            f"optim.warmup_epochs={optim.warmup_epochs:g}: the warm-up takes {warmup} steps and the run has {total}, "
            "so the learning rate never reaches its peak; shorten the warm-up, or train for longer"
        )
    return Plan(
        run_dir=Path(collectives.broadcast_object(str(run_dir))),
        steps_per_epoch=steps,
        total_steps=total,
        warmup_steps=warmup,
        peak_learning_rate=peak_learning_rate(optim.base_learning_rate, optim.scaling, optim.global_batch_size),
        schedule=optim.schedule,
        micro_batches=optim.global_batch_size // (optim.micro_batch_size or optim.global_batch_size),
    )


def check_options(settings: Pretrain, dataset: "Dataset") -> None:
    """Raise ValueError for options of the model and the images that exclude each other."""
    if settings.compile and settings.model.checkpoint_stages:
        raise ValueError("model.checkpoint_stages=true: it can't be compiled; set compile=false")
    if dataset.rendered and settings.data.size != 32:
        raise ValueError(f"data.size={settings.data.size}: Spirograph views are 32 pixels wide; set data.size=32")
    if settings.data.spirograph != "image" and not dataset.rendered:
        raise ValueError(
            f"data.spirograph={settings.data.spirograph}: no effect on the images of {dataset.source}; leave it out"
        )
    if settings.monitor.every_epochs:
        _check_monitor(settings.monitor, dataset)


def _check_monitor(monitor: Monitor, dataset: "Dataset") -> None:
    if monitor.images > dataset.count:
        raise ValueError(
            f"monitor.images={monitor.images}: data.train={dataset.source} has only {dataset.count} images; choose a "
            "smaller number"
        )
    if monitor.k >= monitor.images:
        raise ValueError(
            f"monitor.k={monitor.k}: each of {monitor.images} images has {monitor.images - 1} neighbours; choose a "
            "smaller k, or more monitor.images"
        )
    if monitor.views % 2:
        raise ValueError(
            f"monitor.views={monitor.views}: views are drawn in pairs, as in training; choose an even number, or 0 for "
            "none"
        )

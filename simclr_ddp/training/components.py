"""The bundle `Training`: everything that a training step needs, built from the settings."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simclr_ddp.config import options
from simclr_ddp.config.schema import Finetune, Pretrain
from simclr_ddp.data.augmentations import Augmentation
from simclr_ddp.data.batches import VIEWS, Batch, Share, describe_loader, training_batches, training_images
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed import collectives, ddp
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
from simclr_ddp.runs.metrics import MetricsLog
from simclr_ddp.system import console
from simclr_ddp.system.machine import usable_workers
from simclr_ddp.training.plan import Plan
from simclr_ddp.training.reporter import Reporter
from simclr_ddp.training.sanity import loss_warning
from simclr_ddp.training.state import State
from simclr_ddp.training.step import Record, agree, forward_backward, unmarked


@dataclass(frozen=True)
class Training:
    """The parts of one training run; `make_training` builds it.

    pretrain, doctor, verify, replay and the benchmarks take their steps through this bundle, so there is one copy of
    the training step.
    """

    settings: Pretrain
    runtime: Runtime
    dataset: Dataset
    plan: Plan
    state: State
    model: nn.Module  # state's model as it is trained: in DistributedDataParallel, compiled if compile=true
    objective: KernelInfoNCE
    augment: Callable[..., Tensor]  # (batch inputs, epoch, index) -> float views [V, B, 3, H, W]

    def batches(self, steps: range) -> Generator[Batch, None, None]:
        """Return a generator of this rank's batches of `steps`."""
        return make_batches(self.settings, self.dataset, self.runtime.device, steps)

    def forward_backward(
        self, batch: Batch, step: int, mark: Callable[[str], None] = unmarked
    ) -> tuple[Tensor, Tensor]:
        """Return this rank's loss (0-dim) and raw projections y [V, B, d]; leave gradients in the parameters."""
        collectives.note("forward and backward")
        epoch = step // self.plan.steps_per_epoch
        parts = self.model, self.state, self.runtime, self.objective, self.augment
        return forward_backward(*parts, batch, epoch, self.plan.micro_batches, mark)

    def agree(self, loss: Tensor, y: Tensor, *, accuracy: bool, stop: bool = False) -> Record:
        """Return one record of the ranks: mean loss, contrastive accuracy on request, stop requests, gradient norm."""
        collectives.note("the metrics of the step")
        top1 = self.objective.top1(y[0], y[1]) if accuracy else torch.zeros_like(loss)
        return agree(loss, top1, stop, self.state)

    def probe_top1(self) -> float:
        """Compute the accuracy of the online probe on the training images held out from it."""
        assert self.state.probe is not None
        data = self.settings.data
        return self.state.probe.validation_top1(
            self.state.model,
            self.runtime,
            size=data.size,
            mean=data.augmentation.mean,
            std=data.augmentation.std,
            workers=data.workers,
            loader=data.loader,
        )


def make_training(
    settings: Pretrain, runtime: Runtime, dataset: Dataset, plan: Plan, saved: dict[str, Any] | None = None
) -> Training:
    """Build the bundle; `saved` is the checkpoint to resume from. All ranks call it together."""
    state = State(settings, runtime, dataset, saved)
    return Training(
        settings,
        runtime,
        dataset,
        plan,
        state,
        make_parallel(settings, runtime, state),
        make_objective(settings),
        make_augmentation(settings, dataset, runtime),
    )


def make_reporter(training: Training, start: int, saved: dict[str, Any] | None = None) -> Reporter:
    """Build the reporter of a run that begins at step `start`; the checkpoint `saved` holds the last metrics."""
    optim = training.settings.optim

    def warning(mean_loss: float) -> str | None:
        return loss_warning(mean_loss, training.objective, optim.global_batch_size, optim.name)

    return open_reporter(training.settings, training.plan, training.runtime, start, saved, loss_warning=warning)


def open_reporter(
    settings: Pretrain | Finetune, plan: Plan, runtime: Runtime, start: int, saved: dict[str, Any] | None, **more: Any
) -> Reporter:
    """Open metrics.jsonl with its mirrors on rank 0, and build the reporter; `more` are arguments of its class."""
    log = None
    if collectives.is_main():
        tail, count = (saved.get("metrics", []), saved.get("metric_count", 0)) if saved else ([], 0)
        mirrors = {"wandb": settings.log.wandb, "tensorboard": settings.log.tensorboard}
        log = MetricsLog(plan.run_dir, start, options.plain(settings), tail, count, **mirrors)
    return Reporter(
        log,
        plan,
        start,
        images_per_step=settings.optim.global_batch_size,
        device=runtime.device,
        fp16=runtime.precision == "fp16",
        every_steps=settings.log.every_steps,
        **more,
    )


def make_objective(settings: Pretrain) -> KernelInfoNCE:
    return KernelInfoNCE(**vars(settings.loss))


def make_augmentation(settings: Pretrain, dataset: Dataset, runtime: Runtime) -> Callable[..., Tensor]:
    """Build the function (batch inputs, epoch, index) -> float views [V, B, 3, H, W]."""
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
    """Print who decodes, and return a generator of this rank's batches of `steps`."""
    data = settings.data
    share = Share(settings.seed, settings.optim.global_batch_size, collectives.rank(), collectives.world_size())
    workers = usable_workers(data.workers, collectives.local_world_size())
    if dataset.decoded:
        batch_size = share.global_batch_size // share.world_size
        console.say(describe_loader(dataset.file, data.loader, workers, batch_size, VIEWS, data.size))
    return training_batches(
        dataset,
        share,
        steps,
        size=data.size,
        crop_scale=(data.augmentation.crop_scale[0], data.augmentation.crop_scale[1]),
        workers=workers,
        loader=data.loader,
        device=device,
    )


def make_parallel(settings: Pretrain, runtime: Runtime, state: State) -> nn.Module:
    """Wrap the model in DistributedDataParallel with final gradient buckets, compiled if compile=true."""
    model = ddp.data_parallel(state.model, runtime.device)
    if settings.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    optim, size = settings.optim, settings.data.size
    batch = (optim.micro_batch_size or optim.global_batch_size) // collectives.world_size()
    blank = torch.zeros(VIEWS, batch, 3, size, size, device=runtime.device, dtype=runtime.dtype)

    def forward_and_backward() -> None:
        with runtime.autocast():
            output = model(blank)
        outputs = [output.y] if output.logits is None else [output.y, output.logits]
        torch.stack([o.float().square().mean() for o in outputs]).sum().backward()

    ddp.settle_buckets(model, forward_and_backward)
    return model

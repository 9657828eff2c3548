"""The bundle `Finetuning`: everything that a step of supervised training needs, built from the settings."""

import copy
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_ddp.config.identity import finetune_without_effect
from simclr_ddp.config.options import dotted, shown
from simclr_ddp.config.schema import Finetune, result_keys
from simclr_ddp.data.augmentations import Augmentation
from simclr_ddp.data.batches import Batch, Share, training_batches, training_images
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.data.subset import class_balanced, listed, split
from simclr_ddp.distributed import collectives, ddp
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.models.backbones import make_encoder
from simclr_ddp.models.classifier import Classifier, first_layers
from simclr_ddp.runs.encoder import Loaded, load_head, untrained_head
from simclr_ddp.system import files
from simclr_ddp.system.machine import usable_workers
from simclr_ddp.training.optim import optimizer_of, parameter_groups
from simclr_ddp.training.plan import Plan, check_batch, plan_of
from simclr_ddp.training.resume import DATA
from simclr_ddp.training.state import TrainingState
from simclr_ddp.training.step import Record, agree, every


class ClassifierState(TrainingState):
    """Classifier, optimizer, loss scale and, with optim.average_decay, the moving average of the classifier."""

    model: Classifier

    def __init__(self, settings: Finetune, runtime: Runtime, model: Classifier, plan: Plan) -> None:
        model.to(runtime.device, runtime.dtype).to(memory_format=model.encoder.memory_format)
        super().__init__(model, [make_optimizer(settings, model, plan.peak_learning_rate)], runtime)
        self.optimizer = self.optimizers[0]
        self.decay = settings.optim.average_decay
        self.average = copy.deepcopy(model).requires_grad_(False) if self.decay else None

    @property
    def result(self) -> Classifier:
        """The classifier to evaluate: the average, if there is one."""
        return self.model if self.average is None else self.average

    def step(self, skip: Tensor) -> None:
        super().step(skip)
        if self.average is not None:
            self._update(self.average)

    @torch.no_grad()
    def _update(self, average: Classifier) -> None:
        """Move the average towards the weights, which stays as it is after a failed step; copy running statistics."""
        share = (1 - self.decay) * (~self.failed).float()
        for mean, weight in zip(average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(weight, share.to(mean.dtype))
        for old, new in zip(average.buffers(), self.model.buffers(), strict=True):
            old.copy_(new)

    def saved_bytes(self) -> int:
        average = {} if self.average is None else self.average.state_dict()
        return super().saved_bytes() + sum(t.nbytes for t in average.values())

    def to_save(self) -> dict[str, Any]:
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return super().to_save() | average

    def restore(self, saved: dict[str, Any]) -> None:
        super().restore(saved)
        if self.average is not None:
            self.average.load_state_dict(saved["average"])


def make_optimizer(settings: Finetune, model: Classifier, peak_learning_rate: float) -> torch.optim.Optimizer:
    """Build the optimizer of the trained parameters; each stage may have its own learning rate.

    LARS adapts neither biases, batch norm nor the classifier, as in the reference code of Chen et al. 2020.
    """
    optim = settings.optim
    decay = optim.weight_decay / (peak_learning_rate if optim.decay_over_rate else 1)
    groups: list[dict[str, Any]] = []
    for depth, stage in enumerate(model.stages()):
        for parameters, is_weight in zip(parameter_groups(stage), (True, False), strict=True):
            trained = [p for p in parameters if p.requires_grad]
            group = {"params": trained, "weight_decay": decay * is_weight, "rate_factor": optim.layer_decay**depth}
            if optim.name == "lars":
                group["adapt"] = is_weight and depth > 0
            groups += [group] if trained else []
    return optimizer_of(
        groups, optim.name, optim.momentum, optim.trust_coefficient, optim.unadapted_rate, optim.nesterov
    )


@dataclass(frozen=True)
class Finetuning:
    """The parts of one supervised run; `make_finetuning` builds it."""

    settings: Finetune
    runtime: Runtime
    dataset: Dataset
    images: np.ndarray  # int64 [n] positions of the images to train on
    loaded: Loaded
    plan: Plan
    state: ClassifierState
    model: nn.Module  # state's model as it is trained: in DistributedDataParallel

    def batches(self, steps: range) -> Generator[Batch, None, None]:
        """Return a generator of this rank's batches of `steps`, with one view of each image."""
        s, scale = self.settings, self.settings.augmentation.crop_scale
        return training_batches(
            self.dataset,
            Share(s.seed, s.optim.global_batch_size, collectives.rank(), collectives.world_size()),
            steps,
            size=self.loaded.spec.size,
            crop_scale=(scale[0], scale[1]),
            workers=usable_workers(s.workers, collectives.local_world_size()),
            loader=s.loader,
            device=self.runtime.device,
            views=1,
            subset=self.images,
        )

    def forward_backward(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's mean cross-entropy and top-1, scalars; leave scaled gradients in the parameters.

        The image at position i of the batch is in micro-batch i modulo their number; gradients are added up.
        """
        collectives.note("forward and backward")
        parts, epoch = self.plan.micro_batches, step // self.plan.steps_per_epoch
        self.state.zero_grad()
        losses, correct = [], []
        for number in range(parts):
            part = every(batch, number, parts)
            assert part.labels is not None
            later = number + 1 < parts and hasattr(self.model, "no_sync")
            with self.model.no_sync() if later else nullcontext():  # type: ignore[operator]
                with self.runtime.autocast():
                    logits = self.model(self._augment(part.inputs, epoch, part.sample)[0])
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = F.cross_entropy(logits, part.labels)
                self.state.scaler.scale(loss / parts).backward()
            losses.append(loss.detach())
            correct.append((logits.detach().argmax(1) == part.labels).to(loss.dtype).mean())
        return torch.stack(losses).mean(), torch.stack(correct).mean()

    def agree(self, loss: Tensor, top1: Tensor, *, stop: bool) -> Record:
        """Return one record of the ranks: mean loss and top-1, stop requests, gradient norm."""
        collectives.note("the metrics of the step")
        return agree(loss, top1, stop, self.state)

    def _augment(self, views: Tensor, epoch: int, index: Tensor) -> Tensor:
        a, spec = self.settings.augmentation, self.loaded.spec
        augmentation = Augmentation(
            views=1,
            flip=a.flip,
            strength=a.strength,
            greyscale=a.greyscale,
            mean=spec.mean,
            std=spec.std,
        )
        augment = training_images(self.dataset, augmentation, self.settings.seed, self.runtime.dtype, views=1)
        return augment(views, epoch, index)


def labelled(settings: Finetune, dataset: Dataset) -> np.ndarray:
    """Return the positions of the images to train on, int64 [n]. Raises ValueError if there are none of a class."""
    if not dataset.decoded or not dataset.has_classes:
        raise ValueError(f"train={dataset.source}: fine-tuning needs images with classes; give a .beton file of such")
    if not settings.labels.list:
        return class_balanced(dataset, settings.labels.fraction, settings.seed)
    found = listed(settings.labels.list, dataset)
    assert dataset.labels is not None
    absent = np.setdiff1d(dataset.labels, dataset.labels[found]).tolist()
    if absent:
        name = dataset.classes[absent[0]] if dataset.classes else absent[0]
        raise ValueError(
            f"labels.list={settings.labels.list}: it names no image of class {name}; give images of every class"
        )
    return found


def load_neck(settings: Finetune, loaded: Loaded) -> nn.Sequential:
    """Read the first from_layer layers of the projection head, on rank 0, and return them on all ranks.

    With random_init their weights are drawn anew. Raises ValueError if there is no head in the encoder's file.
    """
    if not settings.from_layer:
        return nn.Sequential()
    fault, weights = "", dict[str, Tensor]()
    if collectives.is_main():
        try:
            weights = load_head(loaded).module.state_dict()
        except (ValueError, OSError) as error:
            fault = f"from_layer={settings.from_layer}: {error}"
    if fault := collectives.broadcast_object(fault):
        raise ValueError(fault)
    head = untrained_head(loaded.settings, loaded.encoder.width_out, settings.seed)
    weights = collectives.broadcast_tensors(weights)
    if not settings.random_init:
        head.load_state_dict(weights)
    return first_layers(head, settings.from_layer)


def identity(
    settings: Finetune, loaded: Loaded, dataset: Dataset, images: np.ndarray, precision: str
) -> dict[str, Any]:
    """Return the values in which a checkpoint and a resumed run must agree, and equal runs do."""
    unused = finetune_without_effect(dotted(settings))
    keys = {k: v for k, v in result_keys(settings).items() if k not in unused and not k.startswith("grid.")}
    return {k: v for k, v in keys.items() if k != "size"} | {
        "precision": precision,
        "encoder": loaded.hash,
        "images": files.short_hash({"positions": images.tolist()}),
        "view size": loaded.spec.size,
        DATA: dataset.fingerprint,
    }


def default_run_dir(settings: Finetune, loaded: Loaded, found: dict[str, Any]) -> Path:
    """Return the directory of a run, named by its identity: settings, encoder and images."""
    if "/" in settings.name:
        raise ValueError(f"name={settings.name}: it leads to another folder; use a name without /, or set run_dir")
    if settings.run_dir:
        if Path(settings.run_dir).resolve() == loaded.folder.resolve():
            raise ValueError(f"run_dir={settings.run_dir}: it is that of the encoder; choose another directory")
        return Path(settings.run_dir)
    defaults = result_keys(Finetune())
    changed = {k: v for k, v in found.items() if k not in defaults or v != defaults[k]}
    grid = settings.grid
    if grid.learning_rates or grid.weight_decays:
        changed["grid"] = [grid.learning_rates, grid.weight_decays, grid.validation_fraction]
    return Path(settings.output or loaded.folder) / "finetune" / f"{settings.name}-{files.short_hash(changed)}"


def candidates(settings: Finetune) -> list[Finetune]:
    """Return the settings of each combination of the grid; those of the run alone without a grid."""
    optim, grid = settings.optim, settings.grid
    rates, decays = grid.learning_rates or [optim.base_learning_rate], grid.weight_decays or [optim.weight_decay]
    return [
        replace(settings, optim=replace(optim, base_learning_rate=rate, weight_decay=decay))
        for rate in rates
        for decay in decays
    ]


def held_out(settings: Finetune, dataset: Dataset, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the labelled images into those that candidates train on and those that choose, class by class.

    Raises ValueError if none would choose, or if a class would have no image to train on.
    """
    assert dataset.labels is not None
    labels, fraction = dataset.labels[images], settings.grid.validation_fraction
    count, most = round(fraction * len(images)), len(images) - len(np.unique(labels))
    if not 0 < count <= most:
        raise ValueError(
            f"grid.validation_fraction={fraction:g}: {count:,} of {len(images):,} labelled images would choose from "
            f"the grid, and it must be at least 1 and at most {most:,}, as one of each class is trained on; "
            "use a value such as 0.1, or more labels"
        )
    return split(images, labels, count, settings.seed)


def grid_dir(
    candidate: Finetune, loaded: Loaded, dataset: Dataset, part: np.ndarray, run_dir: Path, precision: str
) -> Path:
    """Return the directory of a candidate, named by its identity."""
    found = files.short_hash(identity(candidate, loaded, dataset, part, precision))
    optim = candidate.optim
    return run_dir / "grid" / f"rate{optim.base_learning_rate:g}-decay{optim.weight_decay:g}-{found}"


def best(grid: list[dict[str, Any]]) -> int:
    """Position of the best accuracy on held-out images; of equals the lowest rate, then the strongest decay."""
    return max(
        range(len(grid)),
        key=lambda i: (grid[i]["validation_top1"], -grid[i]["learning_rate"], grid[i]["weight_decay"]),
    )


def end_of_grid(choice: Finetune, settings: Finetune) -> str:
    """Return a warning if the best learning rate is the lowest or the highest of several, else ""."""
    rates, rate = settings.grid.learning_rates, choice.optim.base_learning_rate
    if len(rates) < 2 or rate not in (min(rates), max(rates)):
        return ""
    end = "lowest" if rate == min(rates) else "highest"
    return f"grid.learning_rates={shown(rates)}: the best, {rate:g}, is the {end}; extend the grid in its direction"


def describe(settings: Finetune) -> str:
    optim = settings.optim
    return f"optim.base_learning_rate={optim.base_learning_rate:g}, optim.weight_decay={optim.weight_decay:g}"


def make_plan(settings: Finetune, images: np.ndarray, run_dir: Path) -> Plan:
    """Plan a run. Raises ValueError if the batch fits neither ranks nor images."""
    optim = settings.optim
    check_batch(optim)
    if len(images) < optim.global_batch_size:
        raise ValueError(
            f"optim.global_batch_size={optim.global_batch_size}: more than the {len(images):,} labelled images to "
            "train on; lower it, or use more labels"
        )
    return plan_of(optim, len(images) // optim.global_batch_size, run_dir)


def make_finetuning(
    settings: Finetune,
    runtime: Runtime,
    dataset: Dataset,
    images: np.ndarray,
    loaded: Loaded,
    plan: Plan,
    saved: dict[str, Any] | None = None,
) -> Finetuning:
    """Build the bundle; `saved` is the checkpoint to resume from. All ranks call it together."""
    spec = loaded.spec
    recomputed = settings.checkpoint_stages and not settings.frozen
    encoder = make_encoder(spec.arch, spec.width, spec.stem, spec.size, checkpoint_stages=recomputed)
    if settings.optim.layer_decay != 1 and not encoder.stages():
        raise ValueError(
            f"optim.layer_decay={settings.optim.layer_decay:g}: the stages of {spec.arch} are not known; leave it out"
        )
    encoder.load_state_dict(loaded.encoder.state_dict())
    model = Classifier(
        encoder,
        dataset.class_count,
        neck=load_neck(settings, loaded),
        frozen=settings.frozen,
        freeze_bn=settings.freeze_bn,
        bn_momentum=settings.bn_momentum or min(0.1, 10 / plan.steps_per_epoch),
    )
    state = ClassifierState(settings, runtime, model, plan)
    if saved:
        state.restore(saved)
    model.train()
    parallel = ddp.data_parallel(model, runtime.device)
    size = settings.optim.micro_batch_size or settings.optim.global_batch_size
    blank = torch.zeros(
        size // collectives.world_size(), 3, spec.size, spec.size, device=runtime.device, dtype=runtime.dtype
    )

    def forward_and_backward() -> None:
        with runtime.autocast():
            logits = parallel(blank)
        logits.float().square().mean().backward()

    ddp.settle_buckets(parallel, forward_and_backward)
    return Finetuning(settings, runtime, dataset, images, loaded, plan, state, parallel)

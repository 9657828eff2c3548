"""A plain PyTorch loop and a loop of lightly's parts that train the same model, with the same batch and precision.

Both read the images one by one in the processes of a torch DataLoader and augment them there with Pillow. They use
torch's batch norm: SyncBatchNorm on several GPUs; on several CPU ranks it is local to each rank, because torch has no
synchronised one for CPUs.
"""

import copy
import sys
from collections.abc import Callable, Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data import spirograph
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
from simclr_ddp.training.state import State

FOLDER = Path(__file__).parents[2] / ".peers"
Pictures = tuple[Callable[[int], Image.Image], int]  # i -> image i, and the number of images
RATE = 0.03  # learning rate per 256 images of plain SGD and AdamW / 100, low enough for any start


def lightly_version() -> str | None:
    """Return lightly's version, None if it can't be imported; .peers is searched last, so that it replaces nothing."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    try:
        import lightly.loss
        import lightly.transforms  # noqa: F401
    except ImportError:
        return None
    return version("lightly")


class Peer:
    """A training loop as its documentation shows it: views from a DataLoader, forward, loss, backward, update."""

    def __init__(
        self,
        settings: Pretrain,
        runtime: Runtime,
        views: "Views",
        state: State,
        loss: Callable[[Tensor, Tensor], Tensor],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    ) -> None:
        self.runtime, self.loss = runtime, loss
        model = with_torch_batch_norm(state.model, runtime.device)
        self.optimizer = make_optimizer(model)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.model: nn.Module = model
        if collectives.world_size() > 1:
            devices = [runtime.device.index] if runtime.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        sampler: Any = DistributedSampler(views) if collectives.world_size() > 1 else None
        self.loader: DataLoader = DataLoader(
            views,
            batch_size=settings.optim.global_batch_size // collectives.world_size(),
            sampler=sampler,
            shuffle=sampler is None,
            num_workers=settings.data.workers,
            pin_memory=runtime.device.type == "cuda",
            drop_last=True,
        )

    def batches(self) -> Generator[list[Tensor], None, None]:
        """Yield batches without end, each of two float views [B, 3, H, W]."""
        while True:
            yield from self.loader

    def step(self, batches: Generator[list[Tensor], None, None]) -> None:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # only our loop promises determinism, which costs time on a GPU
        views = torch.stack([view.to(self.runtime.device, non_blocking=True) for view in next(batches)])
        with self.runtime.autocast():
            y = self.model(views.to(self.runtime.dtype)).y.to(self.runtime.dtype)
        loss = self.loss(y[0], y[1])
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        torch.use_deterministic_algorithms(before, warn_only=self.runtime.device.type == "cuda")


def plain_loop(settings: Pretrain, runtime: Runtime, pictures: Pictures, state: State) -> Peer:
    """Build a loop of torchvision's transforms, NT-Xent as cross-entropy, and torch's SGD (AdamW if set)."""
    optim = settings.optim
    rate = RATE * optim.global_batch_size / 256

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if optim.name == "adamw":
            return torch.optim.AdamW(model.parameters(), rate / 100, weight_decay=optim.weight_decay)
        return torch.optim.SGD(model.parameters(), rate, momentum=optim.momentum, weight_decay=optim.weight_decay)

    views = Views(*pictures, two_of(torchvision_transform(settings)))
    return Peer(settings, runtime, views, state, plain_loss(settings.loss.temperature), optimizer)


def lightly_loop(settings: Pretrain, runtime: Runtime, pictures: Pictures, state: State, peak_rate: float) -> Peer:
    """Build a loop of lightly's SimCLRTransform, NTXentLoss and, for optim.name=lars, its LARS at the peak rate."""
    from lightly.transforms import SimCLRTransform
    from lightly.utils.lars import LARS

    a, optim = settings.data.augmentation, settings.optim
    transform = SimCLRTransform(
        input_size=settings.data.size,
        cj_prob=a.jitter,
        cj_strength=a.strength,
        min_scale=a.crop_scale[0],
        random_gray_scale=a.greyscale,
        gaussian_blur=sum(a.blur) / 2,
        hf_prob=a.flip,
        normalize={"mean": a.mean, "std": a.std},
    )

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if optim.name == "adamw":
            return torch.optim.AdamW(model.parameters(), peak_rate, weight_decay=optim.weight_decay)
        if optim.name == "sgd":
            return torch.optim.SGD(model.parameters(), peak_rate, optim.momentum, weight_decay=optim.weight_decay)
        weights = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]  # with a decay of 0 its LARS does not adapt them
        groups = [{"params": weights, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return LARS(groups, peak_rate, optim.momentum, trust_coefficient=optim.trust_coefficient)

    return Peer(settings, runtime, Views(*pictures, transform), state, lightly_loss(settings), optimizer)


def lightly_loss(settings: Pretrain) -> Callable[[Tensor, Tensor], Tensor]:
    from lightly.loss import NTXentLoss

    return NTXentLoss(settings.loss.temperature, gather_distributed=collectives.world_size() > 1)


def plain_loss(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Build NT-Xent as it is usually written: cross-entropy over the matrix of all pairs, with its diagonal masked."""

    def loss(y_a: Tensor, y_b: Tensor) -> Tensor:
        z_a, z_b = F.normalize(y_a), F.normalize(y_b)
        if collectives.world_size() > 1:
            z_a, z_b = (torch.cat(torch.distributed.nn.functional.all_gather(z)) for z in (z_a, z_b))
        z = torch.cat((z_a, z_b))
        diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = (z @ z.T / temperature).masked_fill(diagonal, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z_a)))

    return loss


def check_loss(name: str, loss: Callable[[Tensor, Tensor], Tensor], objective: KernelInfoNCE, runtime: Runtime) -> str:
    """Check that a loss of random projections, as a mean over ranks, equals ours to 1e-5; return a message.

    All ranks end if it does not.
    """
    generator = torch.Generator().manual_seed(collectives.rank())
    y = torch.randn(2, 64, 16, generator=generator)
    y[1] = y[0] + 0.5 * y[1]
    y = y.to(runtime.device)
    values = torch.stack([loss(y[0], y[1]), objective(y[0], y[1])])
    theirs, ours = (collectives.all_reduce_sum(values) / collectives.world_size()).tolist()
    if not abs(theirs - ours) <= 1e-5 * max(1.0, abs(ours)):
        collectives.fail_together(
            f"the loss of {name} is {theirs:.6f} where ours is {ours:.6f}: trainings that minimise different losses "
            "can't be compared"
        )
    return f"the loss of {name} equals ours: {theirs:.6f}, {ours:.6f}"


def read_pictures(dataset: Dataset) -> Callable[[int], Image.Image]:
    """Return a function i -> image i, from the .beton file or from generated images, which are all rendered now."""
    if dataset.stored:
        return dataset.file.jpeg
    chunks = torch.from_numpy(dataset.numbers_of(np.arange(dataset.count))).split(500)
    drawn = [spirograph.render(c).mul(255).round().byte().permute(0, 2, 3, 1) for c in chunks]
    pixels = torch.cat(drawn).numpy()
    return lambda i: Image.fromarray(pixels[i])


class Views(TorchDataset):
    """A data set of two views of each of `count` pictures."""

    def __init__(self, picture: Callable[[int], Image.Image], count: int, transform: Callable[..., Any]) -> None:
        self.picture, self.count, self.transform = picture, count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.transform(self.picture(i))


def torchvision_transform(settings: Pretrain) -> v2.Compose:
    """Build the settings' augmentation: PIL image -> one float view [3, H, W]."""
    a, size = settings.data.augmentation, settings.data.size
    s, blur, solarize = a.strength, sum(a.blur) / 2, sum(a.solarize) / 2
    kernel = 2 * (size // 10 // 2) + 1
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, tuple(a.crop_scale)),
            v2.RandomHorizontalFlip(a.flip),
            v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, min(0.5, 0.2 * s))], a.jitter),
            v2.RandomGrayscale(a.greyscale),
            *([v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur)] if blur else []),
            *([v2.RandomSolarize(128, solarize)] if solarize else []),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(a.mean, a.std),
        ]
    )


def two_of(transform: Callable[[Image.Image], Tensor]) -> Callable[[Image.Image], tuple[Tensor, Tensor]]:
    return lambda picture: (transform(picture), transform(picture))


def with_torch_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a SimCLR model without its probe, with torch's batch norms."""
    model = copy.deepcopy(model)
    model.probe = None  # type: ignore[assignment]
    for part, kind in ((model.encoder, nn.BatchNorm2d), (model.projection_head, nn.BatchNorm1d)):
        for parent in list(part.modules()):  # type: ignore[union-attr]
            for name, norm in list(parent.named_children()):
                if isinstance(norm, CrossRankBatchNorm):
                    plain = kind(norm.num_features, norm.eps, norm.momentum, device=device, dtype=norm.weight.dtype)
                    plain.load_state_dict(norm.state_dict(), strict=False)
                    if norm.bias is None:
                        plain.register_parameter("bias", None)
                    setattr(parent, name, plain)
    if device.type == "cuda" and collectives.world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model

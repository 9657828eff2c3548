"""The same model, batch and precision, trained by a plain PyTorch loop and by one of lightly's parts.

Both read the images one by one in the processes of a torch DataLoader, cut and colour them there with Pillow, and
take torch's batch norm: SyncBatchNorm on several GPUs, on several CPU ranks one for each rank, which torch has no
synchronised one for.
"""

import copy
import sys
from collections.abc import Callable, Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from simclr_ddp import distributed, spirograph
from simclr_ddp.config import Pretrain
from simclr_ddp.data import Dataset
from simclr_ddp.distributed import CrossRankBatchNorm
from simclr_ddp.info_nce import KernelInfoNCE
from simclr_ddp.runtime import Runtime
from simclr_ddp.state import State

FOLDER = Path(__file__).parent.parent / ".peers"
Pictures = tuple[Callable[[int], Image.Image], int]  # i -> image i, and how many there are
RATE = 0.03  # learning rate per 256 images of plain SGD and AdamW / 100, low enough for any start


def lightly_version() -> str | None:
    """None where lightly can't be imported; .peers is searched last, so that it replaces nothing."""
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
        if distributed.world_size() > 1:
            devices = [runtime.device.index] if runtime.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        sampler: Any = DistributedSampler(views) if distributed.world_size() > 1 else None
        self.loader: DataLoader = DataLoader(
            views,
            batch_size=settings.optim.global_batch_size // distributed.world_size(),
            sampler=sampler,
            shuffle=sampler is None,
            num_workers=settings.data.workers,
            pin_memory=runtime.device.type == "cuda",
            drop_last=True,
        )

    def batches(self) -> Generator[list[Tensor], None, None]:
        """Float views [B, 3, H, W], two a batch, without end."""
        while True:
            yield from self.loader

    def step(self, batches: Generator[list[Tensor], None, None]) -> None:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # our promise, and not free on a GPU
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
    """torchvision's transforms, NT-Xent by cross-entropy, and torch's SGD (AdamW where the settings say so)."""
    optim = settings.optim
    rate = RATE * optim.global_batch_size / 256

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if optim.name == "adamw":
            return torch.optim.AdamW(model.parameters(), rate / 100, weight_decay=optim.weight_decay)
        return torch.optim.SGD(model.parameters(), rate, momentum=optim.momentum, weight_decay=optim.weight_decay)

    views = Views(*pictures, two_of(torchvision_transform(settings)))
    return Peer(settings, runtime, views, state, plain_loss(settings.loss.temperature), optimizer)


def lightly_loop(settings: Pretrain, runtime: Runtime, pictures: Pictures, state: State, peak_rate: float) -> Peer:
    """lightly's SimCLRTransform, NTXentLoss and, where the settings say LARS, its LARS at the peak rate."""
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
        others = [p for p in model.parameters() if p.ndim <= 1]  # which its LARS leaves alone at a decay of 0
        groups = [{"params": weights, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return LARS(groups, peak_rate, optim.momentum, trust_coefficient=optim.trust_coefficient)

    return Peer(settings, runtime, Views(*pictures, transform), state, lightly_loss(settings), optimizer)


def lightly_loss(settings: Pretrain) -> Callable[[Tensor, Tensor], Tensor]:
    from lightly.loss import NTXentLoss

    return NTXentLoss(settings.loss.temperature, gather_distributed=distributed.world_size() > 1)


def plain_loss(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """NT-Xent as it is usually written: cross-entropy over the matrix of all pairs, its diagonal masked."""

    def loss(y_a: Tensor, y_b: Tensor) -> Tensor:
        z_a, z_b = F.normalize(y_a), F.normalize(y_b)
        if distributed.world_size() > 1:
            z_a, z_b = (torch.cat(torch.distributed.nn.functional.all_gather(z)) for z in (z_a, z_b))
        z = torch.cat((z_a, z_b))
        diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = (z @ z.T / temperature).masked_fill(diagonal, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z_a)))

    return loss


def check_loss(name: str, loss: Callable[[Tensor, Tensor], Tensor], objective: KernelInfoNCE, runtime: Runtime) -> str:
    """The mean over ranks of a loss of random projections is ours to 1e-5, or ValueError; one sentence."""
    generator = torch.Generator().manual_seed(distributed.rank())
    y = torch.randn(2, 64, 16, generator=generator)
    y[1] = y[0] + 0.5 * y[1]
    y = y.to(runtime.device)
    values = torch.stack([loss(y[0], y[1]), objective(y[0], y[1])])
    theirs, ours = (distributed.all_sum(values) / distributed.world_size()).tolist()
    if not abs(theirs - ours) <= 1e-5 * max(1.0, abs(ours)):
        distributed.fail_together(
            f"the loss of {name} is {theirs:.6f} where ours is {ours:.6f}: two trainings are not compared that "
            "minimise different things"
        )
    return f"the loss of {name} is ours: {theirs:.6f}, {ours:.6f}"


def read_pictures(dataset: Dataset) -> Callable[[int], Image.Image]:
    """i -> image i: that of the .beton file, or the generated one, all of which are drawn beforehand."""
    if dataset.images is not None:
        return dataset.images.jpeg
    assert dataset.numbers is not None
    chunks = torch.from_numpy(dataset.numbers).split(500)
    drawn = [spirograph.render(c).mul(255).round().byte().permute(0, 2, 3, 1) for c in chunks]
    pixels = torch.cat(drawn).numpy()
    return lambda i: Image.fromarray(pixels[i])


class Views(TorchDataset):
    """Two views of each of `count` pictures."""

    def __init__(self, picture: Callable[[int], Image.Image], count: int, transform: Callable[..., Any]) -> None:
        self.picture, self.count, self.transform = picture, count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.transform(self.picture(i))


def torchvision_transform(settings: Pretrain) -> v2.Compose:
    """PIL image -> one float view [3, H, W], by the settings' augmentation."""
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
    """A copy of a SimCLR model, without its probe, whose batch norms are torch's."""
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
    if device.type == "cuda" and distributed.world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model

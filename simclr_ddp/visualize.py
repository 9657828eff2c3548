"""Pictures of a run, under RUN_DIR/figures: its curves, and a page of views as the model sees them."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from simclr_ddp import cli
from simclr_ddp.config import Pretrain, Visualize
from simclr_ddp.data import VIEWS, evaluation_batches, evaluation_images, open_dataset, views_at
from simclr_ddp.metrics import read_metrics
from simclr_ddp.pretrain import make_augmentation
from simclr_ddp.run import read_settings
from simclr_ddp.runtime import Runtime

CURVES = {
    "loss": "loss",
    "contrastive_top1": "contrastive top-1",
    "probe_top1": "online probe, validation top-1",
    "learning_rate": "learning rate",
}


def main(argv: list[str] | None = None) -> int:
    return cli.run(visualize, Visualize, "RUN", __doc__ or "", argv)


def visualize(wanted: Visualize) -> None:
    plt.switch_backend("Agg")  # files only, no window
    run_dir = Path(wanted.run)
    settings = read_settings(run_dir)
    folder = run_dir / "figures"
    folder.mkdir(exist_ok=True)
    for path in (curves(run_dir, folder / "curves.png"), views_page(settings, wanted, folder / "views.png")):
        cli.say(f"drew {path}")


def curves(run_dir: Path, path: Path) -> Path:
    """Every metric that the run has, against the epoch. Raises ValueError if there are no metrics yet."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{run_dir}/metrics.jsonl has no lines yet: let the run take log.every_steps steps first")
    shown = [key for key in CURVES if any(key in line for line in lines)]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 2.8), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], shown, strict=True):
        points = [(line["epoch"], line[key]) for line in lines if key in line]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "", color="tab:blue")
        axis.set(title=CURVES[key], xlabel="epoch")
        axis.grid(alpha=0.3)
        if key == "loss" and lines[0]["loss"] > 0:
            axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def views_page(settings: Pretrain, wanted: Visualize, path: Path) -> Path:
    """A row an image: what an evaluation sees of it, then its augmented views, two an epoch."""
    device, a, size = torch.device("cpu"), settings.data.augmentation, settings.data.size
    dataset = open_dataset(settings.data.train, "train")
    index = np.arange(min(wanted.images, dataset.count))
    batches = evaluation_batches(
        dataset, index, size=size, batch_size=len(index), workers=0, loader="torch", device=device
    )
    columns = [evaluation_images(dataset, a.mean, a.std, torch.float32)(next(batches).inputs)[0]]
    augment = make_augmentation(settings, dataset, Runtime(device, "fp32", torch.get_num_threads()))
    scale = (a.crop_scale[0], a.crop_scale[1])
    for epoch in range(-(-wanted.views // VIEWS)):
        inputs = views_at(dataset, settings.seed, epoch, index, size=size, crop_scale=scale)
        columns += list(augment(inputs, epoch, torch.from_numpy(index)))
    page = torch.stack(columns[: 1 + wanted.views], 1)  # [images, columns, 3, H, W]
    if dataset.images is not None and dataset.numbers is None:  # undo the normalisation; Spirograph has none
        page = page * torch.tensor(a.std)[:, None, None] + torch.tensor(a.mean)[:, None, None]

    rows, count = page.shape[:2]
    figure, axes = plt.subplots(
        rows, count, figsize=(1.1 * count, 1.1 * rows + 0.3), layout="constrained", squeeze=False
    )
    for row, pictures in zip(axes, page.clamp(0, 1).permute(0, 1, 3, 4, 2).numpy(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for i, axis in enumerate(axes[0]):
        axis.set_title(f"epoch {(i - 1) // VIEWS}, view {(i - 1) % VIEWS}" if i else "image", fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())

"""Pictures of a run, in RUN_DIR/figures: `python -m simclr_ddp.visualize RUN_DIR key=value ...`

Its curves, a page of views as the model sees them, and maps of the representations of test images by PCA and t-SNE.
Works while the run is training, too: the maps are then those of its newest checkpoint. Each file is a PNG of less than
300 KB, and the same run gives the same files.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from simclr_ddp import cli, distributed
from simclr_ddp.config import Pretrain, Visualize
from simclr_ddp.curves import curves
from simclr_ddp.data import VIEWS, Dataset, evaluation_batches, evaluation_images, open_dataset, views_at
from simclr_ddp.draws import permutation
from simclr_ddp.figures import WIDTH, save
from simclr_ddp.labelled import number_names
from simclr_ddp.maps import LEAST, colouring, maps, scatter, thumbnails
from simclr_ddp.metrics import read_metrics
from simclr_ddp.pretrain import make_augmentation, make_objective
from simclr_ddp.representations import load_encoder, representations
from simclr_ddp.run import read_settings
from simclr_ddp.runtime import Runtime, setup


def main(argv: list[str] | None = None) -> int:
    return cli.run(visualize, Visualize, "RUN", __doc__ or "", argv)


def visualize(wanted: Visualize) -> None:
    run_dir = Path(wanted.run)
    settings = read_settings(run_dir)
    lines = read_metrics(run_dir / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{run_dir}/metrics.jsonl has no lines yet: let the run take log.every_steps steps first")
    folder = run_dir / "figures"
    folder.mkdir(exist_ok=True)
    title = f"{run_dir.resolve().name}, step {lines[-1]['step']:,}"
    untrained_loss = make_objective(settings).untrained_loss(settings.optim.global_batch_size)
    save(curves(lines, title, untrained_loss), folder / "curves.png")
    dataset = open_dataset(settings.data.train, "train")
    save(views_page(dataset, settings, wanted), folder / "views.png", photographs=True)
    if wanted.maps != "none":
        draw_maps(images_to_map(dataset, settings, wanted), settings, wanted, folder)


def views_page(dataset: Dataset, settings: Pretrain, wanted: Visualize) -> Figure:
    """A row an image: what an evaluation sees of it, then its augmented views, two an epoch."""
    a, size = settings.data.augmentation, settings.data.size
    index = np.arange(min(wanted.images, dataset.count))
    augment = make_augmentation(settings, dataset, Runtime(torch.device("cpu"), "fp32", torch.get_num_threads()))
    scale, views = (a.crop_scale[0], a.crop_scale[1]), []
    for epoch in range(-(-wanted.views // VIEWS)):
        inputs = views_at(dataset, settings.seed, epoch, index, size=size, crop_scale=scale)
        views += list(augment(inputs, epoch, torch.from_numpy(index)))
    augmented = torch.stack(views[: wanted.views], 1)  # [images, views, 3, H, W]
    if dataset.numbers is None:  # undo the normalisation; Spirograph has none
        augmented = augmented * torch.tensor(a.std)[:, None, None] + torch.tensor(a.mean)[:, None, None]
    page = torch.cat([whole_images(dataset, index, size)[:, None], augmented], 1)

    rows, count = page.shape[:2]
    side = WIDTH / count
    figure = Figure(figsize=(WIDTH, side * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, count, squeeze=False)
    for row, pictures in zip(axes, page.clamp(0, 1).permute(0, 1, 3, 4, 2).numpy(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for i, axis in enumerate(axes[0]):
        axis.set_title(f"epoch {(i - 1) // VIEWS}\nview {(i - 1) % VIEWS}" if i else "image", fontsize=11)
    return figure


def whole_images(dataset: Dataset, index: np.ndarray, size: int, largest: int | None = None) -> Tensor:
    """[n, 3, H, W] in [0, 1]: what an evaluation sees of the images `index` [n], `largest` pixels high at most."""
    images = evaluation_images(dataset, [0.0] * 3, [1.0] * 3, torch.float32)
    batches = evaluation_batches(
        dataset, index, size=size, batch_size=64, workers=0, loader="torch", device=torch.device("cpu")
    )
    found = []
    for batch in batches:
        part = images(batch.inputs)[0]
        if largest is not None and largest < part.shape[-1]:
            part = F.interpolate(part, size=(largest, largest), mode="bilinear", antialias=True)
        found.append(part)
    return torch.cat(found).clamp(0, 1)  # rounding may go beyond


def images_to_map(train: Dataset, settings: Pretrain, wanted: Visualize) -> Dataset:
    """What the maps show. Raises ValueError in one sentence if there is none, or of another kind than the run saw."""
    source, way_out = wanted.test or settings.data.test, "test=FILE.beton gives test images, maps=none draws no maps"
    if not source:
        raise ValueError(f"data.test is empty in the settings of the run: {way_out}")
    test = open_dataset(source, "test")
    if (train.numbers is None) != (test.numbers is None):
        kinds = ("generated", "photographs") if test.numbers is not None else ("photographs", "generated")
        raise ValueError(f"the test images ({source}) are {kinds[0]}, those of the run {kinds[1]}: {way_out}")
    if test.count < LEAST:
        raise ValueError(f"{source} holds {test.count} images, a map takes {LEAST}: {way_out}")
    return test


def draw_maps(test: Dataset, settings: Pretrain, wanted: Visualize, folder: Path) -> None:
    """Every map of the representations of the same random test images, as points and in the plane as thumbnails."""
    index = permutation(0, 0, test.count)[: wanted.points]  # in this order, so that no class lies above the others
    runtime = setup(wanted.device, "fp32", 0)
    try:
        loaded = load_encoder(wanted.run)
        h = representations(
            loaded.encoder,
            test,
            loaded.spec,
            runtime,
            index=index,
            batch_size=256,
            workers=settings.data.workers,
            loader=settings.data.loader,
            title=str(loaded.file),
        )
    finally:
        distributed.stop()
    if not distributed.is_main():
        return
    colours = colouring(test, index, "" if test.labels is None or test.has_classes else number_names(test)[0])
    step = "" if loaded.step is None else f", step {loaded.step:,}"
    subtitle = f"{Path(wanted.run).resolve().name}{step}, {len(index):,} images"

    def pictures(chosen: np.ndarray) -> np.ndarray:
        return whole_images(test, index[chosen], loaded.spec.size, 40).permute(0, 2, 3, 1).numpy()

    for drawn in maps(h, wanted.maps):
        save(scatter(drawn, colours, subtitle), folder / f"{drawn.name}.png")
        if drawn.points.shape[1] == 2:
            save(thumbnails(drawn, colours, subtitle, pictures), folder / f"{drawn.name}_thumbnails.png")


if __name__ == "__main__":
    sys.exit(main())

"""Plot a run to RUN/figures, or compare several: `python -m simclr_ddp.visualize RUN [RUN ...] key=value ...`

The plots are the curves of the run, a page of views as the model sees them, a confusion matrix of each evaluation that
kept its predictions, and of the representations of test images maps by PCA and t-SNE, strips of nearest neighbours and
the spectrum; without test images, of the training images. While the run is still training, they show its newest
checkpoint. Each plot is a PNG of less than 300 KB, or a file for a paper with format=svg or pdf.

atlas.html is a map to walk through in a browser, without network: it shows the image at a point and its nearest
neighbours, and finds images by class, number or file name. gif=true adds a three-dimensional map that turns, and
projector=true files for TensorBoard's projector. Equal runs give equal files. output=FOLDER writes to FOLDER/figures.

Of several runs, only their curves are drawn, in one picture, comparison.png of the first run or of output=FOLDER.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_ddp.config import command
from simclr_ddp.config.schema import Pretrain, Visualize
from simclr_ddp.system import console, files
from simclr_ddp.system.console import printable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from simclr_ddp.data.dataset import Dataset
    from simclr_ddp.plots.maps import Map

BATCH = 256  # images per forward pass and rank
NEIGHBOURS = 12  # of each image of the atlas
STRIPS, STRIP = 8, 10  # images on the page of strips, and neighbours of each
CLUSTERS = 10  # of the atlas, without classes or with more than 40


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    more = [i for i, a in enumerate(given) if not a.startswith("-") and not command.is_option(a, Visualize)][1:]
    rest = [a for i, a in enumerate(given) if i not in more]
    called = partial(visualize, more=[given[i] for i in more])
    return command.run(called, Visualize, "RUN [RUN ...]", __doc__ or "", rest)


def visualize(options: Visualize, more: list[str]) -> None:
    if more:
        compare([options.run, *more], options)
    else:
        show(options)


def compare(runs: list[str], options: Visualize) -> None:
    """Plot the curves of several runs in one picture."""
    from simclr_ddp.plots.curves import comparison
    from simclr_ddp.plots.png import save
    from simclr_ddp.runs.directory import read_settings

    names = [Path(run).resolve().name for run in runs]
    lines = {}
    for run, name in zip(runs, names, strict=True):
        read_settings(Path(run))  # raises ValueError if it is no run
        if run in lines:
            raise ValueError(f"{run} is given twice; give each run once")
        lines[printable(name if names.count(name) == 1 else run)] = metrics_of(run)
    folder = figures_folder(options)
    if console.main_rank():
        save(comparison(lines, f"{len(runs)} runs"), folder / f"comparison.{options.format}")


def metrics_of(run: str) -> list[dict[str, Any]]:
    from simclr_ddp.runs.metrics import read_metrics

    lines = read_metrics(Path(run) / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{run}/metrics.jsonl has no lines yet; wait until the run has done log.every_steps steps")
    return lines


def show(options: Visualize) -> None:
    """Draw every plot of one run."""
    from simclr_ddp.plots.curves import curves
    from simclr_ddp.plots.png import save
    from simclr_ddp.runs.directory import read_settings
    from simclr_ddp.training.components import make_objective

    run_dir = Path(options.run)
    settings = read_settings(run_dir)
    lines = metrics_of(options.run)
    folder = figures_folder(options)
    draws = console.main_rank()  # the other ranks only share the forward passes of the maps
    title = f"{printable(run_dir.resolve().name)}, step {lines[-1]['step']:,}"
    untrained_loss = make_objective(settings).untrained_loss(settings.optim.global_batch_size)
    if draws:
        save(curves(lines, title, untrained_loss), folder / f"curves.{options.format}")
    train, fault = training_images(settings, options)
    if train is not None and draws:
        draw_views(train, settings, options, folder)
    if draws:
        draw_confusion(train, options, folder)
    if options.maps != "none" and (train is not None or options.test or settings.data.test):
        draw_maps(*images_to_map(train, settings, options), settings, options, folder)
    if fault:
        raise ValueError(fault)


def figures_folder(options: Visualize) -> Path:
    """Create the folder of the plots. Raises OSError if no file can be written there."""
    folder = Path(options.output or options.run) / "figures"
    if not console.main_rank():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.replace_atomically(folder / ".trial", lambda temporary: temporary.write_bytes(bytes(1 << 20)))
        (folder / ".trial").unlink()
    except OSError as error:
        raise OSError(
            f"plots can't be written to {folder} ({error.strerror}); free space there, or choose another folder with "
            "output=..."
        ) from error
    return folder


def training_images(settings: Pretrain, options: Visualize) -> "tuple[Dataset | None, str]":
    """Open the training images of the run; if they have moved, return None and what to do."""
    from simclr_ddp.data.dataset import open_dataset
    from simclr_ddp.runs import checkpoint

    try:
        train = open_dataset(options.train or settings.data.train, "train", settings.data.spirograph)
    except FileNotFoundError:
        if options.train:
            raise
        return None, (
            f"views.png is not drawn, since data.train={settings.data.train} of the run does not exist here; give its "
            "file as train=FILE.beton"
        )
    known = checkpoint.trained_on(Path(options.run) / "checkpoints")
    if known and not train.is_known_as(known):
        console.warn(
            f"train={train.source}: its content ({train.fingerprint}) is not that of the images the run was trained on "
            f"({known}); give their file as train=FILE.beton"
        )
    return train, ""


def draw_views(train: "Dataset", settings: Pretrain, options: Visualize, folder: Path) -> None:
    import torch

    from simclr_ddp.distributed.runtime import Runtime
    from simclr_ddp.plots.png import save
    from simclr_ddp.plots.views import views_page
    from simclr_ddp.training.components import make_augmentation

    augmentation = settings.data.augmentation
    page = views_page(
        train,
        make_augmentation(settings, train, Runtime(torch.device("cpu"), "fp32", torch.get_num_threads())),
        images=options.images,
        views=options.views,
        seed=settings.seed,
        size=settings.data.size,
        crop_scale=(augmentation.crop_scale[0], augmentation.crop_scale[1]),
        mean=augmentation.mean,
        std=augmentation.std,
    )
    save(page, folder / f"views.{options.format}", photographs=True)


def draw_confusion(train: "Dataset | None", options: Visualize, folder: Path) -> None:
    """Plot the confusion matrix of each evaluation of the run that kept the predictions of its images."""
    from simclr_ddp.plots.confusion import confusion
    from simclr_ddp.plots.png import save
    from simclr_ddp.runs import evaluations

    for found in evaluations.read_all(Path(options.run))[0]:
        if not found.path.with_suffix(".npz").exists():
            continue
        try:
            arrays = evaluations.read_arrays(found.path)
        except ValueError as error:
            console.warn(f"{error}; its confusion matrix is not drawn")
            continue
        if "predictions" not in arrays:
            continue
        labels, predictions = arrays["labels"], arrays["predictions"]
        known = train is not None and train.is_known_as(found.record.get("train", {}).get("fingerprint", ""))
        names = [f"class {i}" for i in range(int(max(labels.max(), predictions.max())) + 1)]
        if known and train is not None and train.classes:
            names = train.classes
        step = "" if found.record["step"] is None else f", step {found.record['step']:,}"
        title = printable(f"{found.name}{step}, {Path(found.record['test']['source']).name}")
        save(confusion(labels, predictions, names, title), folder / f"confusion-{found.path.stem}.{options.format}")


def file_names(images: "Dataset") -> list[str] | None:
    """Names of the image files of a data set; None, with a warning if their file is damaged, without them."""
    try:
        return images.file.names() if images.stored else None
    except (ValueError, OSError) as error:
        console.warn(f"{error}; the atlas is drawn without file names")
        return None


def images_to_map(train: "Dataset | None", settings: Pretrain, options: Visualize) -> "tuple[Dataset, str]":
    """Open the images of the maps, and name their split: test, or train if there are no test images.

    Raises ValueError if there are too few, or if their kind is not that of the run.
    """
    from simclr_ddp.data.dataset import open_dataset
    from simclr_ddp.plots.maps import LEAST

    source, way_out = options.test or settings.data.test, "give test images as test=FILE.beton, or set maps=none"
    if source:
        split = "test"
        try:
            images = open_dataset(source, split, settings.data.spirograph)
        except FileNotFoundError as error:
            if options.test:
                raise
            raise ValueError(f"data.test={source} of the run does not exist here; {way_out}") from error
    else:
        assert train is not None
        split, images, source = "train", train, train.source
        console.say("the run has no test images: maps show its training images")
    rendered = train.rendered if train is not None else settings.data.train == "spirograph"
    if rendered != images.rendered:
        kinds = ("generated", "photographs") if images.rendered else ("photographs", "generated")
        raise ValueError(f"{split}={source}: these images are {kinds[0]}, those of the run {kinds[1]}; {way_out}")
    if images.count < LEAST:
        raise ValueError(
            f"{split}={source}: {images.count} images are fewer than {LEAST}, the minimum of a map; {way_out}"
        )
    return images, split


def draw_maps(images: "Dataset", split: str, settings: Pretrain, options: Visualize, folder: Path) -> None:
    """Compute representations of random images with all ranks, and draw on rank 0 all that shows them."""
    from simclr_ddp.data.draws import permutation
    from simclr_ddp.distributed import collectives
    from simclr_ddp.distributed.watchdog import watching
    from simclr_ddp.evaluation.features import project, representations
    from simclr_ddp.evaluation.labels import number_names
    from simclr_ddp.plots.maps import colouring, maps, scatter, thumbnails
    from simclr_ddp.plots.png import save, write
    from simclr_ddp.plots.turning import turning
    from simclr_ddp.plots.views import evaluation_views
    from simclr_ddp.runs.encoder import load_encoder, load_head
    from simclr_ddp.training import lifecycle, preflight

    index = permutation(0, 0, images.count)[: options.points]  # a random order, so that no class covers the others
    data = settings.data
    with lifecycle.joined(options.device, "fp32", 0, options.timeout) as runtime:
        loaded = load_encoder(options.run)
        preflight.evaluation((images,), data.workers, data.loader, BATCH, loaded.spec.size)
        with watching(options.timeout, "start the command again"):
            h = representations(
                loaded.encoder,
                images,
                loaded.spec,
                runtime,
                index=index,
                batch_size=BATCH,
                workers=data.workers,
                loader=data.loader,
                title=str(loaded.file),
            )
    if not collectives.is_main():
        return
    colours = colouring(images, index, number_names(images)[0] if images.has_number_labels else "")
    step = "" if loaded.step is None else f", step {loaded.step:,}"
    shown = f"{len(index):,} {'training ' * (split == 'train')}images of {Path(images.source).name}"
    subtitle = printable(f"{Path(options.run).resolve().name}{step}, {shown}")

    def pictures(chosen: "np.ndarray") -> "np.ndarray":
        return evaluation_views(images, index[chosen], loaded.spec.size, 40).permute(0, 2, 3, 1).numpy()

    flat = []
    for drawn in maps(h, options.maps):
        save(scatter(drawn, colours, subtitle), folder / f"{drawn.name}.{options.format}")
        if drawn.points.shape[1] == 2:
            plot = thumbnails(drawn, colours, subtitle, pictures)
            save(plot, folder / f"{drawn.name}_thumbnails.{options.format}")
            flat.append(drawn)
        elif options.gif:
            write(turning(drawn, colours, subtitle), folder / f"{drawn.name}.gif")
    spectra = {"representation h": h}
    try:
        spectra["embedding z"] = project(h, load_head(loaded), runtime, BATCH)
    except ValueError:
        console.say("the spectrum shows no embeddings z: the run has no checkpoint of this encoder")
    draw_spectrum(spectra, options, subtitle, folder)
    draw_neighbours(images, index, h, flat[::-1], settings.data.size, options, subtitle, folder)


def draw_spectrum(vectors: "dict[str, Tensor]", options: Visualize, subtitle: str, folder: Path) -> None:
    import torch

    from simclr_ddp.evaluation.label_free import rankme
    from simclr_ddp.plots.png import save
    from simclr_ddp.plots.spectrum import spectrum

    spectra, words = {}, []
    for name, found in vectors.items():
        x = found.double()
        spectra[name] = (torch.linalg.svdvals(x - x.mean(0)).square() / len(x)).numpy()
        words.append(f"RankMe of {name.split()[-1]} {rankme(torch.linalg.svdvals(x)):.1f}")
    title = f"spectrum of the covariance, {', '.join(words)}\n{subtitle}"
    save(spectrum(spectra, title), folder / f"spectrum.{options.format}")


def draw_neighbours(
    images: "Dataset",
    index: "np.ndarray",
    h: "Tensor",
    flat: "list[Map]",
    size: int,
    options: Visualize,
    subtitle: str,
    folder: Path,
) -> None:
    """Plot strips of nearest neighbours, and write the atlas and, if wanted, the files of the projector.

    index  [n] positions of the images
    h      [n, D] their representations
    flat   their two-dimensional maps
    size   pixels per side of pictures that are rendered
    """
    import numpy as np
    import torch

    from simclr_ddp.evaluation.clusters import clusters
    from simclr_ddp.evaluation.knn import nearest
    from simclr_ddp.evaluation.labels import number_names
    from simclr_ddp.plots.atlas import Groups, Scores, page, picture_side
    from simclr_ddp.plots.png import save, write
    from simclr_ddp.plots.projector import write_projector
    from simclr_ddp.plots.strips import strips
    from simclr_ddp.plots.views import evaluation_views

    console.say(f"neighbours and pictures of {len(index):,} images ...")
    found = list(nearest(h, h, min(NEIGHBOURS, len(h) - 1), own=True))
    cosines, neighbours = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    side = picture_side(len(index), int(images.file.sizes[index].max()) if images.decoded else size)
    parts = np.array_split(index, -(-len(index) // 4096))
    pictures = torch.cat(
        [(evaluation_views(images, part, side) * 255).round().byte().permute(0, 2, 3, 1) for part in parts]
    ).numpy()
    labels = None if images.labels is None else images.labels[index]
    classes = images.class_count
    names = images.classes or [f"class {i}" for i in range(classes)]

    rows = np.arange(min(STRIPS, len(index)))
    strip = np.concatenate([rows[:, None], neighbours[rows, :STRIP]], 1)
    of_strip = labels[strip] if classes and labels is not None else None
    title = f"nearest neighbours by cosine of h\n{subtitle}"
    plot = strips(pictures[strip], cosines[rows, :STRIP], of_strip, names, title)
    save(plot, folder / f"neighbours.{options.format}", photographs=True)

    colourings: list[Groups | Scores] = []
    if classes and labels is not None:
        colourings.append(Groups("class", names, labels, searchable=True))
        colourings.append(Scores("neighbours of the same class", (labels[neighbours] == labels[:, None]).mean(1)))
    elif labels is not None and not np.isfinite(labels).all():
        console.warn(f"{images.source}: some labels are not finite, so the atlas has no colours for them")
    elif labels is not None:
        colourings += [Scores(name, column) for name, column in zip(number_names(images), labels.T, strict=True)]
    k = classes if 2 <= classes <= 40 else CLUSTERS
    of_image = clusters(h, k).numpy()
    listed = file_names(images)
    colourings.append(Groups("cluster", [f"cluster {i + 1}" for i in range(k)], of_image))
    colourings.append(Scores("cosine to the nearest neighbour", cosines[:, 0]))
    text = page(
        {{"pca_2d": "PCA", "tsne_2d": "t-SNE"}[drawn.name]: drawn.points for drawn in flat},
        pictures,
        colourings,
        neighbours,
        cosines,
        numbers=index,
        names=None if listed is None else [listed[i] for i in index],
        title="Atlas",
        subtitle=subtitle,
    )
    write(text.encode(), folder / "atlas.html")
    if options.projector:
        columns: dict[str, Sequence[object]] = {"number": index.tolist(), "cluster": (of_image + 1).tolist()}
        if classes and labels is not None:
            columns = {"class": [names[label] for label in labels]} | columns
        if listed is not None:
            columns = {"file": [listed[i] for i in index]} | columns
        (folder / "projector").mkdir(exist_ok=True)
        write_projector(folder / "projector", h.numpy(), pictures, columns)
        console.say(f"written to {folder / 'projector'}; tensorboard --logdir {folder / 'projector'} shows it")


if __name__ == "__main__":
    sys.exit(main())

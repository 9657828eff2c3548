"""Maps of representations in two and three dimensions: PCA and t-SNE, coloured by label, also with thumbnails."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from simclr_ddp.data.dataset import Dataset
from simclr_ddp.plots.png import WIDTH
from simclr_ddp.system import console

LEAST = 10  # smallest number of images on a map
PERPLEXITY = 30  # of t-SNE: approximate number of neighbours of an image
COMPONENTS = 50  # PCA components that are the input of t-SNE
LARGEST = 10_000  # images of a three-dimensional t-SNE, which would take hours for more
THUMBNAILS = 26  # thumbnails per side
LEGEND = 20  # largest number of classes with a legend


Colour = tuple[float, float, float, float]  # RGBA in [0, 1]


class Map(NamedTuple):
    name: str  # file name without suffix
    points: np.ndarray  # float64 [n, 2] or [n, 3]
    title: str
    axes: list[str]  # axis labels; [] if axes have no meaning


class Colouring(NamedTuple):
    rgba: np.ndarray  # [n, 4], colour of each image
    legend: dict[str, Colour]  # colour of each class; {} without a legend
    bar: ScalarMappable | None  # colour bar, if colours are numbers
    meaning: str  # meaning of the colour bar, or of colours without a legend


def maps(h: Tensor, methods: str) -> Iterator[Map]:
    """Yield maps of representations h [n, D] by PCA, and by t-SNE if methods is "all".

    Raises ValueError if the representations are constant or not finite.
    """
    scores, shares = pca(h, COMPONENTS)
    for k in (2, 3):
        names = [f"component {i + 1}: {share:.1%}" for i, share in enumerate(shares[:k])]
        title = f"PCA: {k} components explain {shares[:k].sum():.1%} of the variance"
        yield Map(f"pca_{k}d", scores[:, :k], title, names)
    if methods != "all":
        return
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError:
        console.warn("maps=all: t-SNE needs scikit-learn and is skipped; pip install scikit-learn, or set maps=pca")
        return
    for k in (2, 3):
        if k == 3 and len(h) > LARGEST:
            console.say(f"t-SNE in 3 dimensions is skipped, since it takes hours for more than {LARGEST:,} images")
            continue
        console.say(f"t-SNE of {len(h):,} images in {k} dimensions, which takes a while ...")
        yield Map(f"tsne_{k}d", tsne(scores, k), "t-SNE: neighbours stay near, distances mean little", [])


def pca(h: Tensor, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Project h [n, D] on its first k <= components principal components; return [n, k] and their variance shares [k].

    h is centred, not scaled. The entry of largest magnitude of each component is positive.
    """
    if not h.isfinite().all():
        raise ValueError("representations of the encoder are not finite; use an earlier checkpoint")
    x = h.double()
    centred = x - x.mean(0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    if singular[0] <= 1e-6 * x.norm():
        raise ValueError("the encoder gives every image the same representation, so maps are empty; set maps=none")
    directions = directions[:components]
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    shares = singular.square() / singular.square().sum()
    return (centred @ (signs * directions).T).numpy(), shares[:components].numpy()


def tsne(scores: np.ndarray, dimensions: int) -> np.ndarray:
    """Map the leading principal components [n, k] to float64 [n, dimensions] by t-SNE, initialised by PCA.

    It runs on one thread, since several threads sum in varying order, which changes the map. Requires scikit-learn.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    start = scores[:, :dimensions] * (1e-4 / scores[:, 0].std())
    perplexity = min(PERPLEXITY, (len(scores) - 1) / 3)
    with threadpool_limits(1):
        made = TSNE(dimensions, perplexity=perplexity, init=start.astype(np.float32), random_state=0)
        return made.fit_transform(scores.astype(np.float32)).astype(np.float64)


def colouring(dataset: Dataset, index: np.ndarray, number: str) -> Colouring:
    """Colour images by class, or by the first number of the label, named `number`; one colour without labels."""
    if dataset.labels is None:
        return Colouring(np.tile(matplotlib.colormaps["tab10"](0), (len(index), 1)), {}, None, "no labels")
    labels = dataset.labels[index]
    if not dataset.has_classes:
        bar = ScalarMappable(Normalize(labels[:, 0].min(), labels[:, 0].max()), "viridis")
        return Colouring(bar.to_rgba(labels[:, 0]), {}, bar, number)
    count = dataset.class_count
    if count > LEGEND:
        colours = matplotlib.colormaps["turbo"](labels / (count - 1))
        return Colouring(colours, {}, None, f"coloured by class ({count:,})")
    palette = matplotlib.colormaps["tab10" if count <= 10 else "tab20"]
    names = dataset.classes or [f"class {i}" for i in range(count)]
    return Colouring(palette(labels), {names[i]: palette(int(i)) for i in np.unique(labels)}, None, "")


def scatter(drawn: Map, colours: Colouring, subtitle: str) -> Figure:
    """Plot one point per image; three-dimensional maps are shown from two sides."""
    flat = drawn.points.shape[1] == 2
    figure = _figure(6.4 if flat else 4.9, drawn, colours, subtitle)
    size = float(np.clip(32_000 / len(drawn.points), 4, 60))
    if flat:
        axis = figure.add_subplot()
        x, y = drawn.points.T
        axis.scatter(x, y, s=size, c=colours.rgba, alpha=0.75, linewidths=0)
        axis.set_aspect("equal", adjustable="datalim")
        _finish(figure, [axis], drawn, colours)
        return figure
    sides = [figure.add_subplot(1, 2, i + 1, projection="3d", elev=20, azim=azim) for i, azim in enumerate((-60, 30))]
    for axis in sides:
        axis.scatter(*drawn.points.T, s=size * 0.6, c=colours.rgba, alpha=1, linewidths=0)
        axis.set_box_aspect(None, zoom=1.05)
    _finish(figure, sides, drawn, colours)
    return figure


def thumbnails(drawn: Map, colours: Colouring, subtitle: str, pictures: Callable[[np.ndarray], np.ndarray]) -> Figure:
    """Plot thumbnails of images that do not overlap, framed in their colours.

    pictures  maps positions of images [k] to pictures [k, H, W, 3] in [0, 1]
    """
    low, high = drawn.points.min(0), drawn.points.max(0)
    side = (high - low).max() / (THUMBNAILS - 1)
    chosen = apart(drawn.points, side)
    width, height = high - low + 2 * side
    figure = _figure(
        float(np.clip(7.3 * height / width + 1.2, 4, 8.2)), drawn, colours, f"{subtitle}, {len(chosen)} shown"
    )
    axis = figure.add_subplot()
    corners = drawn.points[chosen] - side / 2
    for (x, y), picture in zip(corners, pictures(chosen), strict=True):
        axis.imshow(picture, extent=(x, x + side, y, y + side), interpolation="antialiased")
    frames = [Rectangle((x, y), side, side) for x, y in corners]
    axis.add_collection(PatchCollection(frames, facecolors="none", edgecolors=colours.rgba[chosen], linewidths=1.5))
    axis.set(xlim=(low[0] - side, high[0] + side), ylim=(low[1] - side, high[1] + side))
    axis.set_aspect("equal", adjustable="box")
    _finish(figure, [axis], drawn, colours)
    return figure


def apart(points: np.ndarray, side: float) -> np.ndarray:
    """Select points [n, 2] greedily so that squares of that side around them do not overlap; return positions."""
    taken = [0]
    for i in range(1, len(points)):
        if (np.abs(points[taken] - points[i]).max(1) >= side).all():
            taken.append(i)
    return np.array(taken)


def _figure(height: float, drawn: Map, colours: Colouring, subtitle: str) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    note = "" if colours.bar or colours.legend else f", {colours.meaning}"
    figure.suptitle(f"{drawn.title}\n{subtitle}{note}", parse_math=False)
    return figure


def _finish(figure: Figure, axes: list[Axes], drawn: Map, colours: Colouring) -> None:
    """Label the axes and add the legend or colour bar."""
    for axis in axes:
        axis.spines[["top", "right"] if drawn.axes else list(axis.spines)].set_visible(False)
        axis.tick_params(labelsize=9, length=3 if drawn.axes else 0)
        for i, which in enumerate(("xaxis", "yaxis", "zaxis")[: drawn.points.shape[1]]):
            if drawn.axes:
                getattr(axis, which).set_label_text(drawn.axes[i])
            if not drawn.axes or drawn.points.shape[1] == 3:
                getattr(axis, which).set_ticklabels([])
                getattr(axis, which).labelpad = -10
    single = len(axes) == 1
    if colours.bar is not None:
        where = "right" if single else "bottom"
        figure.colorbar(
            colours.bar, ax=axes, shrink=0.6 if single else 0.4, aspect=30, location=where, label=colours.meaning
        )
    if not colours.legend:
        return
    handles = [Line2D([], [], marker="o", linestyle="", markersize=8, color=rgba) for rgba in colours.legend.values()]
    legend = figure.legend(
        handles,
        map(str, range(len(handles))),
        loc="outside right center" if single else "outside lower center",
        ncols=1 if single else 5,
        handletextpad=0.1,
        frameon=False,
    )
    for text, name in zip(legend.get_texts(), colours.legend, strict=True):  # a label such as `_a` would be skipped
        text.set(text=name if len(name) <= 24 else f"{name[:23]}…", parse_math=False)

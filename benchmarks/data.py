"""Measure images/s of data loading, next to FFCV and torchvision: `python -m benchmarks.data photos.tar workers=1,2`

Every source image gives two random-resized-crop views (area 0.08 to 1, aspect 3/4 to 4/3), uint8 on the CPU and with
no further augmentation. Variants:

* ours, loader=ffcv and loader=torch: `simclr_ddp.data.batches.training_batches`
* FFCV: two pipelines over one image field, random order, page cache, as an FFCV user writes it today
* torchvision: a DataLoader over the same JPEG bytes, Pillow, two RandomResizedCrops

All read one .beton file, in which the source's images are repeated until an epoch has about `images` samples. First a
complete epoch of each variant is checked: every sample once, shapes, pixels; an error ends the command. Then the rounds
are timed.

Timing: each variant has its own process, and one runs at a time. A round is one complete epoch of each variant, in
alternating order. The clock runs from the arrival of one batch to that of a later one, both while all workers are busy:
after the first batches, which wait for start-up and new memory, and before the last ones, when the workers run out of
work. The epoch is then read to its end, so nothing is prefetched while the next variant runs. The result is the rate of
a long epoch; the cost of starting and ending an epoch is not included. The consumer does nothing with a batch.

CPU is the processor time of the process and its workers in the timed part; other users of the machine disturb it least.
Memory is what they hold at the end of that part, the maximum over rounds: private and shared pages, each counted once,
without those of files (libraries, the .beton file in the page cache). Both need Linux, and are 0 elsewhere.
"""

import io
import json
import multiprocessing
import os
import shlex
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from simclr_ddp.config import command
from simclr_ddp.config.options import option
from simclr_ddp.data import beton
from simclr_ddp.data.batches import Share, training_batches, usable_loader
from simclr_ddp.data.convert import Storage, convert
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.draws import permutation
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.runs.provenance import describe
from simclr_ddp.system.console import say
from simclr_ddp.system.machine import cores

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
LABELS = {
    "ours_ffcv": "ours, loader=ffcv",
    "ours_torch": "ours, loader=torch",
    "ffcv": "FFCV, two pipelines",
    "torchvision": "torchvision",
}
SUFFIXES = (".jpg", ".jpeg")
LEAD = 6  # batches before the clock starts: FFCV's five buffers are new until then
KEPT = 64  # samples whose pixels are compared
LIMIT = 1200  # seconds for an epoch
MEAN_DIFFERENCE, MAX_DIFFERENCE = 1.5, 40  # of 255, between our two loaders

Batches = Iterator[tuple[Sequence[Tensor], np.ndarray]]  # V views uint8 [B, 3, H, W], samples int64 [B]


@dataclass
class DataBenchmark:
    source: str = option("", "folder of JPEGs (at any depth) or a .tar of them; empty: 64 are generated")
    workers: str = option("1,2", "numbers of workers, measured one after the other")
    batch_size: int = option(64, "images per batch", low=1)
    images: int = option(2048, "samples per epoch, rounded down to complete batches", low=1)
    size: int = option(224, "height and width of a view in pixels", low=8)
    rounds: int = option(10, "timed epochs of each variant", low=1)
    out: str = option("", "the .json to write, with a .png next to it; empty: benchmarks/results/data/<source>.json")


class Task(NamedTuple):
    """The measurement of one process."""

    path: Path  # the .beton file
    variant: str
    workers: int
    batch_size: int
    batches: int  # per epoch
    size: int


class Observed(NamedTuple):
    """An epoch of n samples, as a variant delivered it."""

    sample: np.ndarray  # int64 [n], in the order of delivery
    means: np.ndarray  # float32 [n, V], mean of each view's pixels
    kinds: list[str]  # every shape [V, B, 3, H, W] and dtype that a batch had
    views: np.ndarray  # uint8 [m, V, 3, H, W] of samples 0, 1, ..., m - 1


class Measured(NamedTuple):
    images_per_second: float
    cpu: float  # seconds of all processes per image
    memory: int  # bytes


def main(argv: list[str] | None = None) -> int:
    return command.run(run, DataBenchmark, "[SOURCE]", __doc__ or "", argv)


def run(settings: DataBenchmark) -> None:
    begin = time.perf_counter()
    workers = _workers(settings.workers)
    batches = settings.images // settings.batch_size
    least = LEAD + 2 * max(workers) + 4
    if batches < least:
        raise ValueError(
            f"images={settings.images}: this makes {batches} batches of {settings.batch_size}, but {least} are needed; "
            "raise images or lower batch_size"
        )
    name = Path(settings.source).stem if settings.source else "generated"
    out = Path(settings.out or f"benchmarks/results/data/{name}.json")
    if out.suffix != ".json":
        raise ValueError(f"out={out}: it does not end in .json; name a .json file")
    variants = list(LABELS)
    loader, reason = usable_loader("auto")
    if loader != "ffcv":
        variants = ["ours_torch", "torchvision"]
        say(f"note: {reason}, so its variants are left out: make setup installs it")
    results: list[dict[str, Any]] = []
    checks = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.beton"
        about = write_samples(settings.source, path, batches * settings.batch_size)
        say(f"{name}: {about['files']:,} images, repeated to {about['samples']:,} ({about['megabytes']:,.0f} MB)")
        for place, k in enumerate(workers):
            tasks = [Task(path, v, k, settings.batch_size, batches, settings.size) for v in variants]
            with _processes(tasks) as processes:
                say(f"workers={k}: checking an epoch of each variant, which also warms it up ...")
                observed = {task.variant: process.run(0) for task, process in zip(tasks, processes, strict=True)}
                checks[f"workers={k}"] = check(observed, about["samples"], settings.batch_size, settings.size)
                measured = _rounds(variants, processes, settings.rounds, k, len(workers) - place - 1)
            results += _summary(measured, k)
    environment = describe(Runtime(torch.device("cpu"), "fp32", torch.get_num_threads()))
    environment["packages"]["numba"] = _version("numba")
    report = {
        "command": _command(settings),
        "environment": environment,
        "source": {"name": name} | about,
        "checks": checks,
        "results": results,
        "seconds": round(time.perf_counter() - begin),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    chart(results, name, out.with_suffix(".png"))
    say(table(results))
    say(f"wrote {out} and {out.with_suffix('.png').name}")


def _workers(text: str) -> list[int]:
    counts = text.replace(" ", "").split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise ValueError(f"workers={text}: numbers of at least 1 are expected; write for example workers=1,2")
    if max(map(int, counts)) > cores():
        raise ValueError(f"workers={text}: this process may use {cores()} cores; choose no more (FFCV refuses them)")
    return sorted({int(count) for count in counts})


def _command(settings: DataBenchmark) -> str:
    """Return the command that was given, without the folders of source and output."""
    default = DataBenchmark()
    options = [f"{k}={v}" for k, v in vars(settings).items() if k not in ("source", "out") and v != getattr(default, k)]
    source = [Path(settings.source).name] if settings.source else []
    return shlex.join(["python", "-m", "benchmarks.data", *source, *options])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- the samples


def write_samples(source: str, path: Path, count: int) -> dict[str, Any]:
    """Write `count` samples to a .beton file by repeating the source's images; the label of sample i is i.

    Raises ValueError or OSError if the source is missing, has no JPEG, or has one that can't be decoded.
    """
    pictures = []
    for name, data in _jpegs(source, count):
        try:
            pictures.append(convert(data, Storage()).picture)
        except Exception as error:  # Pillow raises almost anything at broken data
            raise ValueError(f"{name} can't be decoded ({error}): fix or remove it") from error
    samples = ((pictures[i % len(pictures)], i) for i in range(count))
    beton.write(path, samples, {"image": beton.PICTURES, "label": beton.INT}, count, {"source": Path(source).name})
    sizes = np.array([(picture.height, picture.width) for picture in pictures])
    return {
        "files": len(pictures),
        "samples": count,
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "mean_height_width": sizes.mean(0).round(1).tolist(),
        "largest_height_width": sizes.max(0).tolist(),
    }


def _jpegs(source: str, most: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of at most `most` JPEG files, a random choice if there are more."""
    if not source:
        yield from ((f"generated image {i}", data) for i, data in enumerate(_generated(min(64, most))))
    elif Path(source).is_dir():
        paths = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        yield from ((str(paths[i]), paths[i].read_bytes()) for i in _chosen(len(paths), most, source))
    elif Path(source).is_file():
        try:
            # Read where they lie, never extracted: no name in an archive can lead out of a folder.
            with tarfile.open(source) as archive:
                members = [m for m in archive if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES]
                for i in _chosen(len(members), most, source):
                    file = archive.extractfile(members[i])
                    assert file is not None
                    yield f"{members[i].name} in {source}", file.read()
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{source} is no tar archive, or is truncated ({error}): give another one") from error
    else:
        raise FileNotFoundError(f"{source} does not exist: give a folder of JPEGs or a .tar of them")


def _chosen(found: int, most: int, source: str) -> list[int]:
    if not found:
        raise ValueError(f"{source} has no JPEGs ({', '.join(SUFFIXES)}): give a folder or a .tar of them")
    return sorted(permutation(0, 0, found)[:most].tolist())


def _generated(count: int) -> Iterator[bytes]:
    """Yield JPEGs of about 500 x 375 pixels and 100 kB: smooth colours and some noise."""
    random = np.random.default_rng(0)
    for _ in range(count):
        height, width = (int(side) for side in random.integers((300, 400), (450, 600)))
        colours = Image.fromarray(random.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth * random.uniform(0.3, 1) + random.normal(0, 8, (height, width, 1))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


# --- the variants: (task) -> (number of an epoch) -> its batches


def open_variant(task: Task) -> Callable[[int], Batches]:
    if task.variant.startswith("ours_"):
        return _ours(task, task.variant.removeprefix("ours_"))
    return _ffcv(task) if task.variant == "ffcv" else _torchvision(task)


def _ours(task: Task, loader: str) -> Callable[[int], Batches]:
    dataset = open_dataset(str(task.path), "train")
    share = Share(seed=0, global_batch_size=task.batch_size, rank=0, world_size=1)

    def epoch(number: int) -> Batches:
        steps = range(number * task.batches, (number + 1) * task.batches)
        for batch in training_batches(
            dataset,
            share,
            steps,
            size=task.size,
            crop_scale=SCALE,
            workers=task.workers,
            device=torch.device("cpu"),
            loader=loader,
        ):
            assert batch.labels is not None and torch.equal(batch.labels, batch.sample)
            yield list(batch.inputs), batch.sample.numpy()

    return epoch


def _ffcv(task: Task) -> Callable[[int], Batches]:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec

    def view() -> Any:
        decoder = RandomResizedCropRGBImageDecoder((task.size, task.size), scale=SCALE, ratio=RATIO)
        return PipelineSpec("image", decoder=decoder, transforms=[])

    loader = Loader(
        str(task.path),
        batch_size=task.batch_size,
        num_workers=task.workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=0,
        pipelines={"image": view(), "second_view": view()},
    )

    def epoch(number: int) -> Batches:
        loader.next_epoch = number
        for first, label, second in loader:  # uint8 [B, H, W, 3], int64 [B, 1], uint8 [B, H, W, 3]
            yield [torch.from_numpy(v).permute(0, 3, 1, 2) for v in (first, second)], label.numpy()[:, 0]

    return epoch


class _TwoCrops(TorchDataset):
    """A data set whose item i is (two crops of image i as uint8 [2, 3, size, size], i)."""

    def __init__(self, path: Path, size: int) -> None:
        from torchvision.transforms import InterpolationMode, RandomResizedCrop

        self.images = beton.Beton(path)
        self.crop = RandomResizedCrop(size, SCALE, RATIO, InterpolationMode.BILINEAR, antialias=True)

    def __len__(self) -> int:
        return self.images.count

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from torchvision.transforms.functional import pil_to_tensor

        image = Image.open(io.BytesIO(self.images.stored(i).data)).convert("RGB")
        return torch.stack([pil_to_tensor(self.crop(image)) for _ in range(2)]), i


def _torchvision(task: Task) -> Callable[[int], Batches]:
    loader = DataLoader(
        _TwoCrops(task.path, task.size),
        batch_size=task.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=task.workers,
        persistent_workers=True,
    )

    def epoch(_: int) -> Batches:
        for views, sample in loader:
            yield list(views.unbind(1)), sample.numpy()

    return epoch


# --- one process for each variant


class Process:
    """A process that reads one epoch of a variant on request."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.task = task
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(task, theirs))
        self.process.start()
        theirs.close()

    def run(self, epoch: int) -> Any:
        """Return epoch 0 as Observed, any other as Measured. Raises ValueError if the variant failed."""
        name = f"{LABELS[self.task.variant]} with {self.task.workers} workers"
        try:
            self.pipe.send(epoch)
            if not self.pipe.poll(LIMIT):
                raise ValueError(f"{name} has not read an epoch within {LIMIT} s")
            answer = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(10)
            raise ValueError(f"{name}: its process ended with status {self.process.exitcode}") from None
        if isinstance(answer, str):
            raise ValueError(f"{name}: {answer}")
        return answer

    def close(self) -> None:
        self.pipe.close()  # ends the process where it waits
        self.process.join(10)
        self.process.terminate()
        self.process.join()


@contextmanager
def _processes(tasks: Sequence[Task]) -> Iterator[list[Process]]:
    started: list[Process] = []
    try:
        for task in tasks:
            started.append(Process(task))
        yield started
    except BaseException:
        for process in started:
            process.process.terminate()
        raise
    finally:
        for process in started:
            process.close()


def _serve(task: Task, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent acts on it
    try:
        epoch = open_variant(task)
        while True:
            number = pipe.recv()
            pipe.send(observe(epoch(number)) if number == 0 else measure(epoch(number), task))
    except EOFError:
        pass
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}")


def observe(batches: Iterable[tuple[Sequence[Tensor], np.ndarray]]) -> Observed:
    samples, means, kinds, kept = [], [], set(), {}
    for views, sample in batches:
        stacked = torch.stack(list(views))  # a copy: FFCV's buffers are used again
        kinds.add(f"{list(stacked.shape)} {stacked.dtype}")
        samples.append(np.array(sample))
        means.append(stacked.flatten(2).float().mean(2).T.numpy())
        for i in np.flatnonzero(sample < KEPT).tolist():
            kept[int(sample[i])] = stacked[:, i].numpy()
    views_kept = np.stack([kept[i] for i in sorted(kept)])
    return Observed(np.concatenate(samples), np.concatenate(means), sorted(kinds), views_kept)


def measure(batches: Batches, task: Task) -> Measured:
    """Measure rate and memory in the inner part of an epoch, and read it to its end."""
    # Several workers deliver in bursts, so a multiple of them starts and stops the clock at the same place of a burst.
    clocked = (task.batches - LEAD - 2 * task.workers) // task.workers * task.workers
    images = clocked * task.batch_size
    start = seconds = cpu = 0.0
    memory = 0
    for i, _ in enumerate(batches, start=1):
        if i == LEAD:
            cpu, start = _family(_cpu_seconds), time.perf_counter()
        elif i == LEAD + clocked:
            seconds, cpu = time.perf_counter() - start, _family(_cpu_seconds) - cpu
            memory = int(_family(_memory))
    assert i == task.batches
    return Measured(images / seconds, cpu / images, memory)


def _family(amount: Callable[[Path], float], process: Path = Path("/proc/self")) -> float:
    """Return the sum over a process and its descendants."""
    try:
        alone = amount(process)
        children = [child for file in process.glob("task/*/children") for child in file.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended, or this is not Linux
        return 0
    return alone + sum(_family(amount, Path("/proc") / child) for child in children)


def _cpu_seconds(process: Path) -> float:
    user, system = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _memory(process: Path) -> float:
    rows = [line.split() for line in (process / "smaps_rollup").read_text().splitlines()]
    return sum(1024 * int(row[1]) for row in rows if row[0] in ("Pss_Anon:", "Pss_Shmem:"))


# --- checks


def check(observed: dict[str, Observed], count: int, batch_size: int, size: int) -> dict[str, Any]:
    """Compare the variants' epochs. Raises ValueError for the first variant that is wrong."""
    ours = observed["ours_torch"]
    ours_means = ours.means[np.argsort(ours.sample)]
    found: dict[str, Any] = {}
    for name, seen in observed.items():
        if not np.array_equal(np.sort(seen.sample), np.arange(count)):
            raise ValueError(
                f"{LABELS[name]} is wrong: of {count} samples it delivered {len(set(seen.sample.tolist()))}, "
                f"in {len(seen.sample)} places"
            )
        kind = f"{[2, batch_size, 3, size, size]} {torch.uint8}"
        if seen.kinds != [kind]:
            raise ValueError(f"{LABELS[name]} is wrong: its batches are {', '.join(seen.kinds)}, not {kind}")
        means = seen.means[np.argsort(seen.sample)]
        found[name] = {"mean": float(means.mean()), "correlation": _correlation(means.mean(1), ours_means.mean(1))}
        if fault := _implausible(means, ours_means):
            raise ValueError(f"{LABELS[name]} is wrong: {fault}")
    if "ours_ffcv" in observed:
        difference = np.abs(observed["ours_ffcv"].views.astype(np.int16) - ours.views)
        mean, most = float(difference.mean()), int(difference.max())
        found["ours_ffcv"]["pixel_difference"] = {"mean": mean, "max": most}
        if mean > MEAN_DIFFERENCE or most > MAX_DIFFERENCE:
            raise ValueError(
                f"our two loaders differ by {mean:.2f} of 255 in the mean and {most} at most, "
                f"more than {MEAN_DIFFERENCE} and {MAX_DIFFERENCE}"
            )
    return found


def _implausible(means: np.ndarray, ours: np.ndarray) -> str:
    """Compare the means of a variant's views with ours, both [n, V] in sample order; return an error or "".

    The crops differ, so only properties of any crops of the same images are checked.
    """
    if (means == 0).mean() > (ours == 0).mean() + 0.01:
        return f"{(means == 0).mean():.0%} of its views are black"
    if np.array_equal(means[:, 0], means[:, 1]):
        return "its two views are the same"
    difference = (means - ours).mean(1)
    if abs(difference.mean()) > 2 + 5 * difference.std() / len(difference) ** 0.5:
        return f"its views' mean is {means.mean():.1f}, ours {ours.mean():.1f}"
    # Bright images give bright views. How much, as far as images differ, is known from our two views of an image.
    if _correlation(means.mean(1), ours.mean(1)) < 0.5 * _correlation(ours[:, 0], ours[:, 1]) - 0.1:
        return "its views are of other images than the sample numbers say"
    return ""


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread else 0.0


# --- rounds and results


def _rounds(
    variants: Sequence[str], processes: Sequence[Process], rounds: int, workers: int, blocks_left: int
) -> dict[str, list[Measured]]:
    """Measure each variant's rounds; `blocks_left` other numbers of workers follow later."""
    measured: dict[str, list[Measured]] = {name: [] for name in variants}
    begin = time.perf_counter()
    for r in range(1, rounds + 1):
        pairs = list(zip(variants, processes, strict=True))
        for name, process in pairs if r % 2 else reversed(pairs):
            measured[name].append(process.run(r))
        left = (time.perf_counter() - begin) / r * (rounds - r + blocks_left * (rounds + 1))
        rates = ", ".join(f"{LABELS[name]} {measured[name][-1].images_per_second:.0f}" for name in variants)
        say(f"workers={workers}, round {r} of {rounds}: {rates} images/s; about {left / 60:.1f} min left")
    return measured


def _summary(measured: dict[str, list[Measured]], workers: int) -> list[dict[str, Any]]:
    """Return one row per variant, ours first. Speed-ups are computed per round, which cancels slow minutes."""
    rates = {name: [m.images_per_second for m in rounds] for name, rounds in measured.items()}
    ours = next(iter(rates.values()))
    return [
        {
            "variant": name,
            "workers": workers,
            "images_per_second": _spread(rates[name]),
            "ours_is_faster_by": _spread([a / b for a, b in zip(ours, rates[name], strict=True)]),
            "cpu_ms_per_image": _spread([1000 * m.cpu for m in rounds]),
            "peak_memory_bytes": max(m.memory for m in rounds),
            "rounds": [round(rate, 1) for rate in rates[name]],
        }
        for name, rounds in measured.items()
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    least, lower, median, upper, most = (float(f"{q:.4g}") for q in np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper, "least": least, "most": most}


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [("", "workers", "images/s", "quartiles", "least-most", "ours is", "CPU/image", "memory")]
    for row in results:
        rate, factor = row["images_per_second"], row["ours_is_faster_by"]
        lines.append(
            (
                LABELS[row["variant"]],
                str(row["workers"]),
                f"{rate['median']:.0f}",
                f"{rate['lower_quartile']:.0f}-{rate['upper_quartile']:.0f}",
                f"{rate['least']:.0f}-{rate['most']:.0f}",
                f"{factor['median']:.2f}x",
                f"{row['cpu_ms_per_image']['median']:.1f} ms",
                f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def chart(results: Sequence[dict[str, Any]], name: str, path: Path) -> None:
    """Plot the medians as bars, with quartiles."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")  # files only, no window
    variants = list(dict.fromkeys(row["variant"] for row in results))
    counts = sorted({row["workers"] for row in results})
    figure, axes = plt.subplots(figsize=(6.4, 0.9 + 0.32 * len(results)), layout="constrained")
    height = 0.8 / len(counts)
    for c, k in enumerate(counts):
        rates = {row["variant"]: row["images_per_second"] for row in results if row["workers"] == k}
        places = [v + (c - (len(counts) - 1) / 2) * height for v in range(len(variants))]
        medians = [rates[v]["median"] for v in variants]
        spread = [
            [rates[v]["median"] - rates[v]["lower_quartile"] for v in variants],
            [rates[v]["upper_quartile"] - rates[v]["median"] for v in variants],
        ]
        bars = axes.barh(places, medians, height * 0.9, xerr=spread, label=f"{k} worker" + "s" * (k > 1))
        axes.bar_label(bars, [f"{m:.0f}" for m in medians], padding=4)
    axes.set_yticks(range(len(variants)), [LABELS[v] for v in variants])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"images/s, two views each ({name})")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

"""Measure how well each metric that needs no labels orders runs by the accuracy of a linear classifier.

    python -m benchmarks.label_free configs/pretrain/cifar10_cpu.yaml data.train=datasets/cifar10-train-20k.beton \\
        data.test=datasets/cifar10-test.beton

On 20,000 images (2,000 of each class, written from a folder of them) and two cores it takes an estimated half hour. It
trains 16 short runs that differ in temperature, augmentation, crops, learning rate, head or kernel, with the monitor
on, and evaluates each with simclr_ddp.linear_eval on the test images. The metrics are those of the monitor at the end
of a run, on training images; for comparison also the loss, the contrastive accuracy and two metrics that need labels.
Settings that all runs share can be changed by key=value. Runs that are finished are not run again, so the same command
continues a benchmark that was stopped. FOLDER/README.md holds the rank correlations with bootstrap intervals over the
runs, FOLDER/results.json all values, FOLDER/scatter.png the accuracy against each metric.

flags: --jobs 2       runs at the same time, which share the cores
       --minutes 0    minutes after which no run is started; 0 sets no limit
       --runs FOLDER  run directories, runs/label_free by default
       --out FOLDER   benchmarks/results/label_free by default
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.support.timing import take_flags
from simclr_ddp.config import command, options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.plots.png import WIDTH, save
from simclr_ddp.runs.evaluations import read_all
from simclr_ddp.runs.metrics import read_metrics
from simclr_ddp.runs.provenance import describe
from simclr_ddp.system import console, files

FLAGS = {"--jobs": "2", "--minutes": "0", "--runs": "runs/label_free", "--out": "benchmarks/results/label_free"}
SHARED = {
    "model.width": 0.25,
    "data.size": 16,
    "optim.epochs": 2,
    "optim.warmup_epochs": 0.4,
    "monitor.every_epochs": 2,
    "monitor.views": 6,
    "data.workers": 1,
}
CROP, COLOUR = "data.augmentation.crop_scale", "data.augmentation"
NO_COLOUR = {f"{COLOUR}.jitter": 0, f"{COLOUR}.greyscale": 0}
RUNS: dict[str, dict[str, Any]] = {
    "base": {},
    "temperature 0.05": {"loss.temperature": 0.05},
    "temperature 0.1": {"loss.temperature": 0.1},
    "temperature 0.5": {"loss.temperature": 0.5},
    "temperature 1": {"loss.temperature": 1.0},
    "no colour": NO_COLOUR,
    "strong colour": {f"{COLOUR}.strength": 1.0},
    "crops above 0.8": {CROP: [0.8, 1.0]},
    "crops above 0.5": {CROP: [0.5, 1.0]},
    "crops above 0.05": {CROP: [0.05, 1.0]},
    "flips only": NO_COLOUR | {CROP: [1.0, 1.0]},
    "rate / 10": {"optim.base_learning_rate": 0.3},
    "rate x 3": {"optim.base_learning_rate": 9.0},
    "no head": {"head.kind": "none"},
    "linear head": {"head.kind": "linear"},
    "laplacian": {"loss.kernel": "laplacian"},
}
# Whether more of a metric is expected to be better (1) or worse (-1).
EXPECTED = {
    "monitor_rankme": 1,
    "monitor_effective_rank": 1,
    "monitor_participation_ratio": 1,
    "monitor_alpha_req": -1,
    "monitor_lidar": 1,
    "monitor_alignment": -1,
    "monitor_uniformity": -1,
    "contrastive_top1": 1,
    "loss": -1,
    "monitor_knn_top1": 1,
    "probe_top1": 1,
}
LABELS = ("monitor_knn_top1", "probe_top1")  # use labels
RESAMPLES = 10_000


def main(argv: list[str] | None = None) -> int:
    flags, rest = take_flags(sys.argv[1:] if argv is None else argv, FLAGS)
    words = [word for word in rest if not word.startswith("-")]
    return command.run(partial(benchmark, flags=flags, words=words), Pretrain, "[CONFIG.yaml]", __doc__ or "", rest)


def benchmark(settings: Pretrain, flags: dict[str, str], words: list[str]) -> None:
    """settings: of the command line alone, which are checked by that; each run builds its settings from `words`."""
    if not flags["--jobs"].isdigit() or int(flags["--jobs"]) < 1:
        raise ValueError(f"--jobs {flags['--jobs']}: it must be a number of runs; write for example --jobs 2")
    if not flags["--minutes"].replace(".", "", 1).isdigit():
        raise ValueError(
            f"--minutes {flags['--minutes']}: it must be a number of minutes; write for example --minutes 30"
        )
    begin, limit, jobs = time.monotonic(), 60 * float(flags["--minutes"]), int(flags["--jobs"])
    todo = [name for name in RUNS if not is_done(run_dir(flags, name))]
    console.say(f"{len(RUNS)} runs, {len(RUNS) - len(todo)} of them done")
    ended: list[str] = []

    def run(name: str) -> str:
        if limit and time.monotonic() - begin > limit:
            return ""
        fault = train_and_evaluate(name, words, run_dir(flags, name), jobs)
        ended.append(name)
        left = (time.monotonic() - begin) / len(ended) * (len(todo) - len(ended)) / 60
        console.say(f"{name}: {fault or 'done'}; about {left:.0f} minutes left")
        return fault

    with ThreadPoolExecutor(jobs) as pool:
        faults = {name: fault for name, fault in zip(todo, pool.map(run, todo), strict=True) if fault}
    missing = [name for name in RUNS if name not in faults and not is_done(run_dir(flags, name))]
    if missing:
        raise ValueError(f"--minutes {flags['--minutes']}: {len(missing)} runs are left; the same command continues")
    values = {name: values_of(run_dir(flags, name)) for name in RUNS if name not in faults}
    if len(values) < 3:
        raise ValueError(f"{len(faults)} runs failed, the first: {next(iter(faults.values()))}")
    write(values, faults, words, Path(flags["--out"]))


def run_dir(flags: dict[str, str], name: str) -> Path:
    return Path(flags["--runs"]) / name.replace(" ", "_").replace("/", "by")


def linear_top1(folder: Path) -> list[float]:
    """The accuracy of the linear evaluation of a run; empty if there is none."""
    return [evaluation.trained["top1"] for evaluation in read_all(folder)[0] if evaluation.name == "linear"]


def is_done(folder: Path) -> bool:
    return (folder / "encoder.safetensors").exists() and bool(linear_top1(folder))


def train_and_evaluate(name: str, words: list[str], folder: Path, jobs: int) -> str:
    """Train and evaluate one run, whose output is in log.txt; return why it failed, or ""."""
    threads = f"threads={max(1, len(os.sched_getaffinity(0)) // jobs)}"
    own = [f"{key}={options.shown(value)}" for key, value in RUNS[name].items()]
    shared = [f"{key}={options.shown(value)}" for key, value in SHARED.items()]
    files_given = [word for word in words if "=" not in word]
    given = [word for word in words if "=" in word]
    pretrain = ["simclr_ddp.pretrain", *files_given, *shared, *given, *own, f"run_dir={folder}", threads]
    evaluate = ["simclr_ddp.linear_eval", str(folder), "random_encoder=false", "workers=1", threads]
    folder.mkdir(parents=True, exist_ok=True)
    for arguments in (pretrain, evaluate):
        with (folder / "log.txt").open("a") as log:
            done = subprocess.run([sys.executable, "-m", *arguments], stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            errors = [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("error:")]
            return errors[-1] if errors else f"{arguments[0]} ended with status {done.returncode}"
    return ""


def values_of(folder: Path) -> dict[str, float]:
    """The metrics of a run: at its end, but for the mean loss and contrastive accuracy of its last tenth."""
    lines = read_metrics(folder / "metrics.jsonl")
    tail = lines[-max(1, len(lines) // 10) :]
    found = {key: lines[-1][key] for key in EXPECTED if key in lines[-1]}
    found |= {key: float(np.mean([line[key] for line in tail])) for key in ("loss", "contrastive_top1")}
    return found | {"linear_top1": linear_top1(folder)[-1]}


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis: Pearson's correlation of the ranks; equal values share their mean rank."""
    a, b = (np.sign(v[..., :, None] - v[..., None, :]).sum(-1) for v in (x, y))  # 2 rank - n - 1, of mean 0
    return _ratio((a * b).sum(-1), np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))


def kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's tau-b along the last axis: the correlation of the signs of all differences."""
    a, b = (np.sign(v[..., :, None] - v[..., None, :]).reshape(*v.shape[:-1], -1) for v in (x, y))
    return _ratio((a * b).sum(-1), np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where all values are equal, so that nothing is ordered."""
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), 0.0)


def correlations(x: np.ndarray, y: np.ndarray) -> dict[str, list[float]]:
    """{name: [value, ends of its 95 % interval]} of the n runs' values x and y [n]; runs are resampled, seed 0."""
    drawn = np.random.default_rng(0).integers(0, len(x), (RESAMPLES, len(x)))
    found = {}
    for name, function in (("spearman", spearman), ("kendall", kendall)):
        ends = np.percentile(function(x[drawn], y[drawn]), (2.5, 97.5))
        found[name] = [float(function(x, y)), float(ends[0]), float(ends[1])]
    return found


def write(values: dict[str, dict[str, float]], faults: dict[str, str], words: list[str], out: Path) -> None:
    """Write README.md, results.json and scatter.png."""
    metrics = [key for key in EXPECTED if all(key in found for found in values.values())]
    accuracy = np.array([found["linear_top1"] for found in values.values()])
    columns = {key: np.array([found[key] for found in values.values()]) for key in metrics}
    found = {key: correlations(columns[key], accuracy) for key in metrics}
    line = " ".join(["python -m benchmarks.label_free", *words])
    results = {
        "command": line,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": describe(Runtime(torch.device("cpu"), "fp32", 1)),
        "shared": SHARED,
        "runs": {name: {"options": RUNS[name]} | values[name] for name in values},
        "failed": faults,
        "correlations": found,
    }
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    files.replace_atomically(out / "results.json", lambda temporary: temporary.write_text(text))
    page = report(found, values, faults, line)
    files.replace_atomically(out / "README.md", lambda temporary: temporary.write_text(page))
    save(scatter(columns, accuracy, found), out / "scatter.png")
    print(page)


def report(
    found: dict[str, dict[str, list[float]]], values: dict[str, dict[str, float]], faults: dict[str, str], line: str
) -> str:
    machine = describe(Runtime(torch.device("cpu"), "fp32", 1))
    versions = f"{machine['cores']} cores of {machine['processor']}, torch {machine['packages']['torch']}"
    text = ["# How well metrics without labels order runs", "", f"    {line}", "", f"{versions}.", ""]
    text += [
        f"{len(values)} runs, linear accuracy on the test images. In brackets: 95 % of {RESAMPLES:,} bootstrap samples"
    ]
    text += [
        "of the runs. Expected: the sign of a metric that orders runs well. For lidar and alignment each run draws"
    ]
    text += ["views by its augmentation settings, so these two also depend on how strong the augmentation is.", ""]
    text += ["| metric | labels | expected | Spearman | Kendall |", "|---" * 5 + "|"]
    for key, both in found.items():
        cells = [f"{v:+.2f} [{low:+.2f}, {high:+.2f}]" for v, low, high in both.values()]
        sign = "+" if EXPECTED[key] > 0 else "-"
        text.append(f"| {key.removeprefix('monitor_')} | {'yes' * (key in LABELS)} | {sign} | {' | '.join(cells)} |")
    names = ["linear_top1", *found]
    text += ["", "![accuracy against each metric](scatter.png)", ""]
    titles = [name.removeprefix("monitor_") for name in ("run", *names)]
    text += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, run in sorted(values.items(), key=lambda item: -item[1]["linear_top1"]):
        text.append(f"| {name} | {' | '.join(f'{run[key]:.4g}' for key in names)} |")
    text += ["", *(f"Left out: {name}, {fault}" for name, fault in faults.items())] if faults else []
    return "\n".join(text) + "\n"


def scatter(columns: dict[str, np.ndarray], accuracy: np.ndarray, found: dict[str, dict[str, list[float]]]) -> Figure:
    """A panel for each metric, with a dot for each run."""
    rows = -(-len(columns) // 4)
    figure = Figure(figsize=(WIDTH, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False).flat
    for axis in axes[len(columns) :]:
        axis.remove()
    for axis, (key, x) in zip(axes[: len(columns)], columns.items(), strict=True):
        axis.plot(x, 100 * accuracy, "o", color="tab:orange" if key in LABELS else "tab:blue", markersize=4)
        axis.set_title(f"Spearman {found[key]['spearman'][0]:+.2f}", loc="right", fontsize=8)
        axis.set_xlabel(f"{key.removeprefix('monitor_')}{' (labels)' * (key in LABELS)}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[: len(columns) : 4]:
        axis.set_ylabel("linear top-1, %", fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main())

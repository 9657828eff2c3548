"""The Python part of benchmarks/gpu/plan.sh: `python -m benchmarks.gpu.suite COMMAND ARGUMENTS`

there OUT.json                       record the GPU, the packages and the machine
variants OUT.json CONFIG key=value   measure milliseconds per training step, as configured and with one setting changed
pace OUT CONFIG key=value            measure how long an epoch takes, compiled or not: a line for plan.sh
started CHECKPOINT OUT               write with which epochs and compile a run was started: arguments for plan.sh
compare FOLDER                       print the results in FOLDER next to benchmarks/gpu/predictions.json
tiny TRAIN TEST                      write two small .beton files in the form of CIFAR-10
"""

import json
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from benchmarks.support.loops import Loop, synchronize
from benchmarks.support.step_report import share_of_peak
from simclr_ddp.config import command as cli
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data import beton
from simclr_ddp.data.dataset import Dataset, open_dataset
from simclr_ddp.distributed import rendezvous
from simclr_ddp.distributed.runtime import Runtime, setup
from simclr_ddp.runs import checkpoint
from simclr_ddp.runs.provenance import describe
from simclr_ddp.system.errors import one_line
from simclr_ddp.training.plan import make_plan

PREDICTIONS = Path(__file__).with_name("predictions.json")


def main(argv: list[str] | None = None) -> int:
    command, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("variants", "pace") and arguments:
        measure, out, rest = {"variants": variants, "pace": pace}[command], Path(arguments[0]), arguments[1:]
        return cli.run(lambda settings: measure(settings, out), Pretrain, "[CONFIG.yaml]", __doc__ or "", rest)
    if command == "there" and len(arguments) == 1:
        there(Path(arguments[0]))
    elif command == "started" and len(arguments) == 2:
        config = checkpoint.load(Path(arguments[0]))["config"]
        words = f"optim.epochs={config['optim']['epochs']} compile={str(config['compile']).lower()}"
        Path(arguments[1]).write_text(words + "\n")
    elif command == "compare" and len(arguments) == 1:
        print(compare(Path(arguments[0])))
    elif command == "tiny" and len(arguments) == 2:
        for path, count in zip(arguments, (64, 40), strict=True):
            tiny(Path(path), count)
    else:
        print((__doc__ or "").strip())
        return 0 if command in ("--help", "-h") else 2
    return 0


def there(out: Path) -> None:
    cuda = torch.cuda.is_available()
    runtime = Runtime(torch.device("cuda", 0) if cuda else torch.device("cpu"), "auto", torch.get_num_threads())
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "environment": describe(runtime)}
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {"memory_bytes": properties.total_memory, "processors": properties.multi_processor_count}
        found |= {"cudnn": torch.backends.cudnn.version(), "bf16": torch.cuda.is_bf16_supported()}
    out.write_text(json.dumps(found, indent=1) + "\n")
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20)
        found["nvidia-smi"] = done.stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        found["nvidia-smi"] = [str(error)]
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


# --- the training step with one setting changed -----------------------------------------------------------------------


def variants(settings: Pretrain, out: Path) -> None:
    """Measure the variants one by one, on a batch that is on the device; write OUT.json after each."""
    runtime = setup(settings.device, settings.precision, settings.threads)
    dataset = open_dataset(
        settings.data.train, "train"
    )  # once: the device loader keeps the images of every opened file
    steps = 30 if runtime.device.type == "cuda" else 2
    other = "fp32" if runtime.precision != "fp32" else "bf16"
    changes: dict[str, Pretrain] = {
        "as configured": settings,
        f"compile={str(not settings.compile).lower()}": replace(settings, compile=not settings.compile),
        f"precision={other}": replace(settings, precision=other),
        "channels-last off": settings,
    }
    figures: dict[str, Any] = {}
    try:
        for name, changed in changes.items():
            of = replace(runtime, precision=other) if changed.precision == other else runtime
            try:
                figures[name] = {
                    "ms": 1e3
                    * seconds_of_a_step(changed, of, dataset, steps, channels_first=name == "channels-last off")
                }
            except RuntimeError as error:  # out of memory, or the compiler fails: continue with the others
                figures[name] = {"failure": f"{type(error).__name__}: {one_line(error, 500)}"}
            print(f"{name:<20} {figures[name]}", flush=True)
            record = {"precision": runtime.precision, "steps": steps, "environment": describe(runtime)}
            out.write_text(json.dumps(record | {"figures": figures}, indent=1) + "\n")
    finally:
        rendezvous.stop()


def pace(settings: Pretrain, out: Path) -> None:
    """Write four words about the faster of compile=true and false to OUT, as soon as the first is measured.

    They are: compile=true or false, milliseconds per epoch, seconds before its first step, including compilation, and
    the epochs of the config.
    """
    runtime = setup(settings.device, settings.precision, settings.threads)
    dataset = open_dataset(settings.data.train, "train", settings.data.spirograph)
    steps, least = 30 if runtime.device.type == "cuda" else 2, float("inf")
    try:
        for compiled in (False, True) if settings.compile else (False,):
            word, begin = f"compile={str(compiled).lower()}", time.perf_counter()
            try:
                seconds = seconds_of_a_step(
                    replace(settings, compile=compiled), runtime, dataset, steps, with_data=True
                )
            except Exception as error:  # compilers raise errors of any class
                if not compiled:
                    raise
                print(f"{word}: {type(error).__name__}: {one_line(error, 500)}", flush=True)
                continue
            before = time.perf_counter() - begin - steps * seconds
            print(f"{word}: {1e3 * seconds:.2f} ms per step, {before:.0f} s before the first", flush=True)
            if seconds < least:
                least, epoch = seconds, seconds * make_plan(settings, dataset).steps_per_epoch
                out.write_text(f"{word} {max(1, round(1e3 * epoch))} {round(before)} {settings.optim.epochs}\n")
    finally:
        rendezvous.stop()


def seconds_of_a_step(
    settings: Pretrain,
    runtime: Runtime,
    dataset: Dataset,
    steps: int,
    *,
    channels_first: bool = False,
    with_data: bool = False,
) -> float:
    """Measure seconds per step on one batch, or if `with_data` on a new batch in each step."""
    loop = Loop(settings, runtime, dataset, make_plan(settings, dataset))
    if channels_first:
        loop.state.model.to(memory_format=torch.contiguous_format)
        loop.state.model.encoder.register_forward_pre_hook(_contiguous)
    warm = max(3, steps // 3)
    with closing(loop.batches(warm + steps if with_data else 1)) as batches:
        here: Any = batches if with_data else repeat(next(batches))
        for _ in range(warm):
            loop.step(here)
        synchronize(runtime.device)
        begin = time.perf_counter()
        for _ in range(steps):
            loop.step(here)
        synchronize(runtime.device)
        return (time.perf_counter() - begin) / steps


def _contiguous(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


# --- predictions and measurements -------------------------------------------------------------------------------------


def compare(folder: Path) -> str:
    """Format one line per prediction: the prediction, the goal, and the measurement, if there is one."""
    found = measured(folder)
    lines = [f"{'':<58}{'predicted':>16}{'goal':>10}{'measured':>12}"]
    for key, entry in json.loads(PREDICTIONS.read_text()).items():
        value, predicted, verdict = found.get(key), "", ""
        if entry["predicted"]:
            low, high = entry["predicted"]
            predicted = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            if value is not None:
                inside = low <= value <= high
                verdict = "  as predicted" if inside else f"  {value / (low if value < low else high):.2f} x"
        shown = "-" if value is None else f"{value:.4g}"
        lines.append(f"{entry['what']:<58}{predicted:>16}{entry.get('goal', ''):>10}{shown:>12}{verdict}")
    return "\n".join(lines)


def measured(folder: Path) -> dict[str, float]:
    """Read the metrics that are predicted, by their keys, from the result files in the folder."""
    found: dict[str, float] = {}
    for config in ("cifar", "imagenet"):
        for run in _read(folder / f"step-{config}.json").get("runs", []):
            parts = {part: median(split[part] for split in run["parts_seconds"]) for part in run["parts_seconds"][0]}
            seconds = run["seconds_per_step"]
            found[f"{config} step ms"] = 1e3 * median(seconds.get("data", seconds["synthetic"]))
            found[f"{config} peak GB"] = max(run["peak_memory_bytes"]) / 1e9
            found[f"{config} augmentation %"] = 100 * parts["augmentation"] / sum(parts.values())
            found |= {f"{config} {kind}": number for kind, number in run["work"]["launches"].items()}
            if (share := share_of_peak(run)) is not None:
                found[f"{config} peak rate %"] = 100 * share
    for kind in ("tiled", "triton"):
        for entry in _read(folder / f"loss-{kind}.json").get("measurements", []):
            if "seconds" in entry:
                key = f"{entry['kernel']} {entry['images']} {entry['variant']} ms"
                found[key] = 1e3 * entry["seconds"]["median"]
    if (folder / "run.tgz").exists():
        found |= _of_a_run(folder / "run.tgz")
    return found


def _of_a_run(path: Path) -> dict[str, float]:
    """Read the metrics of the training, and of the evaluation if there is one.

    "Seconds of 200 epochs" is the wall time of the last start's loop from its first to its last step, including
    compilation, the probe's scores and checkpoints, scaled from its epochs to 200.
    """
    with tarfile.open(path) as archive:
        texts = {
            name: file.read().decode()
            for name in archive.getnames()
            if name in ("./config.yaml", "./linear_eval.json", "./metrics.jsonl")
            or (name.startswith("./evaluations/") and name.endswith(".json"))
            if (file := archive.extractfile(name)) is not None
        }
    found: dict[str, float] = {}
    lines = [json.loads(line) for line in texts.get("./metrics.jsonl", "").splitlines() if line.endswith("}")]
    records = [json.loads(text) for name, text in texts.items() if name.endswith(".json")]
    config: Any = OmegaConf.to_container(OmegaConf.create(texts["./config.yaml"]))
    name = config["name"]
    if lines:
        last = lines[-1]
        begun = config["starts"][-1]["step"] * last["epoch"] / last["step"]
        found[f"{name} images/s"] = median(line["images_per_second"] for line in lines)
        found[f"{name} epochs"] = last["epoch"]
        if last["epoch"] > begun:  # otherwise that start has logged nothing yet
            found[f"{name} seconds of 200 epochs"] = 200 * last["seconds"] / (last["epoch"] - begun)
    step = lines[-1]["step"] if lines else None
    for record in records:
        if record.get("step", step) == step and record.get("test", {}).get("split") != "train":
            found[f"{name} linear %"] = 100 * record["results"]["trained"]["top1"]
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def tiny(path: Path, count: int) -> None:
    """Write random 32 x 32 pictures of ten classes, each in another colour."""
    generator = np.random.default_rng(count)
    samples = []
    for i in range(count):
        pixels = generator.integers(0, 128, (32, 32, 3), dtype=np.uint8)
        pixels[..., i % 3] += np.uint8(12 * (i % 10))
        samples.append((beton.Picture(pixels.tobytes(), 32, 32, raw=True), i % 10))
    info = {"label_kind": "classes", "classes": [str(i) for i in range(10)], "numbers": None, "nuisance": None}
    beton.write(path, iter(samples), {"image": beton.PICTURES, "label": beton.INT}, count, info)


if __name__ == "__main__":
    sys.exit(main())

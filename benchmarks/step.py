"""Throughput of the whole training step: the number to compare machines, settings and tools by.

    python -m benchmarks.step configs/pretrain/cifar10_cpu.yaml data.train=datasets/cifar10-train.beton

measures on 1, 2, 4, ... ranks, a group of processes after the other; under torchrun it measures the ranks there are:

    torchrun --nproc_per_node=8 -m benchmarks.step configs/pretrain/imagenet_resnet50.yaml

First it checks that its step computes bitwise what simclr_ddp.pretrain computes, and that the other tools' losses are
ours. A difference from pretrain, or an operation that is not deterministic, is printed and recorded; the figures follow
all the same, and the exit status is 1. Then all variants take turns, a few steps each, in rounds of changing order:

    model only   forward, trivial loss, backward and update on views that are on the device: the ceiling
    synthetic    the training step on a batch that is on the device
    data         the training step with its data: decoded images, or the numbers that Spirograph is drawn from; left
                 out, and the other tools with it, where the file data.train is missing
    plain        a plain PyTorch loop with torchvision's transforms, on the same images
    lightly      the same with lightly's transform, loss and LARS, if it is there: `make peers`

A further pass with a clock between the parts of a step tells where its time goes; there gradients are reduced after
the backward pass, not during it. The operations of the model are counted, and on a GPU the launches of a step and the
host's waits, by torch.profiler. Validation, checkpoints and what else is not of every step is left out. The table
goes to the screen, FOLDER/<config>-<device>.json and .png hold the rest; the former is written after every round.

flags: --ranks 1,2     numbers of ranks to measure on; powers of two up to the GPUs or cores by default
       --rounds 10     rounds
       --steps 10      measured steps of each variant in a round
       --peers no      leave the other tools out
       --out FOLDER    benchmarks/results/step by default
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import peers, step_report, step_work
from benchmarks.loops import PARTS, Ceiling, Clock, Training, check_training, synchronize
from benchmarks.stand_in import stand_in
from benchmarks.step_report import counted
from simclr_ddp import cli, distributed
from simclr_ddp.config import Pretrain, plain
from simclr_ddp.data import Dataset, cores, open_dataset, usable_workers
from simclr_ddp.metrics import peak_memory_bytes
from simclr_ddp.pretrain import make_objective
from simclr_ddp.run import make_plan
from simclr_ddp.runtime import Runtime, describe, setup
from simclr_ddp.state import State

FLAGS = {"--ranks": "", "--rounds": "10", "--steps": "10", "--out": "benchmarks/results/step", "--raw": ""}
FLAGS |= {"--peers": "yes"}
Results = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    flags, rest = take_flags(arguments, FLAGS)
    command = partial(benchmark, flags=flags, arguments=rest)
    return cli.run(command, Pretrain, "[CONFIG.yaml]", __doc__ or "", rest)


def take_flags(arguments: list[str], known: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The known flags of a command with their values, given or not, and all other arguments."""
    flags, rest = dict(known), []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in known:
            flags[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    return flags, rest


def benchmark(settings: Pretrain, flags: dict[str, str], arguments: list[str]) -> int:
    """Measure, print and write; returns the exit status."""
    rounds, steps = (_positive(name, flags[name])[0] for name in ("--rounds", "--steps"))
    if flags["--peers"] not in ("yes", "no"):
        raise ValueError(f"--peers {flags['--peers']}: it must be yes or no")
    others = flags["--peers"] == "yes"
    command = " ".join(["python -m benchmarks.step", *(sys.argv[1:])])
    head = {"command": command, "date": time.strftime("%Y-%m-%d %H:%M"), "settings": plain(settings)}
    runs: list[Results] = []

    def keep(run: Results) -> None:
        """Write what there is after a round: the next may never end."""
        if flags["--raw"] and cli.main_rank():
            Path(flags["--raw"]).write_text(json.dumps(run))
        elif cli.main_rank():
            step_report.save(head | {"runs": [*runs, run]}, Path(flags["--out"]))

    if "RANK" in os.environ:  # one of torchrun's processes
        runs.append(measure(settings, rounds, steps, others, keep))
        if flags["--raw"] or not cli.main_rank():
            return 0 if flags["--raw"] else status(runs)
    else:
        ranks = _positive("--ranks", flags["--ranks"]) if flags["--ranks"] else default_ranks(settings)
        for count in ranks:
            if settings.optim.global_batch_size % count:
                raise ValueError(
                    f"optim.global_batch_size={settings.optim.global_batch_size} does not divide among {count} ranks: "
                    "--ranks takes its divisors"
                )
        if ranks == [1]:
            runs.append(measure(settings, rounds, steps, others, keep))
        else:
            more = [f"--rounds={rounds}", f"--steps={steps}", f"--peers={flags['--peers']}"]
            for count in ranks:
                run = in_processes(count, [*arguments, *more])
                keep(run)
                runs.append(run)
    results = head | {"runs": runs}
    print(step_report.table(results))
    step_report.write(results, Path(flags["--out"]))
    return status(runs)


def status(runs: list[Results]) -> int:
    """1, with a warning, where the step that was measured is not pretrain's bit for bit."""
    for run in runs:
        if not run["same_as_pretrain"]:
            cli.warn(run["checks"][0])
    return 0 if all(run["same_as_pretrain"] for run in runs) else 1


def _positive(name: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"{name} {text}: numbers of at least 1 are wanted, for example {name} {FLAGS[name] or '1,2'}")
    return [int(word) for word in words]


def default_ranks(settings: Pretrain) -> list[int]:
    """Powers of two up to the GPUs, or cores, among which the batch divides."""
    gpus = torch.cuda.device_count() if settings.device != "cpu" else 0
    powers = [2**i for i in range(20) if 2**i <= (gpus or cores())]
    return [count for count in powers if settings.optim.global_batch_size % count == 0]


def in_processes(ranks: int, arguments: list[str]) -> dict[str, Any]:
    """The measurement in a group of that many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    with TemporaryDirectory() as folder:
        raw = Path(folder) / "results.json"
        command = [*launcher, f"--nproc_per_node={ranks}", "-m", "benchmarks.step", *arguments, f"--raw={raw}"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        lines = done.stderr.splitlines()
        for line in lines:
            if line.startswith("warning:"):
                print(line, file=sys.stderr)
        if done.returncode or not raw.exists():
            told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            if not told:
                print(done.stderr[-4000:], file=sys.stderr)
            raise ValueError(told[0].removesuffix(" (--debug shows where)") if told else f"{ranks} ranks failed: above")
        return json.loads(raw.read_text())


# --- the measurement on the ranks there are ---------------------------------------------------------------------------


@dataclass
class Variant:
    """Something to be timed: `step` takes one step on the next of the batches that `open` yields in a round."""

    name: str
    step: Callable[[Any], None]
    open: Callable[[], Generator[Any, None, None]]


def measure(
    settings: Pretrain, rounds: int, steps: int, others: bool, keep: Callable[[Results], None] = lambda run: None
) -> Results:
    """All figures of this number of ranks; equal on all of them.

    others  whether other tools are measured beside ours
    keep    receives the figures so far after every round
    """
    runtime = setup(settings.device, settings.precision, settings.threads)
    try:
        workers = usable_workers(settings.data.workers, distributed.local_world_size())
        settings = replace(settings, data=replace(settings.data, workers=workers))
        if settings.data.train == "spirograph" or Path(settings.data.train).exists():
            dataset = open_dataset(settings.data.train, "train")
            return _measure(settings, runtime, dataset, True, rounds, steps, others, keep)
        cli.say(f"data.train={settings.data.train} is not there: figures without data only")
        with TemporaryDirectory() as folder:
            dataset = stand_in(Path(folder), 20 * settings.optim.global_batch_size)
            return _measure(settings, runtime, dataset, False, rounds, steps, others, keep)
    finally:
        distributed.stop()


def _measure(
    settings: Pretrain,
    runtime: Runtime,
    dataset: Dataset,
    with_data: bool,
    rounds: int,
    steps: int,
    with_others: bool,
    keep: Callable[[Results], None],
) -> Results:
    workers = settings.data.workers
    warm = max(3, 2 * workers)  # steps before the measured ones of a round: a loader's queue is full after them
    ahead = warm + steps + 4 * workers + 2  # more than are taken, so that the loader has work until a round ends
    training = Training(settings, runtime, dataset, make_plan(settings, dataset))
    with closing(training.batches(ahead)) as batches:
        here = next(batches)
        for _ in range(warm):
            training.step(batches)
    memory = of_each_rank(peak_memory_bytes(runtime.device), runtime)  # before anything else is built

    same, sentence = check_training(settings, runtime, dataset)
    checks = [sentence]
    ceiling = Ceiling(settings, runtime, dataset)
    synthetic = Variant("synthetic", training.step, lambda: endless(here))
    data = Variant("data", training.step, lambda: training.batches(ahead))
    variants = [
        Variant("model only", ceiling.step, lambda: endless(None)),
        synthetic,
        *([data] if with_data else []),
    ]
    notes = [training.loader] if training.loader and with_data else []
    if not with_others:
        notes.append("no other tools beside it: --peers=no")
    elif settings.loss.kernel != "cosine":
        notes.append(f"no other tools beside it: they have no loss.kernel={settings.loss.kernel}")
    elif with_data:
        others = other_tools(settings, runtime, dataset, training.plan.peak_learning_rate, checks, notes)
        variants += [Variant(name, peer.step, peer.batches) for name, peer in others.items()]
    for line in [*checks, *notes]:
        cli.say(line)

    work = work_of_a_step(training, here, runtime)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    parts: list[dict[str, float]] = []
    run = {
        "ranks": distributed.world_size(),
        "global_batch_size": settings.optim.global_batch_size,
        "data": dataset.fingerprint if with_data else None,
        "workers_per_rank": workers,
        "rounds": 0,
        "steps_per_round": steps,
        "environment": describe(runtime),
        "lightly": peers.lightly_version(),
        "same_as_pretrain": same,
        "checks": checks,
        "notes": notes,
        "work": work,
        "seconds_per_step": seconds,
        "parts_seconds": parts,
        "peak_memory_bytes": memory,
    }
    begin = time.perf_counter()
    for number in range(1, rounds + 1):
        for variant in in_turns(variants, number):
            seconds[variant.name].append(timed(variant, warm, steps, runtime))
        parts.append(parts_of_a_step(training, data if with_data else synthetic, warm, steps))
        run["rounds"] = number
        keep(run)
        left = (time.perf_counter() - begin) / number * (rounds - number)
        cli.say(f"{counted(distributed.world_size(), 'rank')}: round {number} of {rounds}, {left:.0f} s left")
    return run


def work_of_a_step(training: Training, batch: Any, runtime: Runtime) -> dict[str, Any]:
    """This rank's operations of the model, launches and waits in one step, and the GPU's peak rate, where known."""
    batches = endless(batch)
    return {
        "model_operations": step_work.operations(training.settings, runtime, training.dataset),
        "launches": step_work.launches(lambda: training.step(batches), 10, runtime.device),
        "peak_rate": step_work.peak_rate(describe(runtime)["gpu"], runtime.precision),
    }


def other_tools(
    settings: Pretrain, runtime: Runtime, dataset: Dataset, peak_rate: float, checks: list[str], notes: list[str]
) -> dict[str, peers.Peer]:
    """The loops to be measured beside ours, their losses checked; what is checked, left out or differs is added."""
    objective, temperature = make_objective(settings), settings.loss.temperature
    bare = State(replace(settings, probe=replace(settings.probe, enabled=False)), runtime, dataset)
    checks.append(peers.check_loss("the plain loop", peers.plain_loss(temperature), objective, runtime))
    pictures = peers.read_pictures(dataset), dataset.count
    found = {"plain": peers.plain_loop(settings, runtime, pictures, bare)}
    if peers.lightly_version() is None:
        notes.append("lightly is not there and left out: `make peers` installs it into .peers")
    else:
        checks.append(peers.check_loss("lightly", peers.lightly_loss(settings), objective, runtime))
        found["lightly"] = peers.lightly_loop(settings, runtime, pictures, bare, peak_rate)
    source = "the same stored images" if dataset.images is not None else "the rendered pictures, cropped and coloured"
    notes.append(f"the other tools read {source}, by torch's DataLoader with {settings.data.workers} processes")
    if distributed.world_size() > 1 and runtime.device.type == "cpu":
        notes.append("their batch norm is each rank's own: torch has no synchronised one on CPUs")
    return found


def endless(batch: Any) -> Generator[Any, None, None]:
    while True:
        yield batch


def in_turns(variants: list[Variant], number: int) -> list[Variant]:
    """The order of a round: another one comes first in each, and every second round is reversed."""
    first = number % len(variants)
    order = variants[first:] + variants[:first]
    return order if number % 2 else order[::-1]


def timed(variant: Variant, warm: int, steps: int, runtime: Runtime) -> float:
    """Seconds a step, the slowest rank's."""
    with closing(variant.open()) as batches:
        for _ in range(warm):
            variant.step(batches)
        meet(runtime)
        begin = time.perf_counter()
        for _ in range(steps):
            variant.step(batches)
        meet(runtime)
        return (time.perf_counter() - begin) / steps


def parts_of_a_step(training: Training, variant: Variant, warm: int, steps: int) -> dict[str, float]:
    """Seconds of each part of a step, a mean over steps that wait for the device after every part."""
    with closing(variant.open()) as batches:
        for _ in range(warm):
            training.step(batches)
        meet(training.runtime)
        clock = Clock(training.runtime.device)
        for _ in range(steps):
            training.step(batches, clock)
        return {part: clock.seconds[part] / steps for part in PARTS}


def meet(runtime: Runtime) -> None:
    synchronize(runtime.device)
    distributed.barrier()


def of_each_rank(value: int, runtime: Runtime) -> list[int]:
    values = torch.zeros(distributed.world_size(), dtype=torch.int64, device=runtime.device)
    values[distributed.rank()] = value
    return [int(v) for v in distributed.all_sum(values).tolist()]


if __name__ == "__main__":
    sys.exit(main())

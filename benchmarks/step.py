"""Measure the throughput of the complete training step, to compare machines, settings and tools.

    python -m benchmarks.step configs/pretrain/cifar10_cpu.yaml data.train=datasets/cifar10-train.beton

measures on 1, 2, 4, ... ranks, one group of processes after another; under torchrun it measures the present ranks:

    torchrun --nproc_per_node=8 -m benchmarks.step configs/pretrain/imagenet_resnet50.yaml

First it checks that its step computes bitwise what simclr_ddp.pretrain computes, and that the other tools' losses are
equal to ours. A difference from pretrain, or an operation that is not deterministic, is printed and recorded; the
measurement continues, and the exit status is 1. Then all variants alternate, a few steps each, in rounds of changing
order:

    model only   forward, trivial loss, backward and update on views that are on the device: the upper bound
    synthetic    the training step on a batch that is on the device
    data         the training step with its data: decoded images, or the numbers that Spirograph is drawn from; it and
                 the other tools are left out if the file data.train is missing
    plain        a plain PyTorch loop with torchvision's transforms, on the same images
    lightly      the same with lightly's transform, loss and LARS; `make peers` installs it

A further pass measures the parts of a step; there gradients are reduced after the backward pass, not during it.
The operations of the model are counted, and on a GPU also the launches and host waits of a step, by torch.profiler.
Validation, checkpoints and other work that is not part of every step are left out. The table is printed;
FOLDER/<config>-<device>.json and .png contain the rest, and the former is written after every round.

flags: --ranks 1,2     numbers of ranks to measure on; powers of two up to the GPUs or cores by default
       --rounds 10     number of rounds
       --steps 10      measured steps of each variant in a round
       --peers no      leave the other tools out
       --out FOLDER    benchmarks/results/step by default
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.support import peers, step_report, step_work
from benchmarks.support.loops import PARTS, Ceiling, Clock, Loop, check_loop
from benchmarks.support.stand_in import stand_in
from benchmarks.support.step_report import counted
from benchmarks.support.timing import Variant, endless, in_processes, in_turns, meet, of_each_rank, take_flags
from simclr_ddp.config import command as cli
from simclr_ddp.config.options import plain
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.dataset import Dataset, open_dataset
from simclr_ddp.distributed import collectives, rendezvous
from simclr_ddp.distributed.runtime import Runtime, setup
from simclr_ddp.runs.provenance import describe
from simclr_ddp.system.console import main_rank, say, warn
from simclr_ddp.system.machine import cores, peak_memory_bytes, usable_workers
from simclr_ddp.training.components import make_objective
from simclr_ddp.training.plan import make_plan
from simclr_ddp.training.state import State

FLAGS = {"--ranks": "", "--rounds": "10", "--steps": "10", "--out": "benchmarks/results/step", "--raw": ""}
FLAGS |= {"--peers": "yes"}
Results = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    flags, rest = take_flags(arguments, FLAGS)
    command = partial(benchmark, flags=flags, arguments=rest)
    return cli.run(command, Pretrain, "[CONFIG.yaml]", __doc__ or "", rest)


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
        """Write the results so far after a round, because a later one may fail."""
        if flags["--raw"] and main_rank():
            Path(flags["--raw"]).write_text(json.dumps(run))
        elif main_rank():
            step_report.save(head | {"runs": [*runs, run]}, Path(flags["--out"]))

    if "RANK" in os.environ:  # one of torchrun's processes
        runs.append(measure(settings, rounds, steps, others, keep))
        if flags["--raw"] or not main_rank():
            return 0 if flags["--raw"] else status(runs)
    else:
        ranks = _positive("--ranks", flags["--ranks"]) if flags["--ranks"] else default_ranks(settings)
        for count in ranks:
            if settings.optim.global_batch_size % count:
                raise ValueError(
                    f"optim.global_batch_size={settings.optim.global_batch_size}: it does not divide among {count} "
                    "ranks; set --ranks to its divisors"
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
    """Return 1, with a warning, if the measured step is not bitwise that of pretrain; else 0."""
    for run in runs:
        if not run["same_as_pretrain"]:
            warn(run["checks"][0])
    return 0 if all(run["same_as_pretrain"] for run in runs) else 1


def _positive(name: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() and int(word) > 0 for word in words):
        example = f"{name} {FLAGS[name] or '1,2'}"
        raise ValueError(f"{name} {text}: numbers of at least 1 are expected, for example {example}")
    return [int(word) for word in words]


def default_ranks(settings: Pretrain) -> list[int]:
    """Return the powers of two, up to the number of GPUs or cores, that divide the batch size."""
    gpus = torch.cuda.device_count() if settings.device != "cpu" else 0
    powers = [2**i for i in range(20) if 2**i <= (gpus or cores())]
    return [count for count in powers if settings.optim.global_batch_size % count == 0]


# --- the measurement on the present ranks -----------------------------------------------------------------------------


def measure(
    settings: Pretrain, rounds: int, steps: int, others: bool, keep: Callable[[Results], None] = lambda run: None
) -> Results:
    """Return all results for this number of ranks, equal on all of them.

    others  whether other tools are also measured
    keep    receives the results so far after every round
    """
    runtime = setup(settings.device, settings.precision, settings.threads)
    try:
        workers = usable_workers(settings.data.workers, collectives.local_world_size())
        settings = replace(settings, data=replace(settings.data, workers=workers))
        if settings.data.train == "spirograph" or Path(settings.data.train).exists():
            dataset = open_dataset(settings.data.train, "train", settings.data.spirograph)
            return _measure(settings, runtime, dataset, True, rounds, steps, others, keep)
        say(f"data.train={settings.data.train} does not exist: only variants without data are measured")
        with TemporaryDirectory() as folder:
            dataset = stand_in(Path(folder), 20 * settings.optim.global_batch_size)
            return _measure(settings, runtime, dataset, False, rounds, steps, others, keep)
    finally:
        rendezvous.stop()


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
    warm = max(3, 2 * workers)  # steps before the measured ones of a round, after which a loader's queue is full
    ahead = warm + steps + 4 * workers + 2  # more than are used, so that the loader has work until a round ends
    loop = Loop(settings, runtime, dataset, make_plan(settings, dataset))
    with closing(loop.batches(ahead)) as batches:
        here = next(batches)
        for _ in range(warm):
            loop.step(batches)
    memory = of_each_rank(peak_memory_bytes(runtime.device), runtime)  # before anything else is built

    same, sentence = check_loop(settings, runtime, dataset)
    checks = [sentence]
    ceiling = Ceiling(settings, runtime, dataset)
    synthetic = Variant("synthetic", loop.step, lambda: endless(here))
    data = Variant("data", loop.step, lambda: loop.batches(ahead))
    variants = [
        Variant("model only", ceiling.step, lambda: endless(None)),
        synthetic,
        *([data] if with_data else []),
    ]
    notes = [loop.loader] if loop.loader and with_data else []
    if not with_others:
        notes.append("other tools are left out: --peers=no")
    elif settings.loss.kernel != "cosine":
        notes.append(f"other tools are left out: they have no loss.kernel={settings.loss.kernel}")
    elif with_data:
        others = other_tools(settings, runtime, dataset, loop.plan.peak_learning_rate, checks, notes)
        variants += [Variant(name, peer.step, peer.batches) for name, peer in others.items()]
    for line in [*checks, *notes]:
        say(line)

    work = work_of_a_step(loop, here, runtime)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    parts: list[dict[str, float]] = []
    run = {
        "ranks": collectives.world_size(),
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
        parts.append(parts_of_a_step(loop, data if with_data else synthetic, warm, steps))
        run["rounds"] = number
        keep(run)
        left = (time.perf_counter() - begin) / number * (rounds - number)
        say(f"{counted(collectives.world_size(), 'rank')}: round {number} of {rounds}, {left:.0f} s left")
    return run


def work_of_a_step(loop: Loop, batch: Any, runtime: Runtime) -> dict[str, Any]:
    """Return this rank's model operations, launches and waits in one step, and the GPU's peak rate if known."""
    batches = endless(batch)
    return {
        "model_operations": step_work.operations(loop.settings, runtime, loop.dataset),
        "launches": step_work.launches(lambda: loop.step(batches), 10, runtime.device),
        "peak_rate": step_work.peak_rate(describe(runtime)["gpu"], runtime.precision),
    }


def other_tools(
    settings: Pretrain, runtime: Runtime, dataset: Dataset, peak_rate: float, checks: list[str], notes: list[str]
) -> dict[str, peers.Peer]:
    """Return the other tools' loops after checking their losses; append findings to `checks` and `notes`."""
    objective, temperature = make_objective(settings), settings.loss.temperature
    bare = State(replace(settings, probe=replace(settings.probe, enabled=False)), runtime, dataset)
    checks.append(peers.check_loss("the plain loop", peers.plain_loss(temperature), objective, runtime))
    pictures = peers.read_pictures(dataset), dataset.count
    found = {"plain": peers.plain_loop(settings, runtime, pictures, bare)}
    if peers.lightly_version() is None:
        notes.append("lightly is not installed and left out: `make peers` installs it into .peers")
    else:
        checks.append(peers.check_loss("lightly", peers.lightly_loss(settings), objective, runtime))
        found["lightly"] = peers.lightly_loop(settings, runtime, pictures, bare, peak_rate)
    source = "the same stored images" if dataset.stored else "the rendered pictures, cropped and coloured"
    notes.append(f"the other tools read {source}, by torch's DataLoader with {settings.data.workers} processes")
    if collectives.world_size() > 1 and runtime.device.type == "cpu":
        notes.append("their batch norm is local to each rank: torch has no synchronised one on CPUs")
    return found


def timed(variant: Variant, warm: int, steps: int, runtime: Runtime) -> float:
    """Return the seconds per step of the slowest rank."""
    with closing(variant.open()) as batches:
        for _ in range(warm):
            variant.step(batches)
        meet(runtime)
        begin = time.perf_counter()
        for _ in range(steps):
            variant.step(batches)
        meet(runtime)
        return (time.perf_counter() - begin) / steps


def parts_of_a_step(loop: Loop, variant: Variant, warm: int, steps: int) -> dict[str, float]:
    """Return the mean seconds of each part of a step, over steps that wait for the device after every part."""
    with closing(variant.open()) as batches:
        for _ in range(warm):
            loop.step(batches)
        meet(loop.runtime)
        clock = Clock(loop.runtime.device)
        for _ in range(steps):
            loop.step(batches, clock)
        return {part: clock.seconds[part] / steps for part in PARTS}


if __name__ == "__main__":
    sys.exit(main())

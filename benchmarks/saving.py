"""Measure how much a checkpoint slows down the training step during which it is written.

    python -m benchmarks.saving configs/pretrain/cifar10_cpu.yaml data.train=datasets/cifar10-train.beton

Three kinds of training step alternate, in rounds of changing order:

    none         nothing is saved
    background   a save begins before the step, as in simclr_ddp.pretrain: the state is copied, a thread writes it
    waiting      a save begins before the step, and the step waits until it is on the disk

Time for writing after the end of a step is not counted. The cost is the time of a step relative to that of `none` in
the same round. The table is printed, and FOLDER/<config>-<device>-<ranks>.json contains all values. Under torchrun the
command measures the present ranks. Checkpoints are written to the run directory.

flags: --rounds 20     rounds
       --out FOLDER    benchmarks/results/saving by default
"""

import json
import os
import random
import statistics
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.support.loops import Loop, synchronize
from benchmarks.support.timing import take_flags
from simclr_ddp.config import command, options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.distributed import collectives, rendezvous
from simclr_ddp.distributed.runtime import setup
from simclr_ddp.runs.provenance import describe
from simclr_ddp.system import console
from simclr_ddp.training.plan import make_plan
from simclr_ddp.training.saver import Saver

FLAGS = {"--rounds": "20", "--out": "benchmarks/results/saving"}
KINDS = ("none", "background", "waiting")


def main(argv: list[str] | None = None) -> int:
    flags, rest = take_flags(sys.argv[1:] if argv is None else argv, FLAGS)
    return command.run(partial(benchmark, flags=flags), Pretrain, "[CONFIG.yaml]", __doc__ or "", rest)


def benchmark(settings: Pretrain, flags: dict[str, str]) -> None:
    if not flags["--rounds"].isdigit() or int(flags["--rounds"]) < 2:
        raise ValueError(f"--rounds {flags['--rounds']}: it must be at least 2; write for example --rounds 20")
    rounds = int(flags["--rounds"])
    runtime = setup(settings.device, settings.precision, settings.threads, settings.timeout)
    dataset = open_dataset(settings.data.train, "train", settings.data.spirograph)
    plan = make_plan(settings, dataset)
    loop = Loop(settings, runtime, dataset, plan)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=plan.run_dir) as folder:
        seconds = measure(loop, Path(folder), rounds)
        size = max((path.stat().st_size for path in Path(folder).glob("step-*.pt")), default=0)
    ranks, machine = collectives.world_size(), describe(runtime)
    rendezvous.stop()
    if not console.main_rank():
        return
    growth = {kind: [a / b - 1 for a, b in zip(seconds[kind], seconds["none"], strict=True)] for kind in KINDS}
    print(f"a checkpoint of {size / 1e6:,.1f} MB during a step, {ranks} ranks, {rounds} rounds")
    print(f"{'step':<12} {'median':>10}   growth: median (quartiles)")
    for kind in KINDS:
        low, middle, high = (100 * value for value in statistics.quantiles(growth[kind], n=4))
        shown = "" if kind == "none" else f"{middle:+.1f} % ({low:+.1f} to {high:+.1f} %)"
        print(f"{kind:<12} {statistics.median(seconds[kind]):>8.3f} s   {shown}")
    path = Path(flags["--out"]) / f"{settings.name}-{runtime.device.type}-{ranks}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "command": " ".join(["python -m benchmarks.saving", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine,
        "checkpoint_bytes": size,
        "growth_median": {kind: statistics.median(growth[kind]) for kind in KINDS[1:]},
        "seconds": seconds,
        "settings": options.plain(settings),
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


def measure(loop: Loop, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a step of each kind in every round; rank 0 writes checkpoints to the folder."""
    device, orders = loop.runtime.device, random.Random(0)  # the same on all ranks
    saver = Saver(folder, device, keep_last=loop.settings.checkpoint.keep_last)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with closing(loop.batches(3 + rounds * len(KINDS))) as batches:
        for _ in range(3):
            loop.step(batches)
        for _ in range(rounds):
            for kind in orders.sample(KINDS, len(KINDS)):
                saver.wait()
                collectives.barrier()
                synchronize(device)
                begin = time.perf_counter()
                if kind != "none" and collectives.is_main():
                    with (folder / "metrics.jsonl").open("a") as file:  # pretrain flushes it before a checkpoint
                        file.write(f"{'x' * 200}\n")
                        file.flush()
                        os.fsync(file.fileno())
                    saver.save({"step": loop.done} | loop.state.to_save(), loop.done)
                if kind == "waiting":
                    saver.wait()
                loop.step(batches)
                synchronize(device)
                seconds[kind].append(time.perf_counter() - begin)
        fault = saver.wait()
    if fault:
        raise OSError(f"a checkpoint could not be written ({fault}): set run_dir=... to another disk")
    return seconds


if __name__ == "__main__":
    sys.exit(main())

"""What a checkpoint costs the step beside which it is written.

    python -m benchmarks.saving configs/pretrain/cifar10_cpu.yaml data.train=datasets/cifar10-train.beton

Three kinds of training step take turns, in rounds of changing order:

    none         nothing is saved
    background   a checkpoint is begun before it, as simclr_ddp.pretrain saves: a copy is taken, a thread writes it
    waiting      a checkpoint is begun before it, and the step waits until it is on the disk

What is left to write after a step is not counted. The cost is the time of a step against that of `none` in the same
round. The table goes to the screen, FOLDER/<config>-<device>-<ranks>.json holds the rest. Under torchrun it measures
the ranks there are. Checkpoints are written where the run directory is.

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

from benchmarks.loops import Training, synchronize
from benchmarks.step import take_flags
from simclr_ddp import cli, config, distributed
from simclr_ddp.config import Pretrain
from simclr_ddp.data import open_dataset
from simclr_ddp.run import make_plan
from simclr_ddp.runtime import describe, setup
from simclr_ddp.saver import Saver

FLAGS = {"--rounds": "20", "--out": "benchmarks/results/saving"}
KINDS = ("none", "background", "waiting")


def main(argv: list[str] | None = None) -> int:
    flags, rest = take_flags(sys.argv[1:] if argv is None else argv, FLAGS)
    return cli.run(partial(benchmark, flags=flags), Pretrain, "[CONFIG.yaml]", __doc__ or "", rest)


def benchmark(settings: Pretrain, flags: dict[str, str]) -> None:
    if not flags["--rounds"].isdigit() or int(flags["--rounds"]) < 2:
        raise ValueError(f"--rounds {flags['--rounds']}: a number of at least 2 is wanted, for example --rounds 20")
    rounds = int(flags["--rounds"])
    runtime = setup(settings.device, settings.precision, settings.threads, settings.timeout)
    dataset = open_dataset(settings.data.train, "train")
    plan = make_plan(settings, dataset)
    training = Training(settings, runtime, dataset, plan)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=plan.run_dir) as folder:
        seconds = measure(training, Path(folder), rounds)
        size = max((path.stat().st_size for path in Path(folder).glob("step-*.pt")), default=0)
    ranks, machine = distributed.world_size(), describe(runtime)
    distributed.stop()
    if not cli.main_rank():
        return
    growth = {kind: [a / b - 1 for a, b in zip(seconds[kind], seconds["none"], strict=True)] for kind in KINDS}
    print(f"a checkpoint of {size / 1e6:,.1f} MB beside a step, {ranks} ranks, {rounds} rounds")
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
        "settings": config.plain(settings),
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


def measure(training: Training, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each kind in every round; on rank 0 checkpoints are written to the folder."""
    device, orders = training.runtime.device, random.Random(0)  # the same on all ranks
    saver = Saver(folder, training.settings.checkpoint, training.plan.steps_per_epoch, device)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with closing(training.batches(3 + rounds * len(KINDS))) as batches:
        for _ in range(3):
            training.step(batches)
        for _ in range(rounds):
            for kind in orders.sample(KINDS, len(KINDS)):
                saver.wait()
                distributed.barrier()
                synchronize(device)
                begin = time.perf_counter()
                if kind != "none" and distributed.is_main():
                    with (folder / "metrics.jsonl").open("a") as file:  # which pretrain brings to the disk before
                        file.write(f"{'x' * 200}\n")
                        file.flush()
                        os.fsync(file.fileno())
                    saver.save({"step": training.done} | training.state.to_save(), training.done)
                if kind == "waiting":
                    saver.wait()
                training.step(batches)
                synchronize(device)
                seconds[kind].append(time.perf_counter() - begin)
        fault = saver.wait()
    if fault:
        raise OSError(f"a checkpoint could not be written ({fault}): run_dir=... takes another place")
    return seconds


if __name__ == "__main__":
    sys.exit(main())

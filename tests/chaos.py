"""Faults on a seeded schedule over one training run: `python -m tests.chaos --ranks 4 --faults 100 --out FILE`

Real processes under torchrun, real signals, a real small file system. The run is started again after every fault that
ends it, until it is finished; then its parameters must be, bit for bit, those of a run that nothing happened to, and
metrics.jsonl must hold every step once. The report counts faults, resumes, steps computed twice, and the seconds from a
fault to the first new step.

What is not the real thing: the clock is not turned, as that would disturb the machine; the modification times of the
run's files are, by up to a year in both directions, and processes that are stopped see their clocks leap.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from tests.conftest import write_images
from tests.support import processes
from tests.support.tiny_run import assert_equal_bits

EVERY = 4  # steps between checkpoints
PATIENCE = 10.0  # seconds a rank after which ranks that stand still are given up; they share the cores


class Run:
    """One training run and what is done to it."""

    def __init__(self, arguments: list[str], run_dir: Path, ranks: int, chance: random.Random) -> None:
        self.arguments, self.run_dir, self.ranks, self.chance = arguments, run_dir, ranks, chance
        self.filler = run_dir.parent / "filler"
        self.own_disk = False
        self.process: subprocess.Popen[str] | None = None
        self.output = ""
        self.seen = 0  # the last step of this start
        self.saves_hit = 0

    def start(self) -> None:
        self.seen = 0
        loader = self.chance.choice(["torch", "ffcv"])
        arguments = [*self.arguments, f"data.loader={loader}"]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            processes.command("simclr_ddp.pretrain", *arguments, ranks=self.ranks),
            cwd=processes.ROOT,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        with contextlib.suppress(OSError):
            for line in reversed((self.run_dir / "metrics.jsonl").read_text().splitlines()):
                with contextlib.suppress(json.JSONDecodeError):
                    return json.loads(line)["step"]
        return 0

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_for_step(self, step: int, limit: float = 240) -> bool:
        """Whether that step came; False if the run ended before."""
        end = time.monotonic() + limit
        while self.running() and time.monotonic() < end:
            if self.step() >= step:
                return True
            time.sleep(0.005)
        if self.running():
            raise AssertionError(f"no step {step} within {limit:.0f} s: it hangs\n{self.said()}")
        return self.step() >= step

    def wait_for_end(self, limit: float = 240) -> int:
        """Until every process of it has gone by itself; its exit status."""
        assert self.process is not None
        end = time.monotonic() + limit
        while processes.group(self.process) or self.running():
            if time.monotonic() > end:
                raise AssertionError(f"it did not end within {limit:.0f} s\n{self.said()}")
            time.sleep(0.05)
        said = self.said()
        frames = [line for line in said.splitlines() if line.startswith(f'  File "{processes.ROOT}/simclr_ddp/')]
        assert not frames, f"a traceback, not a line:\n{said}"
        self.output += said
        self.seen = max(self.seen, self.step())
        return self.process.returncode

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def rank(self, which: int | None = None) -> int:
        """The pid of that rank, or of one by chance."""
        assert self.process is not None
        pids = processes.rank_processes(self.process)
        return pids[which] if which is not None else self.chance.choice(pids)


# --- faults: each returns whether the run is to end of it -----------------------------------------------------------


def kill_a_rank(run: Run) -> bool:
    os.kill(run.rank(), signal.SIGKILL)
    return True


def kill_the_launcher(run: Run) -> bool:
    assert run.process is not None
    run.process.kill()
    return True


def kill_during_a_save(run: Run) -> bool:
    writer, end = run.rank(0), time.monotonic() + 5
    while time.monotonic() < end and run.running():
        if any(name.startswith(".step-") for name in os.listdir(run.run_dir / "checkpoints")):
            run.saves_hit += 1
            break
    with contextlib.suppress(ProcessLookupError):
        os.kill(writer, signal.SIGKILL)
    return True


def kill_a_loader(run: Run) -> bool:
    """A decoding process of torch's loader; a rank where threads decode."""
    parent = run.rank()
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    os.kill(int(children[0]) if children else parent, signal.SIGKILL)
    return True


def terminate(run: Run) -> bool:
    """What a queue does: SIGTERM to all, who save and stop."""
    assert run.process is not None
    run.process.terminate()
    return True


def stop_for_a_while(run: Run) -> bool:
    pid = run.rank()
    os.kill(pid, signal.SIGSTOP)
    time.sleep(run.chance.uniform(0.5, 2.0))
    os.kill(pid, signal.SIGCONT)
    return False


def stop_for_good(run: Run) -> bool:
    """The others notice within the time limit; the launcher kills what is left."""
    os.kill(run.rank(), signal.SIGSTOP)
    return True


def fill_the_disk(run: Run) -> bool:
    """Fill the disk for a few saves; training continues and warns. Needs a file system of its own."""
    if not run.own_disk:
        return False
    with contextlib.suppress(OSError), run.filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), run.filler.open("ab", buffering=0) as file:
        while True:
            file.write(b"\0")
    end = time.monotonic() + 3
    while run.running() and time.monotonic() < end:
        time.sleep(0.05)
    run.filler.unlink()
    return False


def flip_a_bit(run: Run) -> bool:
    """In the newest checkpoint, between two starts."""
    _end(run)
    newest = max((run.run_dir / "checkpoints").glob("step-*.pt"), default=None)
    if newest is not None:
        data = bytearray(newest.read_bytes())
        data[run.chance.randrange(len(data))] ^= 1 << run.chance.randrange(8)
        newest.write_bytes(data)
    return True


def truncate_the_metrics(run: Run) -> bool:
    _end(run)
    path = run.run_dir / "metrics.jsonl"
    with path.open("rb+") as file:
        file.truncate(max(0, path.stat().st_size - run.chance.randrange(1, 2000)))
    return True


def turn_the_files_clock(run: Run) -> bool:
    _end(run)
    for path in run.run_dir.rglob("*"):
        then = time.time() + run.chance.uniform(-1, 1) * 365 * 86400
        os.utime(path, (then, then))
    return True


def _end(run: Run) -> None:
    kill_a_rank(run)
    run.wait_for_end()


FAULTS: list[tuple[Callable[[Run], bool], int]] = [  # with their shares
    (kill_a_rank, 5),
    (kill_the_launcher, 3),
    (kill_during_a_save, 3),
    (kill_a_loader, 2),
    (terminate, 2),
    (stop_for_a_while, 2),
    (stop_for_good, 1),
    (fill_the_disk, 1),
    (flip_a_bit, 2),
    (truncate_the_metrics, 2),
    (turn_the_files_clock, 1),
]


# --- the run --------------------------------------------------------------------------------------------------------


def chaos(folder: Path, ranks: int, faults: int, seed: int, steps: int) -> dict[str, object]:
    """Train once undisturbed and once under so many faults; the figures, after all promises have been checked."""
    chance = random.Random(seed)
    images = make_images(folder)
    calm = [*arguments(images, folder / "unbroken", steps, ranks), "checkpoint.keep_last=1000"]
    unbroken = Run(calm, folder / "unbroken", ranks, chance)
    unbroken.start()
    if unbroken.wait_for_end(1800) != 0:
        raise AssertionError(f"the undisturbed run failed:\n{unbroken.output}")
    with small_disk(folder / "disk") as (disk, real):
        run = Run(arguments(images, disk / "run", steps, ranks), disk / "run", ranks, chance)
        run.own_disk = real
        figures = disturb(run, faults, steps)
        figures["file system"] = "tmpfs of 24 MB" if real else "an ordinary folder: no right to mount, disk not filled"
        figures |= compare(disk / "run", folder / "unbroken", steps)
    return {"ranks": ranks, "steps": steps, "seed": seed} | figures


def disturb(run: Run, faults: int, steps: int) -> dict[str, object]:
    schedule: list[Callable[[Run], bool]] = []
    while len(schedule) < faults:  # every kind once before any comes again, then by their shares
        schedule += run.chance.sample([f for f, _ in FAULTS], len(FAULTS)) if not schedule else []
        schedule += run.chance.choices([f for f, _ in FAULTS], [share for _, share in FAULTS])
    done: Counter[str] = Counter()
    recomputed: dict[str, list[int]] = defaultdict(list)
    recoveries, reached, disk_was_full = [], 0, False
    run.start()
    for fault in schedule[:faults]:
        room = max(1, (steps - reached) // (faults - sum(done.values())))
        wanted = run.step() + run.chance.randint(1, max(1, min(2 * EVERY, room)))
        if not run.wait_for_step(min(wanted, steps - 1)):
            raise AssertionError(f"it ended by itself before {fault.__name__}:\n{run.said()}")
        begin = time.monotonic()
        ends = fault(run)
        kind = fault.__name__.replace("_", " ")
        done[kind] += 1
        reached = max(reached, run.step())
        disk_was_full = disk_was_full or fault is fill_the_disk
        if not ends:
            continue
        if run.wait_for_end() == 0:
            raise AssertionError(f"{fault.__name__} ended with status 0")
        lost = run.seen  # of truncated metrics: those before they were
        run.start()
        resumed = wait_for_resume(run)
        run.wait_for_step(resumed + 1)
        recomputed[kind].append(max(0, lost - resumed))
        recoveries.append(time.monotonic() - begin)
        # A checkpoint is on the disk before the next is begun, so up to two intervals; a damaged one costs another.
        allowed = (3 if fault is flip_a_bit else 2) * EVERY
        if not disk_was_full:
            assert recomputed[kind][-1] <= allowed, f"{recomputed[kind][-1]} steps computed twice after {kind}"
        disk_was_full = False
    if run.wait_for_end(600) != 0:
        raise AssertionError(f"it did not finish:\n{run.said()}")
    return {
        "faults": sum(done.values()),
        "of each kind": dict(sorted(done.items())),
        "resumes": len(recoveries),
        "saves that were hit": run.saves_hit,
        "checkpoint interval": EVERY,
        "resumes within the interval": sum(n <= EVERY for found in recomputed.values() for n in found),
        "steps computed twice": sum(map(sum, recomputed.values())),
        "most of them after": {kind: max(found) for kind, found in sorted(recomputed.items())},
        "seconds from fault to new step": {
            "median": round(statistics.median(recoveries), 1),
            "most": round(max(recoveries), 1),
        },
    }


def wait_for_resume(run: Run, limit: float = 240) -> int:
    """Return the step that a start resumes from; 0 if it found no checkpoint."""
    end = time.monotonic() + limit
    while run.running() and time.monotonic() < end:
        said = run.said()
        found = re.search(r"resuming from \S+step-(\d+)\.pt", said)
        if found:
            return int(found.group(1))
        if "weights: random" in said:
            return 0
        time.sleep(0.02)
    raise AssertionError(f"it did not start again:\n{run.said()}")


def compare(run_dir: Path, unbroken: Path, steps: int) -> dict[str, object]:
    """Parameters and optimizer state bit for bit, every step of the metrics once and in order; the figures."""
    name = f"checkpoints/step-{steps:08d}.pt"
    one, other = (torch.load(d / name, weights_only=True) for d in (run_dir, unbroken))
    for key, value in other["model"].items():
        assert torch.equal(one["model"][key], value), f"{key} is not that of the undisturbed run"
    assert_equal_bits(one["optimizers"], other["optimizers"], "optimizers")
    first = torch.load(min((unbroken / "checkpoints").glob("step-*.pt")), weights_only=True)["model"]
    weights = [k for k in first if k.endswith("weight") and first[k].dim() > 1]
    moved = sum((other["model"][k] - first[k]).norm() for k in weights) / sum(first[k].norm() for k in weights)
    assert moved > 0.01, f"the parameters moved by {moved:.2%} only"
    found = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert found == list(range(1, steps + 1)), f"metric lines are missing or doubled: {found}"
    missing, doubled = len(set(range(1, steps + 1)) - set(found)), len(found) - len(set(found))
    said = {"metric lines missing": missing, "metric lines doubled": doubled}
    return said | {"parameters moved by": f"{moved:.1%}", "tensors that differ": 0}


def make_images(folder: Path) -> Path:
    from simclr_ddp.data.write import write_dataset

    write_dataset(str(write_images(folder / "images", 64)), folder / "images.beton")
    return folder / "images.beton"


def arguments(images: Path, run_dir: Path, steps: int, ranks: int) -> list[str]:
    return [
        f"data.train={images}",
        f"run_dir={run_dir}",
        "device=cpu",
        "precision=fp32",
        "threads=1",
        "data.size=32",
        "data.workers=1",
        "model.width=0.125",
        "model.stem=cifar",
        "optim.global_batch_size=32",
        f"optim.steps={steps}",
        "optim.scaling=none",
        "optim.base_learning_rate=0.5",
        "optim.trust_coefficient=0.01",
        "optim.warmup_epochs=0",
        f"checkpoint.every_steps={EVERY}",
        "checkpoint.keep_last=4",
        "log.every_steps=1",
        f"timeout={PATIENCE * ranks}",
    ]


@contextlib.contextmanager
def small_disk(place: Path):
    """(folder, whether it is a file system of its own, of 24 MB)"""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    real = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield place, real
    finally:
        if real:
            subprocess.run(["umount", "-l", str(place)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--faults", type=int, default=50, help="for each number of ranks")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    reports = []
    for ranks in wanted.ranks:
        with tempfile.TemporaryDirectory() as folder:
            reports.append(chaos(Path(folder), ranks, wanted.faults, wanted.seed, wanted.steps))
        print(json.dumps(reports[-1], indent=1), flush=True)
    if wanted.out:
        wanted.out.write_text(json.dumps(reports, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

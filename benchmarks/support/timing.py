"""Helpers to measure variants alternately, on several ranks, and in new processes."""

import json
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.support.loops import synchronize
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime


def take_flags(arguments: list[str], known: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the known flags of a command with their given or default values, and all other arguments."""
    flags, rest = dict(known), []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in known:
            flags[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    return flags, rest


def in_processes(ranks: int, arguments: list[str]) -> dict[str, Any]:
    """Run the measurement of benchmarks.step in a group of `ranks` processes."""
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
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            if not errors:
                print(done.stderr[-4000:], file=sys.stderr)
                raise ValueError(f"{ranks} ranks failed: see above")
            raise ValueError(errors[0].removesuffix(" (--debug shows where)"))
        return json.loads(raw.read_text())


@dataclass
class Variant:
    """A variant to be timed: `step` takes one step on the next of the batches that `open` yields in a round."""

    name: str
    step: Callable[[Any], None]
    open: Callable[[], Generator[Any, None, None]]


def endless(batch: Any) -> Generator[Any, None, None]:
    while True:
        yield batch


def in_turns(variants: list[Variant], number: int) -> list[Variant]:
    """Return the order of a round: each begins with another variant, and every second round is reversed."""
    first = number % len(variants)
    order = variants[first:] + variants[:first]
    return order if number % 2 else order[::-1]


def meet(runtime: Runtime) -> None:
    synchronize(runtime.device)
    collectives.barrier()


def of_each_rank(value: int, runtime: Runtime) -> list[int]:
    values = torch.zeros(collectives.world_size(), dtype=torch.int64, device=runtime.device)
    values[collectives.rank()] = value
    return [int(v) for v in collectives.all_reduce_sum(values).tolist()]

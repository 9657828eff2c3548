"""Time, memory and error of the contrastive loss beside other tools', forward and backward, for growing batches.

    python -m benchmarks.loss                       # N = 256 to 4,096 images, d = 128 and 256
    python -m benchmarks.loss --images 512,1024,2048,4096,8192,16384,32768,65536      # takes hours

In one process all losses take turns, in rounds of changing order, after value and gradient were compared with
float64, of more than 16,384 images the gradient of 128 of them; one that computes something else ends the benchmark.
Peak memory is of a pass of its own for each. What would want more memory than there is, or too much time, is left out
and the table says so. Then groups of processes of one thread each compute the loss of one batch together.

    ours …           simclr_ddp.KernelInfoNCE; bf16 is loss.precision
    rows only        ours, if each rank took its own rows against all columns (benchmarks.rows_only)
    plain            masked cross-entropy over the matrix of similarities, in a few lines of torch
    lightly          its NTXentLoss, and `metric learning` pytorch-metric-learning's, if they are there: `make peers`
    solo-learn       its formula, restated
    Kernel-InfoNCE   its formula, restated: gamma = 2 at the temperature at which it is the cosine, and gamma = 1

The shares are those of the speeds of float32 matrix products and of copies, both measured beside them, that counted
operations and bytes reach, and then the one of the two which alone would take longer.

flags: --images 256,512,1024,2048,4096   images of a batch
       --widths 128,256                  widths of the embedding
       --ranks 1,2,4                     processes that share a batch; 0: none
       --only NAME,NAME                  losses, by their names in the table, instead of all
       --repeats 10                      at least; 3 where one takes over a minute
       --threads 0                       of the one process; 0: all cores
       --out FOLDER                      benchmarks/results/loss by default
"""

import ctypes
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks import loss_report
from benchmarks.loss_reference import Reference, reference
from benchmarks.loss_tools import (
    COMPARED,
    OURS,
    Loss,
    busiest_share,
    make,
    missing,
    package_versions,
    whole_bytes,
    work,
)
from benchmarks.step import take_flags
from simclr_ddp import cli, distributed, tiled
from simclr_ddp.runtime import Runtime, describe, setup

FLAGS = {"--images": "256,512,1024,2048,4096", "--widths": "128,256", "--ranks": "1,2,4", "--only": ""}
FLAGS |= {"--repeats": "10", "--threads": "0", "--out": "benchmarks/results/loss", "--raw": ""}
ON_RANKS = ("ours cosine", "ours laplacian", "rows only", "lightly")
GROWS = {"ours spectral": 1, "metric learning": 3}  # powers of N; 2 of all others
LONGEST = 900.0  # seconds of one repeat beyond which a loss is left out
ALLOWED = (1e-2, 5e-2)  # relative errors of loss and gradient beyond which it is another loss
PROMISED = (1e-4, 1e-3)  # the same of ours in fp32


def main(argv: list[str] | None = None) -> int:
    flags, rest = take_flags(sys.argv[1:] if argv is None else argv, FLAGS)
    if rest and rest[0] in ("--help", "-h"):
        cli.say((__doc__ or "").strip())
        return 0
    try:
        if rest:
            raise ValueError(f"unknown argument {rest[0]}: --help lists them")
        benchmark(flags)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def benchmark(flags: dict[str, str]) -> None:
    sizes = _numbers("--images", flags["--images"], 2)
    widths = _numbers("--widths", flags["--widths"], 2)
    repeats = _number("--repeats", flags["--repeats"], 2)
    ranks = [] if flags["--ranks"] == "0" else _numbers("--ranks", flags["--ranks"], 1)
    threads = _number("--threads", flags["--threads"], 0)
    names = chosen(flags["--only"])
    if "RANK" in os.environ:  # one of torchrun's processes
        if not flags["--raw"]:
            raise ValueError("RANK is set, as torchrun sets it: start one process without it, which starts the --ranks")
        rows = in_group(sizes, widths, repeats, names)
        if cli.main_rank():
            Path(flags["--raw"]).write_text(json.dumps(rows))
        return
    if threads:
        torch.set_num_threads(threads)

    runtime = Runtime(torch.device("cpu"), "fp32", torch.get_num_threads())
    product, copy = product_rate(), copy_rate()
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.loss", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": describe(runtime) | {"peers": package_versions()},
        "product_operations_per_second": product,
        "copied_bytes_per_second": copy,
        "rows": [],
        "rank_rows": [],
    }
    cli.say(
        f"float32 products: {product / 1e9:.0f} GFLOP/s on {runtime.threads} threads, copies: {copy / 1e9:.1f} GB/s"
    )
    cli.say(loss_report.header())
    for width in widths:
        for images in sizes:
            results["rows"] += measure(images, width, repeats, names, results["rows"], (product, copy))
            loss_report.write(results, Path(flags["--out"]))
    shared = [name for name in names if name in ON_RANKS]
    if ranks and not shared:
        cli.say(f"no ranks: of the losses only {', '.join(ON_RANKS)} are measured on them")
    for count in ranks if shared else []:
        found = in_processes(count, sizes, widths, repeats, shared)
        cli.say(loss_report.rank_table(found))
        results["rank_rows"] += found
        loss_report.write(results, Path(flags["--out"]))
    cli.say(f"wrote {flags['--out']}/cpu.json and cpu.png")


def chosen(only: str) -> list[str]:
    """The names of the losses to be measured; ValueError for one that is not known, or not here."""
    for name in only.split(",") if only else []:
        if name not in COMPARED:
            raise ValueError(f"--only {name} is no loss: choose among {', '.join(COMPARED)}")
        if missing(name):
            raise ValueError(f"--only {name} wants a package that is not here: `make peers` installs it into .peers")
    return [name for name in (only.split(",") if only else COMPARED) if not missing(name)]


# --- one process ----------------------------------------------------------------------------------------------------


def measure(
    images: int, width: int, repeats: int, names: list[str], before: list[dict[str, Any]], rates: tuple[float, float]
) -> list[dict[str, Any]]:
    """One row a loss: seconds, error against float64, memory, and the shares of the machine's speeds.

    before  rows of smaller batches, from which times are foretold
    rates   operations per second of products, and bytes per second of copies
    """
    y_a, y_b = embeddings(images, width)
    free = _available_bytes()
    rows: list[dict[str, Any]] = [{"name": name, "images": images, "width": width} for name in names]
    for row in rows:
        wanted = whole_bytes(row["name"], images)
        seconds = foretold(row, before)
        if wanted > 0.6 * free:
            row["left_out"] = f"it wants about {wanted / 1e9:,.0f} GB, {free / 1e9:,.0f} GB are free"
        elif seconds > LONGEST:
            row["left_out"] = f"about {seconds / 60:.0f} minutes a repeat, by the time of smaller batches"
    measured = {row["name"]: make(row["name"]) for row in rows if "left_out" not in row}
    exact = {kernel: reference(kernel, y_a, y_b) for kernel in dict.fromkeys(COMPARED[name] for name in measured)}
    errors = {}
    for name, loss in measured.items():  # which warms up, too
        _, value, gradient = once(loss, y_a, y_b)
        errors[name] = check(name, value, gradient, exact[COMPARED[name]])
    memory = {name: peak_memory(loss, y_a, y_b) for name, loss in measured.items()}
    seconds_of = in_turns(measured, lambda loss: once(loss, y_a, y_b)[0], repeats)
    for row in rows:
        if "left_out" not in row:
            row |= {"seconds": quartiles(seconds_of[row["name"]]), "repeats": len(seconds_of[row["name"]])}
            row |= errors[row["name"]]
            row["memory_bytes"] = memory[row["name"]]
            counted = work(row["name"], images, width)
            if counted is not None:
                row |= {"operations": counted[0], "bytes": counted[1]} | roofline(counted, row["seconds"][1], rates)
        cli.say(loss_report.line(row))
    return rows


def roofline(counted: tuple[int, int], seconds: float, rates: tuple[float, float]) -> dict[str, Any]:
    """Which shares of products' and of copies' speed the counted operations and bytes reach, and the larger one."""
    products, copies = (amount / seconds / rate for amount, rate in zip(counted, rates, strict=True))
    bound = "products" if products >= copies else "copies"
    return {"share_of_products": products, "share_of_copies": copies, "bound": bound}


def check(name: str, value: float, gradient: Tensor, exact: Reference | None) -> dict[str, Any]:
    """Relative errors against float64, and of how many rows of the gradient; ValueError if it is another loss."""
    if exact is None:
        if not (math.isfinite(value) and gradient.isfinite().all()):
            raise ValueError(f"the loss of {name} is {value:g}, or its gradient not finite: --only leaves it out")
        return {"loss_error": None, "gradient_error": None, "gradient_rows": 0}
    wanted, slope, rows = exact
    found = gradient if rows is None else gradient[rows]
    error = abs(value - wanted) / abs(wanted)
    gradient_error = ((found - slope).norm() / slope.norm()).item()
    allowed = ALLOWED if name not in OURS or name.endswith("bf16") else PROMISED
    if not (error <= allowed[0] and gradient_error <= allowed[1] and gradient.isfinite().all()):
        raise ValueError(
            f"the loss of {name} is {value:.6f} where float64 has {wanted:.6f}, its gradient is off by "
            f"{gradient_error:.1e}: losses that compute different things are not compared, --only leaves it out"
        )
    return {"loss_error": error, "gradient_error": gradient_error, "gradient_rows": len(slope)}


def foretold(row: dict[str, Any], before: list[dict[str, Any]]) -> float:
    """Seconds of a loss from those at the largest batch so far of that width, and the power by which they grow."""
    known = [b for b in before if b["name"] == row["name"] and b["width"] == row["width"] and b["images"] > 1000]
    if not known:
        return 0.0
    last = max(known, key=lambda b: b["images"])
    if "seconds" not in last:
        return math.inf if last["images"] <= row["images"] else 0.0
    return last["seconds"][1] * (row["images"] / last["images"]) ** GROWS.get(row["name"], 2)


def in_turns(
    losses: dict[str, Loss], timed: Callable[[Loss], float], repeats: int, total: Callable[[float], float] = float
) -> dict[str, list[float]]:
    """Seconds of each loss in rounds of changing order, fewer of those that take over a minute.

    total  makes of one's own seconds those that all ranks agree on
    """
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    orders = random.Random(0)  # the same on all ranks
    for number in range(repeats):
        for name in orders.sample(list(losses), len(losses)):
            if number < 3 or statistics.median(seconds[name]) <= 60:
                seconds[name].append(total(timed(losses[name])))
    return seconds


def quartiles(seconds: list[float]) -> list[float]:
    return statistics.quantiles(seconds, n=4, method="inclusive")


def embeddings(images: int, width: int) -> tuple[Tensor, Tensor]:
    """Raw projections of two views, as alike (cosine 0.8) as those of a run under way."""
    generator = torch.Generator().manual_seed(0)
    y_a = torch.randn(images, width, generator=generator)
    return y_a, y_a + 0.75 * torch.randn(images, width, generator=generator)


def once(loss: Loss, y_a: Tensor, y_b: Tensor) -> tuple[float, float, Tensor]:
    """(seconds of forward and backward, value, gradient of both)"""
    y_a, y_b = y_a.clone().requires_grad_(), y_b.clone().requires_grad_()
    begin = time.perf_counter()
    value = loss(y_a, y_b)
    value.backward()
    taken = time.perf_counter() - begin
    assert y_a.grad is not None and y_b.grad is not None
    return taken, value.item(), torch.cat([y_a.grad, y_b.grad])


def peak_memory(loss: Loss, y_a: Tensor, y_b: Tensor) -> int:
    """Bytes above the inputs that one forward and backward takes, of the resident set."""
    tiled.buffers.idle.clear()  # what is there already, or was freed before, would not count when it is taken again
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    once(loss, y_a, y_b)
    return _status("VmHWM") - before


def product_rate() -> float:
    """Operations per second of a float32 matrix product on all threads."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / _best_of(lambda: a @ a)


def copy_rate() -> float:
    """Bytes read and written per second by a copy that no cache holds, on all threads."""
    a, b = torch.zeros(2**26), torch.ones(2**26)
    return 2 * a.nbytes / _best_of(lambda: b.copy_(a))


def _best_of(call: Callable[[], object], times: int = 5) -> float:
    best = math.inf
    for _ in range(times + 1):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


# --- several processes ----------------------------------------------------------------------------------------------


def in_processes(ranks: int, sizes: list[int], widths: list[int], repeats: int, names: list[str]) -> list[Any]:
    """The rows of a group of that many processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc_per_node={ranks}", "-m", "benchmarks.loss"]
    command += ["--repeats", str(repeats), "--only", ",".join(names)]
    with TemporaryDirectory() as folder:
        raw = Path(folder) / "rows.json"
        command += ["--images", ",".join(map(str, sizes)), "--widths", ",".join(map(str, widths)), "--raw", str(raw)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode or not raw.exists():
            told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise ValueError(f"{ranks} ranks failed: {told[0][7:] if told else done.stderr[-2000:]}")
        return json.loads(raw.read_text())


def in_group(sizes: list[int], widths: list[int], repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """The rows of the ranks there are, on each of them."""
    setup("cpu", "fp32", 1)
    try:
        count = distributed.world_size()
        rows: list[dict[str, Any]] = []
        for width in widths:
            for images in sizes:
                if images % count == 0:
                    before = [row for row in rows if row["images"] % count == 0]
                    rows += measure_together(images, width, repeats, names, before)
                else:
                    row = {"images": images, "width": width, "ranks": count, "left_out": "not divisible by the ranks"}
                    rows += [{"name": name} | row for name in names]
        return rows
    finally:
        distributed.stop()


def measure_together(
    images: int, width: int, repeats: int, names: list[str], before: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row a loss of one batch over all ranks: the slowest rank's seconds, and the most memory of a rank.

    After the mean of the ranks' losses, and its gradient, were compared with float64.
    """
    count, own = distributed.world_size(), distributed.own_slice(images)
    whole = embeddings(images, width)
    y_a, y_b = (y[own] for y in whole)
    rows: list[dict[str, Any]] = [{"name": n, "images": images, "width": width, "ranks": count} for n in names]
    for row in rows:
        wanted = whole_bytes(row["name"], images)
        free = int(_on_all_ranks(_available_bytes(), min))
        if wanted > 0.6 * free:
            row["left_out"] = f"it wants about {wanted / 1e9:,.0f} GB, {free / 1e9:,.0f} GB are free"
        elif foretold(row, before) > LONGEST:
            row["left_out"] = f"about {foretold(row, before) / 60:.0f} minutes a repeat"
    measured = {row["name"]: make(row["name"]) for row in rows if "left_out" not in row}

    def timed(loss: Loss) -> float:
        distributed.barrier()
        return once(loss, y_a, y_b)[0]

    errors = check_together(measured, whole)
    memory = {name: _on_all_ranks(peak_memory(loss, y_a, y_b), max) for name, loss in measured.items()}
    seconds = in_turns(measured, timed, repeats, lambda own: _on_all_ranks(own, max))
    for row in rows:
        if row["name"] in measured:
            row |= {"seconds": quartiles(seconds[row["name"]]), "repeats": len(seconds[row["name"]])}
            row |= errors[row["name"]]
            row["memory_bytes"] = int(memory[row["name"]])
            row["busiest_share"] = busiest_share(images, count) if row["name"] in OURS else None
    return rows


def check_together(losses: dict[str, Loss], whole: tuple[Tensor, Tensor]) -> dict[str, dict[str, Any]]:
    """Errors of the mean over ranks, by rank 0, which others wait for; all end if one is another loss."""
    count, own = distributed.world_size(), distributed.own_slice(len(whole[0]))
    values, gradients = {}, {}
    for name, loss in losses.items():
        _, value, gradient = once(loss, *(y[own] for y in whole))
        values[name] = statistics.mean(distributed.from_all(value))
        gathered = distributed.of_all(gradient.view(2, -1, gradient.shape[-1]) / count)  # as gradients are averaged
        gradients[name] = torch.cat(gathered, dim=1).flatten(0, 1)
    found: dict[str, Any] | str = {}
    with distributed.while_main_works():
        if distributed.is_main():
            try:
                exact = {kernel: reference(kernel, *whole) for kernel in dict.fromkeys(COMPARED[n] for n in losses)}
                found = {n: check(n, values[n], gradients[n], exact[COMPARED[n]]) for n in losses}
            except ValueError as error:
                found = str(error)
    found = distributed.from_main(found)
    if isinstance(found, str):
        distributed.fail_together(found)
    return found


def _on_all_ranks(value: float, choose: Callable[[list[float]], float]) -> float:
    return choose(distributed.from_all(value))


# --- small things ---------------------------------------------------------------------------------------------------


def _numbers(name: str, text: str, least: int) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() and int(word) >= least for word in words):
        raise ValueError(f"{name} {text}: numbers of at least {least} are wanted, for example {name} {FLAGS[name]}")
    return sorted(int(word) for word in words)


def _number(name: str, text: str, least: int) -> int:
    if not (text.isdigit() and int(text) >= least):
        raise ValueError(f"{name} {text}: one number of at least {least} is wanted, for example {name} {FLAGS[name]}")
    return int(text)


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def _available_bytes() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    sys.exit(main())

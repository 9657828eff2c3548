"""Measure time, memory and error of the contrastive loss and of other tools, forward and backward, by batch size.

    python -m benchmarks.loss                       # N = 256 to 4,096 images, d = 128 and 256
    python -m benchmarks.loss --images 512,1024,2048,4096,8192,16384,32768,65536      # takes hours

First value and gradient are compared with float64 (for more than 16,384 images the gradient of 128 of them); a loss
that computes something else ends the benchmark. Then all losses alternate in one process, in rounds of changing order.
Peak memory is measured in a separate pass. A loss that needs more memory than there is, or too much time, is left out,
and the table says so. Then groups of processes with one thread each compute the loss of one batch together.

    ours …           simclr_ddp.KernelInfoNCE; bf16 is loss.precision
    rows only        ours, if each rank computed its local rows against all columns (benchmarks.support.rows_only)
    plain            masked cross-entropy over the matrix of similarities, in a few lines of torch
    lightly          its NTXentLoss; `metric learning` is pytorch-metric-learning's. `make peers` installs both
    solo-learn       its formula, restated
    Kernel-InfoNCE   its formula, restated: gamma = 2 at the temperature at which it is the cosine, and gamma = 1

The last columns give the counted operations and bytes per second as shares of the measured speeds of float32 matrix
products and of copies, and name the larger share, which bounds the time.

flags: --images 256,512,1024,2048,4096   images of a batch
       --widths 128,256                  widths of the embedding
       --ranks 1,2,4                     numbers of processes that share a batch; 0: none
       --only NAME,NAME                  losses to measure, by their names in the table, instead of all
       --repeats 10                      repeats of each loss; 3 if one takes over a minute
       --threads 0                       threads of the single process; 0: all cores
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

from benchmarks.support import loss_report
from benchmarks.support.loss_reference import Reference, reference
from benchmarks.support.loss_tools import (
    COMPARED,
    OURS,
    Loss,
    busiest_share,
    make,
    matrix_bytes,
    missing,
    package_versions,
    work,
)
from benchmarks.support.timing import take_flags
from simclr_ddp.distributed import collectives, rendezvous
from simclr_ddp.distributed.runtime import Runtime, setup
from simclr_ddp.losses import tiled
from simclr_ddp.runs.provenance import describe
from simclr_ddp.system.console import main_rank, say, shown
from simclr_ddp.system.machine import available_bytes

FLAGS = {"--images": "256,512,1024,2048,4096", "--widths": "128,256", "--ranks": "1,2,4", "--only": ""}
FLAGS |= {"--repeats": "10", "--threads": "0", "--out": "benchmarks/results/loss", "--raw": ""}
ON_RANKS = ("ours cosine", "ours laplacian", "rows only", "lightly")
GROWS = {"ours spectral": 1, "metric learning": 3}  # time grows as this power of N; 2 for all others
LONGEST = 900.0  # seconds per repeat above which a loss is left out
ALLOWED = (1e-2, 5e-2)  # relative errors of loss and gradient above which it counts as another loss
PROMISED = (1e-4, 1e-3)  # the same for ours in fp32


@shown()
def main(argv: list[str] | None = None) -> int:
    flags, rest = take_flags(sys.argv[1:] if argv is None else argv, FLAGS)
    if rest and rest[0] in ("--help", "-h"):
        say((__doc__ or "").strip())
        return 0
    try:
        if rest:
            raise ValueError(f"unknown argument {rest[0]}: --help lists the flags")
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
            raise ValueError("RANK is set, as torchrun sets it: unset it and start one process, which starts --ranks")
        rows = in_group(sizes, widths, repeats, names)
        if main_rank():
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
    say(f"float32 products: {product / 1e9:.0f} GFLOP/s on {runtime.threads} threads, copies: {copy / 1e9:.1f} GB/s")
    say(loss_report.header())
    for width in widths:
        for images in sizes:
            results["rows"] += measure(images, width, repeats, names, results["rows"], (product, copy))
            loss_report.write(results, Path(flags["--out"]))
    shared = [name for name in names if name in ON_RANKS]
    if ranks and not shared:
        say(f"no measurement on ranks: only {', '.join(ON_RANKS)} support it")
    for count in ranks if shared else []:
        found = in_processes(count, sizes, widths, repeats, shared)
        say(loss_report.rank_table(found))
        results["rank_rows"] += found
        loss_report.write(results, Path(flags["--out"]))
    say(f"wrote {flags['--out']}/cpu.json and cpu.png")


def chosen(only: str) -> list[str]:
    """Return the names of the losses to measure. Raises ValueError for one that is unknown or not installed."""
    for name in only.split(",") if only else []:
        if name not in COMPARED:
            raise ValueError(f"--only {name}: it is no loss; choose from {', '.join(COMPARED)}")
        if missing(name):
            raise ValueError(f"--only {name}: its package is not installed; `make peers` installs it into .peers")
    return [name for name in (only.split(",") if only else COMPARED) if not missing(name)]


# --- one process ----------------------------------------------------------------------------------------------------


def measure(
    images: int, width: int, repeats: int, names: list[str], before: list[dict[str, Any]], rates: tuple[float, float]
) -> list[dict[str, Any]]:
    """Return one row per loss: seconds, error against float64, memory, and the shares of the machine's speeds.

    before  rows of smaller batches, from which times are predicted
    rates   operations per second of products, and bytes per second of copies
    """
    y_a, y_b = embeddings(images, width)
    free = available_bytes() or 0
    rows: list[dict[str, Any]] = [{"name": name, "images": images, "width": width} for name in names]
    for row in rows:
        needed = matrix_bytes(row["name"], images)
        seconds = predicted(row, before)
        if needed > 0.6 * free:
            row["left_out"] = f"it needs about {needed / 1e9:,.0f} GB, {free / 1e9:,.0f} GB are free"
        elif seconds > LONGEST:
            row["left_out"] = f"about {seconds / 60:.0f} minutes per repeat, predicted from smaller batches"
    measured = {row["name"]: make(row["name"]) for row in rows if "left_out" not in row}
    exact = {kernel: reference(kernel, y_a, y_b) for kernel in dict.fromkeys(COMPARED[name] for name in measured)}
    errors = {}
    for name, loss in measured.items():  # this also warms up
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
        say(loss_report.line(row))
    return rows


def roofline(counted: tuple[int, int], seconds: float, rates: tuple[float, float]) -> dict[str, Any]:
    """Return which shares of the speeds of products and copies are reached, and the larger one."""
    products, copies = (amount / seconds / rate for amount, rate in zip(counted, rates, strict=True))
    bound = "products" if products >= copies else "copies"
    return {"share_of_products": products, "share_of_copies": copies, "bound": bound}


def check(name: str, value: float, gradient: Tensor, exact: Reference | None) -> dict[str, Any]:
    """Return errors relative to float64, and the number of gradient rows. Raises ValueError if it is another loss."""
    if exact is None:
        if not (math.isfinite(value) and gradient.isfinite().all()):
            raise ValueError(f"the loss of {name} is {value:g}, or its gradient not finite: leave it out with --only")
        return {"loss_error": None, "gradient_error": None, "gradient_rows": 0}
    expected, slope, rows = exact
    found = gradient if rows is None else gradient[rows]
    error = abs(value - expected) / abs(expected)
    gradient_error = ((found - slope).norm() / slope.norm()).item()
    allowed = ALLOWED if name not in OURS or name.endswith("bf16") else PROMISED
    if not (error <= allowed[0] and gradient_error <= allowed[1] and gradient.isfinite().all()):
        raise ValueError(
            f"the loss of {name} is {value:.6f} where float64 has {expected:.6f}, and its gradient differs by "
            f"{gradient_error:.1e}: it computes something else, so leave it out with --only"
        )
    return {"loss_error": error, "gradient_error": gradient_error, "gradient_rows": len(slope)}


def predicted(row: dict[str, Any], before: list[dict[str, Any]]) -> float:
    """Predict the seconds of a loss from those at the largest batch so far of that width, and the power in GROWS."""
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
    """Return the seconds of each loss in rounds of changing order, fewer for losses that take over a minute.

    total  turns the local seconds into those that all ranks agree on
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
    """Return raw projections of two views, as similar (cosine 0.8) as those of a run in progress."""
    generator = torch.Generator().manual_seed(0)
    y_a = torch.randn(images, width, generator=generator)
    return y_a, y_a + 0.75 * torch.randn(images, width, generator=generator)


def once(loss: Loss, y_a: Tensor, y_b: Tensor) -> tuple[float, float, Tensor]:
    """Return (seconds of forward and backward, value, gradient with respect to both)."""
    y_a, y_b = y_a.clone().requires_grad_(), y_b.clone().requires_grad_()
    begin = time.perf_counter()
    value = loss(y_a, y_b)
    value.backward()
    taken = time.perf_counter() - begin
    assert y_a.grad is not None and y_b.grad is not None
    return taken, value.item(), torch.cat([y_a.grad, y_b.grad])


def peak_memory(loss: Loss, y_a: Tensor, y_b: Tensor) -> int:
    """Return the bytes beyond the inputs that one forward and backward adds to the resident set."""
    tiled.buffers.idle.clear()  # memory that is held already, or was freed before, would not count when it is reused
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    once(loss, y_a, y_b)
    return _status("VmHWM") - before


def product_rate() -> float:
    """Return the operations per second of a float32 matrix product on all threads."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / _best_of(lambda: a @ a)


def copy_rate() -> float:
    """Return the bytes read and written per second by a copy that fits no cache, on all threads."""
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
    """Return the rows of a group of `ranks` processes with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc_per_node={ranks}", "-m", "benchmarks.loss"]
    command += ["--repeats", str(repeats), "--only", ",".join(names)]
    with TemporaryDirectory() as folder:
        raw = Path(folder) / "rows.json"
        command += ["--images", ",".join(map(str, sizes)), "--widths", ",".join(map(str, widths)), "--raw", str(raw)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode or not raw.exists():
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise ValueError(f"{ranks} ranks failed: {errors[0][7:] if errors else done.stderr[-2000:]}")
        return json.loads(raw.read_text())


def in_group(sizes: list[int], widths: list[int], repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """Return the rows of the present ranks, on each of them."""
    setup("cpu", "fp32", 1)
    try:
        count = collectives.world_size()
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
        rendezvous.stop()


def measure_together(
    images: int, width: int, repeats: int, names: list[str], before: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return one row per loss of one batch over all ranks: seconds of the slowest rank, and the most memory of a rank.

    First the mean of the ranks' losses, and its gradient, are compared with float64.
    """
    count, local = collectives.world_size(), collectives.local_slice(images)
    complete = embeddings(images, width)
    y_a, y_b = (y[local] for y in complete)
    rows: list[dict[str, Any]] = [{"name": n, "images": images, "width": width, "ranks": count} for n in names]
    for row in rows:
        needed = matrix_bytes(row["name"], images)
        free = int(_on_all_ranks(available_bytes() or 0, min))
        if needed > 0.6 * free:
            row["left_out"] = f"it needs about {needed / 1e9:,.0f} GB, {free / 1e9:,.0f} GB are free"
        elif predicted(row, before) > LONGEST:
            row["left_out"] = f"about {predicted(row, before) / 60:.0f} minutes per repeat"
    measured = {row["name"]: make(row["name"]) for row in rows if "left_out" not in row}

    def timed(loss: Loss) -> float:
        collectives.barrier()
        return once(loss, y_a, y_b)[0]

    errors = check_together(measured, complete)
    memory = {name: _on_all_ranks(peak_memory(loss, y_a, y_b), max) for name, loss in measured.items()}
    seconds = in_turns(measured, timed, repeats, lambda local: _on_all_ranks(local, max))
    for row in rows:
        if row["name"] in measured:
            row |= {"seconds": quartiles(seconds[row["name"]]), "repeats": len(seconds[row["name"]])}
            row |= errors[row["name"]]
            row["memory_bytes"] = int(memory[row["name"]])
            row["busiest_share"] = busiest_share(images, count) if row["name"] in OURS else None
    return rows


def check_together(losses: dict[str, Loss], complete: tuple[Tensor, Tensor]) -> dict[str, dict[str, Any]]:
    """Return the errors of the mean over ranks, computed by rank 0; all ranks end if one is another loss."""
    count, local = collectives.world_size(), collectives.local_slice(len(complete[0]))
    values, gradients = {}, {}
    for name, loss in losses.items():
        _, value, gradient = once(loss, *(y[local] for y in complete))
        values[name] = statistics.mean(collectives.all_gather_object(value))
        gathered = collectives.all_gather(gradient.view(2, -1, gradient.shape[-1]) / count)  # as gradients are averaged
        gradients[name] = torch.cat(gathered, dim=1).flatten(0, 1)
    found: dict[str, Any] | str = {}
    with collectives.while_main_works():
        if collectives.is_main():
            try:
                exact = {kernel: reference(kernel, *complete) for kernel in dict.fromkeys(COMPARED[n] for n in losses)}
                found = {n: check(n, values[n], gradients[n], exact[COMPARED[n]]) for n in losses}
            except ValueError as error:
                found = str(error)
    found = collectives.broadcast_object(found)
    if isinstance(found, str):
        collectives.fail_together(found)
    return found


def _on_all_ranks(value: float, choose: Callable[[list[float]], float]) -> float:
    return choose(collectives.all_gather_object(value))


# --- helpers --------------------------------------------------------------------------------------------------------


def _numbers(name: str, text: str, least: int) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() and int(word) >= least for word in words):
        raise ValueError(f"{name} {text}: numbers of at least {least} are expected, for example {name} {FLAGS[name]}")
    return sorted(int(word) for word in words)


def _number(name: str, text: str, least: int) -> int:
    if not (text.isdigit() and int(text) >= least):
        raise ValueError(f"{name} {text}: one number of at least {least} is expected, for example {name} {FLAGS[name]}")
    return int(text)


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    sys.exit(main())

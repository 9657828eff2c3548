"""Log-sums of a kernel and their gradient: the plain tiles, the same compiled, and the Triton kernels.

    python -m benchmarks.gpu.log_sums [--out=FILE.json] [--sizes=512,2048] [--widths=128,256]

For each kernel, embedding width and number of images: first the error against float64, then seconds of a forward and
a backward pass (median, least, most) and peak memory beside the inputs. Variants, all on one process:

    tiled T               simclr_ddp.tiled as it is, with tiles of T rows and columns
    compiled T            the same tiles, each by one compiled function forward and one backward: torch.compile of the
                          whole breaks off at the choice of the way of adding, which waits for the device, and unrolls
                          the loop over tiles
    compiled T, autotune  in the mode max-autotune-no-cudagraphs
    triton                simclr_ddp.triton_log_sums
    triton, tf32x3        with products on tensor cores, three for one: to see what it would gain, at which error

Triton stays where it beats all but tf32x3: the ratio is printed. Results go to FILE.json after each measurement, by
default benchmarks/results/log_sums_<GPU>.json. Exit status 1 if a variant fails or is wrong.

    --variants=tiled,triton   only those whose names begin so
    --seconds=1               the longest that repeating one may take, 5 by default, unless three repeats take longer

    --sweep=128   instead: seconds of other blocks of the Triton kernels for embeddings of that width, best first, to
                  correct SHAPES in simclr_ddp/triton_log_sums.py by
    --device=cpu  a trial; the Triton kernels take part under TRITON_INTERPRET=1 only
"""

import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.step import take_flags
from simclr_ddp import tile_kernels, tiled
from simclr_ddp.losses import Objective, normalize, tile_kernel
from simclr_ddp.metrics import peak_memory_bytes
from simclr_ddp.products import full_precision
from simclr_ddp.runtime import Runtime, describe

FLAGS = {"--out": "", "--sizes": "512,2048,4096,8192,16384,65536", "--widths": "128,256", "--sweep": ""}
FLAGS |= {"--device": "cuda", "--tiles": "512,4096", "--variants": "tiled,compiled,triton", "--seconds": "5"}
KERNELS = ("cosine", "laplacian")
TEMPERATURE = 0.1
REPEATS = 10  # of each variant, or as many as come in --seconds, three at least
ALLOWED = {"sums": 1e-4, "gradient": 1e-3}

Pass = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # z [2, N, D], upstream [2N] -> log-sums, gradient [2, N, D]


def main() -> int:
    if "--help" in sys.argv or "-h" in sys.argv:
        print((__doc__ or "").strip())
        return 0
    flags, rest = take_flags(sys.argv[1:], FLAGS)
    if rest:
        print(f"error: {rest[0]} is not known: choose from {', '.join(FLAGS)}", file=sys.stderr)
        return 2
    if flags["--device"] == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU, and this needs one: --device=cpu is a trial", file=sys.stderr)
        return 2
    device = torch.device(flags["--device"])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    gpu = re.sub(r"\W+", "_", name).strip("_").lower()
    out = Path(flags["--out"] or f"benchmarks/results/log_sums_{gpu}.json")
    results: dict[str, Any] = {"command": " ".join(["python -m benchmarks.gpu.log_sums", *sys.argv[1:]])}
    results |= {"date": time.strftime("%Y-%m-%d %H:%M"), "torch": torch.__version__, "triton": triton_version()}
    results["environment"] = describe(Runtime(device, "fp32", torch.get_num_threads()))
    entries: list[dict[str, Any]] = []
    results["measurements"] = entries

    def note(entry: dict[str, Any]) -> None:
        entries.append(entry)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")

    sizes, widths = ([int(word) for word in flags[flag].split(",")] for flag in ("--sizes", "--widths"))
    if flags["--sweep"]:
        sweep(int(flags["--sweep"]), min(max(sizes), 8192), device, note)
        return 0
    tiles, seconds = [int(word) for word in flags["--tiles"].split(",")], float(flags["--seconds"])
    for images, width, kernel in product(sizes, widths, KERNELS):
        compare(images, width, kernel, tiles, tuple(flags["--variants"].split(",")), seconds, device, note)
    print(f"wrote {out}")
    return 0 if all(entry["passed"] for entry in entries) else 1


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def inputs(images: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """z [2, N, D] float32 of unit length, views near each other; and the gradient of a mean loss's log-sums [2N]."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(images, width, generator=generator)
    z = normalize(torch.stack([y, y + 0.5 * torch.randn(y.shape, generator=generator)]))
    return z.to(device), (torch.rand(2 * images, generator=generator) / (2 * images)).to(device)


def variants(kernel: tile_kernels.TileKernel, images: int, tiles: list[int], device: torch.device) -> dict[str, Pass]:
    found: dict[str, Pass] = {}
    for tile in tiles:
        if images <= 16 * tile or (images <= 16384 and tile >= 512):  # else the launches alone take seconds
            found[f"tiled {tile}"] = partial(plain, kernel=kernel, tile=tile)
    tile = min(max(tiles), images)
    for mode, of in ((None, ""), ("max-autotune-no-cudagraphs", ", autotune")):
        if device.type == "cuda" or mode is None:
            found[f"compiled {tile}{of}"] = Compiled(kernel, tile, mode)
    if triton_version() is None:
        return found
    from simclr_ddp import triton_log_sums

    if device.type == "cuda" or triton_log_sums.INTERPRETED:
        found["triton"] = partial(by_triton, kernel=kernel, product="ieee")
    if device.type == "cuda":
        found["triton, tf32x3"] = partial(by_triton, kernel=kernel, product="tf32x3")
    return found


def compare(
    images: int,
    width: int,
    kernel: str,
    tiles: list[int],
    beginnings: tuple[str, ...],
    seconds: float,
    device: torch.device,
    note: Callable[[dict[str, Any]], None],
) -> None:
    """Measure all variants whose names begin so, for `seconds` each."""
    z, upstream = inputs(images, width, device)
    of = tile_kernel(Objective(kernel, TEMPERATURE))
    exact = plain(z.double(), upstream.double(), kernel=of, tile=4096)
    medians: dict[str, float] = {}
    for name, run in variants(of, images, tiles, device).items():
        if not name.startswith(beginnings):
            continue
        entry: dict[str, Any] = {"kernel": kernel, "images": images, "width": width, "variant": name}
        try:
            found = dict(zip(ALLOWED, run(z, upstream), strict=True))
            errors = {
                what: ((found[what] - expected).norm() / expected.norm()).item()
                for what, expected in zip(ALLOWED, exact, strict=True)
            }
            passed = all(errors[what] <= allowed for what, allowed in ALLOWED.items())  # not for NaN either
            entry |= {"passed": passed, "errors": errors} | measured(partial(run, z, upstream), device, seconds)
            medians[name] = entry["seconds"]["median"]
        except Exception as error:  # out of memory or of shared memory, or a compiler that fails: the others go on
            entry |= {"passed": False, "failure": f"{type(error).__name__}: {str(error)[:500]}"}
        note(entry)
        print(line(entry), flush=True)
    others = [seconds for name, seconds in medians.items() if not name.startswith("triton")]
    if "triton" in medians and others:
        print(f"  the best other takes {min(others) / medians['triton']:.2f} times as long as triton", flush=True)


def line(entry: dict[str, Any]) -> str:
    what = f"{entry['kernel']:<10}{entry['images']:>6} images{entry['width']:>5} wide  {entry['variant']:<24}"
    if "failure" in entry:
        return f"{what} failed: {entry['failure'].splitlines()[0][:120]}"
    errors = " ".join(f"{value:.0e}" for value in entry["errors"].values())
    memory = f"{entry['peak_memory_bytes'] / 2**20:9.1f} MiB"
    verdict = "" if entry["passed"] else "  WRONG"
    return f"{what}{1e3 * entry['seconds']['median']:10.3f} ms {memory}  errors {errors}{verdict}"


def measured(run: Callable[[], Any], device: torch.device, limit: float = 5.0) -> dict[str, Any]:
    """Seconds of one call, and memory at its peak beside what was there before; after a call that compiled."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    run()
    memory = peak_memory_bytes(device) - before
    seconds: list[float] = []
    while len(seconds) < REPEATS and (len(seconds) < 3 or sum(seconds) < limit):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    spread = {"median": median(seconds), "least": min(seconds), "most": max(seconds), "repeats": len(seconds)}
    return {"seconds": spread, "peak_memory_bytes": memory}


# --- variants -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain(z: Tensor, upstream: Tensor, *, kernel: tile_kernels.TileKernel, tile: int) -> tuple[Tensor, Tensor]:
    before, tiled.TILE = tiled.TILE, tile
    try:
        work = tiled._Pairs(z, z, True, tiled.Problem(kernel, lambda a, b: a, 0, "fp32", None))
        sums, kept = work.log_sums(True)
        return sums, work.gradients(sums, upstream, kept, False)[0].view(z.shape)
    finally:
        tiled.TILE = before


@torch.no_grad()
def by_triton(z: Tensor, upstream: Tensor, *, kernel: tile_kernels.TileKernel, product: str) -> tuple[Tensor, Tensor]:
    from simclr_ddp import triton_log_sums

    before, triton_log_sums.PRODUCT = triton_log_sums.PRODUCT, product
    try:
        problem = tiled.Problem(kernel, lambda a, b: a, 0, "fp32", None, "triton")
        sums = triton_log_sums.forward(z, z, problem)
        return sums, triton_log_sums.backward(z, z, sums, upstream, problem, True, False)[0]
    finally:
        triton_log_sums.PRODUCT = before


class Compiled:
    """The symmetric tiles of `simclr_ddp.tiled`, each by a compiled function that holds all of its operations."""

    def __init__(self, kernel: tile_kernels.TileKernel, tile: int, mode: str | None) -> None:
        self.kernel, self.tile = kernel, tile
        torch._dynamo.reset()  # or the many kernels and sizes exceed its limit of graphs
        # One graph for each pair of lengths, of which there are few.
        self.forward_tile = torch.compile(
            partial(_forward_tile, kernel=kernel), fullgraph=True, dynamic=False, mode=mode
        )
        self.backward_tile = torch.compile(
            partial(_backward_tile, kernel=kernel), fullgraph=True, dynamic=False, mode=mode
        )

    @torch.no_grad()
    def __call__(self, z: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        images = z.shape[1]
        before, tiled.TILE = tiled.TILE, self.tile
        tiles = tiled.tiles(images, images, 0, True)
        tiled.TILE = before
        flat, image = z.flatten(0, 1), torch.arange(2 * images, device=z.device) % images
        squares, weight = flat.square().sum(dim=1), upstream * self.kernel.scale
        sums = flat.new_full((2 * images,), -torch.inf)
        with full_precision(z.device.type):
            for tile in tiles:
                sides = [(flat[where], squares[where], image[where]) for where in (tile.rows, tile.columns)]
                of_rows, of_columns = self.forward_tile(*sides)
                torch.logaddexp2(sums[tile.rows], of_rows, out=sums[tile.rows])
                if tile.mirrored:
                    torch.logaddexp2(sums[tile.columns], of_columns, out=sums[tile.columns])
            products, weights = torch.zeros_like(flat), torch.zeros_like(squares)
            for tile in tiles:
                known = [
                    (flat[where], squares[where], image[where], sums[where], weight[where])
                    for where in (tile.rows, tile.columns)
                ]
                in_rows, in_columns, of_rows, of_columns = self.backward_tile(*known)
                products[tile.rows] += in_rows
                weights[tile.rows] += of_rows
                if tile.mirrored:
                    products[tile.columns] += in_columns
                    weights[tile.columns] += of_columns
        if self.kernel.of_squares:
            products.addcmul_(weights[:, None], flat, value=-1)
        return sums, products.view(z.shape)


def _log2_kernel(a: Any, b: Any, kernel: tile_kernels.TileKernel) -> tuple[Tensor, Tensor | None, Tensor]:
    """log2 k, EXCLUDED for pairs of one image; its slope in the dot product; pairs of one image."""
    dot, same = a[0] @ b[0].mT, a[2][:, None] == b[2]
    if isinstance(kernel, tile_kernels.Cosine):
        return (dot * (kernel.scale * tile_kernels.LOG2_E)).masked_fill(same, tile_kernels.EXCLUDED), None, same
    assert isinstance(kernel, tile_kernels.Power)
    x = (a[1][:, None] + b[1] - 2 * dot) * kernel.unit
    if kernel.gamma == 2:
        return (-x).masked_fill(same, tile_kernels.EXCLUDED), None, same
    near, x = x <= kernel.floor * kernel.unit, x.clamp(min=kernel.floor * kernel.unit)
    power = x.rsqrt() if kernel.gamma == 1 else x.pow(kernel.gamma / 2 - 1)
    return (-x * power).masked_fill(same, tile_kernels.EXCLUDED), power.masked_fill(near, 0), same


def _forward_tile(a: Any, b: Any, *, kernel: tile_kernels.TileKernel) -> tuple[Tensor, Tensor]:
    log_k, _, _ = _log2_kernel(a, b, kernel)
    most, highest = log_k.amax(dim=1), log_k.amax(dim=0)
    of_rows = most + (log_k - most[:, None]).exp2().sum(dim=1).log2()
    return of_rows, highest + (log_k - highest).exp2().sum(dim=0).log2()


def _backward_tile(a: Any, b: Any, *, kernel: tile_kernels.TileKernel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_k, slope, same = _log2_kernel(a, b, kernel)
    w = a[4][:, None] * (log_k - a[3][:, None]).exp2() + b[4] * (log_k - b[3]).exp2()
    w = (w if slope is None else w * slope).masked_fill(same, 0)
    return w @ b[0], w.mT @ a[0], w.sum(dim=1), w.sum(dim=0)


# --- blocks of the Triton kernels -----------------------------------------------------------------------------------


def sweep(width: int, images: int, device: torch.device, note: Callable[[dict[str, Any]], None]) -> None:
    """Minutes of compiling. Both kernels take the same blocks: the sum counts."""
    from simclr_ddp import triton_log_sums
    from simclr_ddp.triton_log_sums import Shape, Side

    z, upstream = inputs(images, width, device)
    kernel = tile_kernel(Objective("cosine", TEMPERATURE))
    found: list[tuple[float, Shape]] = []
    shapes = [Shape(*numbers) for numbers in product((32, 64, 128), (32, 64, 128), (32,), (4, 8))]
    for shape in shapes if device.type == "cuda" else shapes[:1]:
        entry: dict[str, Any] = {"width": width, "images": images, "shape": shape._asdict()}
        try:
            side = Side(z, 0)
            known = Side(z, 0, triton_log_sums.log_sums(side, side, kernel, shape), upstream)
            passes = {
                "forward": partial(triton_log_sums.log_sums, side, side, kernel, shape),
                "backward": partial(triton_log_sums.gradient, known, known, kernel, "fp32", shape),
            }
            for name, run in passes.items():
                run()
                entry[name] = measured(run, device)
            seconds = sum(entry[name]["seconds"]["median"] for name in passes)
            found.append((seconds, shape))
            entry["passed"] = True
            print(f"{1e3 * seconds:10.3f} ms {shape}", flush=True)
        except Exception as error:  # too large for the device
            entry |= {"passed": False, "failure": f"{type(error).__name__}: {str(error)[:500]}"}
            print(f"    failed    {shape}: {str(error)[:100]}", flush=True)
        note(entry)
    for seconds, shape in sorted(found)[:3]:
        print(f"best: {1e3 * seconds:.3f} ms {shape}")


if __name__ == "__main__":
    sys.exit(main())

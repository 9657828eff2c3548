"""Compare implementations of a kernel's log-sums and their gradient: plain tiles, compiled tiles, Triton kernels.

    python -m benchmarks.gpu.log_sums [--out=FILE.json] [--sizes=512,2048] [--widths=128,256]

For each kernel, embedding width and number of images it prints the error against float64, the seconds of a forward and
a backward pass (median, least, most) and the peak memory beyond the inputs. The variants run on one process:

    tiled T               simclr_ddp.losses.tiled, with tiles of T rows and columns (--tiles=1024,4096,8192)
    compiled T            the same tiles, each by one compiled function forward and one backward: torch.compile of the
                          complete loss would unroll the loop over tiles
    compiled T, autotune  the same in the mode max-autotune-no-cudagraphs
    triton                simclr_ddp.losses.triton_log_sums
    triton, tf32x3        the same with three tensor-core products for each product, to see its speed and error

The printed ratio decides about Triton: it stays if it is at least 1.3 times as fast as the best of the others except
tf32x3 for 4,096 images and more, and is deleted otherwise. Results are written to FILE.json after each measurement, by
default benchmarks/results/log_sums_<GPU>.json. The exit status is 1 if a variant fails or is wrong.

    --variants=tiled,triton   measure only these, named by their first word or in full
    --seconds=1   limit each measurement to 1 second instead of 5, unless three repeats take longer

    --sweep=128   instead measure other blocks of the Triton kernels for embeddings of that width and print the best
                  first, to correct SHAPES in simclr_ddp/losses/triton_log_sums.py
    --device=cpu  try the benchmark on the CPU; the Triton kernels are included only with TRITON_INTERPRET=1
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.timing import take_flags
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.losses import tile_kernels, tiled, tiling
from simclr_ddp.losses.contrastive import normalize
from simclr_ddp.losses.kernels import Objective, tile_kernel
from simclr_ddp.losses.matmul import full_precision
from simclr_ddp.runs.provenance import describe
from simclr_ddp.system.errors import one_line
from simclr_ddp.system.machine import peak_memory_bytes

FLAGS = {"--out": "", "--sizes": "512,2048,4096,8192,16384,65536", "--widths": "128,256", "--sweep": ""}
FLAGS |= {"--device": "cuda", "--tiles": "1024,4096,8192", "--variants": "", "--seconds": "5"}
KERNELS = ("cosine", "laplacian")
TEMPERATURE = 0.1
REPEATS = 10  # of each variant, unless three take longer than --seconds
ALLOWED = {"sums": 1e-4, "gradient": 1e-3}

Pass = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # z [2, N, D], upstream [2N] -> log-sums, gradient [2, N, D]


def main() -> int:
    if "--help" in sys.argv or "-h" in sys.argv:
        print((__doc__ or "").strip())
        return 0
    flags, rest = take_flags(sys.argv[1:], FLAGS)
    if rest:
        print(f"error: {rest[0]} is unknown: choose from {', '.join(FLAGS)}", file=sys.stderr)
        return 2
    if flags["--device"] == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU: start on a machine with one, or try --device=cpu", file=sys.stderr)
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
    tiles = [int(word) for word in flags["--tiles"].split(",")]
    chosen = [name for name in flags["--variants"].split(",") if name]
    for images, width, kernel in product(sizes, widths, KERNELS):
        compare(images, width, kernel, tiles, device, note, chosen, float(flags["--seconds"]))
    print(f"wrote {out}")
    return 0 if all(entry["passed"] for entry in entries) else 1


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def inputs(images: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return z [2, N, D] float32 of unit length with similar views, and the gradient of a mean loss's log-sums [2N]."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(images, width, generator=generator)
    z = normalize(torch.stack([y, y + 0.5 * torch.randn(y.shape, generator=generator)]))
    return z.to(device), (torch.rand(2 * images, generator=generator) / (2 * images)).to(device)


def variants(kernel: tile_kernels.TileKernel, images: int, tiles: list[int], device: torch.device) -> dict[str, Pass]:
    found: dict[str, Pass] = {}
    for tile in tiles:
        if images <= 16384 or tile > 512:  # otherwise the launches alone take seconds
            found[f"tiled {tile}"] = partial(plain, kernel=kernel, tile=tile)
    tile = min(max(tiles), images)
    for mode, of in ((None, ""), ("max-autotune-no-cudagraphs", ", autotune")):
        if device.type == "cuda" or mode is None:
            found[f"compiled {tile}{of}"] = Compiled(kernel, tile, mode)
    if triton_version() is None:
        return found
    from simclr_ddp.losses import triton_log_sums

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
    device: torch.device,
    note: Callable[[dict[str, Any]], None],
    chosen: list[str],
    seconds: float,
) -> None:
    """Measure one kernel at one size: the chosen variants, or all if none is named."""
    z, upstream = inputs(images, width, device)
    of = tile_kernel(Objective(kernel, TEMPERATURE))
    exact = plain(z.double(), upstream.double(), kernel=of, tile=4096)
    medians: dict[str, float] = {}
    for name, run in variants(of, images, tiles, device).items():
        if chosen and name not in chosen and name.split()[0] not in chosen:
            continue
        entry: dict[str, Any] = {"kernel": kernel, "images": images, "width": width, "variant": name}
        try:
            found = dict(zip(ALLOWED, run(z, upstream), strict=True))
            errors = {
                what: ((found[what] - expected).norm() / expected.norm()).item()
                for what, expected in zip(ALLOWED, exact, strict=True)
            }
            passed = all(errors[what] <= allowed for what, allowed in ALLOWED.items())  # False also for NaN
            entry |= {"passed": passed, "errors": errors} | measured(partial(run, z, upstream), device, seconds)
            medians[name] = entry["seconds"]["median"]
        except Exception as error:  # out of (shared) memory, or the compiler fails: continue with the others
            entry |= {"passed": False, "failure": f"{type(error).__name__}: {one_line(error, 500)}"}
        note(entry)
        print(line(entry), flush=True)
    others = [value for name, value in medians.items() if not name.startswith("triton")]
    if "triton" in medians and others:
        print(
            f"  the best other variant takes {min(others) / medians['triton']:.2f} times as long as triton", flush=True
        )


def line(entry: dict[str, Any]) -> str:
    what = f"{entry['kernel']:<10}{entry['images']:>6} images{entry['width']:>5} wide  {entry['variant']:<24}"
    if "failure" in entry:
        return f"{what} failed: {entry['failure'].splitlines()[0][:120]}"
    errors = " ".join(f"{value:.0e}" for value in entry["errors"].values())
    memory = f"{entry['peak_memory_bytes'] / 2**20:9.1f} MiB"
    verdict = "" if entry["passed"] else "  WRONG"
    return f"{what}{1e3 * entry['seconds']['median']:10.3f} ms {memory}  errors {errors}{verdict}"


def measured(run: Callable[[], Any], device: torch.device, most: float = 5.0) -> dict[str, Any]:
    """Measure the seconds of one call and its additional peak memory, after a first call that compiles."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    run()
    memory = peak_memory_bytes(device) - before
    seconds: list[float] = []
    while len(seconds) < REPEATS and (len(seconds) < 3 or sum(seconds) < most):
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
    with tiles_of(tile):
        work = tiled.Pairs(z, z, True, tile_kernels.Problem(kernel, lambda a, b: a, 0, "fp32", None, radius=1.0))
        sums, kept = work.log_sums(True)
        return sums, work.gradients(sums, upstream, kept, False)[0].view(z.shape)


@contextmanager
def tiles_of(tile: int) -> Iterator[None]:
    """In this context tiles on any device have `tile` rows and columns, and those on the diagonal half as many."""
    before = tiling.TILE, tiling.TRIANGLE, tiling.GPU
    tiling.TILE, tiling.TRIANGLE, tiling.GPU = tile, tile // 2, tiling.Sizes(tile, tile // 2, tiling.GPU.kept)
    try:
        yield
    finally:
        tiling.TILE, tiling.TRIANGLE, tiling.GPU = before


@torch.no_grad()
def by_triton(z: Tensor, upstream: Tensor, *, kernel: tile_kernels.TileKernel, product: str) -> tuple[Tensor, Tensor]:
    from simclr_ddp.losses import triton_log_sums

    before, triton_log_sums.PRODUCT = triton_log_sums.PRODUCT, product
    try:
        problem = tile_kernels.Problem(kernel, lambda a, b: a, 0, "fp32", None, "triton")
        sums = triton_log_sums.forward(z, z, problem)
        return sums, triton_log_sums.backward(z, z, sums, upstream, problem, True, False)[0]
    finally:
        triton_log_sums.PRODUCT = before


class Compiled:
    """The symmetric tiles of `simclr_ddp.losses.tiled`, with one compiled function for all operations of a tile."""

    def __init__(self, kernel: tile_kernels.TileKernel, tile: int, mode: str | None) -> None:
        self.kernel, self.tile = kernel, tile
        torch._dynamo.reset()  # otherwise the many kernels and sizes exceed its limit of graphs
        # There is one graph for each pair of lengths, of which there are few.
        self.forward_tile = torch.compile(
            partial(_forward_tile, kernel=kernel), fullgraph=True, dynamic=False, mode=mode
        )
        self.backward_tile = torch.compile(
            partial(_backward_tile, kernel=kernel), fullgraph=True, dynamic=False, mode=mode
        )

    @torch.no_grad()
    def __call__(self, z: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        images = z.shape[1]
        with tiles_of(self.tile):
            tiles = tiling.tiles(images, images, 0, True)
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
    """Return log2 k, EXCLUDED for pairs of one image; its slope in the dot product; and the mask of such pairs."""
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
    """Measure other blocks; this compiles for minutes. Both kernels use the same blocks, so their sum is compared."""
    from simclr_ddp.losses import triton_log_sums
    from simclr_ddp.losses.triton_log_sums import Shape, Side

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
            entry |= {"passed": False, "failure": f"{type(error).__name__}: {one_line(error, 500)}"}
            print(f"    failed    {shape}: {one_line(error, 100)}", flush=True)
        note(entry)
    for seconds, shape in sorted(found)[:3]:
        print(f"best: {1e3 * seconds:.3f} ms {shape}")


if __name__ == "__main__":
    sys.exit(main())

"""Measure the path of logistic regressions of linear_eval beside other solvers, on features of real images.

    python -m benchmarks.linear_eval                                        # 50,000 images: takes hours
    python -m benchmarks.linear_eval --problems 8000x512x10x45 --rounds 2   # minutes

A problem is IMAGESxFEATURESxCLASSESxSTRENGTHS. Features are standardised representations of CIFAR-10 by an encoder, by
default an untrained ResNet-18 whose batch norm has seen the images; more than its width are those of further views:
mirrored, centre crop, grey. With 100 classes a label is the class and the decile of the image's brightness. Strengths
are C from 1e-6 to 1e5, and every solver runs from the strongest penalty to the weakest with warm starts where it has
them. All must reach the same tolerance: the Euclidean norm of the gradient of the mean objective, relative to that at
zero weights; the largest norm is computed afterwards in float64, and printed. Solvers that stop at the largest entry of
the gradient are given three times the tolerance divided by the root of the number of weights.

    ours          simclr_ddp.fit_logistic_path
    ours before   one strength at a time in float64, read from commit 81c13e1 by git
    scikit-learn  LogisticRegression, lbfgs, warm_start; `intelex` is scikit-learn-intelex, where it is installed
    torch         torch.optim.LBFGS in float64, strong Wolfe search

flags: --problems 50000x512x10x45,50000x2048x100x9
       --only NAME,NAME   solvers to measure instead of all
       --run FOLDER       run directory or encoder file, instead of the untrained encoder
       --data FILE        cifar10.tar.gz with train/<class>/*.jpg, by default in SIMCLR_DATA or ../shared/data
       --rounds 3         rounds of all solvers, in changing order
       --tolerance 1e-6
       --threads 2
       --out FILE         benchmarks/results/linear_eval/cpu.json by default
"""

import importlib.util
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.support.timing import take_flags
from simclr_ddp import Encoder, fit_logistic_path, load_encoder
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.models.backbone import Backbone
from simclr_ddp.runs.provenance import describe
from simclr_ddp.system.console import say, shown

FLAGS = {"--problems": "50000x512x10x45,50000x2048x100x9", "--only": "", "--run": "", "--data": "", "--rounds": "3"}
FLAGS |= {"--tolerance": "1e-6", "--threads": "2", "--out": "benchmarks/results/linear_eval/cpu.json"}
BEFORE = "81c13e1:simclr_ddp/logistic.py"
VIEWS = 4
H200 = {"float32 products per s": 67e12, "float64 products per s": 67e12, "bytes per s": 4.8e12}  # the maker's rates
REACHED = 0.6  # share of those rates that products of this shape are assumed to reach
Solver = Callable[[np.ndarray, np.ndarray, list[float], float], list[tuple[np.ndarray, np.ndarray]]]


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
    torch.set_num_threads(int(flags["--threads"]))
    problems = [[int(v) for v in problem.split("x")] for problem in flags["--problems"].split(",")]
    tolerance, solvers = float(flags["--tolerance"]), chosen(flags["--only"])
    images, classes = read_images(flags["--data"], max(p[0] for p in problems))
    encoder = load_encoder(flags["--run"]).encoder if flags["--run"] else untrained(images)
    wide = representations(encoder, images, max(p[1] for p in problems))
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.linear_eval", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": describe(Runtime(torch.device("cpu"), "fp32", torch.get_num_threads())),
        "encoder": flags["--run"] or "untrained ResNet-18, ImageNet stem",
        "tolerance": tolerance,
        "rates": rates(),
        "problems": [],
    }
    say(f"measured rates: {', '.join(f'{name} {rate / 1e9:.1f} G' for name, rate in results['rates'].items())}")
    for n, d, k, count in problems:
        h = wide[:n, :d]
        x = ((h - h.mean(0)) / h.std(0).clamp_min(1e-12)).contiguous().numpy()
        y = labels_of(images[:n], classes[:n], k)
        strengths = [10 ** (-6 + 11 * i / max(1, count - 1)) for i in range(count)]
        problem = {"images": n, "features": d, "classes": k, "strengths": count}
        say(f"\n{n:,} images x {d:,} features, {k} classes, {count} strengths")
        problem |= measure(solvers, x, y, strengths, tolerance, int(flags["--rounds"]))
        results["problems"].append(problem)
        out = Path(flags["--out"])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    say(f"wrote {flags['--out']}")


def measure(
    solvers: dict[str, Solver], x: np.ndarray, y: np.ndarray, strengths: list[float], tolerance: float, rounds: int
) -> dict[str, Any]:
    """Run all solvers in rounds of changing order; return seconds, norms, memory and counted work."""
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    memory, norms = dict.fromkeys(solvers, 0), dict.fromkeys(solvers, 0.0)
    names = list(solvers)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with Memory() as used:
                begin = time.perf_counter()
                found = solvers[name](x, y, strengths, tolerance)
                seconds[name].append(time.perf_counter() - begin)
            memory[name] = max(memory[name], used.bytes)
            if not turn:
                norms[name] = max(relative_gradients(x, y, strengths, found))
            say(f"  {name:12} {seconds[name][-1]:8.1f} s, gradient {norms[name]:.1e}, {used.bytes / 2**20:,.0f} MiB")
    slowest = statistics.median(seconds.get("scikit-learn") or [math.nan])
    rows = {
        name: {
            "seconds": statistics.median(taken),
            "least": min(taken),
            "most": max(taken),
            "largest_gradient": norms[name],
            "reached": norms[name] <= tolerance,
            "memory_bytes": memory[name],
            "times_as_fast_as_scikit_learn": slowest / statistics.median(taken),
        }
        for name, taken in seconds.items()
    }
    for name, row in rows.items():
        missed = "" if row["reached"] else f", tolerance not reached: {row['largest_gradient']:.1e}"
        say(f"{name:12} {row['seconds']:8.1f} s  {row['times_as_fast_as_scikit_learn']:5.1f} x{missed}")
    return {"solvers": rows} | ({"work": work(x, y, strengths, tolerance)} if "ours" in solvers else {})


def work(x: np.ndarray, y: np.ndarray, strengths: list[float], tolerance: float) -> dict[str, Any]:
    """Operations and bytes of our solver, and the time that they predict for ImageNet on one H200.

    Evaluations are counted as iterations + 1 per strength, without the few that a line search repeats. The prediction
    assumes the same evaluations, 45 strengths, 1.28 million images, 2,048 features, 1,000 classes, and products at 60 %
    of the maker's rates outside of tensor cores for float32. With 1,000 classes each strength is solved alone.
    """
    from simclr_ddp.evaluation import logistic
    from simclr_ddp.evaluation.chunks import Features

    n, d, k = *x.shape, len(np.unique(y))
    l2 = [logistic.ridge("C", c, n) for c in strengths]
    features, rows = Features(torch.from_numpy(x)), torch.arange(n)
    found = logistic.solutions(features, torch.from_numpy(y), rows, l2, classes=k, tolerance=tolerance)
    evaluations = sum(s.iterations + 1 for s in found)
    images, width, classes, path = 1_280_000, 2048, 1000, 45
    per = 4 * images * width * classes
    passes = evaluations / len(strengths) * path
    products = per * passes / H200["float32 products per s"] / REACHED
    certificate = per * path / H200["float64 products per s"] / REACHED
    reads = 4 * images * width * passes / H200["bytes per s"]
    return {
        "evaluations": evaluations,
        "operations_float32": 4 * n * d * k * evaluations,
        "operations_float64": 4 * n * d * k * len(strengths),
        "bytes_if_each_evaluation_reads_the_features": 4 * n * d * evaluations,
        "predicted_seconds_imagenet_1_h200": max(products, reads) + certificate,
    }


def relative_gradients(
    x: np.ndarray, y: np.ndarray, strengths: list[float], found: list[tuple[np.ndarray, np.ndarray]]
) -> list[float]:
    """Norms of the gradients of mean cross-entropy + |W|^2 / (2 C n), in float64, relative to that at zero weights."""
    n, norms = len(x), []
    zero = (np.zeros_like(found[0][0]), np.zeros_like(found[0][1]))
    for (weight, bias), c in zip([zero, *found], [1.0, *strengths], strict=True):
        gradient, shift = weight / (c * n), np.zeros_like(bias)
        for first in range(0, n, 4096):
            z, t = x[first : first + 4096].astype(np.float64), y[first : first + 4096]
            p = torch.from_numpy(z @ weight + bias).softmax(1).numpy()
            p[np.arange(len(t)), t] -= 1
            gradient, shift = gradient + z.T @ p / n, shift + p.sum(0) / n
        norms.append(math.hypot(np.linalg.norm(gradient), np.linalg.norm(shift)))
    return [norm / norms[0] for norm in norms[1:]]


class Memory:
    """Peak of the resident set above that at the beginning, sampled every 20 ms."""

    def __enter__(self) -> "Memory":
        self.bytes, self._stop, self._first = 0, threading.Event(), _resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, _resident() - self._first)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rates() -> dict[str, float]:
    """Operations per second of products of 512 rows and 512 features by their columns and precision."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(512, 512, dtype=dtype)
        for columns in (10, 80, 450):
            w, taken = torch.randn(columns, 512, dtype=dtype), []
            for _ in range(20):
                begin = time.perf_counter()
                (w @ x.T) @ x
                taken.append(time.perf_counter() - begin)
            found[f"{str(dtype).removeprefix('torch.')} x {columns}"] = 4 * 512 * 512 * columns / min(taken)
    return found


# --- solvers --------------------------------------------------------------------------------------------------------


def chosen(only: str) -> dict[str, Solver]:
    """Return the solvers to measure; those that are not installed are named and left out."""
    solvers: dict[str, Solver] = {"ours": ours, "scikit-learn": scikit_learn, "torch": torch_lbfgs}
    before = earlier()
    if before is not None:
        solvers["ours before"] = before
    try:
        from sklearnex.linear_model import LogisticRegression

        solvers["intelex"] = lambda x, y, c, tol: _scikit_learn(LogisticRegression, x, y, c, tol)
    except ImportError:
        say("left out: intelex, since scikit-learn-intelex is not installed")
    unknown = [name for name in only.split(",") if only and name not in solvers]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: no such solver; choose from {', '.join(solvers)}")
    return {name: solvers[name] for name in (only.split(",") if only else solvers)}


def ours(x: np.ndarray, y: np.ndarray, strengths: list[float], tolerance: float) -> list[tuple[np.ndarray, np.ndarray]]:
    weights, biases, _ = fit_logistic_path(x, y, strengths, tolerance=tolerance)
    return list(zip(weights, biases, strict=True))


def earlier() -> Solver | None:
    """Our solver of commit 81c13e1, or None without its history."""
    done = subprocess.run(["git", "show", BEFORE], capture_output=True, text=True)
    if done.returncode:
        say(f"left out: ours before, since git does not show {BEFORE}")
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logistic_before.py"
        text = done.stdout.replace("from simclr_ddp import scores", "from simclr_ddp.evaluation import scores")
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

    def solve(x: np.ndarray, y: np.ndarray, strengths: list[float], tolerance: float) -> Any:
        l2 = [module.ridge("C", c, len(x)) for c in strengths]
        t, rows = torch.from_numpy(y), torch.arange(len(x))
        found = module.solutions(torch.from_numpy(x), t, rows, l2, classes=int(t.max()) + 1, tolerance=tolerance)
        return [(s.weight.numpy(), s.bias.numpy()) for s in found]

    return solve


def scikit_learn(x: np.ndarray, y: np.ndarray, strengths: list[float], tolerance: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return _scikit_learn(LogisticRegression, x, y, strengths, tolerance)


def _scikit_learn(kind: Any, x: np.ndarray, y: np.ndarray, strengths: list[float], tolerance: float) -> Any:
    x, found = x.astype(np.float64), []
    model = kind(solver="lbfgs", warm_start=True, max_iter=10_000, tol=largest_entry(x, y, tolerance))
    for c in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.set_params(C=c).fit(x, y)
        found.append((model.coef_.T.copy(), model.intercept_.copy()))
    return found


def torch_lbfgs(x: np.ndarray, y: np.ndarray, strengths: list[float], tolerance: float) -> Any:
    z, t = torch.from_numpy(x).double(), torch.from_numpy(y)
    k, found = int(t.max()) + 1, []
    weight = torch.zeros(z.shape[1], k, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(k, dtype=torch.float64, requires_grad=True)
    for c in strengths:
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=10_000,
            max_eval=20_000,
            history_size=10,
            tolerance_grad=largest_entry(x, y, tolerance),
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure(optimizer: torch.optim.LBFGS = optimizer, c: float = c) -> Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(z @ weight + bias, t) + weight.square().sum() / (2 * c * len(z))
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append((weight.detach().numpy().copy(), bias.detach().numpy().copy()))
    return found


def largest_entry(x: np.ndarray, y: np.ndarray, tolerance: float) -> float:
    """Bound of the gradient's largest entry for a Euclidean norm of about tolerance times that at zero weights."""
    k = len(np.unique(y))
    residual = 1 / k - np.eye(k, dtype=x.dtype)[y]
    at_zero = math.hypot(np.linalg.norm(x.T @ residual), np.linalg.norm(residual.sum(0))) / len(x)
    return 3 * tolerance * at_zero / math.sqrt(k * (x.shape[1] + 1))


# --- features -------------------------------------------------------------------------------------------------------


def read_images(archive: str, count: int) -> tuple[Tensor, np.ndarray]:
    """Images [n, 3, 32, 32] float32 in [0, 1] and classes [n] int64 of CIFAR-10, as many of each class, shuffled."""
    from PIL import Image

    path = Path(archive or Path(os.environ.get("SIMCLR_DATA", "../shared/data")) / "cifar10.tar.gz")
    if not path.exists():
        raise ValueError(f"--data {path}: there is no such file; name an archive of CIFAR-10 as folders of classes")
    images: dict[str, list[np.ndarray]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if len(parts) < 3 or parts[-3] != "train" or not member.isfile():
                continue
            found = images.setdefault(parts[-2], [])
            content = tar.extractfile(member)
            if content is not None and len(found) < math.ceil(count / 10):
                found.append(np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB")))
    classes = np.repeat(np.arange(len(images)), [len(images[name]) for name in sorted(images)])
    order = np.random.default_rng(0).permutation(len(classes))[:count]
    pixels = np.concatenate([np.stack(images[name]) for name in sorted(images)])[order]
    if len(pixels) < count:
        raise ValueError(f"--problems: {count} images; {path} has {len(pixels)} for training, so name no more")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, classes[order]


def labels_of(images: Tensor, classes: np.ndarray, k: int) -> np.ndarray:
    """The classes, or with k = 100 the class and the decile of brightness."""
    if k == 10:
        return classes
    if k != 100:
        raise ValueError(f"--problems: {k} classes; must be 10 or 100")
    order = images.mean((1, 2, 3)).argsort().argsort().numpy()
    return classes * 10 + order * 10 // len(order)


def untrained(images: Tensor) -> Encoder:
    """ResNet-18 with random weights; its batch norm has the statistics of some images."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18").train()
    with torch.no_grad():
        for batch in images[:2560].split(256):
            encoder(normalized(batch))
    return encoder


@torch.no_grad()
def representations(encoder: Backbone, images: Tensor, width: int) -> Tensor:
    """Representations of as many views as `width` needs, concatenated: [n, width]."""
    encoder.eval()
    views = math.ceil(width / encoder.width_out)
    if views > VIEWS:
        raise ValueError(f"--problems: {width} features; {VIEWS} views give at most {VIEWS * encoder.width_out}")
    parts = []
    for batch in images.split(256):
        crop = torch.nn.functional.interpolate(batch[:, :, 4:-4, 4:-4], size=32, mode="bilinear")
        grey = batch.mean(1, keepdim=True).expand_as(batch)
        parts.append(torch.cat([encoder(normalized(v)) for v in (batch, batch.flip(3), crop, grey)[:views]], 1))
    return torch.cat(parts)[:, :width]


def normalized(images: Tensor) -> Tensor:
    return (images - 0.45) / 0.25


if __name__ == "__main__":
    sys.exit(main())

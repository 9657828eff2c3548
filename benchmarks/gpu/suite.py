"""Everything that only a GPU can show, in one command: `python -m benchmarks.gpu.suite [OUT.json]`

Stages: the tests marked gpu, a short training run on every GPU of this machine, a short benchmarks.gpu.log_sums, and
benchmarks.step on all GPUs. The results, with hardware and versions, go to OUT.json, by default
benchmarks/results/gpu_suite_<GPU>.json. Exit status 1 if a stage failed; the later stages run all the same.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import torch

from simclr_ddp.metrics import read_metrics
from simclr_ddp.runtime import Runtime, describe

LIMIT = 240  # seconds for each stage


def main() -> int:
    if "--help" in sys.argv or "-h" in sys.argv:
        print((__doc__ or "").strip())
        return 0
    if not torch.cuda.is_available():
        print("error: torch sees no GPU, and this suite needs one: the other tests are `make test`", file=sys.stderr)
        return 2
    runtime = Runtime(torch.device("cuda", 0), "bf16", torch.get_num_threads())
    gpu = re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_").lower()
    out = Path(sys.argv[1] if len(sys.argv) > 1 else f"benchmarks/results/gpu_suite_{gpu}.json")
    results: dict[str, Any] = {"command": "python -m benchmarks.gpu.suite", "environment": describe(runtime)}
    ranks = max(r for r in range(1, 1 + torch.cuda.device_count()) if 256 % r == 0)  # those divide the default batch
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": gpu_tests,
        "training": lambda: training(ranks, "optim.steps=300", "log.every_steps=20"),
        "log-sums": lambda: log_sums("--sizes=512,4096", "--widths=128"),
        "step": lambda: step(ranks, "--rounds=5", "optim.global_batch_size=4096", "model.width=1"),
    }
    for name, stage in stages.items():
        print(f"stage {name} ...", flush=True)
        begin = time.perf_counter()
        results[name] = stage() | {"seconds": round(time.perf_counter() - begin, 1)}
        print(json.dumps(results[name], indent=1), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")  # after each stage: the machine may go at any time
    print(f"wrote {out}")
    return 0 if all(results[name]["passed"] for name in stages) else 1


def run(command: list[str]) -> tuple[bool, str]:
    """(ended well within the limit, the end of its output)"""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else str(error.stdout)
        return False, f"{output[-3000:]}\nstopped after {LIMIT} s"
    return done.returncode == 0, done.stdout[-3000:]


def gpu_tests() -> dict[str, Any]:
    """The tests marked gpu: counts, and the names and messages of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        passed, output = run(
            [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        )
        if not report.exists():
            return {"passed": False, "output": output}
        cases = list(ElementTree.parse(report).iter("testcase"))
    failures = {}
    for case in cases:
        for kind in ("failure", "error"):
            for failure in case.findall(kind):
                failures[f"{case.get('classname')}.{case.get('name')}"] = str(failure.get("message"))[:500]
    skipped = sum(1 for case in cases if case.find("skipped") is not None)
    return {"passed": passed, "tests": len(cases), "skipped": skipped, "failures": failures}


def training(ranks: int, *overrides: str) -> dict[str, Any]:
    """A short run of the default config: throughput after the first lines, memory, and loss at both ends."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        launcher += [f"--nproc_per_node={ranks}", "-m"]
        passed, output = run([*launcher, "simclr_ddp.pretrain", f"run_dir={folder}/run", *overrides])
        lines = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    if not passed or not lines:
        return {"passed": False, "output": output}
    rates = [line["images_per_second"] for line in lines[2:] or lines]
    return {
        "passed": lines[-1]["loss"] < lines[0]["loss"],
        "ranks": ranks,
        "overrides": list(overrides),
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "images_per_second": {"median": median(rates), "least": min(rates), "most": max(rates)},
        "data_wait_fraction": median(line["data_wait_fraction"] for line in lines),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
    }


def log_sums(*arguments: str) -> dict[str, Any]:
    """benchmarks.gpu.log_sums: what computes the loss, at a few sizes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "log_sums.json"
        passed, output = run([sys.executable, "-m", "benchmarks.gpu.log_sums", f"--out={out}", *arguments])
        measurements = json.loads(out.read_text())["measurements"] if out.exists() else []
    return {"passed": passed, "measurements": measurements} | ({} if passed else {"output": output})


def step(ranks: int, *arguments: str) -> dict[str, Any]:
    """benchmarks.step: seconds of a step of each variant and of its parts, medians of the rounds, and memory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.step", f"--ranks={ranks}", f"--out={folder}", *arguments]
        passed, output = run(command)
        written = list(Path(folder).glob("*.json"))
        if not passed or not written:
            return {"passed": False, "output": output}
        measured = json.loads(written[0].read_text())["runs"][0]
    parts = {part: median(split[part] for split in measured["parts_seconds"]) for part in measured["parts_seconds"][0]}
    return {
        "passed": True,
        "ranks": ranks,
        "arguments": list(arguments),
        "seconds_per_step": {name: median(seconds) for name, seconds in measured["seconds_per_step"].items()},
        "parts_seconds": parts,
        "peak_memory_bytes": max(measured["peak_memory_bytes"]),
        "checks": measured["checks"],
    }


if __name__ == "__main__":
    sys.exit(main())

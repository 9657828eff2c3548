"""What a command runs on: device, threads, precision; determinism; and what the record of a run says of them."""

import os
import platform
import subprocess
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from simclr_ddp import distributed
from simclr_ddp.cli import say, warn
from simclr_ddp.data import cores


@dataclass(frozen=True)
class Runtime:
    """device, dtype of the parameters and of the augmentations, and the autocast dtype, if any."""

    device: torch.device
    precision: str
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return nullcontext() if low is None else torch.autocast(self.device.type, low)


def setup(device: str, precision: str, threads: int, timeout: float = 600) -> Runtime:
    """Choose what `auto` leaves open, set threads and determinism, join the process group.

    What was chosen is printed once. The same start on the same kind of machine then computes the same bits:
    cuBLAS and cuDNN are held to deterministic algorithms.
    """
    chosen = _device(device)
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32; bf16 is the fast choice
    # An operation that has no deterministic form on a GPU warns, once, rather than ending the run.
    torch.use_deterministic_algorithms(True, warn_only=chosen.type == "cuda")
    # Else every new tensor would be written twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    ranks = distributed.local_world_size()
    threads = threads or max(1, cores() // ranks)
    torch.set_num_threads(threads)
    if chosen.type == "cpu" and ranks * threads > cores():
        warn(f"{ranks} processes x {threads} threads share {cores()} cores: they will wait for each other")
    resolved = _precision(precision, chosen)
    distributed.start(chosen, timeout)
    say(f"running on {distributed.world_size()} x {chosen.type} in {resolved}, {threads} CPU threads a rank")
    return Runtime(chosen, resolved, threads)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU: device=cpu runs without one")
    if name == "cpu" or not torch.cuda.is_available():
        if name == "auto":
            say("no GPU seen: running on the CPU")
        return torch.device("cpu")
    if distributed.local_world_size() > torch.cuda.device_count():
        raise ValueError(
            f"{distributed.local_world_size()} processes on {torch.cuda.device_count()} GPUs: "
            "start one process per GPU (--nproc_per_node), or run with device=cpu"
        )
    return torch.device("cuda", distributed.local_rank())


def _precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        # Older GPUs emulate it, without tensor cores.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Without instructions for it, bf16 on a CPU is emulated and slower than float32.
    native = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, check, lambda: False)() for check in native) else "fp32"


def describe(runtime: Runtime) -> dict[str, Any]:
    """Versions, hardware and world size, as plain values, for the record of a run."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "torchvision", "numpy", "pillow", "ffcv")
    gpu = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else None
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in packages},
        "processor": _processor(),
        "cores": cores(),
        "gpu": gpu,
        "world_size": distributed.world_size(),
        "threads": runtime.threads,
        "precision": runtime.precision,
        "device": runtime.device.type,
    }


def _git_commit() -> str | None:
    noted = Path(__file__).parent.parent / "COMMIT"  # of a snapshot that a job runs (launch.snapshot)
    if noted.is_file():
        return noted.read_text().strip() or None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

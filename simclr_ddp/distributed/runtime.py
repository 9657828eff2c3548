"""Runtime of a command: device, threads, precision, determinism."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from simclr_ddp.distributed import collectives, rendezvous
from simclr_ddp.system.console import say, warn
from simclr_ddp.system.machine import cores
from simclr_ddp.system.ranks import check_variables


@dataclass(frozen=True)
class Runtime:
    """Device, precision and CPU threads of a process."""

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
    """Resolve `auto`, set threads and determinism, join the process group, and print the choices.

    Equal starts on machines of one type compute equal bits: cuBLAS and cuDNN are restricted to deterministic
    algorithms.
    """
    if not dist.is_initialized():
        check_variables()
    chosen = _device(device)
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32; bf16 is the fast choice
    # An operation without a deterministic GPU implementation warns once instead of ending the run.
    torch.use_deterministic_algorithms(True, warn_only=chosen.type == "cuda")
    # By default every new tensor would be written twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    ranks = collectives.local_world_size()
    threads = threads or max(1, cores() // ranks)
    torch.set_num_threads(threads)
    if chosen.type == "cpu" and ranks * threads > cores():
        warn(f"threads={threads}: {ranks} processes with {threads} threads each share {cores()} cores, which is slow")
    resolved = _precision(precision, chosen)
    rendezvous.start(chosen, timeout)
    say(f"running on {collectives.world_size()} x {chosen.type} in {resolved}, {threads} CPU threads per rank")
    return Runtime(chosen, resolved, threads)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no GPU; set device=cpu to run without one")
    if name == "cpu" or not torch.cuda.is_available():
        if name == "auto":
            say("device=auto: no GPU found, running on the CPU")
        return torch.device("cpu")
    if collectives.local_world_size() > torch.cuda.device_count():
        raise ValueError(
            f"device={name}: {collectives.local_world_size()} processes for {torch.cuda.device_count()} GPUs; "
            "start one process per GPU (--nproc_per_node), or set device=cpu"
        )
    return torch.device("cuda", collectives.local_rank())


def _precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        # Older GPUs emulate bf16 without tensor cores.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Without bf16 instructions a CPU emulates it, slower than float32.
    native = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, check, lambda: False)() for check in native) else "fp32"

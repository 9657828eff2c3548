"""Count the work of a training step: operations of the model, launches on the GPU, and waits of the host."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.support.loops import Ceiling, synchronize
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed.runtime import Runtime

# The makers' dense rates in operations per second, by (part of the GPU's name, precision).
PEAK = {
    ("H200", "bf16"): 989e12,
    ("H200", "fp16"): 989e12,
    ("H200", "fp32"): 67e12,
    ("H100 PCIe", "bf16"): 756e12,
    ("H100", "bf16"): 989e12,
    ("H100", "fp32"): 67e12,
    ("A100", "bf16"): 312e12,
    ("A100", "fp32"): 19.5e12,
}
# The CUDA calls with which the host starts work, and those with which it waits.
CALLS = {
    "kernels": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "graphs": ("cudaGraphLaunch",),
    "copies": ("cudaMemcpyAsync", "cudaMemsetAsync"),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
}


def operations(settings: Pretrain, runtime: Runtime, dataset: Dataset) -> int:
    """Count the operations of this rank's convolutions and matrix products in a forward and backward pass, uncompiled.

    A multiplication and an addition count as two. The loss and the augmentation are not included.
    """
    ceiling = Ceiling(replace(settings, compile=False), runtime, dataset)
    with FlopCounterMode(display=False) as counter:
        ceiling.step(None)
    return int(counter.get_total_flops())


def launches(step: Callable[[], None], steps: int, device: torch.device) -> dict[str, float]:
    """Return the calls of each kind in CALLS per step, a mean over `steps`; {} without a GPU."""
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
    synchronize(device)
    return count(profiler.events() or [], steps)


def count(events: Iterable[Any], steps: int) -> dict[str, float]:
    names = Counter(event.name for event in events)
    return {kind: sum(names[call] for call in calls) / steps for kind, calls in CALLS.items()}


def peak_rate(gpu: str | None, precision: str) -> float | None:
    """Return the operations per second that the GPU's maker states; None if the GPU is not in PEAK."""
    return next((rate for (name, of), rate in PEAK.items() if of == precision and name in (gpu or "")), None)

"""What can be said of a machine and of a recipe before anything is computed: the quick part of the doctor."""

import os
import shutil
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from simclr_ddp import checkpoint, cli, distributed
from simclr_ddp.config import Pretrain
from simclr_ddp.data import PREFETCH, VIEWS, Dataset, cores, usable_loader, usable_workers
from simclr_ddp.model import Encoder
from simclr_ddp.run import Plan
from simclr_ddp.runtime import Runtime


class Finding(NamedTuple):
    level: str  # ok, warning or error
    text: str


def at_the_start(settings: Pretrain, plan: Plan, dataset: Dataset) -> None:
    """The quick part, in `pretrain`: what is well is not printed, and whatever is an error ends the run elsewhere."""
    for finding in memory(dataset):
        if finding.level != "ok":
            cli.say(finding.text)
    found = [*machine(settings, distributed.local_world_size()), *recipe(settings, plan)]
    for finding in found:
        if finding.level != "ok":
            cli.warn(finding.text)


def loss_backend(settings: Pretrain, runtime: Runtime) -> None:
    """ValueError where loss.backend=triton can't compute this run's loss. KernelInfoNCE refuses kernels by itself."""
    if settings.loss.backend != "triton":
        return
    width, of = settings.head.out, f"head.out={settings.head.out}"
    if settings.head.kind == "none":
        wanted = settings.model
        with torch.device("meta"):
            width = Encoder(wanted.arch, wanted.width, wanted.stem).width_out
        of = f"with head.kind=none those of model.arch={wanted.arch}, model.width={wanted.width:g} have {width:,}"
    for fault, text in (
        (runtime.device.type == "cpu", "it needs a GPU, and this run is on the CPU"),
        (find_spec("triton") is None, "Triton is not installed"),
        (runtime.precision == "fp64", "it computes in float32, and precision=fp64"),
        (width > 512, f"it takes embeddings of at most 512 numbers, and {of}"),
    ):
        if fault:
            raise ValueError(f"loss.backend=triton: {text}; set loss.backend=tiled")


def negatives(n: int, ranks: int) -> str:
    """The line of a run's header that says what each view is compared with."""
    among = f" on {ranks} ranks: {2 * n - 2:,} negatives a view, from all ranks" if ranks > 1 else ""
    return f"N = {n:,} images{among or f': {2 * n - 2:,} negatives a view'}"


def room_for(folder: Path, size: int, keep_last: int) -> str:
    """A warning where the checkpoints to keep and the one being written, of that many bytes each, don't fit; or ""."""
    there = sum(path.stat().st_size for path in checkpoint.all_steps(folder)[-keep_last:])  # to be replaced
    wanted, free = (keep_last + 1) * size - there, shutil.disk_usage(folder).free
    if wanted <= free:
        return ""
    return (
        f"{folder} has {free / 1e6:,.0f} MB free, but {keep_last + 1} checkpoints take up to {wanted / 1e6:,.0f} MB "
        "more: make room, run_dir=... takes another place, or a smaller checkpoint.keep_last fewer"
    )


def memory(dataset: Dataset) -> Iterator[Finding]:
    """Whether the data file fits into the memory that is free, where it is read from after the first epoch."""
    free = available_bytes()
    if dataset.images is None or dataset.numbers is not None or free is None:
        return
    size = dataset.images.path.stat().st_size
    if size <= free:
        yield Finding("ok", f"{dataset.source} has {size / 1e9:,.1f} GB, {free / 1e9:,.1f} GB of memory are free")
    else:
        yield Finding(
            "warning",
            f"{dataset.source} has {size / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB of memory are free: images are read "
            "from the disk in every epoch, each by itself and in random order, for which a network or hard disk is too "
            "slow: a local SSD, or a machine with more memory",
        )


def available_bytes() -> int | None:
    """Memory that programs and cached files may still take; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def machine(settings: Pretrain, ranks: int) -> Iterator[Finding]:
    """Cores, GPUs, shared memory and the port."""
    gpus = torch.cuda.device_count()
    if settings.device == "cpu" or not gpus:
        level = "error" if settings.device == "cuda" else "ok"
        yield Finding(level, f"{gpus} GPUs, {cores()} CPU cores: runs on the CPU, {ranks} process{'es' * (ranks > 1)}")
    elif ranks > gpus:
        yield Finding("error", f"{ranks} processes on {gpus} GPUs: start one a GPU (--nproc_per_node={gpus})")
    else:
        names = {torch.cuda.get_device_name(i) for i in range(gpus)}
        yield Finding("ok", f"{gpus} GPUs ({', '.join(sorted(names))}), {cores()} CPU cores, {ranks} processes")
    decoded = settings.data.train != "spirograph"  # whose images are drawn by the device
    workers = usable_workers(settings.data.workers, ranks)
    if decoded and settings.data.workers > workers:
        yield Finding(
            "warning",
            f"data.workers={settings.data.workers} for each of {ranks} processes, but only {cores()} cores may be used "
            f"here: {workers} are taken; a launcher's --cpus-per-task or a wider mask gives more",
        )
    yield from shared_memory(settings, ranks, workers if decoded else 0, gpus)
    port = os.environ.get("MASTER_PORT", "29500")
    alone = distributed.world_size() == 1  # else the ranks have met already, perhaps there
    if ranks > 1 and alone and "TORCHELASTIC_RUN_ID" not in os.environ and not _free(int(port)):
        yield Finding(
            "warning",
            f"port {port} is in use: torchrun --standalone --local-addr=127.0.0.1, or --master-port=... takes another",
        )


def shared_memory(settings: Pretrain, ranks: int, workers: int, gpus: int) -> Iterator[Finding]:
    """Whether /dev/shm holds the batches that DataLoader's processes pass on, and what NCCL takes."""
    folder, wanted, users = Path("/dev/shm"), 0, []
    if workers and settings.data.loader != "ffcv" and usable_loader(settings.data.loader)[0] == "torch":
        batch = settings.optim.global_batch_size // ranks * VIEWS * 3 * settings.data.size**2
        wanted += ranks * (PREFETCH * workers + 1) * batch  # one is in use
        users.append(f"batches of {workers} decoding processes")
    if gpus and ranks > 1:
        wanted += 64 * 2**20 * ranks
        users.append("NCCL")
    if not users or not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    if free < wanted:
        yield Finding(
            "warning",
            f"/dev/shm has {free / 2**20:,.0f} MB free, but {' and '.join(users)} of {ranks} rank{'s' * (ranks > 1)} "
            f"take {wanted / 2**20:,.0f} MB: docker run --shm-size=8g, --ipc=host, or fewer data.workers",
        )


def recipe(settings: Pretrain, plan: Plan) -> Iterator[Finding]:
    """Optimizer, learning rate, batch and temperature against what is known to work."""
    optim, loss = settings.optim, settings.loss
    peak, told = plan.peak_learning_rate, []
    if optim.name == "lars" and not 0.05 <= peak * optim.trust_coefficient / 0.001 <= 20:
        told.append(
            f"LARS at a learning rate of {peak:g} with optim.trust_coefficient={optim.trust_coefficient:g}: working "
            "recipes reach 0.3 to 5 at 0.001 (optim.base_learning_rate=0.3 to 1.5 with linear scaling)"
        )
    if optim.name == "sgd" and not 0.003 <= peak <= 3:
        told.append(f"SGD at a learning rate of {peak:g}: 0.03 to 1 is usual for contrastive training")
    if optim.name == "adamw" and not 1e-5 <= peak <= 1e-2:
        told.append(
            f"AdamW at a learning rate of {peak:g}: 1e-4 to 3e-3 is usual; optim.scaling=none leaves the base rate"
        )
    if loss.kernel in ("cosine", "gaussian"):
        cosine = loss.temperature / (2 if loss.kernel == "gaussian" else 1)
        if not 0.03 <= cosine <= 1.5:
            told.append(f"loss.temperature={loss.temperature:g} is NT-Xent at {cosine:g}: 0.05 to 1 is usual")
        if cosine >= 0.5 and optim.global_batch_size >= 2048:
            told.append(
                f"loss.temperature={loss.temperature:g} with N = {optim.global_batch_size}: large batches gain from "
                "lower temperatures, 0.1 was best for ImageNet"
            )
    yield from (Finding("warning", text) for text in told)
    if not told:
        yield Finding("ok", f"{optim.name} up to {peak:g}, {loss.kernel} kernel at temperature {loss.temperature:g}")


def _free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            return False
    return True

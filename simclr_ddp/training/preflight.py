"""Checks of the machine and the recipe that need no computation: the quick part of simclr_ddp.doctor."""

import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from simclr_ddp.config.identity import idle_options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.batches import PREFETCH, VIEWS, usable_loader
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.models.backbones import make_encoder
from simclr_ddp.runs import checkpoint
from simclr_ddp.system import console
from simclr_ddp.system.machine import available_bytes, cores, usable_workers
from simclr_ddp.training.components import make_objective
from simclr_ddp.training.plan import Plan, make_plan


class Finding(NamedTuple):
    level: str  # ok, warning or error
    text: str


def check(settings: Pretrain, runtime: Runtime, dataset: Dataset) -> Plan:
    """Make the plan of a run and run the quick checks; all ranks end if the settings do not fit the data."""
    try:  # all ranks have equal settings and data, so all fail alike
        make_objective(settings)
        loss_backend(settings, runtime)
        plan = make_plan(settings, dataset)
    except ValueError as error:
        collectives.fail_together(str(error))
    console.say(negatives(settings.optim.global_batch_size, collectives.world_size()))
    at_the_start(settings, plan, dataset)
    return plan


def at_the_start(settings: Pretrain, plan: Plan, dataset: Dataset) -> None:
    """Print the quick checks that found a problem, all as warnings; real errors end the run elsewhere."""
    for finding in memory(dataset):
        if finding.level != "ok":
            console.say(finding.text)
    found = [*machine(settings, collectives.local_world_size()), *recipe(settings, plan)]
    for finding in found:
        if finding.level != "ok":
            console.warn(finding.text)


def evaluation(datasets: Iterable[Dataset], workers: int, loader: str, batch_size: int, size: int) -> None:
    """Print the quick checks of a command that computes representations which found a problem, as warnings."""
    decoded = [dataset for dataset in datasets if dataset.decoded]
    batch = min(batch_size, max((dataset.count for dataset in decoded), default=0)) * 3 * size**2
    found = list(decoding("workers", workers if decoded else 0, loader, batch, collectives.local_world_size()))
    for finding in (*(f for dataset in decoded for f in memory(dataset)), *found):
        if finding.level != "ok":
            console.warn(finding.text)


def loss_backend(settings: Pretrain, runtime: Runtime) -> None:
    """Raise ValueError if loss.backend=triton can't compute this run's loss. KernelInfoNCE checks the kernel itself."""
    if settings.loss.backend != "triton":
        return
    width, of = settings.head.out, f"head.out={settings.head.out}"
    if settings.head.kind == "none":
        m = settings.model
        with torch.device("meta"):
            width = make_encoder(m.arch, m.width, m.stem, settings.data.size).width_out
        of = f"with head.kind=none those of model.arch={m.arch}, model.width={m.width:g} have {width:,}"
    for fault, text in (
        (runtime.device.type == "cpu", "it needs a GPU, and this run is on the CPU"),
        (find_spec("triton") is None, "Triton is not installed"),
        (runtime.precision == "fp64", "it computes in float32, and precision=fp64"),
        (width > 512, f"it takes embeddings of at most 512 numbers, and {of}"),
    ):
        if fault:
            raise ValueError(f"loss.backend=triton: {text}; set loss.backend=tiled")


def negatives(n: int, ranks: int) -> str:
    """Return the line of a run's header that gives the number of negatives of each view."""
    among = f" on {ranks} ranks: {2 * n - 2:,} negatives per view, from all ranks" if ranks > 1 else ""
    return f"N = {n:,} images{among or f': {2 * n - 2:,} negatives per view'}"


def room_for(folder: Path, size: int, keep_last: int) -> str:
    """Return a warning if the checkpoints to keep and the one being written, of `size` bytes each, don't fit; or ""."""
    there = sum(path.stat().st_size for path in checkpoint.all_steps(folder)[-keep_last:])  # to be replaced
    needed, free = (keep_last + 1) * size - there, shutil.disk_usage(folder).free
    if needed <= free:
        return ""
    return (
        f"{folder} has {free / 1e6:,.0f} MB free, but {keep_last + 1} checkpoints take up to {needed / 1e6:,.0f} MB "
        "more: make room, set run_dir=... to another disk, or reduce checkpoint.keep_last"
    )


def memory(dataset: Dataset) -> Iterator[Finding]:
    """Check that the data file fits into the free memory, from which it is read after the first epoch."""
    free = available_bytes()
    if not dataset.decoded or free is None:
        return
    size = dataset.file.path.stat().st_size
    if size <= free:
        yield Finding("ok", f"{dataset.source} has {size / 1e9:,.1f} GB, {free / 1e9:,.1f} GB of memory are free")
    else:
        yield Finding(
            "warning",
            f"{dataset.source} has {size / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB of memory are free: images are read "
            "from the disk in every epoch, one by one and in random order, for which a network or hard disk is too "
            "slow; use a local SSD, or a machine with more memory",
        )


def machine(settings: Pretrain, ranks: int) -> Iterator[Finding]:
    """Check cores, GPUs, shared memory and the port."""
    gpus = torch.cuda.device_count()
    if settings.device == "cpu" or not gpus:
        level = "error" if settings.device == "cuda" else "ok"
        yield Finding(level, f"{gpus} GPUs, {cores()} CPU cores: runs on the CPU, {ranks} process{'es' * (ranks > 1)}")
    elif ranks > gpus:
        yield Finding("error", f"{ranks} processes on {gpus} GPUs: start one per GPU (--nproc_per_node={gpus})")
    else:
        names = {torch.cuda.get_device_name(i) for i in range(gpus)}
        yield Finding("ok", f"{gpus} GPUs ({', '.join(sorted(names))}), {cores()} CPU cores, {ranks} processes")
    batch = settings.optim.global_batch_size // ranks * VIEWS * 3 * settings.data.size**2
    decoded = settings.data.train != "spirograph"  # the device draws its images
    yield from decoding("data.workers", settings.data.workers if decoded else 0, settings.data.loader, batch, ranks)
    port = os.environ.get("MASTER_PORT", "29500")
    alone = collectives.world_size() == 1  # otherwise the ranks have met already, perhaps at this port
    if ranks > 1 and alone and "TORCHELASTIC_RUN_ID" not in os.environ and not _free(int(port)):
        yield Finding(
            "warning",
            f"port {port} is in use: start torchrun with --standalone --local-addr=127.0.0.1, or with another "
            "--master-port=...",
        )


def decoding(key: str, workers: int, loader: str, batch_bytes: int, ranks: int) -> Iterator[Finding]:
    """Check the decoding workers, of the option `key`, and the room in /dev/shm for their batches and for NCCL."""
    usable = usable_workers(workers, ranks)
    if workers > usable:
        yield Finding(
            "warning",
            f"{key}={workers}: {ranks} process{'es' * (ranks > 1)} may use {cores()} cores, so "
            f"{usable} workers per process are started; a launcher's --cpus-per-task or a wider CPU mask gives more",
        )
    folder, needed, users = Path("/dev/shm"), 0, []
    if workers and loader != "ffcv" and usable_loader(loader)[0] == "torch":
        needed += ranks * (PREFETCH * usable + 1) * batch_bytes  # one is in use
        users.append(f"batches of {usable} decoding processes")
    if torch.cuda.device_count() and ranks > 1:
        needed += 64 * 2**20 * ranks
        users.append("NCCL")
    if not users or not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield Finding(
            "warning",
            f"/dev/shm has {free / 2**20:,.0f} MB free, but {' and '.join(users)} of {ranks} rank{'s' * (ranks > 1)} "
            f"take {needed / 2**20:,.0f} MB: use docker run --shm-size=8g or --ipc=host, or fewer {key}",
        )


def recipe(settings: Pretrain, plan: Plan) -> Iterator[Finding]:
    """Compare optimizer, learning rate, batch and temperature with values that are known to work."""
    optim, loss = settings.optim, settings.loss
    peak, warnings = plan.peak_learning_rate, idle_options(settings)
    if optim.name == "lars" and not 0.05 <= peak * optim.trust_coefficient / 0.001 <= 20:
        warnings.append(
            f"LARS at a learning rate of {peak:g} with optim.trust_coefficient={optim.trust_coefficient:g}: working "
            "recipes reach 0.3 to 5 at 0.001 (optim.base_learning_rate=0.3 to 1.5 with linear scaling)"
        )
    if optim.name == "sgd" and not 0.003 <= peak <= 3:
        warnings.append(f"SGD at a learning rate of {peak:g}: 0.03 to 1 is usual for contrastive training")
    if optim.name == "adamw" and not 1e-5 <= peak <= 1e-2:
        warnings.append(
            f"AdamW at a learning rate of {peak:g}: 1e-4 to 3e-3 is usual; optim.scaling=none keeps the base rate"
        )
    if loss.kernel in ("cosine", "gaussian"):
        cosine = loss.temperature / (2 if loss.kernel == "gaussian" else 1)
        if not 0.03 <= cosine <= 1.5:
            warnings.append(f"loss.temperature={loss.temperature:g} is NT-Xent at {cosine:g}: 0.05 to 1 is usual")
        if cosine >= 0.5 and optim.global_batch_size >= 2048:
            warnings.append(
                f"loss.temperature={loss.temperature:g} with N = {optim.global_batch_size}: large batches gain from "
                "lower temperatures, 0.1 was best for ImageNet"
            )
    yield from (Finding("warning", text) for text in warnings)
    if not warnings:
        yield Finding("ok", f"{optim.name} up to {peak:g}, {loss.kernel} kernel at temperature {loss.temperature:g}")


def _free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            return False
    return True

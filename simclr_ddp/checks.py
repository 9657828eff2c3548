"""What can be said of a machine and of a recipe before anything is computed: the quick part of the doctor."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from simclr_ddp import cli, distributed
from simclr_ddp.config import Pretrain
from simclr_ddp.data import cores, usable_workers
from simclr_ddp.run import Plan


class Finding(NamedTuple):
    level: str  # ok, warning or error
    text: str


def at_the_start(settings: Pretrain, plan: Plan) -> None:
    """The quick part, in `pretrain`: only warnings are printed, since whatever is an error ends the run elsewhere."""
    found = [*machine(settings, distributed.local_world_size()), *recipe(settings, plan)]
    for finding in found:
        if finding.level != "ok":
            cli.warn(finding.text)


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
    workers = usable_workers(settings.data.workers, ranks)
    if settings.data.workers > workers:
        yield Finding(
            "ok",
            f"data.workers={settings.data.workers} for each of {ranks} processes, but only {cores()} cores may be used "
            f"here: {workers} are taken; a launcher's --cpus-per-task or a wider mask gives more",
        )
    shared = Path("/dev/shm")
    if shared.is_dir() and gpus and ranks > 1:
        free = shutil.disk_usage(shared).free
        if free < 64 * 2**20 * ranks:
            yield Finding(
                "warning",
                f"/dev/shm has {free / 2**20:,.0f} MB free, and NCCL and torch's DataLoader of {ranks} processes want "
                "more: docker run --shm-size=8g, or --ipc=host",
            )
    port = os.environ.get("MASTER_PORT", "29500")
    alone = distributed.world_size() == 1  # else the ranks have met already, perhaps there
    if ranks > 1 and alone and "TORCHELASTIC_RUN_ID" not in os.environ and not _free(int(port)):
        yield Finding("warning", f"port {port} is in use: torchrun --standalone, or --master-port=... takes another")


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

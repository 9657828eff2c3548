"""The parity certificate: `python -m simclr_ddp.verify [CONFIG.yaml] key=value ...`

Are several processes the same run as one? The config's own data, model, objective and optimizer are trained for a few
steps at full learning rate on one process, and again on 2 and 4 gloo processes of this machine that share the same
small batch, in float64 unless `precision` says otherwise. Printed are the loss, its gradient for the embeddings and the
parameters, and the parameters after the last step; the result is stamped into the run directory as parity.json.

Any other loss of two views is judged likewise, on the output of a linear model:

    python -m simclr_ddp.verify verify.loss=lightly.loss:NTXentLoss verify.arguments=[gather_distributed=true]

Exit status: 0 if all agree, 1 if not.
"""

import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from simclr_ddp import checkpoint, cli, config, distributed
from simclr_ddp.config import Verify
from simclr_ddp.data import open_dataset
from simclr_ddp.optim import set_learning_rate
from simclr_ddp.pretrain import make_augmentation, make_batches, make_objective, make_parallel
from simclr_ddp.run import check_options, default_run_dir
from simclr_ddp.runtime import Runtime, describe
from simclr_ddp.schedule import peak_learning_rate
from simclr_ddp.state import State
from simclr_ddp.step import forward_backward

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # relative; training amplifies rounding


def main(argv: list[str] | None = None) -> int:
    return cli.run(verify, Verify, "[CONFIG.yaml]", __doc__ or "", argv)


def verify(settings: Verify) -> int:
    wanted, folder = settings.verify, default_run_dir(settings)
    settings.precision = "fp64" if settings.precision == "auto" else settings.precision
    parts = 2 if settings.optim.micro_batch_size else 1
    if 1 in wanted.ranks or any(wanted.images % (parts * count) for count in wanted.ranks):
        raise ValueError(
            f"verify.images={wanted.images} does not divide among verify.ranks={list(wanted.ranks)}, "
            f"each of them 2 or more{', and 2 micro-batches' if parts == 2 else ''}: take a multiple of all"
        )
    peak = 0.0
    if not wanted.loss:
        dataset, optim = open_dataset(settings.data.train, "train"), settings.optim
        check_options(settings, dataset)
        if dataset.count < wanted.images:
            raise ValueError(
                f"verify.images={wanted.images}: data.train={dataset.source} holds {dataset.count} images; take fewer"
            )
        peak = peak_learning_rate(optim.base_learning_rate, optim.scaling, optim.global_batch_size)
    alone = run_on(1, settings, peak)
    moved = alone.pop("moved")
    rows = []
    for count in wanted.ranks:
        shared = run_on(count, settings, peak)
        rows += [compare(name, count, alone[name], shared[name]) for name in alone]
    limit = TOLERANCE[settings.precision]
    agree = all(row["difference"] <= limit for row in rows)
    subject = wanted.loss or f"{settings.loss.kernel} loss, {settings.model.arch} x {settings.model.width:g}"
    cli.say(f"{subject}: {wanted.images} images, {settings.precision}\n\n{table(rows, limit)}\n")
    if not wanted.loss:
        cli.say(f"parameters moved by {float(moved):.2%} in {wanted.steps} steps")
        if float(moved) < 0.01:
            cli.warn(
                "the parameters hardly moved, so the last rows say little: a higher optim.base_learning_rate moves them"
            )
        record = {
            "agree": agree,
            "tolerance": limit,
            "moved": float(moved),
            "rows": rows,
            "settings": config.plain(settings),
            "runtime": describe(Runtime(torch.device("cpu"), settings.precision, 1)),
        }
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1) + "\n"
        checkpoint.replace_atomically(folder / "parity.json", lambda temporary: temporary.write_text(text))
        cli.say(f"written to {folder / 'parity.json'}")
    cli.say("any number of ranks is the same run" if agree else "the number of ranks CHANGES the run")
    return 0 if agree else 1


def run_on(count: int, settings: Verify, peak: float) -> dict[str, Tensor]:
    """What `count` processes measure together; ValueError if one of them fails or dies."""
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, str(Path(folder) / "store"), settings, peak)
        fault = "interrupted"
        try:
            for rank in range(count):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_rank, args=(rank, *arguments, theirs), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()
                pipes.append(ours)
            fault, found = first_told(processes, pipes)
        finally:
            for process in processes:
                if fault:
                    process.kill()
                process.join()
    if fault:
        raise ValueError(fault)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def first_told(processes: list[Any], pipes: list[Connection]) -> tuple[str, dict[str, list[float]]]:
    """(fault, what rank 0 found), as soon as one process tells it, or has died.

    A process that only tells that it lost another one is heard, but the death of that one is waited for a second.
    Exit statuses are looked at besides the pipes: that of one that was killed may stay open in its decoding processes.
    """
    open_pipes, lost, until = list(pipes), None, math.inf
    while time.monotonic() < until:
        dead = [rank for rank, process in enumerate(processes) if process.exitcode]  # None: alive
        for pipe in wait(open_pipes, 0.2):
            assert isinstance(pipe, Connection)
            open_pipes.remove(pipe)
            rank = pipes.index(pipe)
            try:
                told = pipe.recv()
            except (EOFError, OSError):
                processes[rank].join(1)
                if rank == 0 or processes[rank].exitcode:
                    dead.append(rank)
                continue
            if cli.LOST.search(told[0]) is None:
                return told
            lost, until = lost or told, min(until, time.monotonic() + 1)
        if dead:
            code = processes[dead[0]].exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
            return (
                f"rank {dead[0]} of {len(processes)} {how} before it told what it found: if memory is short, fewer "
                "verify.ranks or verify.images, or a smaller model.width, take less; else try again",
                {},
            )
    assert lost is not None
    return lost


def _rank(rank: int, count: int, store: str, settings: Verify, peak: float, told: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    try:
        if count > 1:
            distributed.start_here(rank, count, store)
        found = measure_loss(settings) if settings.verify.loss else measure(settings, peak)
        if rank == 0:
            told.send(("", {name: value.double().flatten().tolist() for name, value in found.items()}))
    except Exception as error:
        traceback.print_exc()
        told.send((f"rank {rank} of {count}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", {}))
    finally:
        distributed.stop()


def measure(settings: Verify, peak: float) -> dict[str, Tensor]:
    """Loss and gradients of the first step, parameters after the last; of the whole batch, on every rank."""
    parts = 2 if settings.optim.micro_batch_size else 1
    settings.optim.global_batch_size = settings.verify.images
    settings.optim.micro_batch_size = settings.verify.images // 2 if parts == 2 else None
    runtime = Runtime(torch.device("cpu"), settings.precision, 1)
    dataset = open_dataset(settings.data.train, "train")
    augment, objective = make_augmentation(settings, dataset, runtime), make_objective(settings)
    state = State(settings, runtime, dataset)
    start = _flat([p.detach() for p in state.model.parameters()])
    batches = make_batches(settings, dataset, runtime.device, range(settings.verify.steps))
    model = make_parallel(settings, runtime, state)
    set_learning_rate(state.optimizer, peak)
    steps_per_epoch = dataset.count // settings.verify.images
    found: dict[str, Tensor] = {}
    for step in range(settings.verify.steps):
        batch, epoch = next(batches), step // steps_per_epoch
        loss, y = forward_backward(model, state, runtime, objective, augment, batch, epoch, parts)
        if step == 0:
            y.requires_grad_()
            objective(y[0], y[1]).backward()
            found = of_the_batch(loss, y)
            scale = state.scaler.get_scale()
            found["gradient of the parameters"] = _flat([p.grad for p in state.model.parameters()]) / scale
        state.step(skip=~loss.isfinite())
    batches.close()
    end = _flat([p.detach() for p in state.model.parameters()])
    found[f"parameters after {settings.verify.steps} steps"] = end
    if distributed.world_size() == 1:
        found["moved"] = (end - start).norm() / start.norm()
    return found


def measure_loss(settings: Verify) -> dict[str, Tensor]:
    """The same of a loss by others, on a linear model of random images."""
    wanted, dtype = settings.verify, Runtime(torch.device("cpu"), settings.precision, 1).dtype
    loss_function = load_loss(wanted.loss, wanted.arguments)
    torch.manual_seed(settings.seed)
    images = torch.randn(2, wanted.images, 32, dtype=dtype)
    model = nn.Linear(32, 16).to(dtype)
    parallel = distributed.data_parallel(model, torch.device("cpu"))
    y = parallel(images[:, distributed.own_slice(wanted.images)])
    y.retain_grad()
    loss = loss_function(y[0], y[1])
    loss.backward()
    found = of_the_batch(loss, y)
    found["gradient of the parameters"] = _flat([p.grad for p in model.parameters()])
    if distributed.world_size() == 1:
        found["moved"] = torch.zeros(())
    return found


def of_the_batch(loss: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of all ranks together: the mean loss, and the gradient [V, N, d] that DDP's mean over ranks amounts to."""
    world_size = distributed.world_size()
    assert y.grad is not None
    return {
        "loss": distributed.all_sum(loss.detach().clone()) / world_size,
        "gradient of the embeddings": distributed.gather(y.grad) / world_size,
    }


def load_loss(name: str, arguments: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
    """An instance of package.module:Class, made with arguments that are written name=value."""
    module, _, cls = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"verify.loss={name} can't be imported ({error}): package.module:Class is wanted") from error
    pairs = (argument.partition("=") for argument in arguments)
    return found(**{key: yaml.safe_load(value) for key, _, value in pairs})


def compare(name: str, count: int, alone: Tensor, shared: Tensor) -> dict[str, Any]:
    """|shared - alone| / |alone|, the cosine between them, and the ratio of their norms."""
    norm, other = alone.norm().item(), shared.norm().item()
    cosine = (alone @ shared).item() / (norm * other) if norm * other > 0 else math.nan
    return {
        "quantity": name,
        "ranks": count,
        "alone": alone.item() if len(alone) == 1 else norm,
        "shared": shared.item() if len(shared) == 1 else other,
        "difference": (shared - alone).norm().item() / norm if norm > 0 else math.inf,
        "cosine": cosine,
        "norm_ratio": other / norm if norm > 0 else math.inf,
    }


def table(rows: list[dict[str, Any]], limit: float) -> str:
    lines = [f"{'':30}{'ranks':>6}{'value':>14}{'on one':>14}{'difference':>12}{'cosine':>9}{'norm ratio':>12}"]
    for row in rows:
        verdict = "ok" if row["difference"] <= limit else "DIFFERENT"
        lines.append(
            f"{row['quantity']:30}{row['ranks']:>6}{row['shared']:>14.6g}{row['alone']:>14.6g}"
            f"{row['difference']:>12.1e}{row['cosine']:>9.4f}{row['norm_ratio']:>12.4f}  {verdict}"
        )
    return "\n".join(lines)


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors if t is not None])


if __name__ == "__main__":
    sys.exit(main())

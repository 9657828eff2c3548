"""Take the same few steps on one process and on several, and measure how far the results differ."""

import importlib
import math
import multiprocessing
import os
import signal
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

from simclr_ddp.config.schema import Verify
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.distributed import collectives, ddp, rendezvous
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.system import errors
from simclr_ddp.system.console import shown
from simclr_ddp.system.errors import one_line
from simclr_ddp.training.components import make_training
from simclr_ddp.training.optim import set_learning_rate
from simclr_ddp.training.plan import make_plan

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # relative; training amplifies rounding


def run_on(count: int, settings: Verify, peak: float) -> dict[str, Tensor]:
    """Return what `count` processes measure together. Raises ValueError if one of them fails or dies."""
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
            fault, found = first_report(processes, pipes)
        finally:
            for process in processes:
                if fault:
                    process.kill()
                process.join()
    if fault:
        raise ValueError(fault)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def first_report(processes: list[Any], pipes: list[Connection]) -> tuple[str, dict[str, list[float]]]:
    """Return (fault, results of rank 0) as soon as a process reports one of them or has died.

    If a process only reports that it lost another one, this waits a second for the death of that one. It also checks
    exit statuses, because the decoding processes of a killed process may keep its pipe open.
    """
    open_pipes, lost, until = list(pipes), None, math.inf
    while time.monotonic() < until:
        dead = [rank for rank, process in enumerate(processes) if process.exitcode]  # None: alive
        for pipe in wait(open_pipes, 0.2):
            assert isinstance(pipe, Connection)
            open_pipes.remove(pipe)
            rank = pipes.index(pipe)
            try:
                report = pipe.recv()
            except (EOFError, OSError):
                processes[rank].join(1)
                if rank == 0 or processes[rank].exitcode:
                    dead.append(rank)
                continue
            if errors.LOST.search(report[0]) is None:
                return report
            lost, until = lost or report, min(until, time.monotonic() + 1)
        if dead:
            code = processes[dead[0]].exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
            return (
                f"rank {dead[0]} of {len(processes)} {how} before it reported its results: try again, or if memory is "
                "short, use fewer verify.ranks or verify.images, or a smaller model.width",
                {},
            )
    assert lost is not None
    return lost


def _rank(rank: int, count: int, store: str, settings: Verify, peak: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    try:
        if count > 1:
            rendezvous.start_here(rank, count, store)
        with shown():  # a process of its own shows no messages otherwise
            found = measure_loss(settings) if settings.verify.loss else measure(settings, peak)
        if rank == 0:
            pipe.send(("", {name: value.double().flatten().tolist() for name, value in found.items()}))
    except Exception as error:
        traceback.print_exc()
        pipe.send((f"rank {rank} of {count}: {type(error).__name__}: {one_line(error, 300)}", {}))
    finally:
        rendezvous.stop()


def measure(settings: Verify, peak: float) -> dict[str, Tensor]:
    """Measure the complete batch's loss and gradients in the first step, and the parameters after the last step."""
    parts = 2 if settings.optim.micro_batch_size else 1
    settings.optim.global_batch_size = settings.verify.images
    settings.optim.micro_batch_size = settings.verify.images // 2 if parts == 2 else None
    settings.optim.warmup_epochs = 0.0  # all steps are at the peak rate
    runtime = Runtime(torch.device("cpu"), settings.precision, 1)
    dataset = open_dataset(settings.data.train, "train", settings.data.spirograph)
    training = make_training(settings, runtime, dataset, make_plan(settings, dataset))
    state, objective = training.state, training.objective
    start = _flat([p.detach() for p in state.model.parameters()])
    batches = training.batches(range(settings.verify.steps))
    set_learning_rate(state.optimizer, peak)
    found: dict[str, Tensor] = {}
    for step in range(settings.verify.steps):
        loss, y = training.forward_backward(next(batches), step)
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
    if collectives.world_size() == 1:
        found["moved"] = (end - start).norm() / start.norm()
    return found


def measure_loss(settings: Verify) -> dict[str, Tensor]:
    """Measure the loss and gradients of the class verify.loss, on a linear model of random images."""
    options, dtype = settings.verify, Runtime(torch.device("cpu"), settings.precision, 1).dtype
    loss_function = load_loss(options.loss, options.arguments)
    torch.manual_seed(settings.seed)
    images = torch.randn(2, options.images, 32, dtype=dtype)
    model = nn.Linear(32, 16).to(dtype)
    parallel = ddp.data_parallel(model, torch.device("cpu"))
    y = parallel(images[:, collectives.local_slice(options.images)])
    y.retain_grad()
    loss = loss_function(y[0], y[1])
    loss.backward()
    found = of_the_batch(loss, y)
    found["gradient of the parameters"] = _flat([p.grad for p in model.parameters()])
    if collectives.world_size() == 1:
        found["moved"] = torch.zeros(())
    return found


def of_the_batch(loss: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the mean loss over all ranks, and the gradient [V, N, d] that corresponds to DDP's mean over ranks."""
    world_size = collectives.world_size()
    assert y.grad is not None
    return {
        "loss": collectives.all_reduce_sum(loss.detach().clone()) / world_size,
        "gradient of the embeddings": collectives.gather(y.grad) / world_size,
    }


def load_loss(name: str, arguments: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
    """Create an instance of package.module:Class from arguments in the form name=value."""
    module, _, cls = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"verify.loss={name}: it can't be imported ({error}); write package.module:Class") from error
    pairs = (argument.partition("=") for argument in arguments)
    return found(**{key: yaml.safe_load(value) for key, _, value in pairs})


def compare(name: str, count: int, alone: Tensor, shared: Tensor) -> dict[str, Any]:
    """Return |shared - alone| / |alone|, the cosine between them, and the ratio of their norms."""
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

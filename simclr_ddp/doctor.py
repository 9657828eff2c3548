"""Will this run, fit and learn, and how long will it take? `python -m simclr_ddp.doctor [CONFIG.yaml] key=value ...`

Each line says ok, warning or error, and the way out. Nothing is trained but ten steps that are thrown away, and nothing
is written but a file in the run directory that is dropped again. doctor.ranks is the number of processes the run will
have on this machine. Every start of `pretrain` makes the quick part of these checks by itself. Exit status: 1 where
there is an error.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simclr_ddp import checkpoint, cli, device_loader, p_distance, tiled
from simclr_ddp.checks import Finding, machine, memory, recipe
from simclr_ddp.config import Doctor, Pretrain
from simclr_ddp.data import VIEWS, Dataset, describe_loader, open_dataset, usable_loader, usable_workers
from simclr_ddp.losses import MIXTURES, tile_kernel
from simclr_ddp.model import Encoder, SimCLR, projection_head
from simclr_ddp.pretrain import make_augmentation, make_batches, make_objective
from simclr_ddp.run import Plan, default_run_dir, make_plan
from simclr_ddp.runtime import Runtime, setup
from simclr_ddp.state import State
from simclr_ddp.step import forward_backward

# Of an H100 or H200 in a ResNet's training step in bf16, where batch norm and ReLU wait for the memory: 15 % of the
# peak of 989 TFLOP/s. An assumption.
ASSUMED_RATE = 150e12


def main(argv: list[str] | None = None) -> int:
    return cli.run(doctor, Doctor, "[CONFIG.yaml]", __doc__ or "", argv)


def doctor(settings: Doctor) -> int:
    failed, told = False, set()
    for finding in examine(settings):
        if finding in told:  # by another check that stumbles over the same
            continue
        told.add(finding)
        cli.say(f"{finding.level:<8} {finding.text}")
        failed |= finding.level == "error"
    return 1 if failed else 0


def examine(settings: Doctor) -> Iterator[Finding]:
    ranks = settings.doctor.ranks or max(1, torch.cuda.device_count())
    dataset, plan = None, None
    yield from guarded(software, settings)
    yield from guarded(machine, settings, ranks)
    try:
        dataset = open_dataset(settings.data.train, "train")
        plan = make_plan(settings, dataset)
    except (ValueError, OSError) as error:
        yield Finding("error", str(error))
    if dataset is not None:
        yield from guarded(images, settings, dataset)
        yield from guarded(memory, dataset)
        yield from guarded(decoding, settings, dataset, ranks)
    yield from guarded(batch, settings, ranks)
    if plan is not None:
        yield from guarded(recipe, settings, plan)
    yield from guarded(room, settings)
    if settings.device != "cpu":
        yield from guarded(gpu_memory, settings, ranks, dataset)
        yield from guarded(arithmetic, settings, ranks)
    if plan is not None and settings.doctor.steps:
        yield from guarded(duration, settings, dataset, plan)


def guarded(check: Callable[..., Finding | Iterator[Finding]], *arguments: Any) -> Iterator[Finding]:
    """What a check finds; where it fails itself, that is an error, and the checks after it go on."""
    try:
        found = check(*arguments)
        yield from [found] if isinstance(found, Finding) else found
    except (ValueError, OSError) as error:
        yield Finding("error", " ".join(str(error).split()))
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            traceback.print_exc()
        yield Finding("error", f"{check.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def software(settings: Pretrain) -> Iterator[Finding]:
    names = ("torch", "torchvision", "numpy", "pillow", "numba", "submitit")
    versions = [f"{name} {_version(name)}" for name in names if _version(name)]
    yield Finding("ok", f"Python {platform.python_version()}, {', '.join(versions)}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler:
        yield Finding("ok", f"compiler: {compiler}")
    else:
        level = "error" if settings.compile else "warning"
        yield Finding(
            level, "no C++ compiler: compile=true and building FFCV need one: apt install g++, or conda's gxx"
        )
    _, reason = usable_loader("auto")
    if not reason:
        yield Finding("ok", f"FFCV {_version('ffcv')} can be imported")
    else:
        level = "error" if settings.data.loader == "ffcv" else "warning"
        instead = "torch's DataLoader decodes, the same pixels about half as fast"
        yield Finding(level, f"{reason}: {instead}; `make setup` builds FFCV")


def images(settings: Doctor, dataset: Dataset) -> Iterator[Finding]:
    """The data file: whole, and of which labels."""
    labels = "no labels" if dataset.labels is None else f"{dataset.class_count} classes"
    if dataset.labels is not None and not dataset.has_classes:
        labels = f"{dataset.labels.shape[1]} numbers as labels"
    yield Finding("ok", f"{dataset.source}: {dataset.count:,} images, {labels}")
    if dataset.images is None:
        return
    wanted = dataset.images.info.get("sha256")
    with dataset.images.path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted is None:
        yield Finding("warning", f"{dataset.source} was written by another tool: it has no checksum to compare")
    elif found == wanted:
        yield Finding("ok", f"its checksum is right ({found[:16]})")
    else:
        yield Finding("error", f"{dataset.source} is damaged, its checksum is wrong: copy or write it again")


def decoding(settings: Doctor, dataset: Dataset, ranks: int) -> Iterator[Finding]:
    """Who decodes, and what it takes."""
    if dataset.images is not None and dataset.decoded:
        workers = usable_workers(settings.data.workers, ranks)
        share = settings.optim.global_batch_size // ranks
        if settings.data.loader == "device":
            on_gpu = settings.device != "cpu" and torch.cuda.is_available()
            device_loader.check_room(dataset.images, settings.data.size, torch.device("cuda" if on_gpu else "cpu"))
        told = describe_loader(dataset.images, settings.data.loader, workers, share, VIEWS, settings.data.size)
        yield Finding("ok", told)


def batch(settings: Pretrain, ranks: int) -> Iterator[Finding]:
    n, micro = settings.optim.global_batch_size, settings.optim.micro_batch_size
    if n % ranks:
        yield Finding("error", f"optim.global_batch_size={n} does not divide among {ranks} processes: a multiple does")
    elif micro is not None and (n % micro or micro % ranks):
        way = f"to divide {n} and to be a multiple of {ranks} processes"
        yield Finding("error", f"optim.micro_batch_size={micro} is wanted {way}")
    else:
        yield Finding("ok", f"batch of {n} images, {n // ranks} a process; {2 * n - 2:,} negatives a view")


def room(settings: Pretrain) -> Finding:
    """Whether checkpoints fit where they go; a run directory that was not there is dropped again."""
    run_dir = default_run_dir(settings)
    keep = run_dir.exists()
    size = (2 + settings.checkpoint.keep_last) * checkpoint_bytes(settings)
    parents = [p for p in (run_dir, *run_dir.parents) if not p.exists()]
    fault = checkpoint.trial_write(run_dir, size)
    if not keep:
        for folder in parents:
            with contextlib.suppress(OSError):
                folder.rmdir()
    if fault:
        return Finding("error", fault)
    free = shutil.disk_usage(next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())).free
    return Finding("ok", f"{run_dir} can be written, {free / 1e9:,.1f} GB are free, {size / 1e9:.2f} GB are wanted")


def checkpoint_bytes(settings: Pretrain) -> int:
    """Parameters in float32 with the optimizer's averages."""
    model = blank_model(settings)
    averages = 2 if settings.optim.name == "adamw" else 1
    return 4 * (1 + averages) * sum(p.numel() for p in model.parameters()) + 1_000_000


def blank_model(settings: Pretrain) -> SimCLR:
    """The model without memory, on the meta device."""
    with torch.device("meta"):
        wanted = settings.model
        encoder = Encoder(wanted.arch, wanted.width, wanted.stem, wanted.checkpoint_stages)
        head = settings.head
        return SimCLR(encoder, projection_head(head.kind, encoder.width_out, head.layers, head.hidden, head.out))


def activation_bytes(settings: Pretrain, low: bool = True) -> int:
    """What autograd keeps for one view, counted on the meta device; in 16 bits where `low`.

    With model.checkpoint_stages the largest stage's is added, which the backward pass has while it computes it again.
    """
    model = blank_model(settings).to(torch.bfloat16 if low else torch.float32)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    inputs: dict[nn.Module, Tensor] = {}
    for stage in model.encoder.stages():
        stage.register_forward_pre_hook(lambda module, given: inputs.setdefault(module, given[0].detach()))

    def kept(call: Callable[[], object]) -> int:
        sizes: dict[int, int] = {}
        alive = []  # a storage that is freed may give its address to the next

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                sizes[storage._cdata] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call()
        del output
        return sum(sizes.values())

    def of_views(count: int) -> int:
        size = settings.data.size
        views = torch.zeros(1, count, 3, size, size, device="meta", dtype=next(model.parameters()).dtype)
        inputs.clear()
        whole = kept(lambda: model(views))
        if not settings.model.checkpoint_stages:
            return whole
        return whole + max(kept(lambda stage=stage, x=x: stage(x)) for stage, x in inputs.items())  # type: ignore[misc]

    return (of_views(6) - of_views(2)) // 4


# Tiles that exist at a time, embeddings of up to a sixteenth of one among them: counted, test_doctor.py.
AT_WORK = {"cosine": 4, "simple_sum": 9, "concat_sum": 10, "arccos": 11}


def loss_bytes(settings: Pretrain, ranks: int) -> int:
    """What the loss takes on a GPU at most: tiles at work, and those that it keeps for the backward pass."""
    objective, n = make_objective(settings).objective, settings.optim.global_batch_size
    if objective.kernel == "spectral" or objective.backend == "triton":
        return 0  # there are no tiles
    areas = [tile.area for tile in tiled.tiles(n, n, 0, True, 0, ranks, tiled.GPU)]
    number = 8 if settings.precision == "fp64" else 4
    largest, whole = number * max(areas), number * sum(areas)
    if objective.distance_p != 2:
        return 8 * largest + 4 * number * min(p_distance.GPU_BLOCK, max(areas) * settings.head.out)
    mixed = objective.kernel in MIXTURES and objective.mix_level == "loss"
    kept = whole if (mixed or tile_kernel(objective).keeps) and whole <= tiled.GPU.kept else 0
    return AT_WORK.get("" if mixed else objective.kernel, 5) * largest + (2 if mixed else 1) * kept


def gpu_memory(settings: Pretrain, ranks: int, dataset: Dataset | None = None) -> Finding:
    """A prediction, and where there is a GPU, whether that fits into it."""
    share = (settings.optim.micro_batch_size or settings.optim.global_batch_size) // ranks
    low = settings.precision in ("auto", "bf16", "fp16")
    views = VIEWS * share * activation_bytes(settings, low)
    wanted = views + 2 * checkpoint_bytes(settings) + 1_500_000_000  # gradients, averages; libraries and workspace
    wanted += loss_bytes(settings, ranks)
    if settings.data.loader == "device" and dataset is not None and dataset.images is not None:
        wanted += device_loader.kept_bytes(dataset.images, settings.data.size)
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    there = f" of {total / 1e9:.1f} GB" if total is not None else ""
    text = f"about {wanted / 1e9:.1f} GB{there} of GPU memory per process, {views / 1e9:.1f} GB of them activations"
    if total is None or wanted <= total:
        return Finding("ok", text)
    return Finding(
        "warning",
        f"{text}: more processes, model.checkpoint_stages=true, optim.micro_batch_size, a smaller data.size, or "
        "precision=bf16 takes less",
    )


def flops_per_view(settings: Pretrain) -> int:
    """Floating-point operations of one view's forward and backward passes, counted on the meta device.

    A multiplication and an addition are two. With optim.micro_batch_size there is one more forward pass.
    """
    model, size = blank_model(settings), settings.data.size
    with FlopCounterMode(display=False) as counter:
        output = model(torch.zeros(1, 2, 3, size, size, device="meta"))
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        output.y.sum().backward()
    return (forward * (2 if settings.optim.micro_batch_size else 1) + counter.get_total_flops()) // 2


def arithmetic(settings: Pretrain, ranks: int) -> Finding:
    """What a step takes on a GPU of an assumed speed; the trial, where there is one, measures this machine's."""
    flops = flops_per_view(settings) * VIEWS * settings.optim.global_batch_size / ranks
    rate = f"{ASSUMED_RATE / 1e12:.0f} TFLOP/s"
    text = f"{flops / 1e12:,.1f} TFLOP per step and process: {flops / ASSUMED_RATE:.2g} s on a GPU that reaches {rate}"
    return Finding("ok", f"{text} (a prediction: docs/scaling.md)")


def duration(settings: Doctor, dataset: Dataset, plan: Plan) -> Finding:
    """Hours of the whole run, from some steps of one process that are thrown away."""
    runtime = setup(settings.device, settings.precision, settings.threads)
    rate = steps_per_second(settings, dataset, runtime, plan.micro_batches)
    hours = plan.total_steps / rate / 3600
    images = settings.optim.global_batch_size * rate
    text = f"{plan.total_steps:,} steps at {images:,.0f} images/s take {hours:.2g} hours on one process"
    return Finding("ok", f"{text}; several are about as many times as fast")


def steps_per_second(settings: Doctor, dataset: Dataset, runtime: Runtime, micro_batches: int) -> float:
    count = settings.doctor.steps
    state = State(settings, runtime, dataset)
    augment, objective = make_augmentation(settings, dataset, runtime), make_objective(settings)
    batches = make_batches(settings, dataset, runtime.device, range(count + 2))
    begin = 0.0
    with contextlib.closing(batches):
        for step in range(count + 2):
            if step == 2:  # the first ones choose algorithms
                _synchronize(runtime.device)
                begin = time.perf_counter()
            batch = next(batches)
            loss, _ = forward_backward(state.model, state, runtime, objective, augment, batch, 0, micro_batches)
            state.step(skip=~loss.isfinite())
    _synchronize(runtime.device)
    return count / (time.perf_counter() - begin)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())

"""Predictions of what a run needs, made before it starts: memory, operations, bytes of a checkpoint."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data import device_loader
from simclr_ddp.data.batches import VIEWS
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.losses import p_norm, tiling
from simclr_ddp.losses.kernels import MIXTURES, tile_kernel
from simclr_ddp.models.backbones import make_encoder
from simclr_ddp.models.simclr import SimCLR, projection_head
from simclr_ddp.training.components import make_objective
from simclr_ddp.training.preflight import Finding

# Operations per second that an H100 or H200 is assumed to reach in a ResNet's training step in bf16, where batch norm
# and ReLU wait for the memory: 15 % of the peak of 989 TFLOP/s.
ASSUMED_RATE = 150e12


def checkpoint_bytes(settings: Pretrain) -> int:
    """Return the bytes of the parameters in float32 and of the optimizer's averages."""
    model = blank_model(settings)
    averages = 2 if settings.optim.name == "adamw" else 1
    return 4 * (1 + averages) * sum(p.numel() for p in model.parameters()) + 1_000_000


def blank_model(settings: Pretrain) -> SimCLR:
    """Build the model on the meta device, where it takes no memory."""
    with torch.device("meta"):
        m = settings.model
        size = settings.data.size
        encoder = make_encoder(m.arch, m.width, m.stem, size, checkpoint_stages=m.checkpoint_stages)
        head = settings.head
        return SimCLR(encoder, projection_head(head.kind, encoder.width_out, head.layers, head.hidden, head.out))


def activation_bytes(settings: Pretrain, low: bool = True) -> int:
    """Count the bytes that autograd keeps for one view, on the meta device; in 16 bits if `low`.

    With model.checkpoint_stages, those of the largest stage are added: the backward pass holds them while it recomputes
    that stage.
    """
    model = blank_model(settings).to(torch.bfloat16 if low else torch.float32)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    inputs: dict[nn.Module, Tensor] = {}
    for stage in model.encoder.stages():
        stage.register_forward_pre_hook(lambda module, given: inputs.setdefault(module, given[0].detach()))

    def kept(call: Callable[[], object]) -> int:
        sizes: dict[int, int] = {}
        alive = []  # keeps storages alive: a freed one may give its address to the next

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
        total = kept(lambda: model(views))
        if not settings.model.checkpoint_stages:
            return total
        return total + max(kept(lambda stage=stage, x=x: stage(x)) for stage, x in inputs.items())  # type: ignore[misc]

    return (of_views(6) - of_views(2)) // 4


# Number of tiles that exist at a time, including embeddings of up to a sixteenth of a tile; test_doctor.py counts them.
AT_WORK = {"cosine": 4, "simple_sum": 9, "concat_sum": 10, "arccos": 11}


def loss_bytes(settings: Pretrain, ranks: int) -> int:
    """Return the most bytes that the loss takes on a GPU: tiles in use, and tiles kept for the backward pass."""
    objective, n = make_objective(settings).objective, settings.optim.global_batch_size
    if objective.kernel == "spectral" or objective.backend == "triton":
        return 0  # there are no tiles
    areas = [tile.area for tile in tiling.tiles(n, n, 0, True, 0, ranks, tiling.GPU)]
    number = 8 if settings.precision == "fp64" else 4
    largest, total = number * max(areas), number * sum(areas)
    if objective.distance_p != 2:
        return 8 * largest + 4 * number * min(p_norm.GPU_BLOCK, max(areas) * settings.head.out)
    mixed = objective.kernel in MIXTURES and objective.mix_level == "loss"
    kept = total if (mixed or tile_kernel(objective).keeps) and total <= tiling.GPU.kept else 0
    return AT_WORK.get("" if mixed else objective.kernel, 5) * largest + (2 if mixed else 1) * kept


def gpu_memory(settings: Pretrain, ranks: int, dataset: Dataset | None = None) -> Finding:
    """Predict the GPU memory of a process and, if there is a GPU, check that it fits."""
    share = (settings.optim.micro_batch_size or settings.optim.global_batch_size) // ranks
    low = settings.precision in ("auto", "bf16", "fp16")
    views = VIEWS * share * activation_bytes(settings, low)
    needed = views + 2 * checkpoint_bytes(settings) + 1_500_000_000  # gradients, averages; libraries and workspace
    needed += loss_bytes(settings, ranks)
    if settings.data.loader == "device" and dataset is not None and dataset.decoded:
        needed += device_loader.kept_bytes(dataset.file, settings.data.size)
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    there = f" of {total / 1e9:.1f} GB" if total is not None else ""
    text = f"about {needed / 1e9:.1f} GB{there} of GPU memory per process, {views / 1e9:.1f} GB of them activations"
    if total is None or needed <= total:
        return Finding("ok", text)
    return Finding(
        "warning",
        f"{text}: reduce it with more processes, model.checkpoint_stages=true, optim.micro_batch_size, a smaller "
        "data.size, or precision=bf16",
    )


def flops_per_view(settings: Pretrain) -> int:
    """Count the floating-point operations of one view's forward and backward passes, on the meta device.

    A multiplication and an addition count as two. With optim.micro_batch_size there is one more forward pass.
    """
    model, size = blank_model(settings), settings.data.size
    with FlopCounterMode(display=False) as counter:
        output = model(torch.zeros(1, 2, 3, size, size, device="meta"))
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        output.y.sum().backward()
    return (forward * (2 if settings.optim.micro_batch_size else 1) + counter.get_total_flops()) // 2


def arithmetic(settings: Pretrain, ranks: int) -> Finding:
    """Predict the seconds of a step on a GPU of an assumed speed; `doctor.steps` measures this machine instead."""
    flops = flops_per_view(settings) * VIEWS * settings.optim.global_batch_size / ranks
    rate = f"{ASSUMED_RATE / 1e12:.0f} TFLOP/s"
    text = f"{flops / 1e12:,.1f} TFLOP per step and process: {flops / ASSUMED_RATE:.2g} s on a GPU that reaches {rate}"
    return Finding("ok", f"{text} (a prediction: docs/scaling.md)")

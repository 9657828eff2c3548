"""The training step of pretrain, measured by its parts, and a minimal step with the same model as a lower bound."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from simclr_ddp.config.options import to_yaml
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.batches import VIEWS, Batch
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.runs import checkpoint
from simclr_ddp.training.components import make_parallel, make_training
from simclr_ddp.training.optim import set_learning_rate
from simclr_ddp.training.plan import Plan, make_plan
from simclr_ddp.training.reporter import Reporter
from simclr_ddp.training.state import State
from simclr_ddp.training.step import unmarked

PARTS = ("data wait", "augmentation", "forward", "loss", "backward", "reduction", "optimiser", "rest")
CHECKED_STEPS = 3
# Beginnings of the environment variables that torchrun sets.
TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Measures the seconds of each of PARTS; call it with a part's name when that part has ended."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        synchronize(device)
        self._last = perf_counter()

    def __call__(self, part: str) -> None:
        synchronize(self._device)
        now = perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


class Loop:
    """The loop of `simclr_ddp.pretrain`, one step at a time; `check_loop` compares the two.

    It omits work that is not part of every step: the check of the first 20 updates, the probe's score at the end of an
    epoch, checkpoints, and the lines of metrics.jsonl (their values are computed).
    """

    def __init__(self, settings: Pretrain, runtime: Runtime, dataset: Dataset, plan: Plan) -> None:
        if plan.micro_batches > 1:
            raise ValueError("optim.micro_batch_size: micro-batches are not measured here; leave it out")
        self.settings, self.runtime, self.dataset, self.plan = settings, runtime, dataset, plan
        self.training = make_training(settings, runtime, dataset, plan)
        self.state = self.training.state
        self.report = Reporter(
            None,
            plan,
            0,
            images_per_step=settings.optim.global_batch_size,
            device=runtime.device,
            fp16=runtime.precision == "fp16",
            every_steps=settings.log.every_steps,
        )
        self.done, self.loader = 0, ""

    def batches(self, count: int) -> Generator[Batch, None, None]:
        """Return the batches of the next `count` steps; set `loader` to the description of the loader."""
        with redirect_stdout(StringIO()) as said:
            found = self.training.batches(range(self.done, self.done + count))
        self.loader = said.getvalue().strip()
        return found

    def step(self, batches: Generator[Batch, None, None], mark: Callable[[str], None] = unmarked) -> None:
        """Update on the next batch; `mark` is called at the end of each part."""
        step, training = self.done, self.training
        set_learning_rate(self.state.optimizer, self.plan.learning_rate(min(step, self.plan.total_steps - 1)))
        batch = next(batches)
        mark("data wait")
        separate = mark is not unmarked and collectives.world_size() > 1  # DDP would reduce during the backward pass
        with training.model.no_sync() if separate else nullcontext():  # type: ignore[operator]
            loss, y = training.forward_backward(batch, step, mark)
        if separate:
            self._reduce_gradients()
            mark("reduction")
        record = training.agree(loss, y, accuracy=self.report.due(step))
        mark("rest")
        self.state.step(skip=record.failed)
        mark("optimiser")
        self.report.push(step, record)
        self.done += 1
        mark("rest")

    def _reduce_gradients(self) -> None:
        """Average the gradients over ranks after the backward pass, as DDP does during it."""
        gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
        total = collectives.all_reduce_sum(torch.cat([g.flatten() for g in gradients])) / collectives.world_size()
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


class Ceiling:
    """Upper bound of the speed: forward, a trivial loss, backward and update of the same model, on views on the device.

    There is no data, augmentation, contrastive loss, probe, gradient norm or log. The learning rate is 0: the update is
    computed as at any other rate, and the weights stay.
    """

    def __init__(self, settings: Pretrain, runtime: Runtime, dataset: Dataset) -> None:
        settings = replace(settings, probe=replace(settings.probe, enabled=False))
        self.runtime = runtime
        self.state = State(settings, runtime, dataset)
        self.model = make_parallel(settings, runtime, self.state)
        batch, size = settings.optim.global_batch_size // collectives.world_size(), settings.data.size
        self.views = torch.randn(VIEWS, batch, 3, size, size, device=runtime.device, dtype=runtime.dtype)

    def step(self, _: object) -> None:
        with self.runtime.autocast():
            output = self.model(self.views)
        loss = output.y.to(self.runtime.dtype).square().mean()
        self.state.zero_grad()
        self.state.scaler.scale(loss).backward()
        self.state.scaler.step(self.state.optimizer)
        self.state.scaler.update()


def check_loop(settings: Pretrain, runtime: Runtime, dataset: Dataset) -> tuple[bool, str]:
    """Return whether three steps of `Loop` give bitwise the state of simclr_ddp.pretrain, and a message."""
    settings = replace(
        settings,
        device=runtime.device.type,
        precision=runtime.precision,
        threads=runtime.threads,
        data=replace(settings.data, train=dataset.source),
        optim=replace(settings.optim, steps=CHECKED_STEPS, warmup_epochs=0.0),
        log=replace(settings.log, wandb=False, tensorboard=False),
    )

    def measured() -> dict[str, torch.Tensor]:
        loop = Loop(settings, runtime, dataset, make_plan(settings, dataset))
        with closing(loop.batches(CHECKED_STEPS)) as batches:
            for _ in range(CHECKED_STEPS):
                loop.step(batches)
        return tensors(loop.state.to_save())

    if collectives.world_size() > collectives.local_world_size():
        return False, "the ranks are on several machines, where simclr_ddp.pretrain can't be run to compare with"
    ours = measured()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()  # pretrain uses the same GPU
    with TemporaryDirectory() as folder, collectives.while_main_works():
        name = first_of(ours, pretrained(settings, Path(folder))) if collectives.is_main() else ""
    name = collectives.broadcast_object(name)
    if not name:
        return True, f"{len(ours)} tensors after {CHECKED_STEPS} steps are bitwise equal to simclr_ddp.pretrain's"
    sentence = f"after {CHECKED_STEPS} steps {name} differs from simclr_ddp.pretrain's"
    if first_difference(ours, measured(), runtime.device):
        return False, f"{sentence}, and between two runs of the benchmark: an operation is not deterministic"
    return False, (
        f"{sentence}: the measured speed is that of another training; change the step in benchmarks.support.loops to "
        "that of simclr_ddp/pretrain.py"
    )


def pretrained(settings: Pretrain, folder: Path) -> dict[str, torch.Tensor]:
    """Run `simclr_ddp.pretrain` on as many processes as this benchmark, and return the tensors of its checkpoint."""
    config, run_dir, ranks = folder / "config.yaml", folder / "run", collectives.world_size()
    config.write_text(to_yaml(settings))
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={ranks}", "-m"]
    command = [sys.executable, "-m", *(torchrun if ranks > 1 else []), "simclr_ddp.pretrain"]
    alone = {key: value for key, value in os.environ.items() if not key.startswith(TORCHRUN)}
    done = subprocess.run([*command, config, f"run_dir={run_dir}"], env=alone, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"simclr_ddp.pretrain failed, so nothing can be compared: {done.stderr.strip()[-500:]}")
    return tensors(checkpoint.load(run_dir / "checkpoints" / f"step-{CHECKED_STEPS:08d}.pt"))


def first_of(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """Return the name of the first tensor that is not bitwise equal; "" if all are."""
    if ours.keys() != theirs.keys():
        return min(ours.keys() ^ theirs.keys())
    return next((name for name in ours if not torch.equal(ours[name].cpu(), theirs[name].cpu())), "")


def first_difference(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor], device: torch.device) -> str:
    """Return the name of the first tensor that differs on any rank; "" if none does."""
    name = first_of(ours, others)
    found = collectives.all_reduce_sum(torch.tensor(float(bool(name)), device=device)) > 0
    return (name or "a tensor of another rank") if found else ""


def tensors(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return parameters, buffers and the optimizers' tensors of a checkpoint or of State.to_save(), by name."""
    found = {f"model {name}": tensor for name, tensor in saved["model"].items()}
    for i, optimizer in enumerate(saved["optimizers"]):
        for number, values in optimizer["state"].items():
            for name, value in values.items():
                found[f"optimizer {i} parameter {number} {name}"] = torch.as_tensor(value)
    return found

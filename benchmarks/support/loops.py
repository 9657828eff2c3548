"""One step of training, as simclr_ddp.pretrain takes it, and the least that a step with the same model costs."""

import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from simclr_ddp import distributed
from simclr_ddp.config import Pretrain
from simclr_ddp.data import VIEWS, Batch, Dataset
from simclr_ddp.optim import set_learning_rate
from simclr_ddp.pretrain import make_augmentation, make_batches, make_objective, make_parallel, train
from simclr_ddp.report import Reporter
from simclr_ddp.run import Plan, make_plan
from simclr_ddp.runtime import Runtime
from simclr_ddp.state import State

PARTS = ("data wait", "augmentation", "forward", "loss", "backward", "reduction", "optimiser", "rest")
CHECKED_STEPS = 3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds of each of PARTS; called with a part's name when it has ended."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        synchronize(device)
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def _unmarked(part: str) -> None:
    pass


class Training:
    """The loop of `simclr_ddp.pretrain.train`, a step at a time, which `check_training` holds it to.

    Without what is not of every step: the guard of the first 20 updates, the probe's score at the end of an epoch,
    checkpoints, and the lines of metrics.jsonl (their values are computed).
    """

    def __init__(self, settings: Pretrain, runtime: Runtime, dataset: Dataset, plan: Plan) -> None:
        if plan.micro_batches > 1:
            raise ValueError("optim.micro_batch_size is not measured here: leave it out")
        self.settings, self.runtime, self.dataset, self.plan = settings, runtime, dataset, plan
        self.state = State(settings, runtime, dataset)
        self.model = make_parallel(settings, runtime, self.state)
        self.objective = make_objective(settings)
        self.augment = make_augmentation(settings, dataset, runtime)
        n, fp16 = settings.optim.global_batch_size, runtime.precision == "fp16"
        self.report = Reporter(None, 0, plan.total_steps, n, runtime.device, fp16)
        self.done, self.loader = 0, ""

    def batches(self, count: int) -> Generator[Batch, None, None]:
        """The batches of the next `count` steps, from the data; what it says of its loader goes to `loader`."""
        with redirect_stdout(StringIO()) as said:
            found = make_batches(self.settings, self.dataset, self.runtime.device, range(self.done, self.done + count))
        self.loader = said.getvalue().strip()
        return found

    def step(self, batches: Generator[Batch, None, None], mark: Callable[[str], None] = _unmarked) -> None:
        """One update, on the next of the batches; `mark` is told of each part that ends, and has them one by one."""
        step, plan, state = self.done, self.plan, self.state
        epoch, last_of_epoch = step // plan.steps_per_epoch, (step + 1) % plan.steps_per_epoch == 0
        due = (step + 1) % self.settings.log.every_steps == 0 or last_of_epoch or step + 1 == plan.total_steps
        rate = plan.learning_rate(min(step, plan.total_steps - 1))
        set_learning_rate(state.optimizer, rate)
        with self.report.waiting():
            inputs, sample, labels = next(batches)
        mark("data wait")

        apart = mark is not _unmarked and distributed.world_size() > 1  # DDP would reduce during the backward pass
        with self.model.no_sync() if apart else nullcontext():  # type: ignore[operator]
            with self.runtime.autocast():
                views = self.augment(inputs, epoch, sample)
                mark("augmentation")
                output = self.model(views)
            mark("forward")
            loss = self.objective(output.y[0], output.y[1])
            probe_loss = 0 if state.probe is None else state.probe.loss(output.logits, labels, sample)
            mark("loss")
            state.zero_grad()
            state.scaler.scale(loss + probe_loss).backward()
        mark("backward")
        if apart:
            self._reduce_gradients()
            mark("reduction")

        top1 = self.objective.top1(output.y[0], output.y[1]) if due else torch.zeros_like(loss)
        mine = torch.stack([loss.detach(), top1, torch.zeros_like(loss)])
        vector = torch.cat([distributed.all_sum(mine) / distributed.world_size(), state.gradient_norm()[None]])
        mark("rest")
        state.step(skip=~vector.isfinite().all())
        mark("optimiser")
        line = {"step": step + 1, "epoch": (step + 1) / plan.steps_per_epoch, "learning_rate": rate}
        self.report.push(line, due, vector)
        self.done += 1
        mark("rest")

    def _reduce_gradients(self) -> None:
        """What DDP does during the backward pass, after it."""
        gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
        total = distributed.all_sum(torch.cat([g.flatten() for g in gradients])) / distributed.world_size()
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


class Ceiling:
    """Forward, a trivial loss, backward and update of the same encoder and head, on views that are on the device.

    No data, augmentation, contrastive loss, probe, gradient norm or log. At rate 0 the update is computed as at any
    other, and the weights stay.
    """

    def __init__(self, settings: Pretrain, runtime: Runtime, dataset: Dataset) -> None:
        settings = replace(settings, probe=replace(settings.probe, enabled=False))
        self.runtime = runtime
        self.state = State(settings, runtime, dataset)
        self.model = make_parallel(settings, runtime, self.state)
        batch, size = settings.optim.global_batch_size // distributed.world_size(), settings.data.size
        self.views = torch.randn(VIEWS, batch, 3, size, size, device=runtime.device, dtype=runtime.dtype)

    def step(self, _: object) -> None:
        with self.runtime.autocast():
            output = self.model(self.views)
        loss = output.y.to(self.runtime.dtype).square().mean()
        self.state.zero_grad()
        self.state.scaler.scale(loss).backward()
        self.state.scaler.step(self.state.optimizer)
        self.state.scaler.update()


def check_training(settings: Pretrain, runtime: Runtime, dataset: Dataset) -> tuple[bool, str]:
    """Whether three steps of `Training` give bitwise the state that simclr_ddp.pretrain gives; a sentence about it."""
    settings = replace(
        settings,
        optim=replace(settings.optim, steps=CHECKED_STEPS, warmup_epochs=0.0),
        log=replace(settings.log, wandb=False, tensorboard=False),
    )
    plan, tool = make_plan(settings, dataset), State(settings, runtime, dataset)
    parts = make_objective(settings), make_augmentation(settings, dataset, runtime)
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        plan = replace(plan, run_dir=Path(folder))
        if train(settings, runtime, dataset, plan, tool, *parts, 0, ([], 0)) != 0:
            raise KeyboardInterrupt

    def ours() -> dict[str, torch.Tensor]:
        benchmark = Training(settings, runtime, dataset, plan)
        with closing(benchmark.batches(CHECKED_STEPS)) as batches:
            for _ in range(CHECKED_STEPS):
                benchmark.step(batches)
        return tensors(benchmark.state)

    theirs, mine = tensors(tool), ours()
    name = first_difference(theirs, mine, runtime.device)
    if not name:
        return True, f"{len(theirs)} tensors after {CHECKED_STEPS} steps are bitwise those of simclr_ddp.pretrain"
    sentence = f"after {CHECKED_STEPS} steps {name} differs from simclr_ddp.pretrain's"
    if first_difference(mine, ours(), runtime.device):
        return False, f"{sentence}, and between two runs of the benchmark: an operation here is not deterministic"
    return False, (
        f"{sentence}: this is the speed of another training; the step in benchmarks/loops.py must do what the loop in "
        "simclr_ddp/pretrain.py does"
    )


def first_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], device: torch.device) -> str:
    """The name of a tensor that is not bitwise the same, on any rank; "" if all are."""
    different = [name for name in one if not torch.equal(one[name], other[name])]
    found = distributed.all_sum(torch.tensor(float(len(different)), device=device)) > 0
    return (different or ["a tensor of another rank"])[0] if found else ""


def tensors(state: State) -> dict[str, torch.Tensor]:
    """Parameters, buffers and the optimizers' tensors, by name."""
    found = {f"model {name}": tensor for name, tensor in state.model.state_dict().items()}
    for i, optimizer in enumerate(state.optimizers):
        for number, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                found[f"optimizer {i} parameter {number} {name}"] = torch.as_tensor(value)
    return found

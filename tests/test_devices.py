"""What is promised for CPU and GPU alike: here on the CPU; tests/test_gpu.py calls the same functions with "cuda"."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from simclr_ddp import pretrain
from simclr_ddp.config.options import build
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data import spirograph
from simclr_ddp.data.batches import VIEWS, Batch
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.data.draws import uniforms, view_uniforms
from simclr_ddp.distributed.runtime import Runtime, setup
from simclr_ddp.evaluation import linear
from simclr_ddp.evaluation.features import representations
from simclr_ddp.runs.encoder import Spec, random_encoder
from simclr_ddp.runs.metrics import read_metrics
from simclr_ddp.training import components, forecast
from simclr_ddp.training.state import State
from simclr_ddp.training.step import forward_backward
from tests.support.tiny_run import (
    STEPS,
    assert_same_run,
    final_state,
    settings,
)


def on(device: str, images: Path, run_dir: Path, *more: str) -> list[str]:
    return [*(a for a in settings(images, run_dir) if a != "device=cpu"), f"device={device}", *more]


# --- ten steps that nothing waits in ----------------------------------------------------------------------------------

FIRST, COUNT = 2, 10  # the steps that are watched: the first ones choose algorithms and make the optimizers' averages


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """An error for what waits for the GPU, but for collectives and events, which the mode does not see."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def ten_steps(
    device: str, images: Path, run_dir: Path, within: Any, monkeypatch: pytest.MonkeyPatch, *more: str
) -> list[int]:
    """`pretrain` itself, its loop in a context of `within` from batch FIRST on for ten steps; the steps it was in.

    The steps lie in one epoch, at whose end the online probe is scored, and before the twentieth, at which the guard of
    the learning rate reads what it has gathered.
    """
    batches_of, seen = components.make_batches, []

    def batches(*arguments: Any) -> Iterator[Any]:
        with contextlib.closing(batches_of(*arguments)) as given, contextlib.ExitStack() as stack:
            for step, batch in enumerate(given):
                if step == FIRST:
                    stack.enter_context(within())
                if step == FIRST + COUNT:
                    stack.close()
                if FIRST <= step < FIRST + COUNT:
                    seen.append(step)
                yield batch

    monkeypatch.setattr(components, "make_batches", batches)
    steps = ("optim.global_batch_size=3", "optim.steps=13", "checkpoint.every_steps=0", "data.workers=0")
    assert pretrain.main([*on(device, images, run_dir, *steps, "data.loader=torch"), *more, "--debug"]) == 0
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 13
    return seen


@pytest.mark.parametrize("kernel", ["cosine", "laplacian"])
def test_ten_steps(kernel: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    assert ten_steps("cpu", images, tmp_path / "run", within, monkeypatch, f"loss.kernel={kernel}") == [*range(2, 12)]
    assert entered == ["in", "out"]


WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def calls(device: str, images: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, int]:
    """How often operations and functions of the CUDA runtime were called in ten steps, by name."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    profiler = profile(activities=activities)

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        profiler.start()
        with record_function("ten steps"):
            yield
        profiler.stop()

    ten_steps(device, images, run_dir, within, monkeypatch, *more)
    events = profiler.events()
    (whole,) = [
        e.time_range for e in events if e.name == "ten steps" and e.device_type == torch.autograd.DeviceType.CPU
    ]
    found: dict[str, int] = {}
    for event in events:  # the profiler's own start and end wait for the device, too
        if whole.start <= event.time_range.start and event.time_range.end <= whole.end:
            found[event.name] = found.get(event.name, 0) + 1
    return found


def test_calls_of_ten_steps(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls("cpu", images, tmp_path / "run", monkeypatch)
    assert found["aten::convolution"] == COUNT * 20 and not found.keys() & set(WAITING)


# --- the same numbers -------------------------------------------------------------------------------------------------


def assert_draws_are_numpys(device: str) -> None:
    index = np.array([0, 1, 2, 63, 2**20, 2**31 - 1, 2**31, 2**40], np.int64)
    for seed in (0, 1, -1, 2**31, 2**63 - 1):
        for dtype in (torch.float32, torch.float64):
            expected = uniforms(seed, 7, index[:, None], np.arange(3)[:, None, None], np.arange(16, 22))
            got = view_uniforms(seed, 7, torch.from_numpy(index).to(device), 3, 16, 6, dtype)
            assert got.device.type == device and np.array_equal(got.cpu().double().numpy(), expected)


def test_draws_are_numpys() -> None:
    assert_draws_are_numpys("cpu")


CLASSES = 3


def numbered(count: int, split: str) -> Dataset:
    """Spirograph pictures in three classes, by how red the background is: no file is decoded."""
    numbers = spirograph.numbers(count, split)
    labels = np.digitize(numbers[:, spirograph.NAMES.index("red_background")], [0.2, 0.4]).astype(np.int64)
    return Dataset("numbers", count, labels, [str(c) for c in range(CLASSES)], split, numbers=numbers)


def linear_figures(device: str, precision: str = "fp32") -> tuple[Tensor, float]:
    """(weight and bias [D + 1, K], test top-1) of an untrained encoder's representations."""
    runtime = setup(device, precision, 1)
    spec = Spec("resnet18", 0.125, "stl", 32, [0.5] * 3, [0.25] * 3)
    protocol = linear.Protocol(strengths=[0.1, 1.0], tolerance=1e-9)
    train, test = numbered(400, "train"), numbered(300, "test")
    encoder = random_encoder(spec, 0)
    options: dict[str, Any] = {"batch_size": 128, "workers": 0, "loader": "torch", "title": "test"}
    x, x_test = (representations(encoder, part, spec, runtime, **options).to(device) for part in (train, test))
    fitted = linear.fit(x, [train], linear.held_out(protocol, train), protocol, "random")
    solution = torch.cat([fitted.solution.weight, fitted.solution.bias[None]]).cpu()
    return solution, linear.score(fitted, x_test, test)[0]["top1"]


def assert_linear_figures_agree(one: tuple[Tensor, float], other: tuple[Tensor, float]) -> None:
    assert (one[0] - other[0]).norm() <= 1e-4 * other[0].norm()
    assert abs(one[1] - other[1]) <= 1 / 300 + 1e-12
    assert other[1] > 0.6, "it reads something"


def test_linear_figures_hardly_depend_on_rounding() -> None:
    assert_linear_figures_agree(linear_figures("cpu"), linear_figures("cpu", "fp64"))


# --- memory -----------------------------------------------------------------------------------------------------------


def predicted_and_taken(device: str, **given: Any) -> tuple[float, float]:
    """Bytes of GPU memory that `doctor` predicts without libraries, and the peak of three steps (0 on the CPU)."""
    wanted = build(Pretrain, [("the test", {key.replace("__", "."): value for key, value in given.items()})])
    runtime = Runtime(torch.device(device), wanted.precision, 1)
    n, size = wanted.optim.global_batch_size, wanted.data.size
    dataset = Dataset("fake", n, np.arange(n) % 10, [str(c) for c in range(10)], "fake")
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    state = State(wanted, runtime, dataset)
    augment, objective = components.make_augmentation(wanted, dataset, runtime), components.make_objective(wanted)
    views = torch.randint(0, 256, (VIEWS, n, 3, size, size), dtype=torch.uint8, device=device)
    sample = torch.arange(n, device=device)
    for _ in range(3):
        batch = Batch(views, sample, sample % 10)
        loss, _ = forward_backward(state.model, state, runtime, objective, augment, batch, 0)
        state.step(skip=~loss.isfinite())
    taken = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    activations = forecast.activation_bytes(wanted, wanted.precision in ("bf16", "fp16"))
    return VIEWS * n * activations + 2 * forecast.checkpoint_bytes(wanted) + forecast.loss_bytes(wanted, 1), taken


def test_memory_is_predicted_at_all() -> None:
    predicted, _ = predicted_and_taken("cpu", optim__global_batch_size=16, precision="fp32", model__width=0.125)
    assert predicted > 1e6


# --- runs -------------------------------------------------------------------------------------------------------------


def assert_fp16_learns(device: str, images: Path, run_dir: Path) -> None:
    """The loss falls, and the scale has settled: none of the last steps was skipped."""
    steps = ("precision=fp16", "optim.steps=60", "checkpoint.every_steps=0", "data.loader=torch", "data.workers=0")
    steps += ("optim.name=sgd", "optim.base_learning_rate=0.1", "loss.temperature=0.5", "probe.enabled=false")
    steps += ("data.augmentation.crop_scale=[0.7,1.0]", "data.augmentation.strength=0.2")
    assert pretrain.main([*on(device, images, run_dir, *steps), "--debug"]) == 0
    losses = [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl")]
    assert len(losses) == 60 and np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3
    saved = torch.load(run_dir / "checkpoints" / "step-00000060.pt", weights_only=True)["scaler"]
    assert saved["scale"] >= 1 and saved["_growth_tracker"] >= 20


def test_fp16_learns(images: Path, tmp_path: Path) -> None:
    assert_fp16_learns("cpu", images, tmp_path / "run")


class Broken(Exception):
    pass


def assert_the_other_loader_resumes(device: str, first: str, images: Path, folder: Path) -> None:
    """A run that breaks in step 9, after the checkpoint of step 5, and resumes with the other loader, is bitwise that
    which was never broken."""
    other = {"torch": "ffcv", "ffcv": "torch"}[first]
    batches_of = components.make_batches

    def broken(*arguments: Any) -> Iterator[Any]:
        with contextlib.closing(batches_of(*arguments)) as batches:
            for step, batch in enumerate(batches):
                if step == 8:
                    raise Broken
                yield batch

    options = ("data.workers=0", "precision=fp32")
    assert pretrain.main(on(device, images, folder / "unbroken", *options, f"data.loader={first}")) == 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Broken):
        patch.setattr(components, "make_batches", broken)
        pretrain.main([*on(device, images, folder / "broken", *options, f"data.loader={first}"), "--debug"])
    assert not (folder / "broken" / "checkpoints" / f"step-{STEPS:08d}.pt").exists()
    assert pretrain.main(on(device, images, folder / "broken", *options, f"data.loader={other}")) == 0
    assert final_state(folder / "broken")["step"] == STEPS
    assert_same_run(folder / "broken", folder / "unbroken")


@pytest.mark.parametrize("first", ["torch", "ffcv"])
def test_the_other_loader_resumes(first: str, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed: make setup builds it")
    assert_the_other_loader_resumes("cpu", first, images, tmp_path)

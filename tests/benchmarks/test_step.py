"""`python -m benchmarks.step` end to end on small settings, and that it says when it measures another training."""

import json
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import step
from benchmarks.support import loops, peers, step_report, step_work
from benchmarks.support.loops import PARTS
from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.distributed import batch_norm, collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
from simclr_ddp.training.optim import set_learning_rate
from simclr_ddp.training.plan import make_plan
from simclr_ddp.training.state import State
from tests.support.ranks import Ranks

TINY = (
    "device=cpu",
    "threads=1",
    "precision=fp32",
    "optim.global_batch_size=8",
    "model.width=0.125",
    "data.workers=0",
    "data.loader=torch",
)
CPU = Runtime(torch.device("cpu"), "fp32", 1)


def tiny(**more: Any) -> Pretrain:
    pairs = dict(option.split("=") for option in TINY)
    return options.build(Pretrain, [("the test", pairs | more)])


def run(*arguments: str, out: Path) -> tuple[int, dict[str, Any]]:
    status = step.main([*TINY, *arguments, "--ranks=1", "--rounds=2", "--steps", "2", f"--out={out}"])
    files = list(out.glob("*.json"))
    return status, json.loads(files[0].read_text()) if files else {}


@pytest.fixture(scope="module")
def spirograph(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of the command on the generated set, its figure checked."""
    folder = tmp_path_factory.mktemp("step")
    status, results = run(out=folder)
    assert status == 0
    (figure,) = folder.glob("*.png")
    assert figure.name == "spirograph-cpu.png" and 5_000 < figure.stat().st_size < 300_000
    with Image.open(figure) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    return results


def test_the_json_holds_everything(spirograph: dict[str, Any]) -> None:
    assert spirograph.keys() == {"command", "date", "settings", "runs"}
    (one,) = spirograph["runs"]
    variants = {"model only", "synthetic", "data", "plain"} | ({"lightly"} if peers.lightly_version() else set())
    assert one["seconds_per_step"].keys() == variants
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in one["seconds_per_step"].values())
    assert one["ranks"] == 1 and one["rounds"] == 2 and one["global_batch_size"] == 8
    assert len(one["peak_memory_bytes"]) == 1 and one["peak_memory_bytes"][0] > 50e6
    assert one["environment"].keys() >= {"git_commit", "packages", "processor", "cores", "gpu", "threads"}
    assert one["same_as_pretrain"] and "bitwise" in one["checks"][0] and len(one["checks"]) == len(variants) - 2
    assert one["work"]["launches"] == {} and one["work"]["peak_rate"] is None, "there is no GPU"
    assert one["data"] == "spirograph-train-10000" and spirograph["settings"]["model"]["width"] == 0.125
    for figures in one["summary"]["variants"].values():
        low, middle, high = figures["images_per_second"]
        assert low <= middle <= high and figures["views_per_second"][1] == pytest.approx(2 * middle)
    assert one["summary"]["variants"]["model only"]["share_of_model_only"] == [1, 1, 1]


def test_the_parts_are_those_of_a_step(spirograph: dict[str, Any]) -> None:
    (one,) = spirograph["runs"]
    for parts in one["parts_seconds"]:
        assert tuple(parts) == PARTS
        assert parts["reduction"] == 0, "there is one rank"
        assert all(parts[name] > 0 for name in PARTS if name != "reduction")
    summary = one["summary"]
    assert summary["parts_sum_seconds"] == pytest.approx(sum(summary["parts_seconds"].values()))


def test_the_table(spirograph: dict[str, Any], tmp_path: Path) -> None:
    two = spirograph["runs"][0] | {"ranks": 2, "peak_memory_bytes": [2**20, 2**21]}
    results = spirograph | {"runs": [*spirograph["runs"], two]}
    text = step_report.table(results)
    for expected in ("1 rank x 8 images", "2 ranks x 4 images", "model only", "synthetic", "plain", "1, 2 MiB", *PARTS):
        assert expected in text
    assert "instrumented pass" in text and "of the uninstrumented step" in text
    assert max(map(len, text.splitlines())) < 220
    step_report.draw(results, tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size < 300_000


def test_a_missing_file_leaves_the_variants_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, results = run(f"data.train={tmp_path / 'nowhere.beton'}", "data.size=16", out=tmp_path)
    assert status == 0 and "nowhere.beton does not exist" in capsys.readouterr().out
    (one,) = results["runs"]
    assert one["seconds_per_step"].keys() == {"model only", "synthetic"} and one["data"] is None


def test_images_and_a_kernel_that_the_other_tools_lack(images: Path, tmp_path: Path) -> None:
    status, results = run(f"data.train={images}", "data.size=16", "loss.kernel=laplacian", out=tmp_path)
    (one,) = results["runs"]
    assert status == 0 and one["seconds_per_step"].keys() == {"model only", "synthetic", "data"}
    assert any("loss.kernel=laplacian" in note for note in one["notes"])


@pytest.mark.parametrize("deterministic", [True, False])
def test_another_training_is_measured_with_a_warning_and_status_1(
    deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = iter(range(1, 10**6))
    monkeypatch.setattr(
        loops,
        "set_learning_rate",
        lambda optimizer, rate: set_learning_rate(optimizer, 1 if deterministic else next(rates)),
    )
    status, results = run("--peers=no", out=tmp_path)
    error = capsys.readouterr().err
    assert status == 1 and "differs from simclr_ddp.pretrain's" in error
    assert ("not deterministic" in error) != deterministic and ("another training" in error) == deterministic
    (one,) = results["runs"]
    assert not one["same_as_pretrain"] and one["checks"][0] in error
    assert one["seconds_per_step"].keys() == {"model only", "synthetic", "data"}
    assert all(len(rounds) == 2 for rounds in one["seconds_per_step"].values())


def test_the_rounds_so_far_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, measured = iter([1, 2]), step.parts_of_a_step

    def break_off(*arguments: Any) -> dict[str, float]:
        if next(rounds) == 2:
            raise RuntimeError("the machine has gone")
        return measured(*arguments)

    monkeypatch.setattr(step, "parts_of_a_step", break_off)
    with pytest.raises(RuntimeError, match="has gone"):
        run("--peers=no", out=tmp_path)
    (written,) = tmp_path.glob("*.json")
    (one,) = json.loads(written.read_text())["runs"]
    assert one["rounds"] == 1 and len(one["seconds_per_step"]["data"]) == 1 and one["summary"]["variants"]["data"]


def test_the_work_of_a_step() -> None:
    settings = tiny(**{"model.stem": "cifar", "head.kind": "none", "data.train": "spirograph"})
    dataset = open_dataset("spirograph", "train")
    one = step_work.operations(settings, CPU, dataset)
    convolutions = [m for m in State(settings, CPU, dataset).model.modules() if isinstance(m, nn.Conv2d)]
    side = {1: 32, 2: 16}  # of the first two, which see the whole picture
    forward = 2 * 16 * side[1] ** 2 * convolutions[0].weight.numel()  # two views of eight images
    assert one > 3 * forward and one % 2 == 0
    twice = step_work.operations(
        tiny(**{"model.stem": "cifar", "head.kind": "none", "optim.global_batch_size": "16"}), CPU, dataset
    )
    assert twice == 2 * one


def test_launches_are_counted_by_the_calls_of_the_host() -> None:
    names = (
        ["cudaLaunchKernel"] * 6 + ["cuLaunchKernel"] * 2 + ["cudaMemcpyAsync", "cudaStreamSynchronize", "aten::add"]
    )
    found = step_work.count([SimpleNamespace(name=name) for name in names], 2)
    assert found == {"kernels": 4, "graphs": 0, "copies": 0.5, "waits": 0.5}
    assert step_work.peak_rate("NVIDIA H200", "bf16") == 989e12 and step_work.peak_rate("GeForce", "bf16") is None


def test_a_known_gpu_gives_the_share_of_its_rate(spirograph: dict[str, Any]) -> None:
    work = {"model_operations": 3 * 10**12, "launches": {"kernels": 450.0, "waits": 0.1}, "peak_rate": 1e15}
    one = spirograph["runs"][0] | {"work": work, "seconds_per_step": {"model only": [0.01], "synthetic": [0.01]}}
    assert step_report.share_of_peak(one) == pytest.approx(0.3)
    text = step_report.table(spirograph | {"runs": [one]})
    assert "30.0% of the 1000 TFLOP/s" in text and "450 kernels" in text


@torch.no_grad()
def nudge(tensor: Tensor) -> None:
    """Move the last number of a tensor by one unit in the last place."""
    last = (-1,) * tensor.dim()
    tensor[last] = torch.nextafter(tensor[last], tensor[last] + 1)


def test_the_check_sees_a_single_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(CPU.threads)
    settings, dataset = tiny(), open_dataset("spirograph", "train")
    real, seen = loops.pretrained, []

    def once(*arguments: Any) -> dict[str, Tensor]:
        seen.append(real(*arguments))
        return seen[0]

    monkeypatch.setattr(loops, "pretrained", once)
    same, sentence = loops.check_loop(settings, CPU, dataset)
    assert same and "bitwise" in sentence
    parameter = next(name for name in seen[0] if name.startswith("model encoder"))
    momentum = [name for name in seen[0] if name.endswith("momentum_buffer")][-1]
    for name in (parameter, momentum):
        nudged = {key: tensor.clone() for key, tensor in seen[0].items()}
        nudge(nudged[name])
        monkeypatch.setattr(loops, "pretrained", lambda *_, nudged=nudged: nudged)
        same, sentence = loops.check_loop(settings, CPU, dataset)
        assert not same and f"{name} differs from simclr_ddp" in sentence


def test_another_loss_is_not_compared() -> None:
    objective = KernelInfoNCE("cosine", 0.5)
    assert "equals ours" in peers.check_loss("this", peers.plain_loss(0.5), objective, CPU)
    with pytest.raises(ValueError, match="the loss of that is"):
        peers.check_loss("that", peers.plain_loss(0.501), objective, CPU)


def losses_and_gradients(temperature: float) -> list[Tensor]:
    """Of every loss the mean over ranks, and its gradient after the mean that DistributedDataParallel takes."""
    found = []
    losses = [KernelInfoNCE("cosine", temperature), peers.plain_loss(temperature)]
    if peers.lightly_version():
        losses.append(peers.lightly_loss(tiny(**{"loss.temperature": temperature})))
    for loss in losses:
        torch.manual_seed(0)
        weight = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)
        y = torch.randn(2, 8, 16, dtype=torch.float64)[:, collectives.local_slice(8)] @ weight
        value = loss(y[0], y[1])
        value.backward()
        assert weight.grad is not None
        found.append(torch.cat([value.detach()[None], weight.grad.flatten()]))
        found[-1] = collectives.all_reduce_sum(found[-1]) / collectives.world_size()
    return found


def test_the_other_tools_losses_have_our_gradients(ranks: Ranks) -> None:
    one = losses_and_gradients(0.5)[0]
    for found in [losses_and_gradients(0.5), *ranks.run(2, losses_and_gradients, 0.5)]:
        for vector in found:
            assert torch.allclose(vector, one, rtol=1e-6, atol=1e-9)


def check_and_reduce() -> tuple[str, float, torch.Tensor, torch.Tensor]:
    """The check on these ranks; seconds of the reduction; weights after steps that reduce as DDP does, and apart."""
    settings = tiny()
    dataset = open_dataset("spirograph", "train")
    _, sentence = loops.check_loop(settings, CPU, dataset)
    clock, weights = loops.Clock(CPU.device), []
    for marks in ([], [clock]):
        training = loops.Loop(settings, CPU, dataset, make_plan(settings, dataset))
        with closing(training.batches(2)) as batches:
            for _ in range(2):
                training.step(batches, *marks)
        weights.append(torch.cat([p.detach().flatten() for p in training.state.model.parameters()]))
    return sentence, clock.seconds["reduction"], *weights


def test_two_ranks_compute_what_training_computes(ranks: Ranks) -> None:
    results = ranks.run(2, check_and_reduce)
    for sentence, seconds, together, apart in results:
        assert "bitwise" in sentence and seconds > 0
        assert torch.equal(apart, results[0][3]), "the ranks' weights differ"
        assert torch.allclose(apart, together, rtol=1e-4, atol=1e-5)


def test_the_model_of_the_other_tools_is_ours_with_torchs_batch_norm() -> None:
    state = State(tiny(), CPU, open_dataset("spirograph", "train"))
    model = peers.with_torch_batch_norm(state.model, CPU.device)
    views = torch.rand(2, 4, 3, 32, 32)
    assert torch.allclose(model(views).y, state.model(views).y, atol=1e-6)
    kinds = {type(module) for module in model.modules()}
    assert nn.BatchNorm2d in kinds and nn.BatchNorm1d in kinds and batch_norm.CrossRankBatchNorm not in kinds


def test_lightly_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    assert peers.lightly_version() is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ranks", "3"], "does not divide among 3 ranks"),
        (["--ranks=0"], "--ranks 0: numbers of at least 1"),
        (["--rounds", "many"], "--rounds many: numbers of at least 1"),
        (["--steps"], "--steps : numbers of at least 1"),
        (["--round=1"], "unknown flag --round=1"),
        (["--peers=some"], "--peers some: it must be yes or no"),
        (["data.train=."], "is a folder"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main([*TINY, "--ranks=1", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_ranks_by_default_are_powers_of_two_that_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "cores", lambda: 6)
    assert step.default_ranks(tiny()) == [1, 2, 4]
    assert step.default_ranks(tiny(**{"optim.global_batch_size": 6})) == [1, 2]

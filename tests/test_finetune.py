"""Supervised training of an encoder and a linear classifier, and that it is a run as pretraining is."""

import copy
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from simclr_ddp import finetune, pretrain
from simclr_ddp.config import options, schema
from simclr_ddp.data.write import write_dataset
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.models.classifier import Classifier, first_layers
from simclr_ddp.models.resnet import Encoder
from simclr_ddp.models.simclr import projection_head
from simclr_ddp.runs import evaluations
from simclr_ddp.runs.encoder import load_encoder
from simclr_ddp.runs.metrics import read_metrics
from simclr_ddp.training import finetuning
from simclr_ddp.training.finetuning import ClassifierState
from simclr_ddp.training.optim import set_learning_rate
from simclr_ddp.training.state import TrainingState
from tests.conftest import write_images
from tests.support import processes
from tests.support.parity_run import model_at, relative_difference
from tests.support.parity_run import settings as pretraining
from tests.support.ranks import Ranks
from tests.support.tiny_run import assert_equal_bits

STEPS = 6


@pytest.fixture(scope="module")
def test_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("test")
    write_dataset(str(write_images(folder / "test", 30, seed=1)), folder / "test.beton")
    return folder / "test.beton"


@pytest.fixture(scope="module")
def source(images: Path, test_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining run of two steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    more = ("precision=fp32", f"data.test={test_images}", "optim.steps=2", "data.size=16")
    assert pretrain.main(pretraining(images, run_dir, *more)) == 0
    return run_dir


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(source, tmp_path / "run"))


def settings(source: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        str(source),
        f"run_dir={run_dir}",
        "device=cpu",
        "precision=fp64",
        "threads=1",
        "workers=0",
        "loader=torch",
        "optim.global_batch_size=16",
        f"optim.steps={STEPS}",
        "optim.scaling=none",
        "optim.base_learning_rate=0.1",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=100",
        "log.every_steps=1",
        *more,
    ]


def train(arguments: list[str]) -> None:
    assert finetune.main([*arguments, "--debug"]) == 0


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def test_a_run_is_fine_tuned_from_end_to_end(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_encoder(run)
    arguments = settings(run, tmp_path / "tuned", "optim.steps=40", "optim.base_learning_rate=0.02")
    train(arguments)
    metrics = result(tmp_path / "tuned")["results"]["trained"]
    assert metrics["top1"] > 0.75  # a class is a tint; chance is one half
    assert metrics["top1_interval"][0] < metrics["top1"] and metrics["mean_per_class"] > 0.7
    lines = read_metrics(tmp_path / "tuned" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(np.log(2)), "the classifier starts at zero"
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and len(lines) == 40 and 0 <= lines[-1]["train_top1"] <= 1
    tuned = load_encoder(tmp_path / "tuned")
    assert tuned.spec == before.spec and tuned.hash != before.hash and tuned.step == 40
    classifier = load_file(tmp_path / "tuned" / "classifier.safetensors")
    assert classifier["classifier.weight"].shape == (2, before.encoder.width_out)
    (written,) = (run / "evaluations").glob("*.json")
    record = json.loads(written.read_text())
    assert record == result(tmp_path / "tuned") and record["seconds"] >= lines[-1]["seconds"] > 0
    assert {"name", "optim.base_learning_rate", "optim.steps", "precision", "images"} <= record["protocol"].keys()
    assert record["protocol"]["name"] == "finetune" and "labels.fraction" not in record["protocol"]
    assert evaluations.read_arrays(written)["predictions"].shape == (30,)
    assert f"test top-1 {metrics['top1']:.2%}" in capsys.readouterr().out
    assert finetune.main(arguments) == 0 and "is finished" in capsys.readouterr().out


def test_the_duration_of_a_run_covers_all_its_starts(tmp_path: Path) -> None:
    lines = [{"step": step, "seconds": now} for step, now in enumerate((1.5, 4, 0.5, 3, 2))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, {"step": 9}]))
    assert finetune.training_seconds(tmp_path) == 4 + 3 + 2


def test_a_frozen_encoder_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    train(settings(run, tmp_path / "linear", "frozen=true", "precision=fp32"))
    assert load_encoder(tmp_path / "linear").hash == load_encoder(run).hash
    assert load_file(tmp_path / "linear" / "classifier.safetensors")["classifier.weight"].abs().max() > 0


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale(run: Path, tmp_path: Path) -> None:
    train(settings(run, tmp_path / "tuned", "freeze_bn=true", "precision=fp32"))
    before, after = (load_encoder(path).encoder.state_dict() for path in (run, tmp_path / "tuned"))
    for key, value in before.items():
        same = torch.equal(value, after[key])
        if "running" in key or "tracked" in key:
            assert same, key
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])


OPTIONS = {
    "full": ("optim.base_learning_rate=0.3",),
    "frozen": ("frozen=true", "optim.base_learning_rate=5"),
    "micro": ("optim.micro_batch_size=8", "optim.average_decay=0.8", "optim.layer_decay=0.7"),
    "frozen_bn": ("freeze_bn=true", "optim.name=lars", "optim.base_learning_rate=2", "optim.trust_coefficient=0.02"),
}


@pytest.mark.parametrize(
    ("name", "world_sizes"),
    [
        ("full", (2, 4)),
        pytest.param("frozen", (2,), marks=pytest.mark.slow),
        pytest.param("micro", (2, 4), marks=pytest.mark.slow),
        pytest.param("frozen_bn", (2,), marks=pytest.mark.slow),
    ],
)
def test_its_steps_are_those_of_one_rank(
    name: str, world_sizes: tuple[int, ...], source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    for world_size in (1, *world_sizes):
        folder = tmp_path / str(world_size)
        ranks.run(world_size, train, settings(source, folder, f"output={folder}-results", *OPTIONS[name]))
    first, last = model_at(tmp_path / "1", 1), model_at(tmp_path / "1", STEPS)
    trained = [k for k in last if last[k].dim() > 1 and (name != "frozen" or "classifier" in k)]
    one, other = (torch.cat([state[k].flatten() for k in trained]) for state in (last, first))
    assert relative_difference(one, other) > 0.01
    expected = read_metrics(tmp_path / "1" / "metrics.jsonl")
    for world_size in map(str, world_sizes):
        lines = read_metrics(tmp_path / world_size / "metrics.jsonl")
        for key in ("loss", "train_top1", "learning_rate"):
            values = [[line[key] for line in found] for found in (lines, expected)]
            np.testing.assert_allclose(*values, rtol=1e-10)
        for step in (1, STEPS):
            for key, value in model_at(tmp_path / "1", step).items():
                if value.is_floating_point():
                    assert relative_difference(model_at(tmp_path / world_size, step)[key], value) < 1e-10, (key, step)
        assert result(tmp_path / world_size)["results"] == result(tmp_path / "1")["results"]


def test_micro_batches_and_checkpointed_stages_take_the_same_steps_with_frozen_batch_norm(
    run: Path, tmp_path: Path
) -> None:
    variants = {"complete": (), "micro": ("optim.micro_batch_size=4",), "stages": ("checkpoint_stages=true",)}
    ends = {}
    for name, more in variants.items():
        train(settings(run, tmp_path / name, "freeze_bn=true", "optim.base_learning_rate=0.3", *more))
        ends[name] = model_at(tmp_path / name, STEPS)
    for key, value in ends["complete"].items():
        assert torch.equal(value, ends["stages"][key]), key
        if value.is_floating_point():
            assert relative_difference(ends["micro"][key], value) < 1e-10, key


def test_a_step_that_overflows_in_fp16_holds_the_average_for_that_step_only() -> None:
    model = torch.nn.Linear(2, 1)
    state = ClassifierState.__new__(ClassifierState)
    TrainingState.__init__(
        state, model, [torch.optim.SGD(model.parameters(), 0.1)], Runtime(torch.device("cpu"), "fp16", 1)
    )
    state.decay, state.average = 0.5, copy.deepcopy(model)
    start = model.weight.detach().clone()
    for gradient in (math.inf, 1e5):  # the loss scale is 65,536
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        state.step(~state.gradient_norm().isfinite())
        torch.testing.assert_close(state.average.weight, (start + model.weight) / 2)
    assert not torch.equal(model.weight, start)


def test_the_average_follows_the_weights_and_is_what_is_evaluated(run: Path, tmp_path: Path) -> None:
    train(settings(run, tmp_path / "tuned", "optim.average_decay=0.75", "precision=fp32"))
    saved = [
        torch.load(tmp_path / "tuned" / "checkpoints" / f"step-{step:08d}.pt", weights_only=True) for step in (3, 4)
    ]
    key = "classifier.weight"
    expected = 0.75 * saved[0]["average"][key] + 0.25 * saved[1]["model"][key]
    torch.testing.assert_close(saved[1]["average"][key], expected)
    assert not torch.equal(saved[1]["average"][key], saved[1]["model"][key])
    assert torch.equal(saved[1]["average"]["encoder.bn1.running_mean"], saved[1]["model"]["encoder.bn1.running_mean"])
    last = torch.load(tmp_path / "tuned" / "checkpoints" / f"step-{STEPS:08d}.pt", weights_only=True)["average"]
    assert torch.equal(load_file(tmp_path / "tuned" / "classifier.safetensors")[key], last[key])


def test_the_learning_rate_decreases_with_the_depth_of_a_layer() -> None:
    changes = {"run": "a", "optim.layer_decay": 0.5, "optim.weight_decay": 0.01, "optim.decay_over_rate": True}
    chosen = options.build(schema.Finetune, [("here", changes)])
    model = Classifier(Encoder("resnet18", 0.125, "cifar"), 3)
    optimizer = finetuning.make_optimizer(chosen, model, 0.1)
    set_learning_rate(optimizer, 0.2)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, depth in (("classifier", 0), ("encoder.layer4.1.conv2", 1), ("encoder.layer1.0.conv1", 4)):
        weight = model.get_parameter(f"{name}.weight")
        assert found[id(weight)] == pytest.approx((0.2 * 0.5**depth, 0.1)), name
    assert found[id(model.encoder.conv1.weight)][0] == pytest.approx(0.2 / 32)
    assert found[id(model.classifier.bias)] == (0.2, 0) and found[id(model.encoder.bn1.weight)][1] == 0


def test_it_may_start_from_a_layer_of_the_projection_head(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints" / "step-00000002.pt"
    more = ("from_layer=1", "frozen=true", "optim.steps=1", "precision=fp32", f"output={tmp_path}")
    train(settings(file, tmp_path / "tuned", *more))
    classifier = load_file(tmp_path / "tuned" / "classifier.safetensors")
    head = torch.load(file, weights_only=True)["model"]
    assert torch.equal(classifier["neck.0.weight"], head["projection_head.0.weight"])
    assert torch.equal(classifier["neck.1.running_mean"], head["projection_head.1.running_mean"])
    assert not any(key.startswith("neck.3") for key in classifier), "the second layer is not there"
    alone = shutil.copytree(run, tmp_path / "alone", ignore=shutil.ignore_patterns("checkpoints"))
    for source, layers, fault in (
        (alone, 1, "holds no projection head"),
        (file, 3, "the projection head has 2 layers"),
    ):
        assert finetune.main(settings(source, tmp_path / "other", *more, f"from_layer={layers}")) == 2
        assert fault in capsys.readouterr().err


def test_the_first_layers_of_a_head_end_before_the_next_one() -> None:
    head = projection_head("nonlinear", 8, layers=3, hidden=6, out=4)
    kinds = [type(layer).__name__ for layer in first_layers(head, 1)]
    assert kinds == ["Linear", "CrossRankBatchNorm", "ReLU"]
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    head.eval()
    torch.testing.assert_close(first_layers(head, 3)(x), head(x))
    assert len(first_layers(head, 2)) == 6 and len(first_layers(projection_head("linear", 8, out=4), 1)) == 2
    with pytest.raises(ValueError, match="from_layer=1: the projection head has 0 layers"):
        first_layers(projection_head("none", 8), 1)


def killed_and_started_again(source: Path, folder: Path, ranks: Ranks, count: int, *more: str) -> None:
    """Compare a run that is killed twice in the middle of an epoch with one that is not."""
    more = ("precision=fp32", "optim.steps=24", "checkpoint.every_steps=5", "optim.average_decay=0.9", *more)
    output = f"output={folder}"
    ranks.run(count, train, settings(source, folder / "unbroken", output, *more))
    arguments = settings(source, folder / "killed", output, *more)
    for step, victim in ((8, 0), (13, count - 1)):
        process = processes.start("simclr_ddp.finetune", *arguments, ranks=count)
        processes.wait_for_step(folder / "killed", step, process)
        pids = processes.rank_processes(process) if count > 1 else [process.pid]
        os.kill(pids[victim], signal.SIGKILL)
        status, printed = processes.finish(process)
        assert status != 0 and ("resuming from" in printed) == (step > 8), printed
    ranks.run(count, train, arguments)
    one, other = (
        torch.load(folder / name / "checkpoints" / "step-00000024.pt", weights_only=True)
        for name in ("killed", "unbroken")
    )
    for part in ("model", "average", "optimizers"):
        assert_equal_bits(one[part], other[part], part)
    for name in ("classifier.safetensors", "encoder.safetensors"):
        assert (folder / "killed" / name).read_bytes() == (folder / "unbroken" / name).read_bytes()
    lines, expected = (read_metrics(folder / name / "metrics.jsonl") for name in ("killed", "unbroken"))
    for key in ("step", "loss", "train_top1", "learning_rate"):
        assert [line[key] for line in lines] == [line[key] for line in expected]


def test_killed_and_started_again_ends_bitwise_equal(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    killed_and_started_again(source, tmp_path, ranks, 1)


@pytest.mark.slow
def test_four_ranks_killed_and_started_again_end_bitwise_equal(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    killed_and_started_again(source, tmp_path, ranks, 4, "freeze_bn=true", "optim.micro_batch_size=8")


def test_a_tenth_of_the_labels_and_a_list_of_them(run: Path, tmp_path: Path) -> None:
    few = ("optim.global_batch_size=4", "optim.steps=2", "precision=fp32")
    train(settings(run, tmp_path / "few", "labels.fraction=0.1", *few))
    assert result(tmp_path / "few")["train"]["labelled"] == 4
    (tmp_path / "list.txt").write_text("\n".join(map(str, range(6))))
    train(settings(run, tmp_path / "list", f"labels.list={tmp_path / 'list.txt'}", *few))
    assert result(tmp_path / "list")["train"]["labelled"] == 6
    assert len(list((run / "evaluations").glob("*.npz"))) == 2, "two protocols"


def test_the_best_of_a_grid_is_chosen_on_held_out_images_and_trained_on_all(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("grid.learning_rates=[1e-9,0.02]", "grid.weight_decays=[0.0,1e-4]", "grid.validation_fraction=0.25")
    more = ("precision=fp32", "optim.steps=20", "optim.global_batch_size=10", "grid.validate_every_epochs=2")
    arguments = settings(run, tmp_path / "tuned", *grid, *more)
    train(arguments)
    found = result(tmp_path / "tuned")
    assert [(c["learning_rate"], c["weight_decay"]) for c in found["grid"]] == [
        (1e-9, 0.0),
        (1e-9, 1e-4),
        (0.02, 0.0),
        (0.02, 1e-4),
    ]
    top1 = [c["validation_top1"] for c in found["grid"]]
    assert max(top1[2:]) > max(top1[:2]), "a rate of 0 learns nothing"
    assert found["settings"]["optim"]["base_learning_rate"] == 0.02
    printed = capsys.readouterr()
    assert "best of 4 on 10 held-out images: optim.base_learning_rate=0.02" in printed.out
    assert f"optim.weight_decay=0.0001: top-1 {top1[1]:.2%} on held-out images" in printed.out
    assert "the best, 0.02, is the highest; extend the grid" in printed.err
    folders = sorted((tmp_path / "tuned" / "grid").iterdir())
    assert len(folders) == 4 and not list((tmp_path / "tuned" / "grid").glob("*/checkpoints"))
    lines = read_metrics(folders[0] / "metrics.jsonl")  # of 30 images, in 3 steps an epoch
    assert [line["step"] for line in lines if "validation_top1" in line] == [6, 12, 18]
    (folders[1] / "result.json").unlink()  # as if it had been killed there, and before the final training
    shutil.rmtree(tmp_path / "tuned" / "checkpoints")
    (tmp_path / "tuned" / "result.json").unlink()
    train(arguments)
    printed = capsys.readouterr().out
    assert printed.count("finished: ") == 2, "the three that had finished are not trained again"
    assert result(tmp_path / "tuned")["results"] == found["results"]


def test_a_damaged_result_of_the_grid_is_made_again(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    more = ("grid.learning_rates=[0.01,0.02]", "grid.validation_fraction=0.3", "optim.steps=1", f"output={tmp_path}")
    arguments = settings(source, tmp_path / "tuned", *more)
    ranks.run(2, train, arguments)
    found = result(tmp_path / "tuned")
    files = sorted((tmp_path / "tuned" / "grid").glob("*/result.json"))
    before = [file.read_text() for file in files]
    files[0].write_text(before[0][:20])
    files[1].write_text("{}")
    shutil.rmtree(tmp_path / "tuned" / "checkpoints")
    ranks.run(2, train, arguments)  # the other rank would wait for rank 0 if that failed alone
    for file, text in zip(files, before, strict=True):
        one, other = json.loads(file.read_text()), json.loads(text)
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert result(tmp_path / "tuned")["results"] == found["results"]


def test_the_protocol_of_a_grid_is_its_values_and_not_the_chosen_one(run: Path, tmp_path: Path) -> None:
    quick = ("optim.steps=2", "precision=fp32")
    train(settings(run, tmp_path / "plain", *quick, "optim.base_learning_rate=0.02"))
    for name, rates in (("up", "[1e-9,0.02]"), ("down", "[0.02,1e-9]")):
        values = (f"grid.learning_rates={rates}", "grid.validation_fraction=0.3")
        train(settings(run, tmp_path / name, *quick, *values))
    plain, up, down = (result(tmp_path / name) for name in ("plain", "up", "down"))
    assert up["protocol"]["grid.learning_rates"] == [1e-9, 0.02] and up["protocol"]["grid.validation_fraction"] == 0.3
    assert "optim.base_learning_rate" not in up["protocol"] and up["protocol"]["optim.weight_decay"] == 0
    assert not any(key.startswith("grid.") for key in plain["protocol"])
    assert up["protocol"] == down["protocol"]
    assert len(list((run / "evaluations").glob("*.json"))) == 2, "the grid has not overwritten the plain run"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["labels.fraction=0.01"], "labels.fraction=0.01: 0 of 40 images are fewer than the 2 classes"),
        (["optim.global_batch_size=64"], "optim.global_batch_size=64: more than the 40 labelled images"),
        (["optim.micro_batch_size=3"], "optim.micro_batch_size=3: it must divide"),
        (["grid.learning_rates=[1,2]", "grid.validation_fraction=1"], "grid.validation_fraction=1: 40 of 40 labelled"),
        (
            ["grid.learning_rates=[1,2]", "labels.fraction=0.05", "optim.global_batch_size=1"],
            "grid.validation_fraction=0.1: 0 of 2 labelled images would choose from the grid",
        ),
        (["name=a/b", "run_dir="], "name=a/b: it leads to another folder"),
        (["train=spirograph", "test=spirograph"], "train=spirograph: fine-tuning needs images with classes"),
        (["optim.name=sdg"], "optim.name=sdg"),
    ],
)
def test_a_mistake_is_named(
    arguments: list[str], fault: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main(settings(source, tmp_path / "tuned", *arguments)) == 2
    assert f"error: {fault}" in capsys.readouterr().err


def test_a_loss_that_diverges_ends_the_run(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("precision=fp32", "optim.base_learning_rate=1e30", "checkpoint.every_steps=0", f"output={tmp_path}")
    assert finetune.main(settings(source, tmp_path / "tuned", *more)) == 2
    printed = capsys.readouterr().err
    assert "a lower optim.base_learning_rate or precision=fp32 may help" in printed and "replay" not in printed
    (file,) = (tmp_path / "tuned" / "dumps").iterdir()
    assert f"{file} holds the state before" in printed


def test_the_run_of_the_encoder_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "encoder.safetensors").read_bytes()
    assert finetune.main(settings(run, run)) == 2
    assert f"run_dir={run}: it is that of the encoder" in capsys.readouterr().err
    assert (run / "encoder.safetensors").read_bytes() == before


def test_another_setting_does_not_continue_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("optim.steps=2", "precision=fp32")
    train(settings(run, tmp_path / "tuned", *quick))
    assert finetune.main(settings(run, tmp_path / "tuned", *quick, "seed=1")) == 2
    assert "seed=1: the checkpoint" in capsys.readouterr().err
    assert finetune.main(settings(run, tmp_path / "tuned", *quick, "labels.fraction=0.5")) == 2
    assert "another run" in capsys.readouterr().err
    more = ("precision=fp32", "optim.steps=3", "resume.force=[optim.steps]")
    assert finetune.main(settings(run, tmp_path / "tuned", *more)) == 0
    assert "resume.force: optim.steps changes from 2 to 3" in capsys.readouterr().out


def test_a_longer_run_that_is_killed_before_its_results_writes_them_at_the_next_start(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(run, tmp_path / "tuned", "optim.steps=2", "precision=fp32"))
    longer = settings(run, tmp_path / "tuned", "precision=fp32", "optim.steps=3", "resume.force=[optim.steps]")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(finetune, "export_results", lambda *_: 1 / 0)
        train(longer)
    assert (tmp_path / "tuned" / "checkpoints" / "step-00000003.pt").exists()
    assert not {path.name for path in (tmp_path / "tuned").iterdir()} & set(finetune.RESULTS)
    train(longer)
    assert result(tmp_path / "tuned")["steps"] == 3 and load_encoder(tmp_path / "tuned").step == 3


def test_equal_runs_have_one_directory_below_that_of_the_encoder(run: Path) -> None:
    quick = ("run_dir=", "optim.steps=2", "precision=fp32")
    train(settings(run, Path(), *quick))
    train(settings(run, Path(), *quick, "workers=1", "threads=2"))
    train(settings(run, Path(), *quick, "seed=1"))
    assert len(list((run / "finetune").glob("finetune-*"))) == 2


def test_a_signal_pauses_and_the_same_command_resumes(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = settings(source, tmp_path / "tuned", f"output={tmp_path}", "optim.steps=200", "checkpoint.keep_last=1")
    process = processes.start("simclr_ddp.finetune", *arguments)
    processes.wait_for_step(tmp_path / "tuned", 3, process)
    process.send_signal(signal.SIGTERM)
    status, output = processes.finish(process)
    assert status == 75 and "paused at step" in output, output
    assert finetune.main([*arguments, "optim.steps=200"]) == 0 and "resuming from" in capfd.readouterr().out

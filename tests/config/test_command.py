"""What a user sees: help, dry runs, and one line for every mistake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simclr_ddp import pretrain
from simclr_ddp.config import command as cli
from simclr_ddp.config import options as options_module
from simclr_ddp.config.command import FLAGS
from simclr_ddp.config.options import build, read_yaml
from simclr_ddp.config.schema import Pretrain, Visualize, WriteDataset
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.runs import checkpoint
from simclr_ddp.runs.encoder import load_encoder
from simclr_ddp.runs.metrics import read_metrics
from simclr_ddp.system.console import say, warn
from simclr_ddp.training.plan import make_plan
from tests.support.output import only_error
from tests.support.ranks import Ranks


@pytest.fixture(autouse=True)
def one_rank_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    return pretrain.main(list(arguments))


def small(images: Path, run_dir: Path, *more: str) -> list[str]:
    """Options of a run of two steps."""
    return [
        f"data.train={images}",
        f"run_dir={run_dir}",
        "device=cpu",
        "precision=fp32",
        "threads=1",
        "data.size=16",
        "data.workers=0",
        "model.width=0.0625",
        "model.stem=cifar",
        "head.out=16",
        "probe.enabled=false",
        "optim.global_batch_size=8",
        "optim.steps=2",
        *more,
    ]


def test_a_path_may_contain_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "maps=none").mkdir()
    parsed = cli.parse(["lr=0.1", "maps=none"], Visualize, "RUN")
    assert parsed.run == "lr=0.1" and parsed.maps == "none", "an option is one, whatever is called like it"
    with pytest.raises(ValueError, match="unknown option wd"):
        cli.parse(["wd=0.1"], Visualize, "RUN")


# --- flags ----------------------------------------------------------------------------------------------------------


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0 == run("-h")
    text = capsys.readouterr().out
    for key, option in options_module.options(Pretrain).items():
        (line,) = {line for line in text.splitlines() if line.split()[:1] == [key]}
        assert option.metadata["meaning"] in line
    words = " ".join(text.split())
    assert "optim.weight_decay a number 1e-06 weight decay, not applied to biases" in words
    assert "optim.steps an integer or null null number of steps" in words
    assert "data.augmentation.blur a list of numbers [0.0, 0.0] probability" in words
    assert "log.wandb true or false false mirror" in words
    assert "[CONFIG.yaml] [key=value ...]" in words
    assert all(flag in words and meaning in words for flag, meaning in FLAGS.items())


def test_dry_run_prints_the_resolved_config_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text("seed: 3\noptim:\n  epochs: 30\n")
    assert run("mine.yaml", "optim.epochs=7", "data.train=missing.beton", "--dry-run") == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    wanted = build(Pretrain, [("", {"name": "mine", "seed": 3, "optim.epochs": 7, "data.train": "missing.beton"})])
    assert build(Pretrain, [("printed", read_yaml("printed.yaml"))]) == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "printed.yaml"]


def test_debug_shows_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("optim.epochs=ten", "--debug") == 2
    text = capfd.readouterr().err
    assert "Traceback" in text and "error: optim.epochs=ten in the command line: must be an integer" in text
    assert run("optim.epochs=ten") == 2
    assert "Traceback" not in only_error(capfd)


@pytest.mark.parametrize("flag", ["--debugg", "-v", "--dry-run=1", "--optim.epochs=3", "--epochs"])
def test_unknown_flags(flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(flag) == 2
    shown = only_error(capfd)
    assert f"unknown flag {flag}" in shown and "--dry-run" in shown and "key=value" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.epoch=3"], "unknown option optim.epoch in the command line; did you mean optim.epochs?"),
        (["nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["a.yaml", "b.yaml"], "argument b.yaml is one too many: the usage is [CONFIG.yaml] [key=value ...]"),
        (["optim.epochs", "3"], "is one too many"),
        (["loss.kernel=ntxent"], "loss.kernel=ntxent: unknown value"),
        (["loss.temperature=0"], "loss.temperature=0.0: too small"),
        (["data.train=nowhere.beton"], "nowhere.beton"),
        (["data.train=ch\udce2teau.beton"], r"data.train=ch\xe2teau.beton: has bytes that are not UTF-8"),
        (["data.size=64", "device=cpu"], "data.size=64: Spirograph views are 32 pixels wide; set data.size=32"),
        (
            ["optim.global_batch_size=20000", "device=cpu"],
            "10000 images are fewer than optim.global_batch_size=20000",
        ),
        (["device=cuda"], "device=cuda: torch finds no GPU"),
    ],
)
def test_mistakes_that_need_no_data(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    if arguments == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert run(*arguments) == 2
    assert message in only_error(capfd)
    assert not Path("runs").exists()


def test_positional_arguments_and_exit_status(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[WriteDataset] = []

    def command(settings: WriteDataset) -> int | None:
        seen.append(settings)
        if settings.source == "interrupt":
            raise KeyboardInterrupt
        if settings.source == "fail":
            raise OSError("several\nlines")
        return 7 if settings.source == "seven" else None

    def status(*arguments: str) -> int:
        return cli.run(command, WriteDataset, "SOURCE OUT", "about", list(arguments))

    assert status("here", "there.beton", "quality=80") == 0
    assert (seen[0].source, seen[0].out, seen[0].quality) == ("here", "there.beton", 80)
    assert status("seven", "x") == 7 and status("interrupt", "x") == 130
    assert status("here") == 2 and "out is missing" in only_error(capfd)
    assert status("fail", "x") == 2 and only_error(capfd) == "error: several lines (--debug shows where)"
    for error in (
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    ):
        status = cli.run(lambda _, e=error: (_ for _ in ()).throw(e), WriteDataset, "SOURCE OUT", "", ["a", "b"])
        shown = capfd.readouterr().err
        assert status == 2 and shown.count("\n") == 1 and "optim.micro_batch_size" in shown, shown
    with pytest.raises(RuntimeError):  # not the user's mistake: the traceback is for us
        cli.run(lambda _: (_ for _ in ()).throw(RuntimeError("a bug")), WriteDataset, "SOURCE OUT", "", ["a", "b"])


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    say("text")
    warn("text")
    assert run("optim.epochs=ten") == 2
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    say("text")
    warn("text")
    warn(None)
    assert capfd.readouterr() == ("text\n", "warning: text\n")


# --- data and settings that do not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_truncated_data_file(share: float, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.beton"
    shutil.copy(images, cut)
    os.truncate(cut, int(cut.stat().st_size * share))
    assert run(*small(cut, tmp_path / "run")) == 2
    assert "cut.beton" in only_error(capfd)


def test_a_data_file_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise.beton").write_bytes(b"no beton" * 1000)
    assert run(*small(tmp_path / "noise.beton", tmp_path / "run")) == 2
    assert "noise.beton" in only_error(capfd)
    assert run(*small(tmp_path, tmp_path / "run")) == 2
    assert str(tmp_path) in only_error(capfd)


def test_a_named_pipe_is_never_opened(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Opening one waits for ever for another process to write to it."""
    pipe, run_dir = tmp_path / "p.pt", tmp_path / "run"
    os.mkfifo(pipe)
    (tmp_path / "p.safetensors").symlink_to(pipe)
    tiny = small(images, run_dir)
    for arguments in (["p.yaml"], [f"data.train={pipe}"], [f"model.init={tmp_path}/p.safetensors"]):
        (tmp_path / "p.yaml").unlink(missing_ok=True)
        (tmp_path / "p.yaml").symlink_to(pipe)
        given = [str(tmp_path / a) if a.endswith(".yaml") else a for a in arguments]
        assert run(*tiny, *given) == 2
        assert "is a named pipe, not a file" in only_error(capfd)
    for path in (pipe, tmp_path / "p.safetensors"):
        with pytest.raises(ValueError, match="is a named pipe, not a file"):
            load_encoder(path)
    with pytest.raises(ValueError, match="it is a named pipe, not a file"):
        checkpoint.load(pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss.kernel=concat_sum", "head.out=15"], "15 is odd; choose an even head.out"),
        (["loss.kernel=simple_sum", "loss.mix_weight=1"], "leaves only one component of simple_sum"),
        (["loss.kernel=arccos", "loss.temperature=2"], "at most 1"),
        (["loss.norm_p=1"], "set norm_p=2"),
        (["optim.global_batch_size=64"], "40 images are fewer than optim.global_batch_size=64"),
        (["data.augmentation.crop_scale=[0.9,0.1]"], "crop_scale=[0.9, 0.1]: not a range of area fractions"),
        (["data.augmentation.std=[0,1,1]"], "std=0.0: too small; must be at least 0.001"),
        (["model.init=weights.pt"], "weights: weights.pt does not exist"),
        (["model.init=torchvision"], "model.width=0.0625; set model.width=1"),
    ],
)
def test_settings_that_do_not_fit(
    options: list[str], message: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(*small(images, tmp_path / "run", *options)) == 2
    assert message in only_error(capfd)


def plan_in_ranks(batch: int) -> str:
    settings = build(Pretrain, [("here", {"optim.global_batch_size": batch})])
    try:
        return str(make_plan(settings, Dataset("here", 100, None, None, "")).run_dir)
    except ValueError as error:
        return f"error: {error}"


def test_a_batch_that_does_not_divide_among_the_ranks(ranks: Ranks) -> None:
    message = (
        "error: optim.global_batch_size=30: it does not divide among 4 ranks; choose a multiple of 4, or another number"
    )
    assert all(answer.startswith(message) for answer in ranks.run(4, plan_in_ranks, 30))
    assert len(set(ranks.run(4, plan_in_ranks, 32))) == 1


# --- run directories ------------------------------------------------------------------------------------------------


def test_another_config_in_the_run_directory(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert run(*small(images, run_dir)) == 0
    assert run(*small(images, run_dir)) == 0
    out, err = capfd.readouterr()
    assert "resuming from" not in out
    assert "is finished (2 steps); run_dir=... starts another run" in out and "error" not in err
    assert run(*small(images, run_dir, "optim.weight_decay=1e-3")) == 2
    shown = only_error(capfd)
    assert "optim.weight_decay=0.001: the checkpoint step-00000002.pt in" in shown and "was made with 1e-06; " in shown
    assert "resume.force=[optim.weight_decay] resumes anyway" in shown
    assert run(*small(images, run_dir, "optim.steps=4", "optim.weight_decay=1e-3", "resume.force=[optim.steps]")) == 2
    assert "optim.weight_decay=0.001: " in (shown := only_error(capfd))
    assert "resume.force=[optim.steps,optim.weight_decay] resumes anyway" in shown, "what was forced before, too"
    assert run(*small(images, run_dir, "optim.steps=4", "optim.weight_decay=1e-3", "seed=1")) == 2
    assert "and differs in optim.weight_decay, seed too; " in (shown := only_error(capfd))
    assert "resume.force=[optim.steps,optim.weight_decay,seed] resumes anyway" in shown
    forced = "resume.force=[optim.steps,optim.weight_decay]"
    harmless = ("checkpoint.keep_last=7", "log.every_steps=3")
    assert run(*small(images, run_dir, "optim.steps=4", "optim.weight_decay=1e-3", forced, *harmless)) == 0
    shown = capfd.readouterr().out.splitlines()
    assert [line for line in shown if "changes from" in line] == [
        "resume.force: optim.steps changes from 2 to 4",
        "resume.force: optim.weight_decay changes from 1e-06 to 0.001",
        "checkpoint.keep_last changes from 2 to 7",
        "log.every_steps changes from 10 to 3",
    ]
    assert read_metrics(run_dir / "metrics.jsonl")[-1]["step"] == 4


def test_another_model_in_the_run_directory(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert run(*small(images, run_dir)) == 0
    capfd.readouterr()
    wider = ["model.width=0.125", "optim.steps=4"]
    assert run(*small(images, run_dir, *wider, "resume.force=[optim.steps]")) == 2
    shown = only_error(capfd)
    assert "model.width=0.125: the checkpoint" in shown and "run_dir=... starts another run" in shown
    assert "resume.force" not in shown, "no way out"
    assert run(*small(images, run_dir, *wider, "resume.force=[optim.steps,model.width]")) == 2
    shown = only_error(capfd)
    assert "the checkpoint is of another model" in shown and "run_dir=... starts another run" in shown


def test_an_option_that_is_newer_than_the_checkpoint(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It was made with what is the default now."""
    run_dir = tmp_path / "run"
    assert run(*small(images, run_dir)) == 0
    (path,) = (run_dir / "checkpoints").glob("step-*.pt")
    saved = torch.load(path, weights_only=True)
    del saved["identity"]["loss.radius"], saved["config"]["loss"]["radius"], saved["config"]["log"]["every_steps"]
    torch.save(saved, path)
    capfd.readouterr()
    assert run(*small(images, run_dir, "optim.steps=4", "resume.force=[optim.steps]")) == 0
    shown = capfd.readouterr().out
    assert "loss.radius" not in shown and "None" not in shown
    again = ("optim.steps=4", "loss.radius=2")
    (run_dir / "checkpoints" / "step-00000004.pt").unlink()
    assert run(*small(images, run_dir, *again, "resume.force=[optim.steps]")) == 2
    shown = only_error(capfd)
    for part in ("loss.radius=2.0: the", "made with 1.0", "resume.force=[loss.radius,optim.steps]"):
        assert part in shown


def test_other_data_in_the_run_directory(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file may move, but not change."""
    from simclr_ddp.data.write import write_dataset
    from tests.conftest import write_images

    run_dir = tmp_path / "run"
    assert run(*small(images, run_dir)) == 0
    for path in images.parent.glob("train.beton*"):
        shutil.copy(path, tmp_path / path.name)
    assert run(*small(tmp_path / "train.beton", run_dir)) == 0
    write_dataset(str(write_images(tmp_path / "other", 40, seed=1)), tmp_path / "other.beton")
    capfd.readouterr()
    assert run(*small(tmp_path / "other.beton", run_dir)) == 2
    shown = only_error(capfd)
    assert f"data.train={tmp_path / 'other.beton'}: its content (" in shown and "is not that of the checkpoint" in shown
    assert "resume.force=[data.train] resumes anyway" in shown
    assert run(*small(tmp_path / "other.beton", run_dir, "resume.force=[data.train]")) == 0


def test_another_process_in_the_run_directory(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    program = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
    program += "print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(run_dir / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    assert run(*small(images, run_dir)) == 2
    assert f"run_dir={run_dir}: another process is training in it" in only_error(capfd)
    other.communicate("\n")
    assert run(*small(images, run_dir)) == 0


def test_a_run_directory_that_can_not_be_made(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no/such/place")):
        assert run(*small(images, run_dir)) == 2
        assert f"run_dir={run_dir}: it can't be written" in only_error(capfd)


def test_the_published_mistake_is_warned_about(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """LARS at a learning rate of 0.001; a rate 1,000 times as large is let pass."""
    options = ["optim.steps=25", "optim.scaling=none", "optim.warmup_epochs=0"]
    assert run(*small(images, tmp_path / "a", *options, "optim.base_learning_rate=0.001")) == 0
    assert "warning: learning rate too small for LARS" in capfd.readouterr().err
    assert run(*small(images, tmp_path / "b", *options, "optim.base_learning_rate=1")) == 0
    assert "too small for LARS: at" not in capfd.readouterr().err

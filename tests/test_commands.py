"""Commands end to end on small generated data, and as README and docs show them."""

import importlib
import json
import os
import re
from pathlib import Path

import pytest

from launch import demo
from simclr_ddp import linear_eval, pretrain, write_dataset
from simclr_ddp.data import write
from simclr_ddp.runs.metrics import read_metrics
from tests.conftest import write_images
from tests.support import pages, processes
from tests.support.processes import ROOT
from tests.support.ranks import Ranks
from tests.support.tiny_run import settings, train

TINY = ("optim.steps=4", "data.workers=0", "log.every_steps=1", "model.width=0.0625")


def test_the_demos_summary_of_a_real_evaluation(tmp_path: Path) -> None:
    options = [f"run_dir={tmp_path / 'run'}", "device=cpu"]
    for split in ("train", "test"):
        write.write_dataset("spirograph", tmp_path / f"{split}.beton", images=64, split=split)
        options.append(f"data.{split}={tmp_path / split}.beton")
    assert pretrain.main([*options, "optim.global_batch_size=16", *TINY]) == 0
    assert linear_eval.main([str(tmp_path / "run"), "device=cpu", "workers=0"]) == 0
    (file,) = (tmp_path / "run").glob("evaluations/*.json")
    results = json.loads(file.read_text())["results"]
    text = demo.summary(tmp_path / "run")
    assert f"{results['trained']['mse']:.4f} trained, {results['random']['mse']:.4f} untrained" in text
    assert str(tmp_path / "run") in text


def test_a_run_without_arguments_goes_into_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["device=cpu", "optim.global_batch_size=8", "optim.steps=2", "model.width=0.0625", "precision=fp32"]
    assert pretrain.main(arguments) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"spirograph-[0-9a-f]{8}", run_dir.name)
    assert {p.name for p in run_dir.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "encoder.safetensors",
    }
    assert pretrain.main([*arguments, "log.every_steps=5", "threads=1"]) == 0, "harmless keys change nothing"
    assert pretrain.main([*arguments, "seed=1"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_write_dataset_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.beton"
    assert write_dataset.main(["spirograph", str(out), "images=8"]) == 0
    assert json.loads((tmp_path / "s.beton.json").read_text())["count"] == 8
    assert write_dataset.main(["spirograph", str(out), "images=8"]) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert write_dataset.main(["spirograph", str(out), "images=9", "overwrite=true"]) == 0
    assert write_dataset.main([str(tmp_path / "nowhere"), str(tmp_path / "x.beton")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert write_dataset.main(["spirograph"]) == 2
    assert "out is missing" in capsys.readouterr().err


def test_torchrun_is_started_where_the_machines_name_does_not_resolve() -> None:
    """Without the flag it hangs there: its ranks look for rank 0 under the host's own name."""
    files = [
        path for folder in ("simclr_ddp", "launch", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.*")
    ]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".sh")}
    starts = {path: re.findall(r'"--standalone", ("[^"]*"|f)', text) for path, text in texts.items()}
    assert sum(map(len, starts.values())) >= 5
    for path, following in starts.items():
        assert set(following) <= {'"--local-addr=127.0.0.1"'}, path


@pytest.mark.slow
@pytest.mark.parametrize(("count", "more"), [(2, ()), (1, ("optim.micro_batch_size=8", "precision=fp64"))])
def test_a_compiled_run_gives_the_losses_of_a_plain_one(
    count: int, more: tuple[str, ...], images: Path, ranks: Ranks, tmp_path: Path
) -> None:
    # At a larger learning rate other roundings make another run within four steps.
    options = (*TINY, "precision=fp32", "optim.base_learning_rate=0.05", *more)
    plain, compiled = (settings(images, tmp_path / name, *options) for name in ("no", "yes"))
    ranks.run(count, train, plain)
    status, output = processes.run("simclr_ddp.pretrain", *compiled, "compile=true", ranks=count)
    assert status == 0, output
    losses, expected = ([line["loss"] for line in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("yes", "no"))
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def shown_files(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, now the current one, with the files that the pages name; returns a small .beton file."""
    pages.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return images


@pytest.mark.parametrize("page", pages.PAGES)
def test_what_a_page_shows_is_there(page: str, shown_files: Path) -> None:
    """Each of its commands would start, its options are known, its links lead somewhere, its snippets compile."""
    faults = []
    content = pages.text(page)
    for words in pages.commands(content):
        try:
            pages.check(words, shown_files)
        except ValueError as error:
            faults.append(f"{' '.join(words)}: {error}")
    assert not faults, "\n".join(faults)
    pages.check_options(content)
    pages.check_flags(content)
    pages.check_tests(content)
    pages.check_links(page)
    for fence in pages.fences(content):
        if fence.language == "python":
            code = compile("\n" * fence.line + fence.body, page, "exec")
            if fence.quick:
                exec(code, {})


def test_the_commands_in_the_heads_of_config_files_would_start(shown_files: Path) -> None:
    for path in sorted(path for path in (ROOT / "configs").rglob("*.*") if path.suffix in (".yaml", ".sbatch")):
        shown = pages.commands_of_config(path)
        assert shown, path
        for words in shown:
            pages.check(words, shown_files)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python -m simclr_ddp.pretrain optim.epoch=3", "unknown option optim.epoch"),
        ("python -m simclr_ddp.pretrain configs/pretrain/cifar11.yaml", "does not exist"),
        ("python -m simclr_ddp.pretrained", "no module"),
        ("torchrun --nproc_per_nodes=8 -m simclr_ddp.pretrain", "torchrun refuses it"),
        ("torchrun --nproc_per_node=8 -m simclr_ddp.pretrain precision=fp8", "precision=fp8"),
        ("python -m simclr_ddp.visualize RUN map=pca", "unknown option map"),
        ("python -m launch.slurm configs/slurm/cpus.yaml minute=3 -- simclr_ddp.pretrain", "unknown option minute"),
        ("python -m launch.slurm configs/slurm/cpus.yaml -- simclr_ddp.pretrain sed=1", "unknown option sed"),
        ("python -m launch.sweep configs/sweep/kernel_infonce.yaml trial=3", "unknown option trial"),
        ("python -m launch.sweep configs/sweep/kernel_infonce.yaml set.optim.epoch=3", "optim.epoch"),
        ("python -m launch.summary RUN row=seed", "unknown option row"),
        ("python -m benchmarks.loss --image 3", "takes no --image"),
        ("python -m benchmarks.step --rank 3", "--rank"),
        ("bash benchmarks/gpu/plan.sh D", "takes no D"),
        ("sbatch --partition=NAME configs/slurm/torch.sbatch simclr_ddp.pretrain", "does not exist"),
        ("make tests", "no tests"),
        ("make setup TORCH=x", "no TORCH"),
        ("pip install '.[logs]'", "no extra logs"),
        ("tools/build-wheel dist", "does not exist"),
        ("conda install simclr_ddp", "has no check for it"),
    ],
)
def test_a_wrong_command_on_a_page_is_found(command: str, fault: str, shown_files: Path) -> None:
    (words,) = pages.commands(f"```bash\n{command}  # a comment\n```\n")
    with pytest.raises(ValueError, match=re.escape(fault)):
        pages.check(words, shown_files)
    if words[0] in pages.PROGRAMS:
        assert pages.commands(f"Type `{command}` here.") == [words]


def test_other_wrong_things_on_a_page_are_found() -> None:
    for content, fault in (
        ("\n    python -m simclr_ddp.pretrain\n", "line 2: an indented block"),
        ("```\npython -m simclr_ddp.pretrain\n```\n", "a block of no language"),
    ):
        with pytest.raises(ValueError, match=fault):
            pages.commands(content)
    for option in ("optim.epoch", "optim.epochs=x", "loss.kernel=cosin"):
        with pytest.raises(ValueError, match=option.partition("=")[0]):
            pages.check_options(f"Set `{option}`.")
    with pytest.raises(ValueError, match="no command takes --dry"):
        pages.check_flags("Add `--dry`.")
    with pytest.raises(ValueError, match="test_watch"):
        pages.check_tests("Tested in `test_watch.py`.")
    pages.check_options("Set `optim.epochs=3 optim.name=lars`, `verify.ranks=[2]` or `debug.check_ranks_every=N`.")


def test_the_readmes_walk_through_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in its order, on small images and for two steps, and then its snippet."""
    text = pages.text("README.md", "Your own images")
    blocks = {fence.language: fence.body for fence in pages.fences(text)}
    write_images(tmp_path / "photos", 130, size=40)
    write_images(tmp_path / "photos-test", 12, size=40, seed=1)
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    quick = ["loader=torch", "workers=0"]  # FFCV would compile its pipelines
    shorter = {
        "pretrain": ["data.size=32", "optim.steps=2", "optim.global_batch_size=16", "model.init=random", "threads=1"],
        "linear_eval": ["strengths=[1.0]", "random_encoder=false", *quick],
        "visualize": ["maps=pca"],
    }
    shorter["pretrain"] += [f"data.{word}" for word in quick]
    names = []
    for words in pages.commands(text):
        assert words[:2] == ["python", "-m"], words
        name, arguments = words[2].removeprefix("simclr_ddp."), words[3:]
        module = importlib.import_module(words[2])
        assert module.main([*arguments, *shorter.get(name, [])]) == 0, words
        names.append(name)
    assert names[:6] == ["write_dataset", "pretrain", "pretrain", "visualize", "write_dataset", "linear_eval"]
    assert {p.name for p in Path("runs/photos").iterdir()} >= {"encoder.safetensors", "evaluations", "figures"}
    exec(compile(blocks["python"], "README.md", "exec"), {})


def test_the_readme_is_short() -> None:
    assert len(pages.text("README.md").splitlines()) <= 180

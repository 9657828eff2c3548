"""Commands end to end on small generated data, and what the README says of them."""

import importlib
import json
import re
from pathlib import Path

import pytest

from launch import demo
from simclr_ddp import linear_eval, pretrain, write_dataset
from simclr_ddp.metrics import read_metrics
from tests import processes
from tests.conftest import write_images
from tests.processes import ROOT
from tests.test_resume import settings

README = (ROOT / "README.md").read_text()
TINY = ("optim.steps=4", "data.workers=0", "log.every_steps=1", "model.width=0.0625")


def test_the_demos_summary_of_a_real_evaluation(tmp_path: Path) -> None:
    data = tmp_path / "s.beton"
    write_dataset.write_dataset("spirograph", data, images=64)
    options = [f"data.train={data}", f"data.test={data}", f"run_dir={tmp_path / 'run'}", "device=cpu"]
    assert pretrain.main([*options, "optim.global_batch_size=16", *TINY]) == 0
    assert linear_eval.main([str(tmp_path / "run"), "device=cpu", "workers=0"]) == 0
    results = json.loads((tmp_path / "run" / "linear_eval.json").read_text())["results"]
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
@pytest.mark.parametrize(("ranks", "more"), [(1, ()), (2, ()), (1, ("optim.micro_batch_size=8", "precision=fp64"))])
def test_a_compiled_run_gives_the_losses_of_a_plain_one(
    ranks: int, more: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    losses = []
    for compiled in ("false", "true"):
        options = (*TINY, "precision=fp32", f"compile={compiled}", *more)
        arguments = settings(images, tmp_path / compiled, *options)
        status, output = processes.run("simclr_ddp.pretrain", *arguments, ranks=ranks)
        assert status == 0, output
        losses.append([line["loss"] for line in read_metrics(tmp_path / compiled / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_readmes_loop_runs_as_written() -> None:
    block = re.findall(r"```python\n(.*?)```", section("The objective, in your own loop"), re.S)[0]
    exec(compile(block, "README.md", "exec"), {})


def test_the_readmes_walk_through_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in its order, on small images and for two steps."""
    text = section("A folder of your own")
    write_images(tmp_path / "photos", 130, size=40)
    write_images(tmp_path / "photos-test", 12, size=40, seed=1)
    monkeypatch.chdir(tmp_path)
    Path("photos.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    commands = re.findall(r"^    python -m simclr_ddp\.(\w+) ([^#\n]*)", text, re.M)
    shorter = {"pretrain": ["data.size=32", "optim.steps=2", "optim.epochs=1"], "visualize": ["maps=pca"]}
    assert [name for name, _ in commands].count("pretrain") == 2
    for name, arguments in commands:
        module = importlib.import_module(f"simclr_ddp.{name}")
        assert module.main([*arguments.split(), *shorter.get(name, [])]) == 0, (name, arguments)
    assert {p.name for p in Path("runs/photos").iterdir()} >= {"encoder.safetensors", "linear_eval.json", "figures"}
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.S)[0], "README.md", "exec"), {})


def section(title: str) -> str:
    """The README's text from that heading to the next."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_readmes_commands_exist() -> None:
    modules = set(re.findall(r"-m ((?:simclr_ddp|launch|benchmarks)\.[\w.]+\w)", README))
    assert modules >= {"simclr_ddp.pretrain", "simclr_ddp.write_dataset", "simclr_ddp.linear_eval"}
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for config_file in re.findall(r"configs/\S+\.yaml", README):
        assert (ROOT / config_file).exists(), config_file
    for target in re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target

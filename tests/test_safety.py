"""Nothing that comes from outside is executed, and no key leaves the environment."""

import ast
import os
from pathlib import Path

import pytest
import torch

from simclr_ddp import pretrain, replay
from tests.support import processes
from tests.support.source import parsed
from tests.support.tiny_run import settings

SOURCES = [p for folder in ("simclr_ddp", "launch", "benchmarks") for p in (processes.ROOT / folder).rglob("*.py")]


class Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.proof}",)


def test_a_pickle_in_a_checkpoint_a_dump_or_weights_is_not_executed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof, run_dir = tmp_path / "proof", tmp_path / "run"
    content = {"step": 4, "model": Evil(proof), "identity": {}, "config": {}, "world_size": 1}
    torch.save(content, tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert proof.exists(), "it would run"
    proof.unlink()
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "dumps").mkdir()
    for name in ("checkpoints/step-00000004.pt", "dumps/step-00000004.pt"):
        torch.save(content, run_dir / name)
    assert replay.main([str(run_dir / "dumps" / "step-00000004.pt")]) == 2
    assert pretrain.main(settings(images, run_dir)) == 2
    assert pretrain.main(settings(images, tmp_path / "other", f"model.init={tmp_path / 'evil.pt'}")) == 2
    said = capsys.readouterr().err
    assert said.count("Weights only load failed") == 3 and not proof.exists(), said


def test_yaml_makes_plain_values_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "evil.yaml").write_text(f"name: !!python/object/apply:os.system ['touch {proof}']\n")
    assert pretrain.main([str(tmp_path / "evil.yaml")]) == 2
    assert "is not valid YAML" in capsys.readouterr().err
    assert pretrain.main([f"name=[!!python/object/apply:os.system ['touch {proof}']]"]) == 2
    assert not proof.exists()


def test_names_reach_no_shell_and_no_other_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "$(touch proof);`touch proof`|touch proof"
    arguments = [a for a in settings(images, tmp_path, "optim.steps=1") if not a.startswith("run_dir=")]
    assert pretrain.main([*arguments, f"name={name}"]) == 0
    assert not (tmp_path / "proof").exists()
    assert pretrain.main([*arguments, "name=../../elsewhere"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(processes.ROOT)))
def test_no_source_calls_what_executes_strings(path: Path) -> None:
    for call in (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)):
        name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        where = f"{path}:{call.lineno}: {name}"
        assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.load", "pickle.load", "pickle.loads"), where
        assert keywords.get("shell", "False") == "False", where
        assert name != "torch.load" or keywords.get("weights_only") == "True", where
        assert name != "np.load" or keywords.get("allow_pickle", "False") == "False", where
        assert not name.endswith("extractall"), where


def test_the_key_of_weights_and_biases_is_neither_printed_nor_saved(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    key = "0123456789abcdef" * 2 + "01234567"
    arguments = settings(images, tmp_path / "run", "optim.steps=2", "log.wandb=true")
    process = processes.start_command(
        ["env", f"WANDB_API_KEY={key}", "WANDB_MODE=offline", *processes.command("simclr_ddp.pretrain", *arguments)]
    )
    status, output = processes.finish(process)
    assert status == 0 and key not in output
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if key.encode() in path.read_bytes()]

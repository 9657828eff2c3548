"""Configs that the package brings along, by their bare names."""

from pathlib import Path

import pytest

from simclr_ddp.config import recipes
from simclr_ddp.config.command import parse
from simclr_ddp.config.schema import Finetune, Pretrain


def test_a_bare_name_is_an_included_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = parse(["cifar10", "seed=3"], Pretrain, "[CONFIG.yaml]")
    assert settings.name == "cifar10" and settings.seed == 3 and settings.model.stem == "cifar"
    assert parse(["runs/x", "linear_sgd"], Finetune, "RUN [CONFIG.yaml]").name == "linear_sgd"
    (tmp_path / "stl10").mkdir()  # a folder of that name is no config
    assert Path(recipes.find("stl10")).name == "stl10.yaml"
    assert Path(recipes.find("linear_sgd", "finetune")).parent.name == "finetune"


def test_a_file_is_preferred_and_other_paths_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").write_text("seed: 7\n")
    assert parse(["cifar10"], Pretrain, "[CONFIG.yaml]").seed == 7
    for path in ("configs/no.yaml", "no.yaml", "./cifar10"):
        assert recipes.find(path) == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifr10", "config cifr10 is neither a file nor the name of an included config; did you mean cifar10?"),
        ("xyz", "give FILE.yaml or one of cifar10, cifar100, "),
        ("one_node", "one_node is neither"),  # of launch.slurm
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        recipes.find(name)
    assert message in str(raised.value)

"""The name of a run directory."""

import shutil
from pathlib import Path

import pytest
import torch

from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.runs.directory import default_run_dir


def run_dir(train: object, *arguments: str) -> Path:
    given = dict([("name", "photos"), ("data.train", str(train)), *map(options.parse_override, arguments)])
    return default_run_dir(options.build(Pretrain, [("here", given)]))


def test_the_name_is_of_the_content_of_the_data_and_not_of_its_path(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simclr_ddp.data.write import write_dataset
    from tests.conftest import write_images

    for path in images.parent.glob("train.beton*"):
        shutil.copy(path, tmp_path / path.name)
    write_dataset(str(write_images(tmp_path / "other", 40, seed=1)), tmp_path / "other.beton")
    monkeypatch.chdir(tmp_path)
    spellings = [images, "train.beton", "./train.beton", f"../{tmp_path.name}/train.beton", tmp_path / "train.beton"]
    (name,) = {run_dir(spelling) for spelling in spellings}
    assert name != run_dir("other.beton") and name.parent == Path("runs") and name.name.startswith("photos-")
    assert name != run_dir("train.beton", "seed=1") and name == run_dir("train.beton", "loss.gamma=2")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run_dir("gone.beton")
    assert run_dir("gone.beton", "run_dir=there") == Path("there")


def test_a_directory_with_the_name_of_earlier_versions_is_found(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for path in images.parent.glob("train.beton*"):
        shutil.copy(path, tmp_path / "x" / path.name)
    arguments = ("x/train.beton", "loss.gamma=2", "optim.steps=4", "head.hidden=64")
    new, default = run_dir(*arguments), default_run_dir(Pretrain())
    before, default_before = Path("runs/photos-5c772a14"), Path("runs/spirograph-b14de815")
    assert before != new and default_before != default
    before.mkdir(parents=True)
    default_before.mkdir()
    assert run_dir(*arguments) == before and default_run_dir(Pretrain()) == default_before
    new.mkdir()
    assert run_dir(*arguments) == new


def test_a_directory_of_earlier_versions_is_found_when_its_data_have_moved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By config.yaml and the checkpoint, which names the content; other images of the same settings are another run."""
    from simclr_ddp.data.beton import Beton
    from simclr_ddp.data.write import write_dataset
    from tests.conftest import write_images

    monkeypatch.chdir(tmp_path)
    arguments = ("loss.gamma=2", "optim.steps=4", "head.hidden=64")
    before = Path("runs/photos-5c772a14")  # that of x/train.beton, which is gone
    (before / "checkpoints").mkdir(parents=True)
    (before / "config.yaml").write_text("data:\n  train: x/train.beton\n")
    (tmp_path / "runs" / "photos-damaged").mkdir()
    (tmp_path / "runs" / "photos-damaged" / "config.yaml").write_text("\t{")  # of another run
    saved = {"step": 1, "model": {}, "identity": {"data fingerprint": Beton(images).fingerprint()}}
    torch.save(saved, before / "checkpoints" / "step-00000001.pt")
    write_dataset(str(write_images(tmp_path / "other", 40, seed=1)), tmp_path / "other.beton")
    assert run_dir(images, *arguments) == before
    assert before not in (run_dir("other.beton", *arguments), run_dir(images, *arguments, "seed=1"))

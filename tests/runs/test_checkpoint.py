"""Checkpoints are whole or not there, and damage of any kind is found out."""

import errno
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from simclr_ddp.models.resnet import Encoder
from simclr_ddp.models.weights import initialize
from simclr_ddp.runs import checkpoint
from simclr_ddp.runs.encoder import export_encoder
from simclr_ddp.system import files


def state_of(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    model = {"a.weight": torch.randn(40, 30, generator=generator), "a.count": torch.tensor(step)}
    optimizer = {
        "state": {0: {"momentum_buffer": torch.randn(40, 30, generator=generator)}},
        "param_groups": [{"lr": 0.1}],
    }
    return {
        "step": step,
        "model": model,
        "optimizers": [optimizer],
        "scaler": {},
        "config": {"loss": {"kernel": "cosine"}},
    }


def assert_is(loaded: dict, step: int) -> None:
    wanted = state_of(step)
    assert loaded.keys() == wanted.keys() and loaded["step"] == step and loaded["config"] == wanted["config"]
    for key, value in wanted["model"].items():
        assert torch.equal(loaded["model"][key], value)
    momentum = [s["optimizers"][0]["state"][0]["momentum_buffer"] for s in (loaded, wanted)]
    assert torch.equal(*momentum)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_saved_loaded_and_the_last_ones_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (5, 10, 100, 99_999_999):
        path = checkpoint.save(folder, state_of(step), step, keep_last=2)
        assert path.name == f"step-{step:08d}.pt"
        assert (folder / "latest").read_text() == path.name + "\n"
        assert_is(checkpoint.load(path), step)
        assert_is(torch.load(path, weights_only=True), step)
    assert names(folder) == ["latest", "step-00000100.pt", "step-99999999.pt"]
    assert checkpoint.newest(folder, pytest.fail) == folder / "step-99999999.pt"


def test_keep_last_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state_of(step), step, keep_last=1)
    assert names(tmp_path) == ["latest", "step-00000003.pt"]


def test_none_yet(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "missing", pytest.fail) is None
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    (tmp_path / "step-1.pt").touch()
    (tmp_path / ".step-00000001.pt.tmp").touch()
    assert checkpoint.all_steps(tmp_path) == [] and checkpoint.newest(tmp_path, pytest.fail) is None


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.replace_atomically(path, half)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]
    files.replace_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and names(tmp_path) == ["file"]


def test_the_old_file_is_there_while_the_new_one_is_written(tmp_path: Path) -> None:
    files.replace_atomically(tmp_path / "file", lambda temporary: temporary.write_text("old"))

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert (tmp_path / "file").read_text() == "old" and temporary.parent == tmp_path

    files.replace_atomically(tmp_path / "file", write)


class Unsaveable:
    def __reduce__(self) -> tuple:
        raise OSError("no space left on device")


def test_a_failing_save_leaves_the_checkpoints_as_they_were(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state_of(1), 1, keep_last=1)
    with pytest.raises(Exception, match="no space left"):
        checkpoint.save(tmp_path, state_of(2) | {"bad": Unsaveable()}, 2, keep_last=1)
    assert names(tmp_path) == ["latest", "step-00000001.pt"]
    assert (tmp_path / "latest").read_text() == "step-00000001.pt\n"
    assert_is(checkpoint.load(tmp_path / "step-00000001.pt"), 1)


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.9999])
def test_a_half_written_one_is_kept_aside_and_the_one_before_used(share: float, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state_of(step), step, keep_last=5)
    for step in (2, 3):
        truncate(tmp_path / f"step-0000000{step}.pt", share)
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-00000001.pt"
    assert len(said) == 2 and all("can't be used" in t and "\n" not in t and "renamed to" in t for t in said)
    assert "step-00000003.pt.damaged" in names(tmp_path) and "step-00000002.pt.damaged" in names(tmp_path)
    assert checkpoint.newest(tmp_path, pytest.fail) == tmp_path / "step-00000001.pt"


def test_of_the_damaged_ones_the_newest_two_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        path = checkpoint.save(tmp_path, state_of(step), step, keep_last=2)
        if step > 1:
            truncate(path, 0.5)
            assert checkpoint.newest(tmp_path, lambda _: None) == tmp_path / "step-00000001.pt"
    assert [p.name for p in sorted(tmp_path.glob("*.damaged"))] == [
        "step-00000005.pt.damaged",
        "step-00000006.pt.damaged",
    ]


def test_all_damaged(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state_of(1), 1, keep_last=1)
    truncate(path, 0.5)
    assert checkpoint.newest(tmp_path, lambda _: None) is None


def test_a_flipped_bit_in_a_tensor_is_found_out(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state_of(1), 1, keep_last=1)
    content = path.read_bytes()
    position = content.index(state_of(1)["model"]["a.weight"].numpy().tobytes())
    for offset in (0, 2401, 4799):
        damaged = bytearray(content)
        damaged[position + offset] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="fails its checksum"):
            checkpoint.load(path)
    path.write_bytes(content)
    assert_is(checkpoint.load(path), 1)


def test_a_flipped_bit_anywhere_is_found_out_or_changes_nothing(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state_of(1), 1, keep_last=1)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    found = 0
    for position, bit in zip(generator.integers(0, len(content), 150), generator.integers(0, 8, 150), strict=True):
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.load(path)
        except ValueError:
            found += 1
        else:
            assert_is(loaded, 1)
    assert found > 100


def test_another_archive_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="it is not a training checkpoint"):
        checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"nonsense")
    with pytest.raises(ValueError, match="can't be used"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match="can't be used"):
        checkpoint.load(tmp_path / "missing.pt")


def test_exported_encoder(tmp_path: Path) -> None:
    encoder = Encoder("resnet18", 1 / 16, "cifar").to(memory_format=torch.channels_last)
    path = tmp_path / "encoder.safetensors"
    export_encoder(path, encoder, {"arch": "resnet18", "width": "0.0625"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"arch": "resnet18", "width": "0.0625"}
        assert set(file.keys()) == set(encoder.state_dict())
    again = Encoder("resnet18", 1 / 16, "cifar")
    initialize(again, str(path), "resnet18", 1 / 16)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), encoder.state_dict().values(), strict=True)
    )
    assert names(tmp_path) == ["encoder.safetensors"]


def test_a_disk_that_is_away_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.save(tmp_path, state_of(1), 1, 2)

    def away(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", away)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.newest(tmp_path, print)
    assert path.exists() and not list(tmp_path.glob("*.damaged"))

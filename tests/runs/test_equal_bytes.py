"""Equal runs write equal bytes, so that a hash can stand for an encoder or a checkpoint."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from simclr_ddp import pretrain
from simclr_ddp.runs.encoder import export_encoder
from simclr_ddp.runs.metrics import TIMED, read_metrics
from tests.support.tiny_run import settings


def test_equal_runs_write_equal_bytes(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a run that was killed and resumed. Of metrics.jsonl the lines without TIMED are equal."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)  # the checkpoint holds the settings, run_dir among them
        options = ("optim.steps=6", "data.workers=0", "log.every_steps=1")
        assert pretrain.main(settings(images, Path("run"), *options)) == 0
    a, b = (tmp_path / name / "run" for name in ("a", "b"))
    for file in ("encoder.safetensors", "checkpoints/step-00000006.pt"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    shutil.copytree(a, tmp_path / "c" / "run")  # as if it had been killed after its fifth step
    (tmp_path / "c" / "run" / "encoder.safetensors").unlink()
    (tmp_path / "c" / "run" / "checkpoints" / "step-00000006.pt").unlink()
    monkeypatch.chdir(tmp_path / "c")
    assert pretrain.main(settings(images, Path("run"), *options)) == 0
    for file in ("encoder.safetensors", "checkpoints/step-00000006.pt"):
        assert (a / file).read_bytes() == (tmp_path / "c" / "run" / file).read_bytes(), file

    lines = [
        [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(r / "metrics.jsonl")]
        for r in (a, b)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    saved = torch.load(a / "checkpoints/step-00000006.pt", weights_only=True)
    assert [json.loads(line) for line in saved["metrics"]] == lines[0]
    with zipfile.ZipFile(a / "checkpoints/step-00000006.pt") as archive:
        assert len({name.partition("/")[0] for name in archive.namelist()}) == 1


def test_the_header_of_an_encoder_is_in_order(tmp_path: Path) -> None:
    """As the library writes it, but for the order of the metadata; and the library reads it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    metadata = {key: f'value of {key}: "\u00e4\\\n\x01"' for key in ("std", "arch", "mean", "step", "width", "Z")}
    written = set()
    for i in range(4):
        export_encoder(tmp_path / f"{i}.safetensors", model, metadata)
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    (content,) = written
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and list(header["__metadata__"]) == sorted(metadata)
    with safe_open(tmp_path / "0.safetensors", "pt") as opened:
        assert opened.metadata() == metadata
    loaded = load_file(tmp_path / "0.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())

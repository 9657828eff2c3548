"""What the package wrote before it was divided into sub-packages still serves: runs, encoders and data sets."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_ddp.data.beton import Beton
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.distributed.runtime import setup
from simclr_ddp.evaluation.features import representations
from simclr_ddp.runs.directory import read_settings
from simclr_ddp.runs.encoder import load_encoder
from simclr_ddp.runs.metrics import read_metrics
from tests.support import processes

OLD = Path(__file__).parent / "before_the_move"
OPTIONS = (
    *("device=cpu", "threads=1", "precision=fp32", "data.size=16", "data.workers=0", "data.loader=torch"),
    *("model.width=0.03125", "model.stem=cifar", "head.out=8", "optim.global_batch_size=8", "optim.steps=16"),
    *("optim.scaling=none", "optim.base_learning_rate=0.1", "optim.warmup_epochs=1"),
    *("checkpoint.every_steps=0", "checkpoint.every_minutes=0", "log.every_steps=1"),
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy, since runs and readers write beside what they find."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


@pytest.fixture
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
    return found


def test_a_paused_run_resumes_to_its_end(old: Path, expected: dict[str, Any]) -> None:
    run_dir = old / "paused"
    before = (run_dir / "metrics.jsonl").read_text()
    (old / "images.beton.json").unlink()  # left behind: the images are the same
    arguments = (f"data.train={old / 'images.beton'}", f"run_dir={run_dir}", *OPTIONS)
    status, output = processes.run("simclr_ddp.pretrain", *arguments)
    assert status == 0 and f"resuming from {run_dir / 'checkpoints' / 'step-00000006.pt'}" in output, output
    assert (run_dir / "metrics.jsonl").read_text().startswith(before), "steps of then were computed again"
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 17))
    # Of weights, running statistics and momentum. Later steps are left out: so small a model multiplies roundings.
    for step, loss in expected["losses"].items():
        assert lines[int(step) - 1]["loss"] == pytest.approx(loss, rel=1e-3), f"step {step}"
    assert [path.name for path in sorted((run_dir / "checkpoints").glob("step-*"))] == [
        "step-00000006.pt",
        "step-00000016.pt",
    ]
    assert load_encoder(run_dir).step == 16 and read_settings(run_dir).optim.steps == 16


@pytest.mark.parametrize("file", ["finished", "finished/encoder.safetensors"])
def test_an_encoder_of_then_gives_the_representations_of_then(file: str, old: Path, expected: dict[str, Any]) -> None:
    loaded, dataset = load_encoder(old / file), open_dataset(str(old / "images.beton"), "train")
    assert loaded.step == 16 and loaded.settings["optim.base_learning_rate"] == 0.1
    runtime = setup("cpu", "fp64", 1)
    h = representations(
        loaded.encoder, dataset, loaded.spec, runtime, batch_size=16, workers=0, loader="torch", title="then"
    )
    torch.testing.assert_close(h, torch.tensor(expected["features"], dtype=h.dtype), rtol=1e-6, atol=1e-6)


def test_a_checkpoint_of_then_gives_its_encoder(old: Path) -> None:
    loaded = load_encoder(old / "paused")
    assert loaded.step == 6 and loaded.file.name == "step-00000006.pt"
    assert loaded.spec[:4] == ("resnet18", 1 / 32, "cifar", 16)


def test_a_data_set_of_then_reads_the_same(old: Path, expected: dict[str, Any]) -> None:
    images, dataset = Beton(old / "images.beton"), open_dataset(str(old / "images.beton"), "train")
    for found in (images, dataset):
        assert found.labels is not None and found.labels.tolist() == expected["labels"]
        assert found.count == 16 and found.classes == ["class0", "class1"]
    assert images.fingerprint() == dataset.fingerprint == expected["fingerprint"]
    (old / "images.beton.json").unlink()
    alone = open_dataset(str(old / "images.beton"), "train")
    assert alone.fingerprint == expected["fingerprint"] and alone.classes is None
    assert [hashlib.sha256(images.image(i).tobytes()).hexdigest()[:16] for i in range(16)] == expected["pixels"]

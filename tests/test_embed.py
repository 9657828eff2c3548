"""simclr_ddp.embed from end to end; tests/evaluation/test_features.py tests what it writes."""

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from simclr_ddp import embed
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.write import write_dataset
from simclr_ddp.evaluation.features import project
from simclr_ddp.runs.encoder import load_encoder, load_head
from tests.evaluation.test_features import alone, of
from tests.support.encoder_run import CHECKPOINT, make_run
from tests.support.output import only_error
from tests.support.ranks import Ranks

QUICK = ("device=cpu", "threads=1", "workers=0", "split=train")


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", images)


def written(folder: Path) -> Path:
    return max(folder.glob("embeddings/*"), key=lambda path: path.stat().st_mtime_ns)


def embed_on_ranks(path: Path, *more: str) -> None:
    assert embed.main([str(path), *QUICK, *more]) == 0


def test_representations_and_embeddings_of_a_checkpoint(run: Path, images: Path) -> None:
    embed_on_ranks(run / CHECKPOINT, "embeddings=true", "precision=fp64")
    file, dataset = written(run), open_dataset(str(images), "train")
    assert file.name.startswith("step00000008-train.") and file.suffix == ".safetensors"
    found = load_file(file)
    torch.testing.assert_close(found["h"], of(run, images))
    torch.testing.assert_close(found["z"], project(found["h"], load_head(load_encoder(run / CHECKPOINT)), alone(), 256))
    assert found["labels"].tolist() == list(dataset.labels if dataset.labels is not None else [])
    with safe_open(file, "np") as opened:
        about = {name: json.loads(value) for name, value in opened.metadata().items()}
    assert about["classes"] == ["class0", "class1"] and about["step"] == 8 and about["split"] == "train"
    assert about["images"] == dataset.fingerprint and about["source"] == str(images)
    embed_on_ranks(run, "views=2")
    averaged = load_file(written(run))
    assert set(averaged) == {"h", "labels"} and averaged["h"].shape == found["h"].shape
    assert len(list((run / "embeddings").iterdir())) == 2, "other settings have another file"


def test_any_ranks_give_the_bytes_of_one(run: Path, ranks: Ranks) -> None:
    found = []
    for world_size in (1, 2, 4):
        more = ("embeddings=true", "views=3", "batch_size=24", "cache=false", f"output={run / str(world_size)}")
        ranks.run(world_size, embed_on_ranks, run / CHECKPOINT, *more)
        found.append(written(run / str(world_size)).read_bytes())
    assert found[0] == found[1] == found[2]


def test_labels_may_be_numbers_or_absent(run: Path, tmp_path: Path, images: Path) -> None:
    write_dataset("spirograph", tmp_path / "numbers.beton", images=9)
    write_dataset(str(images.parent / "train" / "class0"), tmp_path / "unlabelled.beton")
    embed_on_ranks(run, f"data={tmp_path / 'numbers.beton'}")
    assert load_file(written(run))["labels"].shape == (9, 4)
    embed_on_ranks(run, f"data={tmp_path / 'unlabelled.beton'}")
    assert set(load_file(written(run))) == {"h"}


def test_arrays_and_a_table(run: Path, images: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install pyarrow")
    embed_on_ranks(run / CHECKPOINT, "embeddings=true", "format=npy")
    files: dict[str, Path] = {path.name.split(".", 2)[2]: path for path in (run / "embeddings").iterdir()}
    assert set(files) == {"h.npy", "z.npy", "parquet"}
    h, z = (np.load(files[name], allow_pickle=False) for name in ("h.npy", "z.npy"))
    assert h.shape == (40, 64) and z.shape == (40, 16) and h.dtype == z.dtype == np.float32
    table, dataset = parquet.read_table(files["parquet"]).to_pydict(), open_dataset(str(images), "train")
    assert table["index"] == list(range(40)) and set(table["split"]) == {"train"}
    assert dataset.labels is not None and dataset.classes is not None and table["label"] == dataset.labels.tolist()
    assert table["file"] == dataset.file.names() and [n.split("/")[0] for n in table["file"]] == table["class"]
    assert table["class"] == [dataset.classes[i] for i in dataset.labels]


def test_mistakes(
    run: Path, tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_pyarrow(name: str, *arguments: Any, **more: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    (tmp_path / "file").touch()
    alone = shutil.copytree(run, tmp_path / "alone", ignore=shutil.ignore_patterns("checkpoints"))
    for path, more, sentence in (
        (
            alone,
            ("embeddings=true",),
            f"{alone / 'encoder.safetensors'} holds no projection head; give a checkpoint of the run",
        ),
        (run, ("format=npy",), "format=npy: pyarrow, which writes the table of the images, is not installed"),
        (run, ("split=test",), "data.test is empty in the settings of the run; give the images as data=FILE.beton"),
        (run, ("data=nowhere.beton",), "nowhere.beton"),
        (run, (f"output={tmp_path / 'file'}",), f"results can't be written to {tmp_path / 'file'}"),
        (run, ("split=val",), "split=val: unknown value"),
    ):
        assert embed.main([str(path), *QUICK, *more]) == 2, more
        assert sentence in only_error(capfd)
    assert not (run / "embeddings").exists() and not (run / "representations").exists(), "before anything is computed"

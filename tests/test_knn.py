"""simclr_ddp.knn from end to end; tests/evaluation/test_knn.py tests the formula."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_ddp import knn, linear_eval
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.write import write_dataset
from simclr_ddp.evaluation.features import representations
from simclr_ddp.evaluation.knn import knn_predict, leave_one_out_predict
from simclr_ddp.evaluation.scores import wilson
from simclr_ddp.runs import evaluations
from simclr_ddp.runs.encoder import load_encoder
from tests.evaluation.test_features import alone
from tests.support.encoder_run import CHECKPOINT, make_run
from tests.support.output import only_error
from tests.support.ranks import Ranks

QUICK = ("device=cpu", "threads=1", "workers=0", "k=7")


def write_tints(folder: Path, count: int, classes: int) -> Path:
    """An image folder whose classes are tints, with so much noise that some images are taken for another class."""
    generator = np.random.default_rng(count)
    for i in range(count):
        label = i % classes
        pixels = 0.5 + 0.25 * np.sin(label + np.arange(3)) + generator.normal(0, 0.12, 3) + np.zeros((18, 18, 1))
        path = folder / f"class{label}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seven classes to train and test on, two classes, Spirograph numbers, and without labels."""
    folder = tmp_path_factory.mktemp("data")
    for name, count, classes in (("train", 70, 7), ("test", 28, 7), ("two", 20, 2)):
        write_dataset(str(write_tints(folder / name, count, classes)), folder / f"{name}.beton")
    write_dataset(str(folder / "two" / "class0"), folder / "unlabelled.beton")
    write_dataset("spirograph", folder / "numbers.beton", images=30)
    return {path.stem: path for path in folder.glob("*.beton")}


@pytest.fixture
def run(files: dict[str, Path], tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", files["train"], files["test"])


def evaluate(run: Path, *more: str) -> Path:
    """Evaluate on this rank, and return the file that was written last."""
    assert knn.main([str(run), *QUICK, *more]) == 0
    return max(run.glob("evaluations/*.json"), key=lambda path: path.stat().st_mtime_ns)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def representations_of(run: Path, source: Path) -> torch.Tensor:
    loaded, dataset = load_encoder(run), open_dataset(str(source), "test")
    loading: dict[str, Any] = {"batch_size": 256, "workers": 0, "loader": "torch"}
    return representations(loaded.encoder, dataset, loaded.spec, alone("fp32"), title="", **loading)


def test_an_encoder_is_measured_from_end_to_end(
    run: Path, files: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = evaluate(run)
    record, arrays = read(path), evaluations.read_arrays(path)
    train, test = (open_dataset(str(files[name]), name) for name in ("train", "test"))
    assert train.labels is not None and test.labels is not None
    bank, query = (representations_of(run, files[name]) for name in ("train", "test"))
    ranked = knn_predict(bank, train.labels, query, k=7)
    correct = (ranked == torch.from_numpy(test.labels)[:, None]).double()
    result = record["results"]["trained"]
    assert result["top1"] == pytest.approx(correct[:, 0].mean()) and 1 / 7 < result["top1"] < 1
    assert result["top5"] == pytest.approx(correct[:, :5].sum(1).mean()) and result["top1"] < result["top5"] < 1
    assert tuple(result["top1_interval"]) == pytest.approx(wilson(result["top1"], 28))
    assert result["mean_per_class"] == pytest.approx(result["top1"])  # four images of each class
    assert set(record["results"]) == {"trained", "random"}
    assert record["results"]["random"]["top1"] != result["top1"]
    assert record["protocol"] == {
        "name": "knn", "k": 7, "temperature": 0.1, "leave_one_out": False, "views": 0, "seed": 0, "size": 0,
        "precision": "fp32",
    }  # fmt: skip
    assert np.array_equal(arrays["labels"], test.labels)
    assert np.array_equal(arrays["predictions"], ranked[:, 0]) and arrays["predictions"].dtype == np.int64
    printed = capfd.readouterr().out
    rows = {line[:20].strip(): line[20:].split() for line in printed.splitlines()}
    assert rows["test top-1"][0] == f"{result['top1']:.2%}" and len(rows["test top-1"]) == 2
    assert "(k=7, temperature=0.1)" in printed and f"written to {path}" in printed


def test_each_setting_has_its_file_and_all_evaluations_share_representations(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [evaluate(run, *more) for more in ((), ("k=3",), ("temperature=0.5",), ("size=20",), ("views=2",))]
    assert len(set(paths)) == 5 and all(path.with_suffix(".npz").exists() for path in paths)
    assert [read(path)["protocol"]["size"] for path in paths] == [0, 0, 0, 20, 0]
    assert len(list((run / "representations").iterdir())) == 12  # of two encoders, two files and three kinds
    capfd.readouterr()
    quick = ("device=cpu", "threads=1", "workers=0", "strengths=[1]")
    assert linear_eval.main([str(run), *quick, "validation_fraction=0.25"]) == 0
    assert capfd.readouterr().out.count("representations are read from") == 4
    assert evaluate(run, "cache=false") == paths[0] and "read from" not in capfd.readouterr().out


def test_without_test_images_each_image_is_classified_by_the_others(
    files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", files["train"])
    path = evaluate(run, "random_encoder=false")
    labels = open_dataset(str(files["train"]), "train").labels
    expected = leave_one_out_predict(representations_of(run, files["train"]), labels, k=7)[:, 0]
    assert np.array_equal(evaluations.read_arrays(path)["predictions"], expected)
    assert read(path)["protocol"]["leave_one_out"] and read(path)["test"]["split"] == "train"
    shown = capfd.readouterr()
    assert "leave-one-out)" in shown.out and "these are the training images" in shown.err
    assert evaluate(run, "random_encoder=false", f"test={files['train']}") == path


def on_ranks(run: Path, *more: str) -> None:
    assert knn.main([str(run), *QUICK, *more]) == 0


@pytest.mark.parametrize("more", [(), ("test={train}",)])
def test_any_ranks_give_the_result_of_one(
    run: Path, files: dict[str, Path], ranks: Ranks, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for world_size in (1, 2, 4):
        shutil.rmtree(run / "representations", ignore_errors=True)
        ranks.run(world_size, on_ranks, run, *(text.format(**files) for text in more))
        (path,) = run.glob("evaluations/*.json")
        record = read(path)
        assert record["runtime"]["world_size"] == world_size
        metrics = [{k: v for k, v in r.items() if "seconds" not in k} for r in record["results"].values()]
        found.append((metrics, evaluations.read_arrays(path)["predictions"].tolist()))
    assert found[0] == found[1] == found[2] and len(set(found[0][1])) > 2


def test_mistakes(files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", files["train"], files["test"])
    broken = make_run(tmp_path / "broken", files["train"], files["test"])
    saved = torch.load(broken / CHECKPOINT, weights_only=True)
    saved["model"]["encoder.conv1.weight"].fill_(float("nan"))
    torch.save(saved, broken / CHECKPOINT)
    (tmp_path / "foreign.safetensors").write_bytes((run / "encoder.safetensors").read_bytes()[:-100])
    for path, more, sentence in (
        (run, ("k=71",), "k=71: the bank holds 70 vectors; choose k from 1 to 70"),
        (run, ("k=70", "test={train}"), "k=70: each of 70 vectors has 69 neighbours; choose a smaller k"),
        (run, ("k=0",), "k=0: too small; must be at least 1"),
        (run, ("temperature=0",), "temperature=0.0: too small"),
        (run, ("train={unlabelled}",), "train={unlabelled}: has no labels"),
        (run, ("train={two}",), "test={test}: train={two} has no class class2"),
        (run, ("train={numbers}", "test={numbers}"), "train={numbers}: its labels are numbers, not classes; use"),
        (broken / CHECKPOINT, (), "representations of the trained encoder are not finite; use an earlier checkpoint"),
        (run / "encoder.safetensors", ("views=2", "output={nowhere}/x"), "results can't be written to {nowhere}/x"),
        (tmp_path / "foreign.safetensors", (), "foreign.safetensors can't be read as safetensors"),
    ):
        (tmp_path / "nowhere").touch()
        names = files | {"nowhere": tmp_path / "nowhere"}
        assert knn.main([str(path), *QUICK, *(text.format(**names) for text in more)]) == 2, more
        assert sentence.format(**names) in only_error(capfd)
    assert not list(tmp_path.glob("*/evaluations/*"))

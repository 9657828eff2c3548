import json
import shutil
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simclr_ddp import linear_eval
from simclr_ddp.data import dataset as dataset_module
from simclr_ddp.data.beton import sidecar
from simclr_ddp.data.crops import resize_crop
from simclr_ddp.data.dataset import Dataset, open_dataset
from simclr_ddp.data.spirograph import TARGETS
from simclr_ddp.data.write import write_dataset
from simclr_ddp.distributed.runtime import setup
from simclr_ddp.evaluation import linear, logistic, logistic_path
from simclr_ddp.evaluation.features import representations
from simclr_ddp.evaluation.labels import number_names, open_labelled
from simclr_ddp.evaluation.table import table
from simclr_ddp.runs import checkpoint, evaluations
from simclr_ddp.runs.directory import read_settings
from simclr_ddp.runs.encoder import encoder_metadata, load_encoder, random_encoder
from simclr_ddp.system import console
from tests.conftest import write_images
from tests.support import processes
from tests.support.old_files import as_before, without_description
from tests.support.parity_run import settings, train
from tests.support.ranks import Ranks

STEPS = 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Path]:
    """Small data sets: two classes of images to train and test on, three classes, Spirograph, and without labels."""
    folder = tmp_path_factory.mktemp("data")
    found = {"train": images}
    (folder / "one" / "class1").mkdir(parents=True)  # a class without images
    for name, count, classes in (("test", 30, 2), ("three", 30, 3), ("one", 20, 1)):
        write_dataset(str(write_images(folder / name, count, classes=classes, seed=1)), folder / f"{name}.beton")
    write_dataset(str(folder / "one" / "class0"), folder / "unlabelled.beton")
    for split in ("train", "test"):
        write_dataset("spirograph", folder / f"spirograph-{split}.beton", images=256, split=split)
    return found | {path.stem: path for path in folder.glob("*.beton")}


@pytest.fixture(scope="module")
def trained(files: dict[str, Path], ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ten steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    more = ("precision=fp32", f"data.test={files['test']}", "checkpoint.every_steps=5", f"optim.steps={STEPS}")
    ranks.run(1, train, settings(files["train"], run_dir, "data.size=16", *more))
    return run_dir


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluate(path: Path, *more: str) -> dict[str, Any]:
    quick = ("device=cpu", "threads=1", "workers=0", "--debug")
    assert linear_eval.main([str(path), *quick, *more]) == 0
    return newest(path)


def newest(path: Path) -> dict[str, Any]:
    """The record written last for a run, or for a file of one."""
    places = [folder / "evaluations" for folder in (path, path.parent, path.parent.parent)]
    written = [file for folder in places for file in folder.glob("*.json")]
    found: dict[str, Any] = json.loads(max(written, key=lambda file: file.stat().st_mtime_ns).read_text())
    return found


def evaluate_on_ranks(path: Path, *more: str) -> None:
    """What each of the ranks does; rank 0 alone leaves a file."""
    quick = ("device=cpu", "threads=1", "workers=0", "--debug")
    assert linear_eval.main([str(path), *quick, *more]) == 0


def without_seconds(results: dict[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in result.items() if not k.endswith("_seconds")} for name, result in results.items()}


def test_a_run_is_evaluated_from_end_to_end(
    run: Path, files: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    record = evaluate(run, "validation_fraction=0.25")
    result = record["results"]["trained"]
    assert result["top1"] > 0.75  # a class is a tint; chance is one half
    low, high = result["top1_interval"]
    assert low < result["top1"] < high and 0.7 < result["mean_per_class"] <= 1
    assert result["top5"] is None and set(record["results"]) == {"trained", "random"}
    tried = result["validation"]
    np.testing.assert_allclose([t["strength"] for t in tried], np.logspace(-6, 5, 45))  # C, from strong to weak
    np.testing.assert_allclose([t["l2"] for t in tried], 1 / (2 * 30 * np.logspace(-6, 5, 45)))
    best = max(tried, key=lambda t: (t["top1"], t["l2"]))
    assert result["strength"] == best["strength"] and result["validation_top1"] == best["top1"]
    assert all(t["converged"] and t["gradient"] <= 1e-6 for t in tried)
    assert result["converged"] and result["gradient"] <= 1e-6 and result["features"] == 32
    assert record["train"]["images"] == 40 and record["test"]["images"] == 30 and record["validation_images"] == 10
    assert record["test"]["fingerprint"] == open_dataset(str(files["test"]), "test").fingerprint
    assert record["encoder"]["size"] == 16 and record["settings"]["tolerance"] == 1e-6
    assert record["objective"] == "1/2 |W|^2 + C * sum of cross-entropy over images"
    assert record["runtime"]["precision"] == "fp32" and record["seconds"] > 0
    printed = capfd.readouterr().out
    assert printed.count("images are decoded by") == 1, "which loader was taken is said once"
    rows = {line[:20].strip(): line[20:].split() for line in printed.splitlines()}
    assert rows["test top-1"][0] == f"{result['top1']:.2%}" and len(rows["test top-1"]) == 2
    assert rows["strength (C)"][0] == f"{result['strength']:.3g}"
    for title in ("validation top-1", "95 % interval", "test mean per class", "relative gradient", "seconds, solving"):
        assert rows[title], title
    assert "random encoder" in printed and "no top-5: with 2 classes" in printed and record["objective"] in printed
    assert "trained encoder, train: 40 of 40 images" in printed and "images/s" in printed
    assert "random encoder: 45 of 45 strengths" in printed
    assert not list(run.glob(".*.tmp"))
    per_image = evaluations.read_arrays(evaluations.read_all(run)[0][0].path)
    labels = open_dataset(str(files["test"]), "test").labels
    assert labels is not None
    np.testing.assert_array_equal(per_image["labels"], labels)
    assert (per_image["predictions"] == labels).mean() == result["top1"]
    np.testing.assert_array_equal(per_image["ranks"] == 0, per_image["predictions"] == labels)


def test_images_may_be_larger_than_the_views_of_training(run: Path) -> None:
    """Figures of size=16, the run's own, are those without it; those of size=24 are others and say so."""
    quick = ("validation_fraction=0.25", "strengths=[0.01]", "random_encoder=false")
    own, same, larger = (evaluate(run, *quick, *more) for more in ((), ("size=16",), ("size=24",)))
    assert [r["encoder"]["size"] for r in (own, same, larger)] == [16, 16, 24]
    own, same, larger = (without_seconds(r["results"])["trained"] for r in (own, same, larger))
    assert own == same and own["gradient"] != larger["gradient"]


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_representations_are_those_of_the_whole_image_in_order(
    trained: Path, files: dict[str, Path], loader: str, precision: str
) -> None:
    loaded, dataset = load_encoder(trained), open_dataset(str(files["train"]), "train")
    runtime = setup("cpu", precision, 1)
    expected = []
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (loaded.spec.mean, loaded.spec.std))
    oracle = load_encoder(trained).encoder.double().eval()
    assert dataset.images is not None
    for i in range(dataset.count):
        picture = dataset.images.jpeg(i)
        pixels = torch.from_numpy(resize_crop(picture, (0, 0, picture.height, picture.width), 16).copy())
        with torch.no_grad():
            expected.append(oracle(((pixels.permute(2, 0, 1) / 255.0).double() - mean).div(std)[None])[0])
    h = representations(
        loaded.encoder,
        dataset,
        loaded.spec,
        runtime,
        batch_size=7,
        workers=0,
        loader=loader,
        title="the trained encoder",
    )
    assert h.dtype == runtime.dtype
    tolerance = {"fp32": 1e-5, "fp64": 1e-6, "bf16": 0.1}[precision]
    torch.testing.assert_close(h.double(), torch.stack(expected), rtol=tolerance, atol=tolerance)


def test_a_crop_shows_the_centre_of_an_image(run: Path, trained: Path, files: dict[str, Path], loader: str) -> None:
    loaded, dataset = load_encoder(trained), open_dataset(str(files["train"]), "train")
    assert dataset.images is not None
    cut = loaded._replace(spec=loaded.spec._replace(size=24, crop=0.5))
    h = representations(
        cut.encoder, dataset, cut.spec, setup("cpu", "fp64", 1), batch_size=7, workers=0, loader=loader, title="crop"
    )
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (loaded.spec.mean, loaded.spec.std))
    for i in (0, 39):
        picture = dataset.images.jpeg(i)
        side = round(0.5 * min(picture.size))
        box = ((picture.height - side) // 2, (picture.width - side) // 2, side, side)
        pixels = torch.from_numpy(resize_crop(picture, box, 24).copy()).permute(2, 0, 1) / 255.0
        expected = loaded.encoder.double()(((pixels.double() - mean) / std)[None])[0].detach()
        torch.testing.assert_close(h[i], expected, rtol=1e-6, atol=1e-6)
    quick = ("strengths=[1]", "random_encoder=false", "size=24")
    whole, centre = evaluate(run, *quick), evaluate(run, *quick, "crop=0.5")
    assert centre["encoder"]["crop"] == 0.5 and whole["encoder"]["crop"] == 0
    assert whole["results"]["trained"]["gradient"] != centre["results"]["trained"]["gradient"]
    assert len(list((run / "evaluations").glob("*.json"))) == 2


def test_validation_images_choose_the_strength_and_are_then_trained_on(run: Path, files: dict[str, Path]) -> None:
    record = evaluate(run, f"validation={files['one']}", "strengths=[0.01,1]", "random_encoder=false")
    found = record["results"]["trained"]
    assert record["validation_images"] == record["validation"]["images"] == 20

    loaded, train = load_encoder(run), open_dataset(str(files["train"]), "train")
    held, test = (open_dataset(str(files[name]), "test") for name in ("one", "test"))
    loading: dict[str, Any] = {"batch_size": 256, "workers": 0, "loader": "auto", "title": ""}
    x, x_held, x_test = (
        representations(loaded.encoder, dataset, loaded.spec, setup("cpu", "fp32", 1), **loading).double()
        for dataset in (train, held, test)
    )
    x, labels = torch.cat([x, x_held]), torch.cat([torch.from_numpy(train.labels), torch.zeros(20, dtype=torch.int64)])
    features = logistic.standardized(x)
    x, x_test = ((z - features.mean) * features.factor for z in (x, x_test))
    rows, everything = torch.arange(40), torch.arange(60)
    for tried in found["validation"]:
        (model,) = logistic.solutions(features, labels, rows, [logistic.ridge("C", tried["strength"], 40)], classes=2)
        assert tried["top1"] == pytest.approx((model.predict(x[40:]).argmax(1) == 0).double().mean().item(), abs=0.051)
    (model,) = logistic.solutions(features, labels, everything, [logistic.ridge("C", found["strength"], 60)], classes=2)
    correct = (model.predict(x_test).argmax(1) == torch.from_numpy(test.labels)).double().mean().item()
    assert found["top1"] == pytest.approx(correct, abs=0.034)  # one of the 30 images may lie at the boundary


def test_validation_images_are_no_test_images(run: Path, files: dict[str, Path]) -> None:
    more = (f"test={files['train']}", f"validation={files['one']}", "strengths=[1]", "random_encoder=false")
    record = evaluate(run, *more)
    assert record["test"]["images"] == 40 and record["validation_images"] == 20


def gathered(run_dir: Path, file: Path, precision: str) -> Tensor:
    runtime = setup("cpu", precision, 1)
    loaded, dataset = load_encoder(run_dir), open_dataset(str(file), "train")
    return representations(
        loaded.encoder, dataset, loaded.spec, runtime, batch_size=13, workers=0, loader="auto", title="all"
    )


def test_any_ranks_give_the_representations_of_one(trained: Path, files: dict[str, Path], ranks: Ranks) -> None:
    # Three ranks: 14, 13 and 13 of 40 images in batches of 13, so that rank 0 alone has a second one.
    (alone,) = ranks.run(1, gathered, trained, files["train"], "fp64")
    assert alone.shape == (40, 32) and len(alone.unique(dim=0)) == 40
    for world_size in (2, 3):
        first, *others = ranks.run(world_size, gathered, trained, files["train"], "fp64")
        torch.testing.assert_close(first, alone, rtol=1e-12, atol=1e-12)
        assert all(h.shape == (0, 32) for h in others)


def test_two_ranks_evaluate_as_one(run: Path, ranks: Ranks) -> None:
    records = []
    for world_size in (1, 2):
        ranks.run(world_size, evaluate_on_ranks, run, "precision=fp64", "cache=false")
        records.append(newest(run))
    one, two = records
    assert one["runtime"]["world_size"] == 1 and two["runtime"]["world_size"] == 2
    for name in ("trained", "random"):
        a, b = one["results"][name], two["results"][name]
        for key in ("top1", "top1_interval", "mean_per_class", "strength"):
            assert a[key] == b[key]
        assert [t["top1"] for t in a["validation"]] == [t["top1"] for t in b["validation"]]


def test_directory_checkpoint_and_exported_encoder_agree(
    run: Path, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    exported = evaluate(run)
    assert exported["step"] == 10 and exported["file"].endswith("encoder.safetensors")
    figures = without_seconds(exported["results"])
    assert without_seconds(evaluate(run / "encoder.safetensors")["results"]) == figures

    last = run / "checkpoints" / f"step-{STEPS:08d}.pt"
    record = evaluate(last)
    assert record["step"] == STEPS and without_seconds(record["results"]) == figures
    assert not (last.parent / "evaluations").exists(), "a run has one folder of evaluations"
    (only,) = run.glob("evaluations/*.json")  # equal weights, images and settings are one evaluation
    assert only.name.startswith(f"step00000010.{record['hash'][:8]}-test.") and "-linear." in only.name
    kept = only.read_bytes()
    early = evaluate(last.with_name("step-00000005.pt"), "random_encoder=false")
    assert early["step"] == 5 and set(early["results"]) == {"trained"}
    weights = [load_encoder(last.with_name(f"step-{step:08d}.pt")).encoder.conv1.weight for step in (5, STEPS)]
    assert not torch.equal(*weights) and early["hash"] != record["hash"]
    evaluate(run, "strengths=[1]", "random_encoder=false")
    evaluate(run, f"test={files['train']}", "strengths=[1]", "random_encoder=false")
    assert len(list(run.glob("evaluations/*.json"))) == 4 and only.read_bytes() == kept, "none replaces another"

    alone = Path(shutil.copy(run / "encoder.safetensors", tmp_path / "alone.safetensors"))
    given = evaluate(alone, f"train={files['train']}", f"test={files['test']}")
    assert without_seconds(given["results"]) == figures and list(tmp_path.glob("evaluations/*.json"))

    # Without an exported encoder: the newest valid checkpoint; a damaged one stays where it is.
    (run / "encoder.safetensors").unlink()
    last.write_bytes(last.read_bytes()[:-100])
    capfd.readouterr()
    assert evaluate(run, "random_encoder=false")["step"] == 5
    assert "using the previous checkpoint" in capfd.readouterr().err and last.exists()


def test_results_have_another_place_and_are_printed_before_they_can_be_lost(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    quick = ("device=cpu", "threads=1", "workers=0", "strengths=[1]", "random_encoder=false")
    assert linear_eval.main([str(run), *quick, f"output={tmp_path / 'results'}"]) == 0
    assert len(list((tmp_path / "results").glob("evaluations/*.json"))) == 1 and not (run / "evaluations").exists()

    (tmp_path / "file").touch()
    capfd.readouterr()
    assert linear_eval.main([str(run), *quick, f"output={tmp_path / 'file'}"]) == 2
    out, err = capfd.readouterr()
    assert "results can't be written" in err and "output=" in err and err.count("\n") == 1
    assert "trained encoder" not in out, "this is known before anything is computed"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluations, "write", full)
    assert linear_eval.main([str(run), *quick]) == 2
    out, err = capfd.readouterr()
    assert "test top-1" in out and "the results above are not written" in err and "output=" in err
    assert not list(run.glob("evaluations/*"))
    monkeypatch.undo()

    def closed(text: str) -> None:
        if "95 % interval" in text:
            raise BrokenPipeError(32, "Broken pipe")  # as in `linear_eval RUN | head`

    monkeypatch.setattr(console, "say", closed)
    assert linear_eval.main([str(run), *quick]) == 2 and len(list(run.glob("evaluations/*.json"))) == 1


def test_a_run_that_deletes_its_checkpoints_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with checkpoint.keep_last=1: a file may go before it is opened, or while it is read."""
    (run / "encoder.safetensors").unlink()
    listed, check, gone = checkpoint.all_steps, zipfile.ZipFile.testzip, run / "checkpoints/step-00000009.pt"
    monkeypatch.setattr(checkpoint, "all_steps", lambda folder: [gone] if not seen else listed(folder))
    seen: list[str] = []

    class Watched(type(Path())):  # type: ignore[misc]
        def exists(self) -> bool:
            seen.append(str(self))
            return super().exists()

    gone = Watched(gone)

    def deleted_meanwhile(archive: zipfile.ZipFile) -> str | None:
        (run / f"checkpoints/step-{STEPS:08d}.pt").unlink()
        return check(archive)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", deleted_meanwhile)
    assert load_encoder(run).step == STEPS and seen == [str(gone)]


@pytest.mark.slow
def test_an_evaluation_that_hangs_ends_with_a_sentence(run: Path) -> None:
    code = f"""
import sys, time
from simclr_ddp import linear_eval
from simclr_ddp.distributed import watchdog
from simclr_ddp.evaluation import features
watchdog.PREPARING = 1
features.evaluation_batches = lambda *_, **__: (time.sleep(1000) for _ in range(2))
sys.exit(linear_eval.main(["{run}", "device=cpu", "timeout=3"]))
"""
    status, output = processes.finish(processes.start_command([sys.executable, "-c", code]))
    last = output.splitlines()[-1]
    assert (
        status == 1 and last.startswith("error: nothing has moved for ") and "at step 0 (its first), its data" in last
    )
    assert last.endswith("timeout=... gives a step more time; start the command again")


def test_test_images_may_lack_classes(run: Path, files: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    more = (f"train={files['three']}", f"test={files['test']}", "strengths=[1]", "random_encoder=false")
    result = evaluate(run, *more)["results"]["trained"]
    arrays = evaluations.read_arrays(evaluations.read_all(run)[0][0].path)
    right = arrays["predictions"] == arrays["labels"]
    assert result["mean_per_class"] == pytest.approx(np.mean([right[arrays["labels"] == c].mean() for c in (0, 1)]))
    assert "(no test images of 1 of 3 classes, which count in no mean: class2)" in capfd.readouterr().out


def test_spirograph_files_are_regressed(
    trained: Path, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = Path(shutil.copy(trained / "encoder.safetensors", tmp_path))
    more = [f"{split}={files[f'spirograph-{split}']}" for split in ("train", "test")]
    record = evaluate(encoder, *more, "convention=mean", "strengths=[1e-3,1e-2,1e-1,1]")
    results = record["results"]
    y_train, y_test = (open_dataset(text.partition("=")[2], "train").labels for text in more)
    assert y_train is not None and y_test is not None
    baseline = ((y_test.astype(float) - y_train.astype(float).mean(0)) ** 2).mean(0)
    assert list(results["predict_the_mean"]["mse_of"]) == list(TARGETS)
    np.testing.assert_allclose(list(results["predict_the_mean"]["mse_of"].values()), baseline, rtol=1e-6)
    assert results["predict_the_mean"]["mse"] == pytest.approx(baseline.mean(), rel=1e-6)
    for name in ("trained", "random"):
        assert results[name]["mse"] == pytest.approx(np.mean(list(results[name]["mse_of"].values())))
        tried = results[name]["validation"]
        assert results[name]["strength"] == min(tried, key=lambda t: t["mse"])["strength"]
    assert results["trained"]["mse"] < 0.9 * min(results[name]["mse"] for name in ("random", "predict_the_mean"))
    (written,) = encoder.parent.glob("evaluations/*.json")
    errors = evaluations.read_arrays(written)["squared_error"]
    assert errors.shape == y_test.shape[:1] and errors.mean() == pytest.approx(results["trained"]["mse"])
    printed = capfd.readouterr().out
    assert "predict the mean" in printed and all(f"test MSE, {name}" in printed for name in TARGETS)


def test_the_generated_set_is_regressed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "SPIROGRAPH_IMAGES", {"train": 200, "test": 100})
    encoder = Path(shutil.copy(trained / "encoder.safetensors", tmp_path))
    record = evaluate(encoder, "train=spirograph", "test=spirograph", "random_encoder=false")
    assert record["train"] == {
        "source": "spirograph",
        "split": "train",
        "fingerprint": "spirograph-train-200",
        "images": 200,
        "labels": "4 numbers",
        "classes": None,
    }
    assert record["results"]["trained"]["mse"] < record["results"]["predict_the_mean"]["mse"]


def test_the_random_encoder_belongs_to_the_seed(run: Path) -> None:
    spec = load_encoder(run).spec
    state = torch.get_rng_state()
    one, again, other = (random_encoder(spec, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, again[k]) for k, v in one.items())
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
    first, second, third = (evaluate(run, f"seed={seed}", "strengths=[1e-3]")["results"] for seed in (1, 1, 2))
    assert without_seconds(first) == without_seconds(second)
    assert first["random"]["gradient"] != third["random"]["gradient"]
    assert first["trained"]["gradient"] == third["trained"]["gradient"]  # one strength: no split, no seed


def test_classes_are_compared_by_name(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Classes of the training set are caf\u00e9, dog, owl; test sets name them in other ways and lack some of them."""
    named = {"class0": "cafe\u0301", "class1": "dog", "class2": "owl"}  # decomposed, as on a Mac
    for split, seed in (("train", 0), ("test", 1)):
        folder = write_images(tmp_path / split, 60, classes=3, seed=seed)
        for old, new in named.items():
            (folder / old).rename(folder / (new if split == "train" else unicodedata.normalize("NFC", new)))
        write_dataset(str(folder), tmp_path / f"{split}.beton")
    shutil.copytree(tmp_path / "train", tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "dog")
    (tmp_path / "fewer" / "a").mkdir()  # an unknown name without images harms nothing
    write_dataset(str(tmp_path / "fewer"), tmp_path / "fewer.beton")
    train, test, fewer = (tmp_path / f"{name}.beton" for name in ("train", "test", "fewer"))
    loaded = load_encoder(run)
    given = {"train": str(train), "test": str(test)}
    names = ["caf\u00e9", "dog", "owl"]
    for expected in (given, given | {"test": str(fewer)}):
        sidecar(Path(expected["test"])).unlink()  # what is in the file counts
        one, other, _ = open_labelled(expected, loaded)
        raw = open_dataset(expected["test"], "test")
        assert one.classes == other.classes == names and raw.classes is not None and raw.labels is not None
        assert other.labels is not None
        assert [names[i] for i in other.labels] == [raw.classes[i] for i in raw.labels]
    assert open_dataset(str(fewer), "test").classes == ["a", "caf\u00e9", "owl"]
    more = (f"train={train}", f"test={fewer}", "random_encoder=false", "strengths=[1e5]")
    assert evaluate(run, *more)["results"]["trained"]["top1"] == 1, "it was fitted to these images"
    assert capfd.readouterr().err == ""


def test_a_file_without_names_is_evaluated_against_itself_only(run: Path, files: dict[str, Path]) -> None:
    bare = shutil.copy(files["train"], run / "bare.beton")
    bare.write_bytes(without_description(bare))
    record = evaluate(run, f"train={bare}", f"test={bare}", "random_encoder=false", "strengths=[1]")
    assert record["results"]["trained"]["top1"] > 0.7


def test_the_test_images_choose_nothing(run: Path, files: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    records = [evaluate(run, f"test={files[name]}") for name in ("test", "train")]
    assert "these are the training images" in capfd.readouterr().err
    one, two = (record["results"]["trained"] for record in records)
    assert one["validation"] == two["validation"] and one["strength"] == two["strength"]
    assert one["gradient"] == two["gradient"] and one["top1"] != two["top1"]
    assert [record["test"]["split"] for record in records] == ["test", "train"]
    # The images that the encoder was trained on, wherever they are now.
    moved = Path(shutil.copy(files["train"], run / "moved.beton"))
    shutil.copy(f"{files['train']}.json", f"{moved}.json")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(files["train"]), "gone.beton"))
    swapped = evaluate(run, f"train={files['test']}", f"test={moved}", "strengths=[1]", "random_encoder=false")
    assert swapped["test"]["split"] == "train" and "training images of the run" in capfd.readouterr().err


def toy(labels: np.ndarray, count: int = 80) -> tuple[Tensor, Dataset]:
    """Five noisy features that depend on the labels, in float64, and a data set of these labels."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(count, 5)) + labels[:, None])
    return x, Dataset("here", count, labels, None, "")


def evaluate_toy(x: Tensor, train: Dataset, test: Dataset, **changed: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    protocol, held = linear.Protocol(**{"strengths": (), **changed}), np.arange(80) < 20
    return linear.evaluate(x.clone(), x.clone(), train, test, held, protocol, torch.device("cpu"), "trained")[0]


def test_labels_of_the_test_images_do_not_reach_the_choice() -> None:
    x, dataset = toy(np.arange(80) % 2)
    shuffled = Dataset("there", 80, np.random.default_rng(1).permutation(80) % 2, None, "")
    one, other = evaluate_toy(x, dataset, dataset), evaluate_toy(x, dataset, shuffled)
    for key in ("strength", "validation", "validation_top1", "gradient", "iterations"):
        assert one[key] == other[key]
    assert one["top1"] > 0.9 and other["top1"] < 0.7


def test_the_mean_over_classes_may_choose_the_strength() -> None:
    labels = (np.arange(80) % 10 == 0).astype(np.int64)  # one image in ten
    x, dataset = toy(labels)
    chosen = {metric: evaluate_toy(x / 4, dataset, dataset, metric=metric) for metric in ("top1", "mean_per_class")}
    by_mean = chosen["mean_per_class"]
    assert by_mean["validation_mean_per_class"] == max(c["mean_per_class"] for c in by_mean["validation"])
    strongest = {metric: record["validation"][0][metric] for metric, record in chosen.items()}
    assert strongest == {"top1": 0.9, "mean_per_class": 0.5}, "it predicts one class for all"


def test_a_strength_has_the_same_meaning_in_both_conventions() -> None:
    x, dataset = toy(np.arange(80) % 2)
    one = evaluate_toy(x, dataset, dataset, strengths=[1e-3], tolerance=1e-10)
    other = evaluate_toy(x, dataset, dataset, convention="mean", strengths=[1 / (2 * 80 * 1e-3)], tolerance=1e-10)
    assert one["validation"] == [] and one["validation_top1"] is None
    assert {**one, "strength": 0, "solve_seconds": 0} == {**other, "strength": 0, "solve_seconds": 0}


def test_fits_that_stopped_early_and_the_end_of_the_path_are_said(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ("max_iterations=1", "tolerance=1e-9", "random_encoder=false")
    record = evaluate(run, *more, "convention=mean", "strengths=[1e-3,1e-2]")
    assert not record["results"]["trained"]["converged"]
    assert record["objective"] == "mean of cross-entropy over images + strength * |W|^2"
    said = capfd.readouterr().err
    assert "L-BFGS did not reach tolerance=1e-09 in 3 of 3 fits, including the fit to all training images" in said
    end = {1e-2: "strongest", 1e-3: "weakest"}[record["results"]["trained"]["strength"]]
    assert f"is the {end} penalty on the path" in said


def test_a_path_that_memory_can_not_hold_ends_before_the_forward_passes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logistic_path, "available_bytes", lambda: 10_000)
    assert linear_eval.main([str(run), "device=cpu", "cache=false"]) == 2
    said = capfd.readouterr().err
    assert "error: strengths: 45 of them with 32 features and 2 classes need 0.0 GiB" in said and "encoder" not in said


def test_six_classes_have_a_top5() -> None:
    labels = np.arange(12) % 6
    dataset = Dataset("here", 12, labels, [f"class {i}" for i in range(6)], "")
    ranks = torch.tensor([5] + [4] * 2 + [0] * 9)
    metrics = linear.classification_metrics(ranks, torch.from_numpy(labels), 6)
    expected = {"top1": 9 / 12, "top5": 11 / 12, "mean_per_class": 9 / 12}  # two of each class
    assert {k: metrics[k] for k in expected} == pytest.approx(expected)
    text = table({"trained": metrics}, dataset, dataset, "C")
    assert ["test", "top-5", "91.67%"] in [line.split() for line in text.splitlines()] and "no top-5" not in text
    assert linear.classification_metrics(ranks.clamp_max(4), torch.from_numpy(labels), 5)["top5"] is None


def test_units_of_the_features_do_not_matter() -> None:
    x, dataset = toy(np.arange(80) % 2)
    one, other = (evaluate_toy(v, dataset, dataset) for v in (x, 1000 * x * torch.arange(1, 6) + 7))
    for tried, again in zip(one["validation"], other["validation"], strict=True):
        assert abs(tried["iterations"] - again["iterations"]) <= 1 and tried["top1"] == again["top1"]
    assert one["top1"] == other["top1"] and one["strength"] == other["strength"]


def test_names_of_the_numbers() -> None:
    numbers = np.zeros((3, 4), np.float32)
    assert number_names(Dataset("spirograph", 3, numbers, None, "")) == list(TARGETS)
    other = Dataset("other", 3, numbers[:, :2], None, "")
    assert number_names(other) == ["number 0", "number 1"]


ERRORS = {
    "no such run": (["{here}/nothing"], "{here}/nothing does not exist; give a run directory"),
    "no encoder": (["{here}"], "{here} contains neither encoder.safetensors nor a valid checkpoint"),
    "unlabelled": (["{run}", "train={unlabelled}"], "train={unlabelled}: has no labels"),
    "empty test": (
        ["{run}/without_test.pt"],
        "data.test is empty in the settings of the run; give the test images as test=FILE.beton",
    ),
    "unknown data": (["{here}/alone.safetensors"], "data.train is not known without the run's settings"),
    "other classes": (
        ["{run}", "test={three}"],
        "test={three}: train={train} has no class class2, only class0, class1; give test images of its classes",
    ),
    "no names": (["{run}", "test={bare}"], "test={bare}: holds no class names, so its classes can't be compared"),
    "no names to train on": (["{run}", "train={bare}"], "train={bare}: holds no class names"),
    "a name twice": (["{run}", "test={twice}"], "test={twice}: names class caf\u00e9 twice"),
    "not trained on": (["{run}", "train={empty-class}", "test={three}"], "class 2 (class2) has no image in train="),
    "one class": (["{run}", "train={one}", "test={one}"], "train={one}: has only one class"),
    "mixed kinds": (
        ["{run}", "test={spirograph-test}"],
        "its labels are classes, but those of test={spirograph-test} are 4 num",
    ),
    "foreign .pt": (["{here}/foreign.pt"], "it is not a training checkpoint; give a checkpoint of a training run"),
    "no settings": (["{here}/bare.pt"], "{here}/bare.pt contains no settings of a pretraining run"),
    "foreign weights": (["{here}/foreign.safetensors"], "has no valid metadata of its encoder (KeyError 'mean')"),
    "no weights": (["{here}/broken.safetensors"], "broken.safetensors can't be read as safetensors"),
    "other weights": (["{here}/wider.safetensors"], "does not contain the resnet18 x 0.125 of its metadata"),
    "not finite": (
        ["{here}/nan.safetensors", "train={train}", "test={test}"],
        "representations of the trained encoder are not finite",
    ),
    "no penalty": (
        ["{run}", "strengths=[0,1]"],
        "strengths=[0.0, 1.0]: with convention=C a strength of 0 is an unbounded penalty",
    ),
    "no validation": (
        ["{run}", "validation_fraction=0.01"],
        "validation_fraction=0.01: of 40 training images, 0 choose the strength",
    ),
    "test for validation": (["{run}", "validation={test}"], "validation={test}: these are the test images"),
    "other validation": (["{run}", "validation={three}"], "validation={three}: train={train} has no class class2"),
    "a fraction and validation": (
        ["{run}", "validation={one}", "validation_fraction=0.3"],
        "validation_fraction=0.3: has no effect, since validation={one} chooses the strength",
    ),
    "nothing to choose": (
        ["{run}", "strengths=[1]", "metric=mean_per_class"],
        "metric=mean_per_class: has no effect, since there is a single strength",
    ),
    "cropped views": (["{run}", "views=2", "crop=1"], "crop=1 would have no effect; set one of them"),
    "cropped drawings": (
        ["{run}", "crop=1", "train=spirograph", "test=spirograph"],
        "crop=1: spirograph is rendered at the size of a view",
    ),
    "all validation": (["{run}", "validation_fraction=1"], "40 choose the strength and 0 are fitted"),
}


@pytest.fixture(scope="module")
def places(trained: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything that is wrong, in a folder `here`."""
    here = tmp_path_factory.mktemp("errors")
    weights, metadata = load_file(trained / "encoder.safetensors"), encoder_metadata(read_settings(trained), 10)
    save_file(weights, here / "alone.safetensors", metadata)
    save_file(weights, here / "foreign.safetensors")
    save_file(weights, here / "wider.safetensors", metadata | {"width": "0.125"})
    save_file({k: v * float("nan") for k, v in weights.items()}, here / "nan.safetensors", metadata)
    (here / "broken.safetensors").write_bytes(b"nothing of the kind")
    torch.save({"conv1.weight": torch.zeros(1)}, here / "foreign.pt")
    torch.save({"step": 1, "model": {}}, here / "bare.pt")
    run = Path(shutil.copytree(trained, here / "run"))
    saved = checkpoint.load(run / "checkpoints" / f"step-{STEPS:08d}.pt")
    saved["config"]["data"]["test"] = ""
    torch.save(saved, run / "without_test.pt")
    more = {"bare": here / "bare.beton", "twice": here / "twice.beton"}
    for path in more.values():
        shutil.copy(files["test"], path)
        shutil.copy(f"{files['test']}.json", f"{path}.json")
        as_before(path)
    sidecar(more["bare"]).unlink()
    info = json.loads(sidecar(more["twice"]).read_text()) | {"classes": ["cafe\u0301", "caf\u00e9"]}
    sidecar(more["twice"]).write_text(json.dumps(info))
    folder = write_images(here / "folder", 24, classes=3)
    for image in (folder / "class2").iterdir():
        image.unlink()
    more["empty-class"] = here / "empty-class.beton"
    write_dataset(str(folder), more["empty-class"])
    return files | {"here": here, "run": run} | more


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_told_in_a_sentence(case: str, places: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    arguments, sentence = ERRORS[case]
    filled = [argument.format(**places) for argument in arguments]
    assert linear_eval.main([*filled, "device=cpu", "threads=1", "workers=0"]) == 2
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence.format(**places) in errors[0] and "Traceback" not in said
    assert not (places["here"] / "evaluations").exists() and not (places["run"] / "evaluations").exists()

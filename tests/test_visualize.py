"""The command end to end: which files it makes of which run, and what it says where it can't."""

import base64
import io
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from simclr_ddp import pretrain, visualize
from simclr_ddp.data import spirograph
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.write import write_dataset
from simclr_ddp.distributed.runtime import setup
from simclr_ddp.evaluation.features import representations
from simclr_ddp.runs import evaluations
from simclr_ddp.runs.encoder import load_encoder
from tests.conftest import write_images
from tests.support import processes
from tests.support.tiny_run import settings

TINY = ("optim.steps=4", "data.workers=0", "log.every_steps=1", "model.width=0.0625")
PCA = {"pca_2d", "pca_2d_thumbnails", "pca_3d", "spectrum", "neighbours"}


def trained(data: Path | str, run_dir: Path, *more: str) -> Path:
    assert pretrain.main([*settings(Path(data), run_dir, *TINY), f"data.train={data}", *more]) == 0
    return run_dir


@pytest.fixture(scope="module")
def run_dir(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 40 labelled images, which are its test images, too."""
    return trained(images, tmp_path_factory.mktemp("visualize") / "run", f"data.test={images}")


def figures(run_dir: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (run_dir / "figures").glob("*.png")}


def atlas(run_dir: Path) -> dict[str, Any]:
    """The data of a run's atlas."""
    text = (run_dir / "figures" / "atlas.html").read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])  # type: ignore[no-any-return]


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2")


def test_every_figure_is_drawn_small_and_the_same_again(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"pca", "tsne"} if find_spec("sklearn") else {"pca"}
    options = [str(run_dir), "images=3", "views=3", "device=cpu"]
    assert visualize.main(options) == 0
    output = capsys.readouterr().out
    made = figures(run_dir)
    kinds = ("2d", "2d_thumbnails", "3d")
    assert made.keys() == {"curves", "views", "spectrum", "neighbours"} | {
        f"{m}_{kind}" for m in methods for kind in kinds
    }
    for name, data in made.items():
        path = run_dir / "figures" / f"{name}.png"
        assert f"plotted {path} ({len(data) / 1000:,.0f} KB)" in output and len(data) < 300_000
        with Image.open(path) as picture:
            assert picture.width == 900 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    assert re.search(r"the model receives values with min -[\d.]+, max [\d.]+, std [\d.]+\n", output)
    assert ("t-SNE of 40 images in 3 dimensions" in output) == ("tsne" in methods)
    page = (run_dir / "figures" / "atlas.html").read_bytes()
    for path in (run_dir / "figures").iterdir():
        path.unlink()
    assert visualize.main(options) == 0
    assert figures(run_dir) == made and (run_dir / "figures" / "atlas.html").read_bytes() == page


def test_the_atlas_holds_the_neighbours_the_classes_and_the_pictures(run_dir: Path, images: Path) -> None:
    assert visualize.main([str(run_dir), "images=1", "views=1", "maps=pca", "points=30", "device=cpu"]) == 0
    data, dataset = atlas(run_dir), open_dataset(str(images), "test")
    assert sorted(set(data["numbers"])) == sorted(data["numbers"]) and len(data["numbers"]) == 30
    assert [drawn["name"] for drawn in data["maps"]] == ["PCA"]
    titles = ["class", "neighbours of the same class", "cluster", "cosine to the nearest neighbour"]
    assert [c["title"] for c in data["colourings"]] == titles

    loaded, index = load_encoder(run_dir), np.array(data["numbers"])
    assert dataset.labels is not None
    labels = dataset.labels[index]
    assert data["colourings"][0]["names"] == ["class0", "class1"]
    np.testing.assert_array_equal(unpacked(data["colourings"][0]["values"]), labels)
    h = normalize(
        representations(
            loaded.encoder,
            dataset,
            loaded.spec,
            setup("cpu", "fp32", 1),
            batch_size=30,
            workers=0,
            loader="torch",
            title="",
            index=index,
        )
    )
    cosines = (h @ h.T).fill_diagonal_(-2).numpy()
    neighbours = unpacked(data["neighbours"]).reshape(30, 12)
    expected = -np.sort(-cosines, axis=1)[:, :12]
    np.testing.assert_allclose(np.take_along_axis(cosines, neighbours.astype(int), 1), expected, atol=1e-5)
    np.testing.assert_allclose(unpacked(data["cosines"]).reshape(30, 12) / 32767.5 - 1, expected, atol=5e-5)
    agreement = (labels[neighbours] == labels[:, None]).mean(1)
    listed = dataset.file.names()
    assert listed is not None and data["names"] == [listed[i] for i in index]
    assert all(name.startswith(f"class{label}/") for name, label in zip(data["names"], labels, strict=True))
    scores = data["colourings"][1]
    found = scores["low"] + (scores["high"] - scores["low"]) * unpacked(scores["values"]) / 65535
    np.testing.assert_allclose(found, agreement, atol=1e-4)

    side = data["side"]
    with Image.open(io.BytesIO(base64.b64decode(data["sheets"][0].partition(",")[2]))) as sheet:
        cell = np.asarray(sheet)[:side, 3 * side : 4 * side].astype(int)
    original = dataset.file.jpeg(int(index[3])).resize((side, side), Image.Resampling.BILINEAR)
    assert np.abs(cell - np.asarray(original).astype(int)).mean() < 6


def test_only_the_first_rank_draws(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert visualize.main([str(run_dir), "maps=none", f"output={tmp_path / 'x'}"]) == 0
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_two_ranks(run_dir: Path, tmp_path: Path) -> None:
    options = [str(run_dir), "images=1", "views=1", "maps=pca", "device=cpu", f"output={tmp_path}"]
    status, output = processes.run("simclr_ddp.visualize", *options, ranks=2)
    assert status == 0, output
    assert figures(tmp_path).keys() == PCA | {"curves", "views"} and len(atlas(tmp_path)["numbers"]) == 40


def test_fewer_points_and_no_maps(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visualize.main([str(run_dir), "images=1", "views=1", "maps=pca", "points=12", "device=cpu"]) == 0
    assert "12 of 12 images" in capsys.readouterr().out
    assert visualize.main([str(run_dir), "images=1", "views=1", "maps=none", "test=nowhere"]) == 0
    assert "pca" not in capsys.readouterr().out


@pytest.mark.parametrize("written", [False, True])
def test_a_spirograph_run(written: bool, tmp_path: Path) -> None:
    source: Path | str = "spirograph"
    if written:
        source = tmp_path / "s.beton"
        write_dataset("spirograph", source, images=32)
    run_dir = trained(source, tmp_path / "run", f"data.test={source}", "data.size=32")
    assert visualize.main([str(run_dir), "images=1", "views=1", "maps=pca", "points=20", "device=cpu"]) == 0
    assert figures(run_dir).keys() == PCA | {"curves", "views"}
    titles = [colouring["title"] for colouring in atlas(run_dir)["colourings"]]
    assert titles[:4] == list(spirograph.TARGETS) and titles[4:] == ["cluster", "cosine to the nearest neighbour"]


def test_a_run_without_labels(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 20, classes=1)
    data = tmp_path / "unlabelled.beton"
    write_dataset(str(folder / "class0"), data)
    run_dir = trained(data, tmp_path / "run", f"data.test={data}")
    assert visualize.main([str(run_dir), "images=1", "views=1", "maps=pca", "device=cpu"]) == 0
    assert figures(run_dir).keys() == PCA | {"curves", "views"}


def test_what_is_missing_is_one_sentence(
    run_dir: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.beton"
    write_dataset(str(write_images(tmp_path / "images", 6)), few)
    for arguments, sentence in (
        ([str(tmp_path)], "is no run directory"),
        ([], "run is missing"),
        (
            [str(run_dir), "test=spirograph"],
            "test=spirograph: these images are generated, those of the run photographs",
        ),
        ([str(run_dir), f"test={few}"], "6 images are fewer than 10, the minimum of a map"),
        ([str(run_dir), "test=nowhere.beton"], "nowhere.beton does not exist"),
        ([str(run_dir), "points=3"], "points=3: too small"),
    ):
        capsys.readouterr()
        assert visualize.main([*arguments, "images=1", "views=1", "device=cpu"]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error


def with_data(run_dir: Path, copy: Path, train: Path | str, test: Path | str) -> Path:
    """A copy of a run whose config.yaml names other data."""
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("figures"))
    text = (copy / "config.yaml").read_text()
    text = re.sub(r"^  train: .*\n  test: .*$", f"  train: {train}\n  test: {test}", text, flags=re.M)
    (copy / "config.yaml").write_text(text)
    return copy


def test_without_test_images_the_training_images_are_mapped(
    run_dir: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = with_data(run_dir, tmp_path / "run", images, "''")
    options = [str(run_dir), "images=1", "views=1", "maps=pca", "device=cpu", f"output={tmp_path / 'elsewhere'}"]
    assert visualize.main(options) == 0
    assert "the run has no test images: maps show its training images" in capsys.readouterr().out
    assert figures(tmp_path / "elsewhere").keys() == PCA | {"curves", "views"} and not (run_dir / "figures").exists()

    (tmp_path / "file").touch()
    assert visualize.main([*options[:-1], f"output={tmp_path / 'file'}"]) == 2
    error = capsys.readouterr().err
    assert "plots can't be written" in error and "output=" in error and error.count("\n") == 1


def test_data_that_has_moved(run_dir: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that needs no training file is drawn, and the way out for the rest is one sentence."""
    first, moved = tmp_path / "first.beton", images
    run_dir = with_data(run_dir, tmp_path / "run", first, first)
    quick = [str(run_dir), "images=1", "views=1", "maps=pca", "device=cpu"]
    for more, missing, drawn in (
        ([f"test={moved}"], f"views.png is not drawn, since data.train={first} of the run does not exist", PCA),
        ([f"train={moved}"], f"data.test={first} of the run does not exist here", {"views"}),
        ([f"train={moved}", f"test={moved}"], "", PCA | {"views"}),
    ):
        capsys.readouterr()
        assert visualize.main([*quick, *more, f"output={tmp_path / str(len(drawn))}"]) == (2 if missing else 0)
        error = capsys.readouterr().err
        assert missing in error and error.count("\n") == bool(missing), error
        assert figures(tmp_path / str(len(drawn))).keys() == drawn | {"curves"}

    other = tmp_path / "other.beton"
    write_dataset(str(write_images(tmp_path / "images", 12, seed=9)), other)
    assert visualize.main([*quick[:-2], "maps=none", f"train={other}"]) == 0
    assert f"train={other}: its content" in capsys.readouterr().err


def test_representations_of_some_images_are_those_rows_of_all(run_dir: Path, images: Path) -> None:
    loaded, dataset = load_encoder(run_dir), open_dataset(str(images), "test")
    runtime = setup("cpu", "fp64", 1)
    all_rows, some = (
        representations(
            loaded.encoder,
            dataset,
            loaded.spec,
            runtime,
            batch_size=7,
            workers=0,
            loader="torch",
            title="",
            index=index,
        )
        for index in (None, np.array([30, 2, 9]))
    )
    torch.testing.assert_close(some, all_rows[[30, 2, 9]], rtol=1e-12, atol=1e-12)


def test_predictions_of_an_evaluation_become_a_confusion_matrix(run_dir: Path, images: Path, tmp_path: Path) -> None:
    copy = with_data(run_dir, tmp_path / "run", images, images)
    dataset = open_dataset(str(images), "test")
    about = {"fingerprint": dataset.fingerprint, "source": str(images)}
    record = {"step": 4, "hash": "0" * 16, "train": about, "test": about, "protocol": {"name": "knn"}}
    record |= {"results": {"trained": {"top1": 0.75}}}
    labels = np.arange(40) % 2
    path = evaluations.write(copy, record, {"labels": labels, "predictions": np.where(np.arange(40) < 10, 0, labels)})
    assert visualize.main([str(copy), "images=1", "views=1", "maps=none"]) == 0
    (drawn,) = (copy / "figures").glob("confusion*")
    assert drawn.name == f"confusion-{path.stem}.png"


def test_files_for_papers_for_tensorboard_and_a_turning_map(run_dir: Path, tmp_path: Path) -> None:
    options = [str(run_dir), "images=1", "views=1", "maps=pca", "points=12", "device=cpu", f"output={tmp_path}"]
    assert visualize.main([*options, "format=svg", "gif=true", "projector=true"]) == 0
    folder = tmp_path / "figures"
    assert {path.stem for path in folder.glob("*.svg")} == PCA | {"curves", "views"} and not list(folder.glob("*.png"))
    assert {path.name for path in folder.glob("*.gif")} == {"pca_3d.gif"}
    tensors = np.loadtxt(folder / "projector" / "tensors.tsv")
    metadata = (folder / "projector" / "metadata.tsv").read_text().splitlines()
    assert len(tensors) == 12 and metadata[0] == "file\tclass\tnumber\tcluster"
    assert [int(line.split("\t")[2]) for line in metadata[1:]] == atlas(tmp_path)["numbers"]


def test_several_runs_are_compared_in_one_picture(
    run_dir: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_data(run_dir, tmp_path / "other", images, images)
    for form in ("png", "pdf"):
        assert visualize.main([str(run_dir), f"format={form}", str(other), f"output={tmp_path}"]) == 0
        assert [path.name for path in (tmp_path / "figures").glob(f"*.{form}")] == [f"comparison.{form}"]
    capsys.readouterr()
    for more, message in (
        ([str(other), str(other)], "is given twice"),
        ([str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert visualize.main([str(run_dir), *more, f"output={tmp_path}"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error

"""The command end to end: which files it makes of which run, and what it says where it can't."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_ddp import pretrain, visualize
from simclr_ddp.data import open_dataset
from simclr_ddp.representations import load_encoder, representations
from simclr_ddp.runtime import setup
from simclr_ddp.write_dataset import write_dataset
from tests.conftest import write_images
from tests.test_resume import settings

TINY = ("optim.steps=4", "data.workers=0", "log.every_steps=1", "model.width=0.0625")
PCA = {"pca_2d", "pca_2d_thumbnails", "pca_3d"}


def trained(data: Path | str, run_dir: Path, *more: str) -> Path:
    assert pretrain.main([*settings(Path(data), run_dir, *TINY), f"data.train={data}", *more]) == 0
    return run_dir


@pytest.fixture(scope="module")
def run_dir(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 40 labelled images, which are its test images, too."""
    return trained(images, tmp_path_factory.mktemp("visualize") / "run", f"data.test={images}")


def figures(run_dir: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (run_dir / "figures").glob("*.png")}


def test_every_figure_is_drawn_small_and_the_same_again(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"pca", "tsne"} if find_spec("sklearn") else {"pca"}
    options = [str(run_dir), "images=3", "views=3", "device=cpu"]
    assert visualize.main(options) == 0
    output = capsys.readouterr().out
    made = figures(run_dir)
    kinds = ("2d", "2d_thumbnails", "3d")
    assert made.keys() == {"curves", "views"} | {f"{m}_{kind}" for m in methods for kind in kinds}
    for name, data in made.items():
        path = run_dir / "figures" / f"{name}.png"
        assert f"drew {path} ({len(data) / 1000:,.0f} KB)" in output and len(data) < 300_000
        with Image.open(path) as picture:
            assert picture.width == 900 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    assert ("t-SNE of 40 images in 3 dimensions" in output) == ("tsne" in methods)
    for path in (run_dir / "figures").iterdir():
        path.unlink()
    assert visualize.main(options) == 0
    assert figures(run_dir) == made


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
        ([str(run_dir), "test=spirograph"], "the test images (spirograph) are generated, those of the run photographs"),
        ([str(run_dir), f"test={few}"], "holds 6 images, a map takes 10"),
        ([str(run_dir), "test=nowhere.beton"], "nowhere.beton is not there"),
        ([str(run_dir), "points=3"], "points=3 is too small"),
    ):
        capsys.readouterr()
        assert visualize.main([*arguments, "images=1", "views=1", "device=cpu"]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error

    empty = trained(images, tmp_path / "run", "data.test=")
    capsys.readouterr()
    assert visualize.main([str(empty), "images=1", "views=1", "device=cpu"]) == 2
    error = capsys.readouterr().err
    assert "data.test is empty" in error and "test=FILE.beton" in error and error.count("\n") == 1
    assert figures(empty).keys() == {"curves", "views"}, "what needs no test images is drawn"


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

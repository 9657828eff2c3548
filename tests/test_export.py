"""Encoders for other tools, read again with the real ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor

from simclr_ddp import embed_images, export, load_encoder
from simclr_ddp.runs import export_formats
from simclr_ddp.runs.encoder import Loaded
from tests.support.encoder_run import CHECKPOINT, STEP, make_run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a ResNet-18 as torchvision has it."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return make_run(folder, "photos.beton", model__width=1.0, model__stem="imagenet", data__size=64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a narrow ResNet-18 with a 3x3 stem."""
    return make_run(tmp_path_factory.mktemp("runs") / "small", "photos.beton")


def images(loaded: Loaded, count: int) -> Tensor:
    """Evaluation views of noise [n, 3, size, size]."""
    pixels = np.random.default_rng(count).integers(256, size=(count, 80, 100, 3), dtype=np.uint8)
    return torch.stack([loaded.transform(Image.fromarray(picture)) for picture in pixels])


@torch.no_grad()
def expected(loaded: Loaded, views: Tensor) -> Tensor:
    return loaded.encoder.eval()(views)


def close(found: Tensor, wanted: Tensor) -> None:
    assert wanted.std(0).max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@torch.no_grad()
def test_torchvision_loads_it(plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(plain), "format=torchvision"]) == 0
    assert "read again: representations of random images differ by" in capfd.readouterr().out
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    network.load_state_dict(torch.load(plain / "export/torchvision/encoder.pth", weights_only=True))
    loaded = load_encoder(plain)
    views = images(loaded, 2)
    close(network.eval()(views), expected(loaded, views))


@torch.no_grad()
def test_timm_loads_the_folder_offline(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert export.main([str(plain), "format=timm", f"output={tmp_path / 'folder'}"]) == 0
    network = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    loaded = load_encoder(plain)
    views = images(loaded, 2)
    close(network(views), expected(loaded, views))
    config = timm.data.resolve_model_data_config(network)
    assert config["mean"] == loaded.transform.mean and config["std"] == loaded.transform.std
    assert list(config["input_size"]) == [3, 64, 64] and config["crop_pct"] == 0.875 and config["crop_mode"] == "center"
    smooth = Image.fromarray(np.linspace(0, 255, 80 * 120 * 3).reshape(80, 120, 3).astype(np.uint8))
    theirs = timm.data.create_transform(**config)(smooth)
    torch.testing.assert_close(theirs, loaded.transform(smooth), rtol=0, atol=0.15)  # sizes are rounded differently


@pytest.mark.parametrize("run", ["plain", "small"])
def test_onnx_runs_any_encoder_on_any_number_of_images(run: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(run)
    assert export.main([str(folder), "format=onnx"]) == 0
    session = onnxruntime.InferenceSession(str(folder / "export/onnx/encoder.onnx"), providers=["CPUExecutionProvider"])
    loaded = load_encoder(folder)
    for count in (2, 5):
        views = images(loaded, count)
        (h,) = session.run(None, {"images": views.numpy()})
        close(torch.from_numpy(h), expected(loaded, views))


@torch.no_grad()
def test_a_program_runs_any_encoder(small: Path) -> None:
    assert export.main([str(small), "format=torch_export"]) == 0
    program = torch.export.load(str(small / "export/torch_export/encoder.pt2")).module()
    loaded = load_encoder(small)
    for count in (2, 7):
        views = images(loaded, count)
        close(program(views), expected(loaded, views))


def test_the_encoder_of_a_checkpoint(small: Path, tmp_path: Path) -> None:
    assert export.main([str(small / CHECKPOINT), f"output={tmp_path}", "size=24", "crop=1"]) == 0
    again, loaded = load_encoder(tmp_path / "encoder.safetensors"), load_encoder(small)
    assert again.hash == loaded.hash and again.spec.size == 24 and again.step == STEP
    assert again.transform.crop == 1 and json.loads((tmp_path / "preprocessing.json").read_text())["crop_fraction"] == 1
    pixels = np.zeros((1, 30, 40, 3), np.uint8)
    assert embed_images(again, pixels).shape == embed_images(loaded, pixels).shape


def test_preprocessing_and_card_say_what_was_done(small: Path, plain: Path, tmp_path: Path) -> None:
    assert export.main([str(small), f"output={tmp_path}", "format=torch_export"]) == 0
    read = json.loads((tmp_path / "preprocessing.json").read_text())
    loaded = load_encoder(small)
    assert read["size"] == 16 and read["crop"] == "the complete image" and read["mean"] == loaded.transform.mean
    card = (tmp_path / "README.md").read_text()
    for text in (
        "pipeline_tag: image-feature-extraction",
        "resnet18, 0.125 times as wide, with the stem stl",
        "| loss.kernel | cosine |",
        "| seed | 0 |",
        "| data.train | photos.beton |",
        f"is saved after {STEP} steps",
        loaded.hash,
        'torch.export.load("encoder.pt2")',
        "`encoder.pt2`: sha256 `",
        "None is in the run directory.",
    ):
        assert text in card, text
    assert export_formats.preprocessing(load_encoder(plain))["crop_fraction"] == 0.875


def test_the_card_lists_the_evaluations_of_these_weights(small: Path, tmp_path: Path) -> None:
    folder = small / "evaluations"
    folder.mkdir()
    record: dict[str, Any] = {
        "step": STEP,
        "hash": load_encoder(small).hash,
        "protocol": {"name": "knn", "k": 20},
        "train": {"source": "photos.beton", "fingerprint": "0123", "images": 40},
        "test": {"source": "photos-test.beton", "fingerprint": "4567", "images": 12, "split": "test"},
        "results": {"trained": {"top1": 0.625}},
        "settings": {},
    }
    (folder / "mine.json").write_text(json.dumps(record))
    (folder / "other.json").write_text(
        json.dumps(record | {"hash": "of others", "results": {"trained": {"top1": 0.5}}})
    )
    try:
        assert export.main([str(small), f"output={tmp_path}"]) == 0
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    card = (tmp_path / "README.md").read_text()
    assert "| knn | 12 test images of photos-test.beton | photos.beton (content 0123) | top-1 62.50% |" in card
    assert "50.00" not in card


@pytest.mark.parametrize("form", ["torchvision", "timm"])
def test_a_stock_class_that_cannot_hold_it(
    form: str, small: Path, plain: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(small), f"format={form}"]) == 2
    error = capfd.readouterr().err
    assert f"format={form}: its resnet18 can't have model.stem=stl; choose format=onnx or format=torch_export" in error
    wide = load_encoder(plain).spec._replace(width=2.0)
    assert "can't have model.width=2" in export_formats.fault(wide, form)
    assert not (small / "export" / form).exists()


def test_a_wrong_file_is_not_called_right(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(loaded: Loaded, views: Tensor, folder: Path) -> Tensor:
        return expected(loaded, views) * 1.001

    monkeypatch.setitem(export_formats.WRITERS, "timm", wrong)
    with pytest.raises(ValueError, match=r"the timm encoder has other representations, by 1\.0e-03"):
        export_formats.write(load_encoder(plain), "timm", tmp_path)


def test_a_readme_of_somebody_else_is_kept(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert export.main([str(small), f"output={tmp_path}"]) == 2
    assert "its README.md is no model card" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_what_is_not_installed_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert export_formats.fault(load_encoder(small).spec, "onnx") == (
        "format=onnx: onnxscript not installed; pip install '.[onnx]'"
    )

"""Representations: averages over views, equal bytes on any number of ranks, and the cache."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from simclr_ddp.data.augmentations import Augmentation
from simclr_ddp.data.crops import crop_boxes, cut_views
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.draws import uniforms
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.evaluation import cache, features
from simclr_ddp.evaluation.features import EPOCH, averaging, embed, project, representations
from simclr_ddp.losses.contrastive import normalize
from simclr_ddp.runs.encoder import Loaded, load_encoder, load_head
from simclr_ddp.system.files import replace_atomically
from tests.support.disk import files_limited_to
from tests.support.encoder_run import CHECKPOINT, make_run
from tests.support.ranks import Ranks


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", images)


def alone(precision: str = "fp64") -> Runtime:
    torch.set_num_threads(1)
    return Runtime(torch.device("cpu"), precision, 1)


def of(
    run: Path, images: Path | str, views: int = 0, loader: str = "torch", precision: str = "fp64", batch_size: int = 13
) -> Tensor:
    loaded = load_encoder(run)
    averaged = averaging(views, 5, loaded.settings, loaded.spec)
    dataset = open_dataset(str(images), "test")
    loading: dict[str, Any] = {"batch_size": batch_size, "workers": 0, "loader": loader}
    return representations(
        loaded.encoder, dataset, loaded.spec, alone(precision), averaged=averaged, title="", **loading
    )


def test_an_average_is_that_of_the_views_of_each_image(run: Path, images: Path, loader: str) -> None:
    """By definition: view by view, image by image."""
    loaded, dataset = load_encoder(run), open_dataset(str(images), "train")
    encoder, expected = loaded.encoder.double().eval(), []
    a = loaded.settings
    augment = Augmentation(
        views=1,
        flip=a["data.augmentation.flip"],
        strength=a["data.augmentation.strength"],
        jitter_probability=a["data.augmentation.jitter"],
        greyscale=a["data.augmentation.greyscale"],
        mean=loaded.spec.mean,
        std=loaded.spec.std,
    )
    for i in range(dataset.count):
        boxes = crop_boxes(5, EPOCH, np.array([i]), dataset.file.sizes[i : i + 1], 3, (0.08, 1.0))[0]
        h = []
        for view, pixels in enumerate(cut_views(dataset.file, i, boxes, 16)):
            draws = torch.from_numpy(uniforms(5, EPOCH, np.array(i), view, np.arange(11)))[None, None]
            picture = torch.from_numpy(pixels).permute(2, 0, 1)[None, None]
            with torch.no_grad():
                h.append(encoder(augment(picture, draws)[0])[0])
        expected.append(torch.stack(h).mean(0))
    torch.testing.assert_close(of(run, images, 3, loader), torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_spirograph_views_have_other_nuisance_numbers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_dataset.__globals__["SPIROGRAPH_IMAGES"], "test", 6)
    one, many, plain = (of(run, "spirograph", views) for views in (1, 40, 0))
    assert one.shape == many.shape == plain.shape == (6, 64)
    assert not torch.allclose(one, plain) and torch.equal(one, of(run, "spirograph", 1, batch_size=4))
    assert (many - of(run, "spirograph", 39)).norm() < (one - many).norm() / 5, "views average out"


@pytest.mark.parametrize("views", [0, 4])
def test_any_ranks_give_the_bytes_of_one(run: Path, images: Path, ranks: Ranks, views: int) -> None:
    """In float32 too: four ranks share four batches of 13 images, or fourteen of 3 with four views each."""
    (expected,) = ranks.run(1, of, run, images, views, "torch", "fp32")
    assert expected.shape == (40, 64) and len(expected.unique(dim=0)) == 40
    for world_size in (2, 4):
        first, *others = ranks.run(world_size, of, run, images, views, "torch", "fp32")
        assert first.numpy().tobytes() == expected.numpy().tobytes()
        assert all(h.shape == (0, 64) for h in others)
    (few,) = ranks.run(1, of, run, images, views, "torch", "fp32", 64)
    torch.testing.assert_close(ranks.run(4, of, run, images, views, "torch", "fp32", 64)[0], few)  # three have nothing


def test_embeddings_are_those_of_the_loss(images: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images, loss__radius=3.0, loss__norm_p=1.0)
    loaded = load_encoder(run / CHECKPOINT)
    h = of(run / CHECKPOINT, images)
    z = project(h, load_head(loaded), alone(), 7)
    saved = torch.load(run / CHECKPOINT, weights_only=True)["model"]
    y = h @ saved["projection_head.0.weight"].double().T
    norms = {
        key: saved[f"projection_head.1.{key}"].double() for key in ("running_mean", "running_var", "weight", "bias")
    }
    y = (y - norms["running_mean"]) / (norms["running_var"] + 1e-5).sqrt() * norms["weight"] + norms["bias"]
    y = y.relu() @ saved["projection_head.3.weight"].double().T
    norms = {key: saved[f"projection_head.4.{key}"].double() for key in ("running_mean", "running_var", "weight")}
    y = (y - norms["running_mean"]) / (norms["running_var"] + 1e-5).sqrt() * norms["weight"]
    torch.testing.assert_close(z, normalize(y, 9.0, 1.0))
    torch.testing.assert_close(z.abs().sum(1), torch.full((40,), 3.0, dtype=torch.float64))


def test_the_head_of_an_exported_encoder_is_that_of_its_checkpoint(run: Path, tmp_path: Path) -> None:
    expected = load_head(load_encoder(run / CHECKPOINT)).module.state_dict()
    for path in (run, run / "encoder.safetensors"):
        found = load_head(load_encoder(path)).module.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    alone = Path(shutil.copy(run / "encoder.safetensors", tmp_path))
    with pytest.raises(ValueError, match=r"holds no projection head; give a checkpoint of the run$"):
        load_head(load_encoder(alone))
    saved = torch.load(run / CHECKPOINT, weights_only=True)
    saved["model"]["encoder.conv1.weight"] += 1
    (tmp_path / "checkpoints").mkdir()
    torch.save(saved, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=rf"of the run \({tmp_path / CHECKPOINT} holds another encoder\)"):
        load_head(load_encoder(alone))


def cached(loaded: Loaded, images: Path, folder: Path | None, precision: str = "fp32", views: int = 0) -> Tensor:
    return embed(
        loaded.encoder,
        loaded.hash,
        open_dataset(str(images), "train"),
        loaded.spec,
        alone(precision),
        averaged=averaging(views, 0, loaded.settings, loaded.spec),
        folder=folder,
        batch_size=64,
        workers=0,
        loader="torch",
        title="all",
    )


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that representations are computed."""
    found: list[str] = []
    real = features.representations

    def counted(*arguments: Any, **more: Any) -> Tensor:
        found.append("computed")
        return real(*arguments, **more)

    monkeypatch.setattr(features, "representations", counted)
    return found


def test_a_cache_is_read_and_is_not_changed_by_what_is_done_with_it(
    run: Path, images: Path, tmp_path: Path, forwards: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_encoder(run)
    first = cached(loaded, images, tmp_path)
    (file,) = (tmp_path / cache.FOLDER).iterdir()
    content = file.read_bytes()
    again = cached(loaded, images, tmp_path)
    assert torch.equal(first, again) and len(forwards) == 1 and f"read from {file}" in capfd.readouterr().out
    expected = first.clone()
    first.zero_()
    again.zero_()
    assert file.read_bytes() == content and torch.equal(cached(loaded, images, tmp_path), expected)
    with safe_open(file, "np") as opened:
        assert np.array_equal(opened.get_tensor("h"), expected.numpy())
    assert len(forwards) == 1


def test_representations_are_computed_into_the_file(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So they need no memory; a failure leaves nothing behind, and what a killed process left is deleted."""
    folder = tmp_path / cache.FOLDER
    folder.mkdir()
    young, old = folder / ".young.tmp", folder / ".old.tmp"
    for left in (young, old):
        left.touch()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    sizes: list[int] = []

    def fail(*_: Any, out: Tensor, **__: Any) -> Tensor:
        out[1] = 1
        (file,) = set(folder.iterdir()) - {young}
        sizes.append(file.stat().st_size)
        assert np.frombuffer(file.read_bytes()[-out.nbytes :], np.float32).sum() == out.shape[1]
        raise ValueError("stopped")

    monkeypatch.setattr(features, "representations", fail)
    loaded = load_encoder(run)
    with pytest.raises(ValueError, match="stopped"):
        cached(loaded, images, tmp_path)
    assert sizes and list(folder.iterdir()) == [young]


def test_other_settings_have_another_cache(run: Path, images: Path, tmp_path: Path, forwards: list[str]) -> None:
    loaded = load_encoder(run)
    larger = loaded._replace(spec=loaded.spec._replace(size=24))
    other = loaded._replace(hash="of other weights")
    for i, (subject, more) in enumerate(
        ((loaded, {}), (loaded, {"precision": "fp64"}), (loaded, {"views": 2}), (larger, {}), (other, {})), start=1
    ):
        cached(subject, images, tmp_path, **more)  # type: ignore[arg-type]
        assert len(forwards) == len(list((tmp_path / cache.FOLDER).iterdir())) == i
    cached(loaded, images, None)
    assert len(forwards) == 6, "no folder is no cache"


def test_a_damaged_or_foreign_cache_is_replaced_with_a_warning(
    run: Path, images: Path, tmp_path: Path, forwards: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_encoder(run)
    expected = cached(loaded, images, tmp_path).clone()
    (file,) = (tmp_path / cache.FOLDER).iterdir()
    good = file.read_bytes()
    cached(loaded._replace(hash="of other weights"), images, tmp_path / "other")
    (foreign,) = (tmp_path / "other" / cache.FOLDER).iterdir()
    bit = bytearray(good)
    bit[-5] ^= 1
    no_key = json.dumps({"h": {"dtype": "F32", "shape": [0, 64], "data_offsets": [0, 0]}}).encode()
    for damaged, why in (
        (good[:-7], "incomplete"),
        (b"", ""),
        (b"\xff" * 100, ""),
        (bytes(bit), "is damaged: its checksum is another"),
        (foreign.read_bytes(), "holds the representations of other weights"),
        (len(no_key).to_bytes(8, "little") + no_key, "holds the representations of other weights, images"),
    ):
        file.write_bytes(damaged)
        before = len(forwards)
        capfd.readouterr()
        assert torch.equal(cached(loaded, images, tmp_path), expected) and len(forwards) == before + 1
        printed = capfd.readouterr().err
        assert printed.startswith(f"warning: {file}: ") and printed.count("\n") == 1 and why in printed.lower(), printed
        assert "the representations are computed again" in printed and file.read_bytes() == good
    file.unlink()
    file.mkdir()
    assert torch.equal(cached(loaded, images, tmp_path), expected)
    assert "is a folder, not a file" in capfd.readouterr().err


def test_a_full_disk_is_a_warning(
    run: Path, images: Path, tmp_path: Path, forwards: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_encoder(run)
    with files_limited_to(1000):
        first, again = (cached(loaded, images, tmp_path) for _ in range(2))
    assert torch.equal(first, again) and len(forwards) == 2
    printed = capfd.readouterr().err
    assert printed.count("warning: ") == 1 and "set cache=false" in printed and not list(tmp_path.glob("*/*"))


def test_representations_that_are_not_finite_are_not_kept(run: Path, images: Path, tmp_path: Path) -> None:
    loaded = load_encoder(run)
    loaded.encoder.conv1.weight.data.fill_(float("nan"))
    assert cached(loaded, images, tmp_path).isnan().all() and not list(tmp_path.glob("*/*"))


def test_an_average_needs_the_augmentation_of_the_run(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "encoder.safetensors"
    replace_atomically(moved, lambda path: path.write_bytes((run / "encoder.safetensors").read_bytes()))
    loaded = load_encoder(moved)
    with pytest.raises(
        ValueError, match=r"views=2: the augmentation of the run is not known .*; give the run directory"
    ):
        averaging(2, 0, loaded.settings, loaded.spec)

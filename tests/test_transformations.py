"""simclr_ddp.transformations, and the transformations themselves by definition."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel

from simclr_ddp import transformations
from simclr_ddp.data.write import write_dataset
from simclr_ddp.evaluation.transformations import NOISE, TASKS, edges, noisy, transformed
from tests.support.encoder_run import CHECKPOINT, make_run
from tests.support.output import only_error
from tests.support.ranks import Ranks
from tests.test_knn import write_tints

QUICK = ("device=cpu", "threads=1", "workers=0", "strengths=[1e-2,1]")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one colour each, which a rotation doesn't change."""
    folder = tmp_path_factory.mktemp("transformations")
    for name, count in (("train", 160), ("test", 80)):
        write_dataset(str(write_tints(folder / name, count, 4)), folder / f"{name}.beton")
    write_dataset("spirograph", folder / "numbers.beton", images=9)
    return make_run(folder / "run", folder / "train.beton", folder / "test.beton")


def on_ranks(path: Path, *more: str) -> None:
    assert transformations.main([str(path), *QUICK, *more]) == 0


def test_what_images_show_is_predicted_and_what_they_hide_is_not(
    run: Path, tmp_path: Path, ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    on_ranks(run / CHECKPOINT, f"output={tmp_path / '1'}")
    (file,) = tmp_path.glob("1/evaluations/*.json")
    assert file.name.startswith("step00000008.") and "-transformations." in file.name
    results = json.loads(file.read_text())["results"]
    assert set(results["trained"]) == {f"{task.name}_{kind}_top1" for task in TASKS for kind in "hz"}
    assert set(results["random"]) == {f"{task.name}_h_top1" for task in TASKS}
    for kind in "hz":
        assert results["trained"][f"rotation_{kind}_top1"] < 0.5, "the images are of one colour"
        assert min(results["trained"][f"{name}_{kind}_top1"] for name in ("greyscale", "noise", "sobel")) > 0.85
    assert "transformation" in capfd.readouterr().out
    ranks.run(2, on_ranks, run / CHECKPOINT, f"output={tmp_path / '2'}")
    (other,) = tmp_path.glob("2/evaluations/*.json")
    assert json.loads(other.read_text())["results"] == results


def test_each_transformation_by_definition() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 30, 3, 8, 8), dtype=np.uint8))
    images, sample = pixels[0].double() / 255, torch.arange(30) + 70
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    for task in TASKS:
        labels = task.labels(3, 100)
        found = transformed(task, labels, 3, mean, std, torch.float64)(pixels, sample)[0]
        found = found * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        assert len(set(labels[70:])) == len(task.classes)
        for i, label in enumerate(labels[70:]):
            expected = images[i]
            if task.name == "rotation":
                expected = torch.from_numpy(np.rot90(expected.numpy(), label, (1, 2)).copy())
            elif label:
                changed = {
                    "greyscale": (0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]).expand(3, 8, 8),
                    "noise": noisy(images[i : i + 1], sample[i : i + 1], 3)[0],
                    "sobel": edges(images[i : i + 1])[0],
                }
                expected = changed[task.name]
            torch.testing.assert_close(found[i], expected.double(), rtol=1e-5, atol=1e-6)


def test_shares_noise_and_edges() -> None:
    for task in TASKS:
        counts = np.bincount(task.labels(0, 20_000), minlength=len(task.classes)) / 20_000
        assert np.abs(counts - task.shares).max() < 0.02 and sum(task.shares) == 1
        assert (task.labels(1, 50) != task.labels(0, 50)).any() and (task.labels(0, 9) == task.labels(0, 50)[:9]).all()
    grey = torch.full((20, 3, 16, 16), 0.5, dtype=torch.float64)
    noise = noisy(grey, torch.arange(20), 0) - grey
    assert noise.std().item() == pytest.approx(NOISE, rel=0.02) and abs(noise.mean().item()) < 0.003
    assert torch.equal(noisy(grey[:1], torch.tensor([7]), 0), noisy(grey, torch.arange(20), 0)[7:8])
    kurtosis = ((noise / noise.std()) ** 4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.2), "Gaussian"
    image = np.random.default_rng(1).uniform(0, 0.2, (3, 9, 9))
    expected = [[math.hypot(a, b) for a, b in zip(x.flat, y.flat, strict=True)]
                for x, y in ((sobel(c, 0, mode="nearest"), sobel(c, 1, mode="nearest")) for c in image)]  # fmt: skip
    found = edges(torch.from_numpy(image)[None])[0].flatten(1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).clamp(0, 1))


def test_mistakes(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    numbers, alone = run.parent / "numbers.beton", run.parent / "alone"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("checkpoints"))
    for path, more, sentence in (
        (alone, (), f"{alone / 'encoder.safetensors'} holds no projection head; give a checkpoint of the run"),
        (run / CHECKPOINT, (f"test={numbers}",), f"test={numbers}: its images are rendered; give photographs"),
        (run / CHECKPOINT, ("train=nowhere.beton",), "nowhere.beton"),
    ):
        assert transformations.main([str(path), *QUICK, *more]) == 2
        assert sentence in only_error(capfd)
    assert not (run / "evaluations").exists()

"""The monitor of a run: measured from outside, without effect on training, and the same after a resume."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_ddp import pretrain
from simclr_ddp.data.batches import evaluation_batches, evaluation_images, views_at
from simclr_ddp.data.dataset import Dataset, open_dataset
from simclr_ddp.data.draws import monitored
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.evaluation import label_free
from simclr_ddp.evaluation.knn import leave_one_out_predict
from simclr_ddp.evaluation.monitor import EPOCH, Monitor
from simclr_ddp.models.resnet import Encoder
from simclr_ddp.runs.metrics import read_metrics
from tests.support.output import only_error
from tests.support.ranks import Ranks
from tests.support.tiny_run import STEPS, assert_equal_bits, final_state, settings, train

ON = ("model.width=0.0625", "monitor.every_epochs=5", "monitor.images=30", "monitor.views=4", "monitor.k=3")
NAMES = {
    *("rankme", "effective_rank", "participation_ratio", "alpha_req", "uniformity"),
    *("lidar", "alignment", "knn_top1", "neighbour_overlap"),
}
CPU = Runtime(torch.device("cpu"), "fp64", 1)


def measured(run_dir: Path) -> dict[int, dict[str, float]]:
    """{step: metrics of the monitor} of a run."""
    found = {}
    for line in read_metrics(run_dir / "metrics.jsonl"):
        values = {k.removeprefix("monitor_"): v for k, v in line.items() if k.startswith("monitor_")}
        found |= {line["step"]: values} if values else {}
    return found


def test_a_monitored_run_trains_bitwise_the_same(images: Path, tmp_path: Path) -> None:
    for name, more in (("on", ON), ("off", ON[:1])):
        assert pretrain.main(settings(images, tmp_path / name, *more)) == 0
    on, off = final_state(tmp_path / "on"), final_state(tmp_path / "off")
    for part in ("model", "optimizers", "scaler", "identity"):
        assert_equal_bits(on[part], off[part], part)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("on", "off")]
    for key in ("step", "loss", "contrastive_top1", "probe_top1"):
        assert [line.get(key) for line in lines[0]] == [line.get(key) for line in lines[1]]
    found = measured(tmp_path / "on")  # an epoch has two steps; the last is not the end of a fifth epoch
    assert list(found) == [10, 20, STEPS] and not measured(tmp_path / "off") and "monitor" not in off
    assert found[10].keys() == NAMES - {"neighbour_overlap"} and found[20].keys() == found[STEPS].keys() == NAMES
    assert found[10]["rankme"] != found[20]["rankme"] and found[10]["lidar"] != found[20]["lidar"]


@pytest.mark.parametrize("pause", [10, 13])
def test_a_resumed_run_measures_the_same(pause: int, images: Path, tmp_path: Path) -> None:
    """Paused right after a measurement, and between two: the neighbours of the last one are in the checkpoint."""
    more = (*ON, "data.workers=0", "optim.schedule=constant", "resume.force=[optim.steps]")
    assert pretrain.main(settings(images, tmp_path / "unbroken", *more)) == 0
    assert pretrain.main([*settings(images, tmp_path / "paused", *more), f"optim.steps={pause}"]) == 0
    assert pretrain.main(settings(images, tmp_path / "paused", *more)) == 0
    found, expected = measured(tmp_path / "paused"), measured(tmp_path / "unbroken")
    if pause == 13:  # the end of a run is measured too, and is the measurement before step 20
        assert found.pop(pause)["neighbour_overlap"] > 0
        assert found[20].pop("neighbour_overlap") != expected[20].pop("neighbour_overlap")
    assert found == expected


@pytest.mark.parametrize("more", [(), ("monitor.images=3", "monitor.k=2", "monitor.views=0")])
def test_ranks_measure_what_one_process_does(more: tuple[str, ...], images: Path, ranks: Ranks, tmp_path: Path) -> None:
    """In float64; with three images one of four ranks has none."""
    exact = (*ON, *more, "precision=fp64", "optim.steps=4", "optim.base_learning_rate=0.01", "monitor.every_epochs=1")
    results = []
    for count in (1, 2, 4):
        ranks.run(count, train, settings(images, tmp_path / str(count), *exact))
        results.append(measured(tmp_path / str(count)))
    assert list(results[0]) == [2, 4] and ("lidar" in results[0][4]) == (not more)
    for found in results[1:]:
        for step, values in results[0].items():
            assert found[step] == pytest.approx(values, rel=1e-6), step


def made(dataset: Dataset, **more: object) -> Monitor:
    numbers = {"every_epochs": 1, "images": 20, "views": 4, "k": 3, "seed": 5} | more

    def augment(views: torch.Tensor, epoch: int, index: torch.Tensor) -> torch.Tensor:
        assert epoch >= EPOCH and views.shape[:2] == (2, len(index))
        return views.double() / 255

    return Monitor(
        dataset,
        CPU,
        augment,
        **numbers,  # type: ignore[arg-type]
        size=16,
        mean=[0.5] * 3,
        std=[0.2] * 3,
        crop_scale=(0.2, 1.0),
        workers=0,
        loader="torch",
    )


def test_it_measures_the_encoder_on_images_of_the_seed(images: Path) -> None:
    """Composed here from the parts, image by image."""
    dataset = open_dataset(str(images), "train")
    encoder = Encoder("resnet18", 0.0625, "cifar").double()
    found = made(dataset).measure(encoder)
    assert encoder.training
    encoder.eval()
    index = monitored(5, 40, 20)
    assert len(set(index)) == 20 and index.tolist() == sorted(index) and (index != monitored(6, 40, 20)).any()
    normalised = evaluation_images(dataset, [0.5] * 3, [0.2] * 3, torch.float64)
    with torch.no_grad():
        loading = {"size": 16, "batch_size": 1, "workers": 0, "loader": "torch", "device": CPU.device}
        h = torch.cat([encoder(normalised(b.inputs)[0]) for b in evaluation_batches(dataset, index, **loading)])
        pairs = [views_at(dataset, 5, EPOCH + i, index, size=16, crop_scale=(0.2, 1.0)).double() / 255 for i in (0, 1)]
        views = torch.stack([encoder(v) for v in torch.cat(pairs)], dim=1)
    expected = label_free.measure(h, views)
    labels = torch.from_numpy(dataset.labels[index])
    expected["knn_top1"] = (leave_one_out_predict(h, labels, k=3)[:, 0] == labels).double().mean().item()
    assert found == pytest.approx({f"monitor_{name}": value for name, value in expected.items()}, rel=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("monitor.images=41", "monitor.images=41: data.train=.* has only 40 images; choose a smaller number"),
        (
            "monitor.k=30",
            "monitor.k=30: each of 30 images has 29 neighbours; choose a smaller k, or more monitor.images",
        ),
        (
            "monitor.views=3",
            "monitor.views=3: views are drawn in pairs, as in training; choose an even number, or 0 fo",
        ),
    ],
)
def test_mistakes(more: str, message: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(settings(images, tmp_path / "run", *ON, more)) == 2
    assert re.fullmatch(f"error: {message}.*", only_error(capfd)) and not (tmp_path / "run").exists()


def test_values_that_are_not_finite(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dataset = open_dataset(str(images), "train")
    encoder = Encoder("resnet18", 0.0625, "cifar").double()
    next(encoder.parameters()).data.fill_(float("nan"))
    assert made(dataset).measure(encoder) == {} and encoder.training
    assert "monitor: nothing is measured in this epoch, h: contains values that are not" in capfd.readouterr().err


def test_neighbours_of_other_options_are_not_compared(images: Path) -> None:
    dataset, encoder = open_dataset(str(images), "train"), Encoder("resnet18", 0.0625, "cifar").double()
    first = made(dataset)
    first.measure(encoder)
    assert made(dataset, saved=first.saved).measure(encoder)["monitor_neighbour_overlap"] == 1
    for more in ({"k": 4}, {"images": 21}):
        assert "monitor_neighbour_overlap" not in made(dataset, saved=first.saved, **more).measure(encoder)


def test_images_without_classes_have_no_accuracy() -> None:
    dataset, encoder = open_dataset("spirograph", "train"), Encoder("resnet18", 0.0625, "stl").double()
    monitor = made(dataset, images=8, views=0)
    monitor._loading["size"] = 32
    found = monitor.measure(encoder)
    assert "monitor_rankme" in found and "monitor_knn_top1" not in found and np.isfinite([*found.values()]).all()

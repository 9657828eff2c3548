"""simclr_ddp.label_free from end to end; tests/evaluation/test_label_free.py tests the formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_ddp import label_free
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.write import write_dataset
from simclr_ddp.evaluation.features import representations
from simclr_ddp.evaluation.label_free import measure
from simclr_ddp.runs import evaluations
from simclr_ddp.runs.encoder import load_encoder
from tests.conftest import write_images
from tests.evaluation.test_features import alone
from tests.support.encoder_run import make_run
from tests.support.output import only_error
from tests.support.ranks import Ranks

QUICK = ("device=cpu", "threads=1", "workers=0", "augmented=2", "images=8", "--debug")


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(str(write_images(folder / "images", 24) / "class0"), folder / "unlabelled.beton")
    return folder / "unlabelled.beton"


def measured(run: Path, *more: str) -> None:
    assert label_free.main([str(run), *QUICK, *more]) == 0


def only_record(run: Path) -> dict[str, Any]:
    ((one,), faults) = evaluations.read_all(run)
    assert not faults and one.name == "label_free"
    return one.record


def test_a_crop_is_for_evaluation_views_only(unlabelled: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", unlabelled)
    results = []
    for more in ((), ("crop=0.5", "size=16")):
        measured(run, f"output={tmp_path / str(len(more))}", "random_encoder=false", *more)
        results.append(only_record(tmp_path / str(len(more)))["results"]["trained"])
    whole, centre = results
    assert whole["rankme"] != centre["rankme"] and whole["alignment"] == centre["alignment"]


def test_an_encoder_is_measured_without_labels(
    unlabelled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", unlabelled)
    measured(run)
    record = only_record(run)
    assert record["test"]["split"] == "train" and record["test"]["labels"] == "none"
    dataset, loaded = open_dataset(str(unlabelled), "train"), load_encoder(run)
    h = representations(
        loaded.encoder, dataset, loaded.spec, alone(), batch_size=5, workers=0, loader="torch", title="expected"
    )
    found = record["results"]["trained"]
    for name, value in measure(h).items():
        assert found[name] == pytest.approx(value, rel=1e-4)
    assert found["lidar"] >= 1 and found["alignment"] > 0, "views of an image differ"
    assert set(record["results"]["random"]) == set(found)
    printed = capfd.readouterr().out
    assert f"rankme{found['rankme']:>33.5g}" in printed and "random encoder" in printed
    again = json.dumps(record["results"]["trained"]["lidar"])
    measured(run, "cache=false")
    assert json.dumps(only_record(run)["results"]["trained"]["lidar"]) == again


def test_two_ranks_measure_as_one(unlabelled: Path, tmp_path: Path, ranks: Ranks) -> None:
    results = []
    for world_size in (1, 2):
        run = make_run(tmp_path / f"run{world_size}", unlabelled)
        ranks.run(world_size, measured, run, "precision=fp64", "batch_size=5", "loader=torch")
        results.append(only_record(run)["results"])
    for encoder in ("trained", "random"):
        one, two = ({k: v for k, v in r[encoder].items() if not k.endswith("_seconds")} for r in results)
        assert one == pytest.approx(two, rel=1e-9)


def test_mistakes_are_one_line(unlabelled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", unlabelled)
    (tmp_path / "alone").mkdir()
    encoder = (run / "encoder.safetensors").rename(tmp_path / "alone" / "encoder.safetensors")
    gone = make_run(tmp_path / "gone", tmp_path / "gone.beton")
    cases = (
        ([run, "augmented=1"], "augmented=1: two views are the fewest; set augmented=0"),
        ([encoder], "data.train is not known without the run's settings; give the images as test=FILE.beton"),
        ([encoder, f"test={unlabelled}"], "augmented=10: the augmentation of the run is not known; set augmented=0"),
        ([gone], f"data.train={tmp_path}/gone.beton of the run does not exist here"),
    )
    for arguments, expected in cases:
        assert label_free.main([*map(str, arguments), "device=cpu", "workers=0"]) == 2
        assert expected in only_error(capfd)
    state = torch.load(run / "checkpoints/step-00000008.pt", weights_only=True)
    state["model"]["encoder.conv1.weight"] *= float("nan")
    torch.save(state, run / "checkpoints/step-00000008.pt")
    assert label_free.main([str(run), *QUICK[:-1]]) == 2
    assert "contains values that are not finite; use an earlier checkpoint" in only_error(capfd)
    assert not (run / "evaluations").exists()

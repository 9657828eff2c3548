"""Records of evaluations: names of their files, and results per image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr_ddp.runs import evaluations


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "step": 8,
        "hash": "0123456789abcdef",
        "own_size": 32,
        "settings": {"convention": "C", "strengths": [], "size": 0, "precision": "fp32"},
        "runtime": {"precision": "fp32"},
        "train": {"source": "train.beton", "fingerprint": "of train"},
        "test": {"source": "test.beton", "fingerprint": "of test", "split": "test"},
        "results": {"trained": {"top1": 0.5}, "random": {"top1": 0.25}},
    }


def test_a_linear_evaluation_keeps_the_name_it_always_had(tmp_path: Path, record: dict[str, Any]) -> None:
    expected = "step00000008.01234567-test.20d1cb7a-linear.8994b3e4.json"
    assert evaluations.write(tmp_path, record).name == expected
    assert evaluations.write(tmp_path, record | {"protocol": {"name": "knn", "k": 200}}).name != expected
    (linear, other), faults = evaluations.read_all(tmp_path)
    assert not faults and {linear.name, other.name} == {"linear", "knn"} and linear.key != other.key


def test_settings_of_a_protocol_tell_evaluations_apart(tmp_path: Path, record: dict[str, Any]) -> None:
    protocols: list[dict[str, Any]] = [{"k": 200}, {"k": 20}, {"k": 20, "size": 32}, {"k": 20, "size": 48}]
    paths = {evaluations.write(tmp_path, record | {"protocol": {"name": "knn"} | p}) for p in protocols}
    assert len(paths) == 4 and all("-knn." in path.name for path in paths)
    assert evaluations.protocol({"protocol": {"name": "knn", "k": 20}}) == {"k": 20}
    chosen = record | {"validation": record["test"] | {"source": "data/val.beton"}}
    assert evaluations.protocol(chosen)["validation"] == "val.beton"
    assert "validation_fraction" in evaluations.protocol(record) and "validation_fraction" not in evaluations.protocol(
        chosen
    )
    assert evaluations.data_name(chosen) != evaluations.data_name(record)
    by_mean = record | {"settings": record["settings"] | {"metric": "mean_per_class", "crop": 1.0}}
    assert evaluations.protocol(by_mean) == evaluations.protocol(record) | {"metric": "mean_per_class", "crop": 1.0}


def test_an_evaluation_without_training_images_has_a_name(tmp_path: Path, record: dict[str, Any]) -> None:
    del record["train"]
    evaluations.write(tmp_path, record | {"protocol": {"name": "spectrum"}})
    (found,), faults = evaluations.of_run(tmp_path, step=8, train="nowhere.beton", test="test.beton")
    assert not faults and found.name == "spectrum"


def test_results_per_image_are_kept_and_belong_to_their_record(tmp_path: Path, record: dict[str, Any]) -> None:
    arrays = {"labels": np.arange(5), "predictions": np.arange(5)[::-1]}
    path = evaluations.write(tmp_path, record, arrays)
    found = evaluations.read_arrays(path)
    assert set(found) == set(arrays) and all(np.array_equal(found[name], arrays[name]) for name in arrays)

    file = path.with_suffix(".npz")
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no zip file", content.replace(b"labels", b"labelz", 1)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"can't be read .*; evaluate again to write it"):
            evaluations.read_arrays(path)
    np.savez(file, labels=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="can't be read"):  # nothing is unpickled
        evaluations.read_arrays(path)

    assert evaluations.write(tmp_path, record) == path and not file.exists(), "not those of an earlier evaluation"
    with pytest.raises(ValueError, match="has no results per image"):
        evaluations.read_arrays(path)

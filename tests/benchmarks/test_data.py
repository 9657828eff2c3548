"""The benchmark of data loading: a whole tiny run, its checks, and what it says to mistakes."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import data
from benchmarks.data import Batches, DataBenchmark, Observed, Task, check, observe, open_variant, write_samples
from tests.conftest import write_images

COUNT, BATCH, SIZE = 32, 2, 16
OPTIONS = ["workers=1", f"images={COUNT}", f"batch_size={BATCH}", f"size={SIZE}", "rounds=2"]
KEYS = {"command", "environment", "source", "checks", "results", "seconds"}
ROW = {
    "variant",
    "workers",
    "images_per_second",
    "ours_is_faster_by",
    "cpu_ms_per_image",
    "peak_memory_bytes",
    "rounds",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos") / "photos", 12, size=40)


@pytest.fixture(scope="module")
def observed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observed]:
    """An epoch of the variants that need no FFCV, read in this process."""
    path = tmp_path_factory.mktemp("samples") / "samples.beton"
    write_samples(str(folder), path, COUNT)
    tasks = [Task(path, name, 1, BATCH, COUNT // BATCH, SIZE) for name in ("ours_torch", "torchvision")]
    return {task.variant: observe(open_variant(task)(0)) for task in tasks}


@pytest.fixture
def without_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "usable_loader", lambda _: ("torch", "FFCV can't be imported (it is not here)"))


@pytest.mark.slow
def test_a_run_without_ffcv(
    folder: Path, tmp_path: Path, without_ffcv: None, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "x.json"
    assert data.main([str(folder), *OPTIONS, f"out={out}"]) == 0
    said, errors = capfd.readouterr()
    assert "note: FFCV can't be imported (it is not here), so its variants are left out" in said
    assert "round 2 of 2" in said and "min left" in said and errors == ""
    report = _report(out, ["ours_torch", "torchvision"])
    assert report["command"] == "python -m benchmarks.data photos " + " ".join(sorted(OPTIONS, key=_place))
    assert report["source"] | {"megabytes": 0} == {
        "name": "photos",
        "files": 12,
        "samples": COUNT,
        "megabytes": 0,
        "mean_height_width": report["source"]["mean_height_width"],
        "largest_height_width": report["source"]["largest_height_width"],
    }


@pytest.mark.slow  # FFCV compiles its pipeline for half a minute
def test_a_run_with_ffcv(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    out = tmp_path / "x.json"
    assert data.main([str(folder), *OPTIONS, f"out={out}"]) == 0
    report = _report(out, ["ours_ffcv", "ours_torch", "ffcv", "torchvision"])
    assert report["environment"]["packages"]["ffcv"] and report["environment"]["packages"]["numba"]
    assert set(report["checks"]["workers=1"]["ours_ffcv"]["pixel_difference"]) == {"mean", "max"}


def _place(option: str) -> int:
    return list(vars(DataBenchmark())).index(option.partition("=")[0])


def _report(out: Path, variants: list[str]) -> dict[str, Any]:
    report = json.loads(out.read_text())
    assert set(report) == KEYS
    assert [row["variant"] for row in report["results"]] == variants == list(report["checks"]["workers=1"])
    for row in report["results"]:
        assert set(row) == ROW and len(row["rounds"]) == 2
        rate = row["images_per_second"]
        assert 0 < rate["least"] <= rate["lower_quartile"] <= rate["median"] <= rate["upper_quartile"] <= rate["most"]
        assert row["peak_memory_bytes"] > 50e6
    assert report["results"][0]["ours_is_faster_by"]["median"] == 1
    assert {"git_commit", "packages", "processor", "cores"} <= set(report["environment"])
    assert 1_000 < out.with_suffix(".png").stat().st_size < 100_000
    return report


def test_sound_variants_pass_the_check(observed: dict[str, Observed]) -> None:
    found = check(observed | {"ours_ffcv": observed["ours_torch"]}, COUNT, BATCH, SIZE)
    assert found["ours_ffcv"]["pixel_difference"] == {"mean": 0, "max": 0}
    assert found["torchvision"]["correlation"] > 0.5


def _with_first(change: Callable[[list[torch.Tensor], np.ndarray], Any]) -> Callable[[Batches], Batches]:
    """A variant whose first batch is changed."""

    def mutated(batches: Batches) -> Batches:
        for i, (views, sample) in enumerate(batches):
            yield change(list(views), sample) if i == 0 else (views, sample)

    return mutated


def _with_all(change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Callable[[Batches], Batches]:
    return lambda batches: ((change(list(views)), sample) for views, sample in batches)


def _without_first(batches: Batches) -> Batches:
    next(batches)
    yield from batches


def _shuffled(batches: Batches) -> Batches:
    """The sample numbers of other batches."""
    whole = [(list(views), sample.copy()) for views, sample in batches]
    yield from ((views, whole[i - 5][1]) for i, (views, _) in enumerate(whole))


@pytest.mark.parametrize(
    ("mutate", "sentence"),
    [
        (_without_first, "of 32 samples it delivered 30, in 30 places"),
        (_with_first(lambda views, sample: (views, sample * 0 + sample[0])), "it delivered 31, in 32 places"),
        (_with_all(lambda views: [v[..., 1:] for v in views]), "its batches are"),
        (_with_all(lambda views: [v.float() for v in views]), "its batches are"),
        (_with_first(lambda views, sample: ([v * 0 for v in views], sample)), "6% of its views are black"),
        (_with_all(lambda views: [views[0], views[0]]), "its two views are the same"),
        (_with_all(lambda views: [v // 2 for v in views]), "its views' mean is"),
        (_shuffled, "its views are of other images"),
    ],
)
def test_a_wrong_variant_fails_the_check(
    observed: dict[str, Observed], folder: Path, tmp_path: Path, mutate: Callable[[Batches], Batches], sentence: str
) -> None:
    write_samples(str(folder), tmp_path / "samples.beton", COUNT)
    task = Task(tmp_path / "samples.beton", "ours_torch", 1, BATCH, COUNT // BATCH, SIZE)
    wrong = observe(mutate(open_variant(task)(0)))
    with pytest.raises(ValueError, match=f"torchvision is wrong: .*{sentence}"):
        check(observed | {"torchvision": wrong}, COUNT, BATCH, SIZE)


@pytest.mark.parametrize("change", [lambda pixels: pixels ^ 2, lambda pixels: np.where(pixels < 1, 41, pixels)])
def test_our_loaders_must_agree(observed: dict[str, Observed], change: Callable[[np.ndarray], np.ndarray]) -> None:
    ours = observed["ours_torch"]
    views = ours.views.copy()
    views[0, 0, 0, 0, 0] = 0
    reference = ours._replace(views=views)
    wrong = ours._replace(views=change(views).astype(np.uint8))
    with pytest.raises(ValueError, match="our two loaders differ by"):
        check({"ours_torch": reference, "ours_ffcv": wrong}, COUNT, BATCH, SIZE)


def test_an_archive_is_read_where_it_lies(folder: Path, tmp_path: Path) -> None:
    """Names that lead out of a folder, links and other files do no harm."""
    archive, path = tmp_path / "photos.tar", tmp_path / "out" / "samples.beton"
    path.parent.mkdir()
    photo = next(folder.rglob("*.jpg")).read_bytes()
    with tarfile.open(archive, "w") as tar:
        for name in ("../outside.jpg", "/absolute.JPEG", "deep/er/inside.jpg", "note.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(photo)
            tar.addfile(member, io.BytesIO(photo))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    about = write_samples(str(archive), path, 8)
    assert (about["files"], about["samples"]) == (3, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "photos.tar"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["samples.beton", "samples.beton.json"]


def test_without_a_source_images_are_generated(tmp_path: Path) -> None:
    about = write_samples("", tmp_path / "samples.beton", 8)
    assert about["files"] == 8 and 300 <= min(about["mean_height_width"]) <= max(about["largest_height_width"]) < 600


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere does not exist: give a folder of JPEGs or a .tar of them"),
        (["empty"], "empty has no JPEGs"),
        (["text.tar"], "text.tar is no tar archive"),
        (["broken"], "bad.jpg can't be decoded"),
        (["workers=1,none"], "workers=1,none: numbers of at least 1 are expected"),
        (["workers=4096"], "workers=4096: this process may use"),
        (["images=64"], "images=64: this makes 1 batches of 64, but 14 are needed"),
        (["out=x.txt"], "out=x.txt: it does not end in .json"),
        (["round=1"], "did you mean rounds?"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_ffcv: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken"):
        Path(name).mkdir()
    Path("broken/bad.jpg").write_bytes(b"\xff\xd8 not much of a JPEG")
    Path("text.tar").write_text("no archive")
    assert data.main(arguments) == 2
    errors = capfd.readouterr().err
    assert sentence in errors and errors.startswith("error: ") and errors.count("\n") == 1

"""Comparing and reporting evaluations that lie in run directories, and running those that are missing."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from simclr_ddp import evaluate
from simclr_ddp.config import options
from simclr_ddp.config.schema import Evaluate, LinearEval
from simclr_ddp.data.write import write_dataset
from simclr_ddp.evaluation import report
from simclr_ddp.runs import evaluations
from tests.conftest import write_images
from tests.support import encoder_run
from tests.support.output import only_error

LABELS = np.arange(200) % 10
IMAGES = {"source": "data/test_100%.beton", "fingerprint": "aa", "images": 200, "split": "test"}


def make_run(folder: Path, weight: float = 0.0) -> Path:
    """A run of which only its encoder is left."""
    folder.mkdir(parents=True)
    save_file({"w": torch.tensor([weight])}, folder / "encoder.safetensors", {"step": "8"})
    return folder


def record_of(run: Path, results: dict[str, Any], **changed: Any) -> dict[str, Any]:
    step, weights = evaluations.exported(run / "encoder.safetensors")
    return {
        "step": step,
        "hash": weights,
        "settings": options.plain(LinearEval(run=str(run))),
        "runtime": {"precision": "fp32"},
        "train": IMAGES | {"source": "data/train.beton", "fingerprint": "bb", "split": "train"},
        "test": IMAGES,
        "results": results,
        "seconds": 12.5,
    } | changed


def classified(run: Path, wrong: list[int], **changed: Any) -> Path:
    """A linear evaluation in which these images are classified wrongly, and an untrained encoder is right for half."""
    predictions = LABELS.copy()
    predictions[wrong] = (predictions[wrong] + 1) % 10
    top1 = float((predictions == LABELS).mean())
    trained = {"top1": top1, "top1_interval": [top1 - 0.02, top1 + 0.02], "strength": 3.0, "validation": [{"top1": 1}]}
    record = record_of(run, {"trained": trained, "random": {"top1": 0.5}}, **changed)
    return evaluations.write(run, record, {"labels": LABELS, "predictions": predictions})


def regressed(run: Path, errors: np.ndarray) -> Path:
    mse = float(errors.mean())
    results = {"trained": {"mse": mse, "mse_of": {"radius": mse}}, "predict_the_mean": {"mse": 2.0}}
    protocol = {"name": "linear", "views": 3}
    return evaluations.write(run, record_of(run, results, protocol=protocol), {"squared_error": errors})


def reported(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    assert evaluate.main([*map(str, arguments), f"output={folder}", "--debug"]) == 0
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_two_runs_are_compared_on_the_same_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", 1.0)
    classified(a, [0, 1, 2])
    classified(b, [*range(1, 13), 50])
    content = reported(tmp_path, a, b)
    (row,) = content["comparisons"]
    assert (row["only_a"], row["only_b"], row["images"]) == (11, 1, 200)
    assert row["difference"] == pytest.approx(0.05) and row["mean_a"] == 0.985 and row["mean_b"] == 0.935
    assert row["p"] == pytest.approx(stats.binomtest(11, 12).pvalue)
    low, high = row["interval"]
    assert 0 < low < 0.05 < high < 0.1
    printed = capfd.readouterr().out
    assert "98.50% (96.50% .. 100.50%)" in printed and "+5.00 points" in printed and "0.0063" in printed
    assert re.search(r"\| +a +\| b +\| random encoder \|", printed), "equal ones have one column"
    assert "11 and 1 images only one is right" in printed and content["notes"] == []
    swapped = reported(tmp_path, b, a)["comparisons"][0]
    assert swapped["difference"] == -row["difference"] and swapped["p"] == row["p"]


def test_errors_of_numbers_are_compared(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", 1.0)
    random = np.random.default_rng(0)
    errors = random.exponential(size=(2, 200))
    for run, values in ((a, errors[0]), (b, errors[0] + 0.1 + 0.2 * errors[1])):
        regressed(run, values)
    content = reported(tmp_path, a, b)
    (row,) = content["comparisons"]
    assert row["metric"] == "mse" and row["interval"][1] < 0 and row["p"] < 0.001
    (section,) = content["evaluations"]
    assert section["predict_the_mean"] == {"mse": 2.0} and set(section["metrics"]) == {"mse", "mse_of.radius"}
    text = (tmp_path / "report.md").read_text()
    assert "predict the mean" in text and "mean squared error, radius" in text and "Settings: views=3." in text


@pytest.mark.parametrize("commas", [True, False])
def test_groups_of_seeds_are_compared_by_welchs_interval(tmp_path: Path, commas: bool) -> None:
    counts = {"a": (10, 12, 14), "b": (20, 26, 21)}
    for name, wrong in counts.items():
        for seed, count in enumerate(wrong):
            classified(make_run(tmp_path / name / f"seed{seed}", seed), list(range(count)))
    given = [",".join(f"{tmp_path / n}/seed{i}" for i in range(3)) if commas else str(tmp_path / n) for n in counts]
    content = reported(tmp_path / "out", *given)
    (row,) = content["comparisons"]
    a, b = ([1 - count / 200 for count in counts[name]] for name in "ab")
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert row["p"] == pytest.approx(expected.pvalue) and row["test"] == "Welch's t-test over runs"
    assert row["interval"] == pytest.approx(tuple(expected.confidence_interval()))
    (cell, _) = content["evaluations"][0]["metrics"]["top1"]
    assert cell["mean"] == pytest.approx(np.mean(a)) and cell["deviation"] == pytest.approx(np.std(a, ddof=1))
    assert cell["values"] == pytest.approx(a) and cell["interval"] is None and cell["random"] == 0.5
    assert "94.00% ± 1.00% (3)" in (tmp_path / "out/report.md").read_text()


def test_the_report_is_a_function_of_its_json(tmp_path: Path) -> None:
    """Every number of report.md and report.tex is in report.json; names that LaTeX would read as commands are text."""
    a, b = make_run(tmp_path / "50%_a&b"), make_run(tmp_path / "b", 1.0)
    classified(a, [0])
    classified(a, [0, 1], protocol={"name": "knn", "k": 20})
    classified(b, [1, 2])
    content = reported(tmp_path, a, b)
    text, tex = ((tmp_path / f"report.{suffix}").read_text() for suffix in ("md", "tex"))
    assert report.markdown(content) == text and report.latex(content) == tex
    assert "## knn, 200 test images of test_100%.beton" in text and "Settings: k=20." in text
    assert r"50\%\_a\&b" in tex and r"test\_100\%.beton" in tex
    body = [line for line in tex.splitlines() if not line.startswith("%")]
    assert not re.search(r"(?<!\\)[%#_~^]", "\n".join(body)), "special characters are escaped"
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 3
    for table in re.findall(r"\\begin{tabular}{(\w+)}(.*?)\\end{tabular}", tex, re.DOTALL):
        rows = [line for line in table[1].splitlines() if line.endswith(r"\\")]
        assert len(rows) >= 2 and {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(table[0])}


def test_a_report_of_one_run_lies_in_its_directory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    classified(run, [0])
    stale = classified(run, [0, 1], hash="0" * 16, step=4)
    assert evaluate.main([str(run)]) == 0
    content = json.loads((run / "report.json").read_text())
    assert content["comparisons"] == [] and len(content["evaluations"]) == 1
    assert content["evaluations"][0]["seconds"] == [12.5]
    assert content["notes"] == [f"{stale}: it measured other weights (step 4) than the run has now"]
    assert "random encoder" in capfd.readouterr().out
    assert evaluate.main([str(run / "encoder.safetensors")]) == 0
    assert "output=FOLDER" in capfd.readouterr().out, "a file has no folder of its own"


def test_random_encoders_that_differ_stand_beside_their_columns(tmp_path: Path) -> None:
    a, b, c = (make_run(tmp_path / name, i) for i, name in enumerate("abc"))
    for run, random in ((a, {"random": {"top1": 0.4}}), (b, {}), (c, {"random": {"top1": 0.3}})):
        record = record_of(run, {"trained": {"top1": 0.9}} | random)
        evaluations.write(run, record, {"labels": LABELS, "predictions": LABELS})
    reported(tmp_path, a, b, c)
    rows = [line.split("|")[1:-1] for line in (tmp_path / "report.md").read_text().splitlines() if line[:1] == "|"]
    head, top1 = ([cell.strip() for cell in rows[i]] for i in (0, 2))
    assert head == ["", "a", "random encoder", "b", "c", "random encoder"]
    assert top1 == ["top-1", "90.00%", "40.00%", "90.00%", "90.00%", "30.00%"]


def test_damaged_records_are_noted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    classified(run, [0])
    (run / "evaluations" / "torn.json").write_text('{"step": 8, "results"')
    (note,) = reported(tmp_path, run)["notes"]
    assert note == f"{run}/evaluations/torn.json can't be read: it is no complete record of an evaluation"


def test_a_single_run_and_a_group_are_not_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "group/b", "group/c"):
        classified(make_run(tmp_path / name, len(name)), [0])
    assert evaluate.main([str(tmp_path / "a"), str(tmp_path / "group")]) == 2
    assert "linear of a and group: one is a single run, and a deviation needs two" in only_error(capfd)


def test_runs_that_measured_something_else_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", 1.0)
    classified(a, [0])
    classified(b, [0], test=IMAGES | {"fingerprint": "cc"})
    assert evaluate.main([str(a), str(b)]) == 2
    error = only_error(capfd)
    for run in (a, b):
        assert evaluations.read_all(run)[0][0].measured in error
    assert "no evaluation with accuracy or error of the same images" in error and "protocols=linear" in error


def test_runs_that_share_no_accuracy_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Metrics without labels are equal in kind, but nothing is known of single images."""
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", 1.0)
    for run in (a, b):
        evaluations.write(run, record_of(run, {"trained": {"rankme": 3.0}}, protocol={"name": "label_free"}))
    assert evaluate.main([str(a), str(b)]) == 2
    assert "no evaluation with accuracy or error of the same images" in only_error(capfd)


def test_mistakes_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", 1.0)
    (tmp_path / "nothing").mkdir()
    cases: list[tuple[list[str | Path], str]] = [
        ([], "no runs given"),
        ([a, b], "a: has no evaluation of its current encoder; run some with protocols=all"),
        ([tmp_path / "missing"], "missing: does not exist"),
        ([tmp_path / "nothing"], "nothing: is neither a run nor a folder that holds runs"),
        ([a, a], "a run is given twice"),
        ([a, "protocols=linear,kmn"], "protocols=linear,kmn: kmn is unknown; choose from linear"),
        ([a, "protocols=linear", "set.linear.size=3"], "set.linear.size=3: is no option of an evaluation"),
        ([a, "protocols=linear", "set.linear_eval.sizes=3"], "unknown option sizes"),
    ]
    for arguments, expected in cases:
        assert evaluate.main([*map(str, arguments)]) == 2
        assert expected in only_error(capfd)


def test_per_image_results_that_are_missing_or_differ(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", 1.0)
    kept, other = classified(a, [0]), classified(b, [1])
    other.with_suffix(".npz").unlink()
    assert evaluate.main([str(a), str(b)]) == 2
    assert "has no results per image" in (error := only_error(capfd)) and "evaluate again" in error
    np.savez(other.with_suffix(".npz"), labels=LABELS[::-1], predictions=LABELS)
    assert evaluate.main([str(a), str(b)]) == 2
    assert f"{kept} and {other} have different labels per image" in only_error(capfd)
    np.savez(other.with_suffix(".npz"), labels=LABELS)
    assert evaluate.main([str(a), str(b)]) == 2
    assert "has no labels and predictions [n]; evaluate again" in only_error(capfd)
    np.savez(other.with_suffix(".npz"), squared_error=np.full(200, np.nan))
    assert evaluate.main([str(a), str(b)]) == 2
    assert "has values that are no finite numbers" in only_error(capfd)
    other.with_suffix(".npz").write_bytes(b"PK")
    assert evaluate.main([str(a), str(b)]) == 2
    assert "can't be read" in only_error(capfd)


def test_finished_evaluations_are_reused_and_failures_are_noted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command that is started fails here, as the encoder is none; its line and the note say so."""
    run = make_run(tmp_path / "a")
    classified(run, [0])
    assert evaluate.main([str(run), "protocols=linear"]) == 0
    assert f"linear of {run}: finished before" in capfd.readouterr().out
    assert evaluate.main([str(run), "protocols=linear", "set.linear_eval.tolerance=1e-3"]) == 1
    out, err = capfd.readouterr()
    started = f"python -m simclr_ddp.linear_eval {run} tolerance=0.001"
    assert started in out and f"- not measured: linear of {run}, exit status 2 of {started}" in out
    assert "encoder.safetensors" in err and err.count("error: ") == 1
    alone = run / "encoder.safetensors"  # whose report is only printed
    assert evaluate.main([str(alone), "protocols=linear", "set.linear_eval.tolerance=1e-3"]) == 1


@pytest.mark.slow
def test_all_protocols_are_run_once_and_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, count in (("train", 40), ("test", 20)):
        write_dataset(str(write_images(tmp_path / name, count, seed=count)), tmp_path / f"{name}.beton")
    run = encoder_run.make_run(tmp_path / "run", tmp_path / "train.beton", tmp_path / "test.beton")
    quick = [
        "set.linear_eval.strengths=[1]",
        "set.knn.k=5",
        "set.transformations.strengths=[1]",
        "set.label_free.augmented=2",
        "device=cpu",
    ]
    quick += [f"set.{command}.workers=0" for command, _ in evaluate.PROTOCOLS.values()]
    content = reported(tmp_path, run, "protocols=all", *quick)
    assert content["notes"] == [] and "finished before" not in capfd.readouterr().out
    found = {section["protocol"]: section for section in content["evaluations"]}
    assert list(found) == ["linear", "knn", "transformations", "label_free"]
    assert found["knn"]["settings"]["k"] == 5 and found["label_free"]["settings"]["augmented"] == 2
    for section in found.values():
        assert section["seconds"][0] > 0
        for name, (cell,) in section["metrics"].items():
            assert cell["random"] is not None or name.endswith("_z_top1"), name
    again = reported(tmp_path, run, "protocols=all", *quick)
    assert again == content and capfd.readouterr().out.count("finished before") == 4


def test_transformations_are_left_out_where_they_can_not_be_measured(tmp_path: Path) -> None:
    run = encoder_run.make_run(tmp_path / "run", "images.beton", "images.beton")
    drawn = encoder_run.make_run(tmp_path / "drawn", "spirograph", "spirograph")
    alone = shutil.copytree(run, tmp_path / "alone", ignore=shutil.ignore_patterns("checkpoints"))
    found = {}
    for path in (run, run / encoder_run.CHECKPOINT, drawn, alone):
        encoder = evaluate.identify(path)
        found[path] = evaluate.why_left_out("transformations", encoder, Evaluate())
        assert evaluate.why_left_out("knn", encoder, Evaluate()) == ""
    assert found[run] == found[run / encoder_run.CHECKPOINT] == ""
    assert "generated images" in found[drawn] and "no checkpoint" in found[alone]


def test_an_evaluation_is_missing_if_settings_or_images_differ(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    path = classified(run, [0])
    encoder = evaluate.identify(run)

    def finished(**changed: Any) -> bool:
        ((one,), _) = evaluate.finished(encoder)
        return evaluate.is_that(one, "linear", LinearEval(run="elsewhere", **changed), encoder)

    assert finished() and finished(device="cpu", workers=0, batch_size=7) and finished(test=IMAGES["source"])
    assert not finished(convention="mean") and not finished(seed=1) and not finished(test="data/other.beton")
    record = json.loads(path.read_text())
    for key in ("crop", "metric", "validation"):  # options that earlier versions did not have
        del record["settings"][key]
    path.write_text(json.dumps(record))
    assert finished() and not finished(crop=0.5) and not finished(metric="mean_per_class")
    assert not finished(validation="data/other.beton")
    path.with_suffix(".npz").unlink()
    assert not finished(), "written by an earlier version, without results per image"

"""Tables of run directories that are written here, whole, unfinished and damaged."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch import summary
from simclr_ddp.config.options import build, to_yaml
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.runs import evaluations
from tests.support import processes
from tests.support.output import only_error


def make_run(folder: Path, probe: float, epochs_done: int | None = None, **options: Any) -> Path:
    """A run of two lines an epoch, whose probe is at `probe` in the end."""
    values = {key.replace("__", "."): value for key, value in options.items()}
    settings = build(Pretrain, [("the test", {"optim.epochs": 4, **values})])
    folder.mkdir(parents=True)
    starts = "" if epochs_done == 0 else "starts:\n- step: 0\n"
    (folder / "config.yaml").write_text(to_yaml(settings) + starts)
    lines = []
    for i in range(1, 2 * (settings.optim.epochs if epochs_done is None else epochs_done) + 1):
        line = {"step": i, "epoch": i / 2, "loss": 5 - i / 10, "contrastive_top1": 0.1, "images_per_second": 100.0}
        lines.append(line | ({"probe_top1": probe} if i % 2 == 0 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """Two kernels for two lengths, two seeds each."""
    for k, kernel in enumerate(("cosine", "laplacian")):
        for epochs in (4, 6):
            for seed in (0, 1):
                probe = 0.5 + 0.1 * k + 0.01 * epochs + 0.02 * seed
                make_run(tmp_path / f"runs/{kernel}-{epochs}-{seed}", probe, loss__kernel=kernel, optim__epochs=epochs,
                         seed=seed)  # fmt: skip
    return tmp_path / "runs"


def rows(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def printed(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert summary.main([str(argument) for argument in arguments]) == 0
    return capfd.readouterr().out


def test_kernels_by_lengths_with_the_mean_of_the_seeds(matrix: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = printed(capfd, matrix, "rows=loss.kernel", "columns=optim.epochs")
    assert text.startswith("probe_top1 by loss.kernel, optim.epochs; 8 of 8 runs\n")
    assert rows(text) == [
        ["loss.kernel", "optim.epochs=4", "optim.epochs=6"],
        ["---", "---", "---"],
        ["cosine", "0.55 ± 0.014 (2)", "0.57 ± 0.014 (2)"],
        ["laplacian", "0.65 ± 0.014 (2)", "0.67 ± 0.014 (2)"],
    ]
    assert "Left out:" not in text and "also differ" not in text


def test_it_finds_out_in_what_the_runs_differ(matrix: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = printed(capfd, *sorted(matrix.iterdir()))
    assert {row[0] for row in rows(text)[2:]} in ({"cosine", "laplacian"}, {"4", "6"})
    assert len(rows(text)[0]) == 3 and text.count("± 0.014 (2)") == 4
    single = printed(capfd, matrix / "cosine-4-0", matrix / "cosine-4-1")
    assert rows(single)[2:] == [["all", "0.55 ± 0.014 (2)"]]
    one = printed(capfd, matrix / "cosine-4-0", "value=loss")
    assert rows(one)[2:] == [["all", "4.25"]], "the mean of the last epoch's two lines, 4.3 and 4.2"


def test_what_a_mean_hides_is_said(matrix: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = printed(capfd, matrix, "rows=loss.kernel")
    assert "Runs of a cell also differ in optim.epochs; rows=optim.epochs shows them." in text
    assert rows(text)[2][1].endswith("(4)")


def test_unfinished_and_damaged_runs_are_listed_and_count_in_no_mean(
    matrix: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_run(matrix / "short", 0.99, epochs_done=3, loss__kernel="cosine", seed=7)
    (matrix / "short" / "log.txt").write_text("error: step 7: it diverges\n")
    with (matrix / "cosine-4-1" / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n")
    with (matrix / "cosine-6-1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "epo')  # being written
    diverged = (matrix / "laplacian-6-1" / "metrics.jsonl").read_text().splitlines()
    diverged[-1] = diverged[-1].replace('"loss": 3.8', '"loss": NaN')
    (matrix / "laplacian-6-1" / "metrics.jsonl").write_text("\n".join(diverged) + "\n")
    endless = make_run(matrix / "endless", 0.99) / "metrics.jsonl"
    endless.write_text(endless.read_text().replace('"epoch": 0.5', '"epoch": Infinity'))
    (matrix / "laplacian-4-1" / "config.yaml").write_text("loss: {kernel: [")
    (matrix / "laplacian-4-0" / "linear_eval.json").write_text("{")
    make_run(matrix / "begun", 0.99, epochs_done=0)
    (matrix / "begun" / "config.yaml").rename(matrix / "begun" / "trial.yaml")  # of a sweep's trial
    text = printed(capfd, matrix, "rows=loss.kernel", "columns=optim.epochs", f"out={matrix}/out")
    assert "; 5 of 11 runs" in text and "0.99" not in text
    assert rows(text)[2:] == [["cosine", "0.54", "0.57 ± 0.014 (2)"], ["laplacian", "0.64", "0.66"]]
    said = dict(line[2:].split(": ", 1) for line in text.splitlines() if line.startswith("- "))
    assert said[f"{matrix}/short"] == "not finished: epoch 3.00 of 4, error: step 7: it diverges"
    assert said[f"{matrix}/cosine-4-1"] == "damaged: 1 lines of metrics.jsonl can't be read"
    assert said[f"{matrix}/laplacian-4-1"].startswith("damaged: config file")
    assert said[f"{matrix}/laplacian-6-1"] == "loss is nan"
    assert said[f"{matrix}/endless"].startswith("damaged: OverflowError")
    assert f"- {matrix}/laplacian-4-0/linear_eval.json can't be read: it is no complete record" in text
    assert said[f"{matrix}/begun"] == "not finished: epoch 0.00 of 4"
    written = list(csv.DictReader((matrix / "out/summary.csv").read_text().splitlines()))
    assert len(written) == 11 and sum(row["fault"] != "" for row in written) == 6
    assert (matrix / "out/summary.md").read_text() in text
    assert 0 < (matrix / "out/summary.png").stat().st_size < 300_000


def test_a_job_says_why_it_has_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In the log of the rank whose error is the cause, of the newest job; a task of an array, too."""
    for name, job in (("a", "9"), ("b", "77_1")):
        run = make_run(tmp_path / name, 0.5, epochs_done=3)
        (run / "slurm").mkdir()
        for number, submitted in enumerate(("8", job)):
            (run / f"slurm/{submitted}_submitted.pkl").touch()
            os.utime(run / f"slurm/{submitted}_submitted.pkl", (number, number))
        (run / "slurm/8_0_log.out").write_text("error: of an older job\n")
        own = "error: rank 0 on node1: simclr_ddp.pretrain ended with status 2"
        (run / f"slurm/{job}_0_log.out").write_text(f"error: lost the other ranks (x): the first says why\n{own}\n")
        (run / f"slurm/{job}_1_log.out").write_text("error: rank 1: step 7: it diverges (--debug shows where)\n")
    text = printed(capfd, tmp_path)
    assert text.count("not finished: epoch 3.00 of 4, error: rank 1: step 7: it diverges\n") == 2, text


def test_copies_in_a_run_are_no_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a job keeps them: its config file, and the code with the configs that lie there."""
    for name in ("a", "b"):
        make_run(tmp_path / name, 0.5)
        make_run(tmp_path / name / "slurm/code-1/benchmarks/results/seed0", 0.9)
        copy = make_run(tmp_path / name / "slurm/config-1/1", 0.9, epochs_done=0) / "config.yaml"
        copy.rename(copy.with_name("trial.yaml"))
    assert "; 2 of 2 runs" in printed(capfd, tmp_path)


def test_a_linear_evaluation_comes_first(capfd: pytest.CaptureFixture[str]) -> None:
    folder = processes.ROOT / "benchmarks/results/cifar10_cpu"
    text = printed(capfd, folder, "columns=seed")
    assert text.startswith("linear_top1 by seed; 3 of 3 runs")
    measured = json.loads((folder / "seed0/linear_eval.json").read_text())["results"]["trained"]["top1"]
    assert rows(text)[2][1] == f"{measured:.4g}"
    assert "probe_top1 by seed" in printed(capfd, folder, "columns=seed", "value=probe_top1")


def evaluated(run: Path, top1: float, step: int = 8, old: bool = False, **changed: Any) -> Path:
    """An evaluation in a run directory, of its last step on its test images by default."""
    settings = {"convention": "C", "strengths": changed.get("strengths", []), "size": 0}
    record = {
        "step": step,
        "hash": changed.get("hash", "of these weights"),
        "settings": settings,
        "runtime": {"precision": "fp32"},
        "train": {"source": "train.beton", "fingerprint": "of train"},
        "test": {"source": "test.beton", "images": 100, "fingerprint": "of test", "split": "test"}
        | changed.get("test", {}),
        "results": {"trained": changed.get("trained", {"top1": top1})},
    }
    if "protocol" in changed:
        record["protocol"] = changed["protocol"]
    if not old:
        return evaluations.write(run, record)
    del record["hash"], record["test"]["split"]
    (run / "linear_eval.json").write_text(json.dumps(record))
    return run / "linear_eval.json"


@pytest.fixture
def own_data() -> dict[str, str]:
    return {"data__train": "train.beton", "data__test": "test.beton"}


def test_a_metric_belongs_to_what_it_measured(
    tmp_path: Path, own_data: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Old files too: only the last step, on the run's test images, never on training images; the rest is named."""
    for old in (False, True):
        run = make_run(tmp_path / f"old={old}", 0.5, **own_data)
        wrong: dict[Path, str] = {}
        for changed, reason in (
            ({"step": 2}, "it measured step 2, and the run is at step 8"),
            ({"test": {"split": "train", "fingerprint": "of train"}}, "it measured training images"),
            ({"test": {"source": "train.beton"}}, "it measured the training images of the run"),
            ({"test": {"source": "other.beton"}}, "it measured other.beton, and data.test of the run is test.beton"),
        ):
            path = evaluated(run, 0.99, old=old, **changed)
            wrong = {} if old else wrong
            wrong[path] = reason
            text = printed(capfd, run)
            assert text.startswith("probe_top1; 1 of 1 runs") and "0.99" not in text
            for file, why in wrong.items():
                assert f"- {file}: {why}" in text
        right = evaluated(run, 0.75, old=old)
        text = printed(capfd, run)
        assert text.startswith("linear_top1; 1 of 1 runs") and rows(text)[2:] == [["all", "0.75"]]
        assert "Measured on 100 images of test.beton" in text and f"- {right}" not in text
        assert len(list(run.glob("evaluations/*"))) == (0 if old else 5), "none is overwritten"


def test_generated_images_of_either_form_are_those_of_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", 0.5)
    for form in ("", "-rows"):
        evaluated(run, 0.75, test={"source": "spirograph", "fingerprint": f"spirograph-test-2000{form}"})
        text = printed(capfd, run)
        assert "it measured spirograph" not in text, text
        assert text.startswith("linear_top1; 1 of 1 runs") and rows(text)[2:] == [["all", "0.75"]], text


def test_weights_of_the_same_step_but_of_another_training_are_others(
    tmp_path: Path, own_data: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", 0.5, **own_data)
    save_file({"a": np.ones(3, np.float32)}, run / "encoder.safetensors", {"step": "8"})
    step, weights = evaluations.exported(run / "encoder.safetensors")
    other = evaluated(run, 0.99, hash="of other weights")
    assert step == 8 and f"- {other}: it measured other weights of this step" in printed(capfd, run)
    evaluated(run, 0.75, hash=weights)
    assert rows(printed(capfd, run))[2:] == [["all", "0.75"]]


def test_equal_evaluations_are_compared_and_the_metric_does_not_depend_on_who_has_one(
    tmp_path: Path, own_data: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / f"seed={i}", 0.5 + 0.1 * i, seed=i, **own_data) for i in range(3)]
    evaluated(runs[0], 0.8)
    text = printed(capfd, *runs)
    assert text.startswith("probe_top1; 3 of 3 runs") and rows(text)[2:] == [["all", "0.6 ± 0.1 (3)"]]
    assert "linear_top1 is known of 1 of 3 runs; value=linear_top1 shows it." in text
    for i in (1, 2):
        evaluated(runs[i], 0.8 + 0.1 * (i - 1))
    for run in runs[:2]:
        other = evaluated(run, 0.99, strengths=[1.0])
    text = printed(capfd, *runs)
    assert text.startswith("linear_top1; 3 of 3 runs") and rows(text)[2:] == [["all", "0.8333 ± 0.058 (3)"]]
    name = other.stem.split("-", 1)[1].removesuffix(".trained")
    assert f"- {other}: other images or settings than those shown; evaluation={name} shows it" in text
    text = printed(capfd, *runs, f"evaluation={name}", "value=linear_top1")
    assert rows(text)[2:] == [["all", "0.99 ± 0 (2) (1 without)"]] and "strengths=[1.0]" in text


def test_another_protocol_is_shown_by_its_name(
    tmp_path: Path, own_data: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / f"seed={i}", 0.5, seed=i, **own_data) for i in range(2)]
    for i, run in enumerate(runs):
        for k, top1 in ((200, 0.6), (20, 0.9)):
            evaluated(run, top1 + 0.1 * i, protocol={"name": "knn", "k": k, "temperature": 0.1})
    text = printed(capfd, *runs)
    assert text.startswith("knn_top1; 2 of 2 runs") and "temperature=0.1." in text
    assert rows(text)[2:] == [["all", "0.95 ± 0.071 (2)"]] and "k=20," in text, "of equals, the last"
    for i, run in enumerate(runs):
        path = evaluated(run, 0.3 + 0.1 * i)
    text = printed(capfd, *runs)
    assert text.startswith("linear_top1; 2 of 2 runs") and rows(text)[2:] == [["all", "0.35 ± 0.071 (2)"]]
    assert text.count("other images or settings than those shown; evaluation=test.") == 4 and str(path) not in text
    text = printed(capfd, *runs, "evaluation=-knn.", f"out={tmp_path / 'out'}")
    assert text.startswith("knn_top1; 2 of 2 runs") and "linear_top1 is known" not in text
    (first, _) = csv.DictReader((tmp_path / "out/summary.csv").read_text().splitlines())
    assert (first["knn_top1"], first["linear_top1"], first["probe_top1"]) == ("0.9", "", "0.5")
    for run in runs:
        evaluated(run, 0, protocol={"name": "label_free"}, trained={"rankme": 9.5, "forward_seconds": 1})
    evaluated(make_run(tmp_path / "seed=2", 0.5, seed=2, **own_data), 0, protocol={"name": "label_free"},
              trained={"rankme": 8.5})  # fmt: skip
    text = printed(capfd, *runs, tmp_path / "seed=2", "value=linear_top1")
    assert rows(text)[2:] == [["all", "0.35 ± 0.071 (2) (1 without)"]], "most runs have no accuracy"
    text = printed(capfd, *runs, tmp_path / "seed=2", "evaluation=-label_free.", "value=label_free_rankme")
    assert rows(text)[2:] == [["all", "9.167 ± 0.58 (3)"]]
    assert summary.main([*map(str, runs), "value=knn_top"]) == 2
    assert "value=knn_top: unknown value; did you mean" in only_error(capfd)


def test_metrics_of_the_monitor(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of the last epoch that has one; the other metrics stay the first choice."""
    for seed in (0, 1):
        file = make_run(tmp_path / str(seed), 0.5, seed=seed) / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[3]["monitor_rankme"], lines[5]["monitor_rankme"] = 10.0, 20.0 + seed
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert printed(capfd, tmp_path).startswith("probe_top1; 2 of 2 runs\n")
    text = printed(capfd, tmp_path, "value=monitor_rankme", f"out={tmp_path / 'out'}")
    assert rows(text)[2] == ["all", "20.5 ± 0.71 (2)"] and "Measured on" not in text
    written = list(csv.DictReader((tmp_path / "out" / "summary.csv").open()))
    assert [row["monitor_rankme"] for row in written] == ["20.0", "21.0"]


def test_a_folder_may_have_an_equals_sign_in_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "lr=0.1", 0.5)
    monkeypatch.chdir(tmp_path)
    for given in (f"{tmp_path}/lr=0.1", "./lr=0.1", "lr=0.1"):
        assert "1 of 1 runs" in printed(capfd, given)
    assert summary.main(["runs/lr=0.2"]) == 2 and "runs/lr=0.2: not a folder" in only_error(capfd)


def test_mistakes(matrix: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, said in {
        (): "no runs given; write python -m launch.summary runs/a runs/b",
        ("nowhere",): "nowhere: not a folder",
        (str(matrix), "rows=loss.kernl"): "unknown option loss.kernl in rows or columns; did you mean loss.kernel?",
        (
            str(matrix),
            "rows=kernels_and_more",
        ): "unknown option kernels_and_more in rows or columns; --help lists every "
        "option; the runs differ in seed, loss.kernel, optim.epochs",
        (str(matrix), "value=top1"): "value=top1: unknown value; did you mean probe_top1?",
    }.items():
        assert summary.main(list(arguments)) == 2
        assert said in only_error(capfd)
    (matrix.parent / "empty").mkdir()
    text = printed(capfd, matrix.parent / "empty")
    assert "0 of 1 runs" in text and "is no run directory" in text

"""Tables of run directories that are written here, whole, unfinished and damaged."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch import summary
from simclr_ddp import config
from simclr_ddp.config import Pretrain
from tests import processes
from tests.test_cli import only_error


def make_run(folder: Path, probe: float, epochs_done: int | None = None, **options: Any) -> Path:
    """A run of two lines an epoch, whose probe is at `probe` in the end."""
    values = {key.replace("__", "."): value for key, value in options.items()}
    settings = config.build(Pretrain, [("the test", {"optim.epochs": 4, **values})])
    folder.mkdir(parents=True)
    starts = "" if epochs_done == 0 else "starts:\n- step: 0\n"
    (folder / "config.yaml").write_text(config.to_yaml(settings) + starts)
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
    assert "In no mean" not in text and "too:" not in text


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
    assert "Runs of a cell differ in optim.epochs, too: rows=optim.epochs shows them." in text
    assert rows(text)[2][1].endswith("(4)")


def test_unfinished_and_damaged_runs_are_listed_and_count_in_no_mean(
    matrix: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_run(matrix / "short", 0.99, epochs_done=3, loss__kernel="cosine", seed=7)
    (matrix / "short" / "log.txt").write_text("error: step 7: it diverges\n")
    with (matrix / "cosine-4-1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "epo')
    (matrix / "laplacian-4-1" / "config.yaml").write_text("loss: {kernel: [")
    (matrix / "laplacian-4-0" / "linear_eval.json").write_text("{")
    make_run(matrix / "begun", 0.99, epochs_done=0)
    (matrix / "begun" / "config.yaml").rename(matrix / "begun" / "trial.yaml")  # of a sweep's trial
    text = printed(capfd, matrix, "rows=loss.kernel", "columns=optim.epochs", f"out={matrix}/out")
    assert "; 5 of 10 runs" in text and "0.99" not in text
    assert rows(text)[2:] == [["cosine", "0.54", "0.57 ± 0.014 (2)"], ["laplacian", "", "0.67 ± 0.014 (2)"]]
    told = dict(line[2:].split(": ", 1) for line in text.splitlines() if line.startswith("- "))
    assert told[f"{matrix}/short"] == "not finished: epoch 3.00 of 4, error: step 7: it diverges"
    assert told[f"{matrix}/cosine-4-1"] == "damaged: 1 lines of metrics.jsonl can't be read"
    assert told[f"{matrix}/laplacian-4-1"].startswith("damaged: config file")
    assert "linear_eval.json" in told[f"{matrix}/laplacian-4-0"]
    assert told[f"{matrix}/begun"] == "not finished: epoch 0.00 of 4"
    written = list(csv.DictReader((matrix / "out/summary.csv").read_text().splitlines()))
    assert len(written) == 10 and sum(row["fault"] != "" for row in written) == 5
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


def test_mistakes(matrix: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, told in {
        (): "no runs are named: python -m launch.summary runs/a runs/b",
        ("nowhere",): "nowhere is no folder",
        (str(matrix), "rows=loss.kernl"): "unknown option loss.kernl in rows or columns: did you mean loss.kernel?",
        (
            str(matrix),
            "rows=kernels_and_more",
        ): "unknown option kernels_and_more in rows or columns: --help lists every "
        "option; the runs differ in seed, loss.kernel, optim.epochs",
        (str(matrix), "value=top1"): "value=top1 is not known",
    }.items():
        assert summary.main(list(arguments)) == 2
        assert told in only_error(capfd)
    (matrix.parent / "empty").mkdir()
    text = printed(capfd, matrix.parent / "empty")
    assert "0 of 1 runs" in text and "is no run directory" in text

"""metrics.jsonl over restarts."""

import json
from pathlib import Path

import pytest
import torch

from simclr_ddp.runs.metrics import MetricsLog, read_metrics, summary
from simclr_ddp.system.machine import peak_memory_bytes
from tests.support.disk import files_limited_to


def line_of(step: int) -> dict:
    return {"step": step, "epoch": step / 4, "loss": 5 / step, "learning_rate": 0.1 * step, "seconds": 1.5 * step}


def write(run_dir: Path, resume_step: int, steps: range) -> None:
    metrics = MetricsLog(run_dir, resume_step, {"seed": 0})
    for step in steps:
        metrics.write(line_of(step))
    metrics.sync()
    metrics.close()


def test_lines_are_appended_and_flushed(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, 0, {})
    for step in range(1, 4):
        metrics.write(line_of(step))
        assert read_metrics(tmp_path / "metrics.jsonl") == [line_of(s) for s in range(1, step + 1)]
    metrics.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 8))
    write(tmp_path, 5, range(6, 11))  # killed at 7, and gone on from 5
    assert read_metrics(tmp_path / "metrics.jsonl") == [line_of(s) for s in range(1, 11)]
    write(tmp_path, 0, range(1, 3))  # no checkpoint was left: from the start
    assert read_metrics(tmp_path / "metrics.jsonl") == [line_of(1), line_of(2)]


@pytest.mark.parametrize("ending", ['{"step": 4, "lo', '{"step": 4}}\n', "\x00\x00\x00", "{", "42\n", '{"stem": 3}\n'])
def test_a_half_written_last_line_is_cut_off(ending: str, tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(ending)
    assert read_metrics(path) == [line_of(s) for s in range(1, 4)]
    write(tmp_path, 3, range(4, 6))
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line_of(s) for s in range(1, 6)]
    assert path.read_text().endswith("}\n")


def test_lines_that_are_lost_for_good_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, 0, {})
    for step in range(1, 216):
        log.write(line_of(step))
    log.close()
    resumed = MetricsLog(tmp_path, 215, {}, list(log.tail), log.count)
    resumed.close()
    assert (resumed.count, capsys.readouterr().err) == (215, "")
    (tmp_path / "metrics.jsonl").unlink()
    resumed = MetricsLog(tmp_path, 215, {}, list(log.tail), log.count)
    resumed.close()
    assert "has lost 15 of its 215 lines" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(16, 216))
    MetricsLog(tmp_path, 215, {}, list(resumed.tail), resumed.count).close()
    assert "has lost 15 of its 215 lines" in capsys.readouterr().err, "reported at every start"


def test_lines_that_were_lost_come_back_from_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(tmp_path, 0, {})
    for step in range(1, 301):
        log.write({"step": step, "loss": 1 / step})
    tail, whole = list(log.tail), path.read_text()
    log.close()
    assert len(tail) == 200
    for left in (len(whole), len(whole) - 7, len(whole) // 2, len(whole) * 2 // 5):
        path.write_text(whole[:left])
        MetricsLog(tmp_path, 290, {}, tail).close()
        assert path.read_text().splitlines() == whole.splitlines()[:290], left
    path.unlink()
    mended = MetricsLog(tmp_path, 290, {}, tail)
    assert [line["step"] for line in read_metrics(path)] == list(range(101, 291)), "the newest are all there is"
    assert [json.loads(line)["step"] for line in mended.tail] == list(range(101, 291))


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, 0, {})
    log.write({"step": 1, "loss": 0.5})
    with files_limited_to(40):  # in the middle of the second line
        for step in (2, 3):
            log.write({"step": step, "loss": 0.25})
        assert not log.sync()
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "metrics.jsonl can't be written" in said
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert log.sync() and [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    log.write({"step": 4, "loss": 0.125})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_summary_of_a_line() -> None:
    line = {"epoch": 1.5, "loss": 3.14159, "images_per_second": 1234.5, "data_wait_fraction": 0.034}
    assert summary(line) == "epoch 1.50, loss 3.1416, 1234 images/s, data 3%"
    assert summary(line | {"data_wait_fraction": 0.351}).endswith(", data 35% (the loader is the limit)")
    assert summary(line | {"probe_top1": 0.875}).endswith(", data 3%, probe 87.5%")


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    assert 1e7 < before < 1e11
    block = torch.ones(3 * before // 4)  # 3 times as many bytes as were ever in use
    assert peak_memory_bytes(torch.device("cpu")) > 3 * before
    del block

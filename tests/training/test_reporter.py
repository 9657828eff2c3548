"""What the host learns one step late: lines, the stop flag, and values that are not finite."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_ddp.distributed import collectives
from simclr_ddp.runs.metrics import MetricsLog, read_metrics
from simclr_ddp.training.plan import Plan
from simclr_ddp.training.reporter import LateReader, Reporter, StepFailed
from simclr_ddp.training.step import Record
from tests.support.ranks import Ranks


def reporter(log: MetricsLog | None, start: int = 0, warmup_steps: int = 0, **more: Any) -> Reporter:
    plan = Plan(Path(), 4, 40, warmup_steps, 0.5, "constant", 1)
    return Reporter(log, plan, start, images_per_step=64, device=torch.device("cpu"), **{"fp16": False, **more})


def make(run_dir: Path, fp16: bool = False, start: int = 0, **more: Any) -> Reporter:
    return reporter(MetricsLog(run_dir, start, {}), start=start, fp16=fp16, **more)


def push(report: Reporter, step: int, loss: float = 1.0, stop: float = 0.0, norm: float = 2.0) -> None:
    """Push the record of the step that brings the run to `step` steps."""
    values = torch.tensor([loss, 0.25, stop, norm])
    report.push(step - 1, Record(values, ~values.isfinite().all()))


def finish(report: Reporter) -> None:
    """As the loop ends: act on the last step, close the files."""
    report.act()
    report.end()


def steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")]


def test_late_reader_gives_what_was_pushed_last() -> None:
    reader = LateReader()
    assert reader.read() is None
    vector = torch.tensor([1.0, 2.0])
    reader.push({"n": 1}, vector)
    vector.zero_()  # the caller's tensor may be reused
    assert reader.read() == ({"n": 1}, [1.0, 2.0])
    reader.push({"n": 2}, torch.tensor([3.0]))
    assert reader.read() == ({"n": 2}, [3.0]) == reader.read()


def test_lines_are_written_one_step_late(tmp_path: Path) -> None:
    report = make(tmp_path)
    for step in (1, 2, 3):
        push(report, step, loss=float(step))
        assert steps(tmp_path) == list(range(1, step))
    finish(report)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    wanted = ["step", "epoch", "loss", "contrastive_top1", "learning_rate", "images_per_second", "data_wait_fraction"]
    assert list(lines[0]) == [*wanted, "peak_memory_bytes", "seconds"]
    assert (lines[0]["epoch"], lines[0]["contrastive_top1"], lines[0]["learning_rate"]) == (0.25, 0.25, 0.5)


def test_only_due_lines_are_written(tmp_path: Path) -> None:
    """Every third step, and the last step of an epoch of four and of the run of forty."""
    report = make(tmp_path, every_steps=3)
    for step in range(1, 41):
        push(report, step)
    finish(report)
    assert steps(tmp_path) == [step for step in range(1, 41) if step % 3 == 0 or step % 4 == 0]


def test_rates_count_all_steps_since_the_line_before(tmp_path: Path) -> None:
    report = make(tmp_path, start=4, every_steps=2)

    def slow() -> Iterator[Any]:
        while True:
            time.sleep(0.02)
            yield object()

    batches = report.timed(slow(), 4)
    for step in range(5, 9):
        next(batches)
        time.sleep(0.02)
        push(report, step)
    finish(report)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert 64 / 0.4 < line["images_per_second"] < 64 / 0.04
        assert 0.1 < line["data_wait_fraction"] < 0.9


def test_the_stop_flag_is_seen_one_step_later(tmp_path: Path) -> None:
    report = make(tmp_path)
    push(report, 1)
    push(report, 2, stop=0.25)  # one of four ranks was told
    assert not report.stop
    push(report, 3)
    assert report.stop
    finish(report)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_a_value_that_is_not_finite_ends_the_run(loss: float, norm: float, tmp_path: Path) -> None:
    report = make(tmp_path)
    push(report, 1)
    push(report, 2, loss=loss, norm=norm)
    with pytest.raises(ValueError, match=r"^step 2: .* diverges; a lower optim.base_learning_rate"):
        push(report, 3)
    assert steps(tmp_path) == [1]


def test_in_the_last_step_too(tmp_path: Path) -> None:
    report = make(tmp_path)
    push(report, 1, loss=math.nan)
    with pytest.raises(ValueError, match=r"^step 1: loss nan"):
        report.act()


def test_fp16_gradients_may_overflow_but_the_loss_may_not(tmp_path: Path) -> None:
    report = make(tmp_path, fp16=True)
    push(report, 1, norm=math.inf)
    push(report, 2, loss=math.nan)
    with pytest.raises(ValueError, match=r"^step 2"):
        push(report, 3)
    assert steps(tmp_path) == [1]


def test_flush_writes_the_last_line_once(tmp_path: Path) -> None:
    report = make(tmp_path)
    assert report.flush()  # nothing yet
    push(report, 1)
    assert report.flush() and steps(tmp_path) == [1]
    assert report.flush() and steps(tmp_path) == [1]
    push(report, 2)
    assert steps(tmp_path) == [1]
    push(report, 3, loss=math.nan)
    assert not report.flush() and steps(tmp_path) == [1, 2]
    with pytest.raises(ValueError, match=r"^step 3"):
        report.act()


def test_values_can_be_added_before_the_line_is_written(tmp_path: Path) -> None:
    report = make(tmp_path)
    push(report, 1)
    report.add(probe_top1=0.5)
    push(report, 2)
    finish(report)
    assert [line.get("probe_top1") for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.5, None]


def test_the_loss_is_judged_once_after_the_warm_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The mean of the steps read since the warm-up ended, over an epoch or 20 steps; read one step late."""
    judged: list[float] = []

    def judge(mean_loss: float) -> str:
        judged.append(mean_loss)
        return "it does not learn"

    report = make(tmp_path, warmup_steps=4, loss_warning=judge)
    for step in range(1, 41):
        push(report, step, loss=100.0 if step < 4 else float(step))
    finish(report)
    assert judged == [sum(range(4, 24)) / 20]
    assert capfd.readouterr().err.count("it does not learn") == 1


def diverging(losses: list[float], stops: list[float]) -> str:
    """As in the loop: the vector is the mean over ranks, and every rank acts on it alike."""
    report = reporter(None)
    mine = torch.tensor([losses[collectives.rank()], 0.0, stops[collectives.rank()]])
    try:
        for step in range(1, 9):
            values = mine if step == 3 else torch.tensor([1.0, 0.0, 0.0])
            vector = collectives.all_reduce_sum(values.clone()) / collectives.world_size()
            values = torch.cat([vector, torch.ones(1)])
            report.push(step - 1, Record(values, ~values.isfinite().all()))
            if report.stop:
                return f"stopped at {step}"
    except StepFailed as failed:
        return f"step {failed.step} failed, known at {step}"
    return "nothing"


def test_all_ranks_end_at_the_same_step(ranks: Ranks) -> None:
    said = ranks.run(4, diverging, [1.0, math.nan, 1.0, 1.0], [0.0] * 4)
    assert said == ["step 3 failed, known at 4"] * 4
    assert ranks.run(4, diverging, [1.0] * 4, [0.0, 0.0, 1.0, 0.0]) == ["stopped at 4"] * 4
    assert ranks.run(2, diverging, [1.0] * 4, [0.0] * 4) == ["nothing"] * 2


def test_fp16_that_never_stops_overflowing_ends_the_run(tmp_path: Path) -> None:
    report = make(tmp_path, fp16=True)
    with pytest.raises(StepFailed, match="overflow fp16"):  # of which pretrain leaves a dump
        for step in range(1, 40):
            push(report, step, norm=math.inf)
    assert step == 21, "twenty steps on end, read one step late"

"""metrics.jsonl over restarts, its mirrors, and the progress lines."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simclr_ddp.config import Log
from simclr_ddp.metrics import MetricsLog, Progress, _wandb_id, peak_memory_bytes, read_metrics
from tests.test_saver import files_limited_to


def line_of(step: int) -> dict:
    return {"step": step, "epoch": step / 4, "loss": 5 / step, "learning_rate": 0.1 * step, "seconds": 1.5 * step}


def write(run_dir: Path, resume_step: int, steps: range, log: Log | None = None) -> None:
    metrics = MetricsLog(run_dir, resume_step, log or Log(), {"seed": 0})
    for step in steps:
        metrics.write(line_of(step))
    metrics.sync()
    metrics.close()


def test_lines_are_appended_and_flushed(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, 0, Log(), {})
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


def test_lines_that_are_lost_for_good_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, 0, Log(), {})
    for step in range(1, 216):
        log.write(line_of(step))
    log.close()
    resumed = MetricsLog(tmp_path, 215, Log(), {}, list(log.tail), log.count)
    resumed.close()
    assert (resumed.count, capsys.readouterr().err) == (215, "")
    (tmp_path / "metrics.jsonl").unlink()
    resumed = MetricsLog(tmp_path, 215, Log(), {}, list(log.tail), log.count)
    resumed.close()
    assert "has lost 15 of its 215 lines" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(16, 216))
    MetricsLog(tmp_path, 215, Log(), {}, list(resumed.tail), resumed.count).close()
    assert "has lost 15 of its 215 lines" in capsys.readouterr().err, "told at every start"


def test_lines_that_were_lost_come_back_from_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(tmp_path, 0, Log(), {})
    for step in range(1, 301):
        log.write({"step": step, "loss": 1 / step})
    tail, whole = list(log.tail), path.read_text()
    log.close()
    assert len(tail) == 200
    for left in (len(whole), len(whole) - 7, len(whole) // 2, len(whole) * 2 // 5):
        path.write_text(whole[:left])
        MetricsLog(tmp_path, 290, Log(), {}, tail).close()
        assert path.read_text().splitlines() == whole.splitlines()[:290], left
    path.unlink()
    mended = MetricsLog(tmp_path, 290, Log(), {}, tail)
    assert [line["step"] for line in read_metrics(path)] == list(range(101, 291)), "the newest are all there is"
    assert [json.loads(line)["step"] for line in mended.tail] == list(range(101, 291))


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, 0, Log(), {})
    log.write({"step": 1, "loss": 0.5})
    with files_limited_to(40):  # in the middle of the second line
        for step in (2, 3):
            log.write({"step": step, "loss": 0.25})
        assert not log.sync()
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "metrics.jsonl can't be written" in told
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert log.sync() and [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    log.write({"step": 4, "loss": 0.125})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_holds_the_same_values_after_a_restart(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, 0, range(1, 8), Log(tensorboard=True))
    write(tmp_path, 5, range(6, 11), Log(tensorboard=True))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"epoch", "loss", "learning_rate", "seconds"}
    for key in events.Tags()["scalars"]:
        values = [(e.step, e.value) for e in events.Scalars(key)]
        expected = [(line["step"], line[key]) for line in read_metrics(tmp_path / "metrics.jsonl")]
        assert [step for step, _ in values] == [step for step, _ in expected] == list(range(1, 11))
        assert [v for _, v in values] == pytest.approx([v for _, v in expected], rel=1e-6)


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    content, position, record = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:  # the rest of a block is padding
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline_holds_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    format_of = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run_dir = tmp_path / "cifar10-1a2b3c4d"
    run_dir.mkdir()
    write(run_dir, 0, range(1, 5), Log(wandb=True))
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    # The run directory's own id, so that a resumed run goes on with its curves and another "cifar10" doesn't.
    assert re.fullmatch(r"run-cifar10-1a2b3c4d-[0-9a-f]{8}\.wandb", file.name)
    assert _wandb_id(run_dir) == file.name[4:-6] != _wandb_id(tmp_path / "elsewhere" / run_dir.name)
    records, end = [], time.monotonic() + 30
    while not records or records[-1].WhichOneof("record_type") != "exit":  # its service may write after `finish`
        assert time.monotonic() < end, "the last record is missing"
        time.sleep(0.1)
        records = [format_of.Record.FromString(content) for content in wandb_records(file)]
    mirrored, config = [], {}
    for record in records:
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.WhichOneof("record_type") == "history":
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            mirrored.append({"step": items.pop("_step")} | {k: v for k, v in items.items() if not k.startswith("_")})
    assert mirrored == read_metrics(run_dir / "metrics.jsonl") == [line_of(s) for s in range(1, 5)]
    assert config["seed"] == 0


FAILS = """
import sys, time
from pathlib import Path
from simclr_ddp import cli, distributed, metrics
from simclr_ddp.config import Log, WriteDataset
from simclr_ddp.report import Reporter
cli.LAST_WORDS["metrics"] = LIMIT

def command(settings):
    distributed.start_here(0, 1, settings.source)
    distributed.met = IN_A_GROUP
    log = metrics.MetricsLog(Path(settings.out), 0, Log(wandb=True, tensorboard=True), {})
    report = Reporter(log, 0, 10, 4, distributed.torch.device("cpu"), False)
    with report.closed_by_failures():
        log.write({"step": 1, "loss": 0.5})
        CHANGED
        raise ValueError("it fails")

sys.exit(cli.run(command, WriteDataset, "SOURCE OUT", "", sys.argv[1:]))
"""


def failed(tmp_path: Path, **changes: str) -> tuple[int, str, Path]:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    code = FAILS
    for name, value in changes.items():
        code = code.replace(name, value)
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(run_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr, run_dir


@pytest.mark.parametrize("in_a_group", [True, False])
def test_the_mirrors_of_a_run_that_fails_are_closed(in_a_group: bool, tmp_path: Path) -> None:
    """Also where a rank ends without Python's own end; W&B has it as failed."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    format_of = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    status, told, run_dir = failed(tmp_path, LIMIT="60", IN_A_GROUP=str(in_a_group), CHANGED="pass")
    assert status == 2 and told.splitlines()[0].startswith("error: it fails"), told
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    last, end = None, time.monotonic() + 30
    while (last is None or last.WhichOneof("record_type") != "exit") and time.monotonic() < end:
        time.sleep(0.1)
        last = next(reversed([format_of.Record.FromString(content) for content in wandb_records(file)]), None)
    assert last is not None and last.WhichOneof("record_type") == "exit" and last.exit.exit_code == 1
    (events,) = (run_dir / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_mirrors_that_hang_do_not_hold_up_the_end(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    hangs = "log._wandb.finish(); log._wandb.finish = lambda **_: time.sleep(1000)"
    status, told, run_dir = failed(tmp_path, LIMIT="1", IN_A_GROUP="True", CHANGED=hangs)
    assert status == 2 and told.splitlines()[0].startswith("error: it fails"), told
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [1]


def test_a_mirror_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ValueError, match=f"log.{name}=true needs {name}: pip install {name}"):
            MetricsLog(tmp_path, 0, Log(**{name: True}), {})


def shown(values: dict, capsys: pytest.CaptureFixture[str], is_main: bool = True) -> str:
    progress = Progress(total=40, start=10, shown=is_main)
    progress.step()
    line = {"epoch": 1.5, "loss": 3.14159, "images_per_second": 1234.5, "data_wait_fraction": 0.034}
    progress.line(line | values)
    progress.close()
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_plain_progress_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    line = shown({"step": 20}, capsys)
    assert re.fullmatch(r"step 20/40  epoch 1\.50  loss 3\.1416  123[45] images/s  data 3%  0:00:0\d left\n", line)
    assert "  data 35% (the loader is the limit)  " in shown({"step": 20, "data_wait_fraction": 0.351}, capsys)
    assert "probe 87.5%" in shown({"step": 20, "probe_top1": 0.875}, capsys)
    assert shown({"step": 20}, capsys, is_main=False) == ""
    assert "left" in shown({"step": 10}, capsys)


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    assert 1e7 < before < 1e11
    block = torch.ones(3 * before // 4)  # 3 times as many bytes as were ever in use
    assert peak_memory_bytes(torch.device("cpu")) > 3 * before
    del block

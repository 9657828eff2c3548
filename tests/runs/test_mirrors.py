"""Mirrors of metrics.jsonl: what they hold, and that none of their faults reaches the run."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import pytest

from simclr_ddp.runs import mirrors
from simclr_ddp.runs.metrics import MetricsLog, read_metrics
from simclr_ddp.runs.mirror_process import wandb_id
from tests.support.disk import files_limited_to


def line_of(step: int) -> dict:
    return {"step": step, "epoch": step / 4, "loss": 5 / step, "learning_rate": 0.1 * step, "seconds": 1.5 * step}


def write(run_dir: Path, resume_step: int, steps: range, **chosen: bool) -> None:
    metrics = MetricsLog(run_dir, resume_step, {"seed": 0}, **chosen)
    for step in steps:
        metrics.write(line_of(step))
    metrics.close()


def test_tensorboard_holds_the_same_values_after_a_restart(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, 0, range(1, 8), tensorboard=True)
    write(tmp_path, 5, range(6, 11), tensorboard=True)
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


def history(file: Path) -> tuple[list[dict], dict]:
    """The lines and the config in a complete .wandb file."""
    format_of = pytest.importorskip("wandb.proto.wandb_internal_pb2")
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
    return mirrored, config


def test_wandb_offline_holds_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a directory whose name W&B refuses as an id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run_dir = tmp_path / "bs=16,lr=0.1 #?:;' größe"
    run_dir.mkdir()
    write(run_dir, 0, range(1, 5), wandb=True)
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert file.name == f"run-{wandb_id(run_dir)}.wandb"
    mirrored, config = history(file)
    assert mirrored == read_metrics(run_dir / "metrics.jsonl") == [line_of(s) for s in range(1, 5)]
    assert config["seed"] == 0


def test_the_id_of_a_wandb_run_is_that_of_its_directory(tmp_path: Path) -> None:
    """So that a resumed run continues its curves, and another "cifar10" does not."""
    assert wandb_id(Path("/runs/cifar10-1a2b3c4d")) == "cifar10-1a2b3c4d-2904a2e6"
    names = ["a,b", "a#b", "a?b", "a:b", "größe", "写真", "x" * 255, "a b", "-", "cifar10", "elsewhere/cifar10"]
    ids = [wandb_id(tmp_path / name) for name in names]
    assert len(set(ids)) == len(names) and all(re.fullmatch(r"[\w.=-]{1,128}", name, re.ASCII) for name in ids)


FAILS = """
import sys, time
from pathlib import Path
from simclr_ddp.config import command as cli
from simclr_ddp.distributed import rendezvous
from simclr_ddp.runs import metrics
from simclr_ddp.config.schema import WriteDataset
from simclr_ddp.system import ranks
from simclr_ddp.training.plan import Plan
from simclr_ddp.training.reporter import Reporter
PLAN = Plan(Path(), 4, 10, 0, 0.1, "constant", 1)
cli.THREAD_SECONDS["metrics"] = LIMIT

def command(settings):
    rendezvous.start_here(0, 1, settings.source)
    ranks.join(lambda: IN_A_GROUP)
    log = metrics.MetricsLog(Path(settings.out), 0, {}, wandb=True, tensorboard=True)
    report = Reporter(log, PLAN, 0, images_per_step=4, device=rendezvous.torch.device("cpu"), fp16=False)
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
    status, said, run_dir = failed(tmp_path, LIMIT="60", IN_A_GROUP=str(in_a_group), CHANGED="pass")
    assert status == 2 and said.splitlines()[0].startswith("error: it fails"), said
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert [line["step"] for line in history(file)[0]] == [1]
    last = format_of.Record.FromString(list(wandb_records(file))[-1])
    assert last.exit.exit_code == 1
    (events,) = (run_dir / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


# A package `wandb` that fails at one place in one way, or works: it writes to a file what it has been given.
FAKE = """
import json, os, time
from pathlib import Path
PLACE, KIND = os.environ["FAULT"].split()
SEEN = Path(os.environ["SEEN"])

def at(place, mode=None):
    if place != PLACE or mode == "offline" or SEEN.with_name("healed").exists():
        return
    if KIND == "hangs":
        time.sleep(1000)
    if KIND == "exits":
        os._exit(3)
    raise {"fails": RuntimeError, "interrupted": KeyboardInterrupt}[KIND]("no\\nnetwork")

class Run:
    step, url = 0, "https://here"
    def log(self, values, step):
        at("log")
        with SEEN.open("a") as file:
            print(step, file=file)
    def finish(self, exit_code):
        at("finish")

def init(mode=None, **options):
    at("init", mode)
    SEEN.unlink(missing_ok=True)
    return Run()

at("import")
"""


@pytest.mark.parametrize(
    "fault",
    [
        *("import fails", "import hangs", "init fails", "init hangs", "init interrupted"),
        *("log fails", "log hangs", "log exits", "finish fails", "finish hangs"),
    ],
)
def test_no_fault_of_a_mirror_reaches_the_run(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    for name, seconds in {"OPENING": 1, "OPEN": 1, "CLOSING": 1, "RETRY": 0.1}.items():
        monkeypatch.setattr(mirrors, name, seconds)
    begin = time.monotonic()
    log = MetricsLog(tmp_path, 0, {}, wandb=True)
    for step in range(1, 4):
        log.write(line_of(step))
    assert time.monotonic() - begin < 1, "training waits for nothing"
    if fault.startswith(("import", "log")):  # they work again after a while
        shown = ""
        while "warning" not in shown:
            time.sleep(0.05)
            shown += capsys.readouterr().err
        (tmp_path / "healed").write_text("")
        while not (tmp_path / "seen").exists() or (tmp_path / "seen").read_text() != "1\n2\n3\n":
            time.sleep(0.05)
    else:
        shown = ""
    begin = time.monotonic()
    log.close()
    assert time.monotonic() - begin < 8
    shown += capsys.readouterr().err
    assert shown.count("warning") == shown.count("\n") == 1, shown
    assert re.match("warning: Weights & Biases: .*; metrics.jsonl has all lines; ", shown), shown
    assert (tmp_path / "seen").read_text() == "1\n2\n3\n", "if it can't be opened, W&B has them offline"
    assert read_metrics(tmp_path / "metrics.jsonl") == [line_of(step) for step in range(1, 4)]


def test_a_mirror_on_a_full_disk_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(mirrors, "RETRY", 0.1)
    log = MetricsLog(tmp_path, 0, {})
    shown = ""
    with files_limited_to(0):
        mirror = mirrors.Mirror("tensorboard", tmp_path, {}, 0)
        while "warning" not in shown:
            time.sleep(0.05)
            shown += capsys.readouterr().err
    log.write(line_of(1))
    mirror.close()
    mirror.wait()
    log.close()
    shown += capsys.readouterr().err
    assert shown.count("warning: TensorBoard: ") == shown.count("\n") == 1 and "File too large" in shown, shown
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    assert [(e.step, e.value) for e in events.Reload().Scalars("loss")] == [(1, 5.0)]


def services() -> list[int]:
    """The pids of the services of W&B that this process's mirrors have started."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, rest = (entry / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            parents[int(entry.name)], names[int(entry.name)] = int(rest.split()[1]), name
    return [pid for pid, name in names.items() if name == "wandb-core" and parents.get(parents[pid]) == os.getpid()]


@pytest.mark.slow
def test_a_service_of_wandb_that_is_killed_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(mirrors, "RETRY", 0.1)
    monkeypatch.setenv("WANDB_MODE", "offline")
    log, step, shown = MetricsLog(tmp_path, 0, {}, wandb=True), 0, ""
    for killed in (False, True):
        end = time.monotonic() + 120
        while shown.count("offline in") <= killed:
            assert time.monotonic() < end, shown
            log.write(line_of(step := step + 1))
            time.sleep(0.1)
            shown += "".join(capsys.readouterr())
        for pid in [] if killed else services():
            os.kill(pid, SIGKILL)
    log.close()
    assert shown.count("warning") == 1 and "Connection" in shown, shown
    newest = max(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert [line["step"] for line in history(newest)[0]] == list(range(1, step + 1))


@pytest.mark.slow
def test_an_invalid_key_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    write(tmp_path, 0, range(1, 5), wandb=True)
    shown = capsys.readouterr().err
    assert shown.count("warning") == 1 and "API key must have" in shown and "logging offline" in shown
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [line["step"] for line in history(file)[0]] == [1, 2, 3, 4]

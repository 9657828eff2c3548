"""Saving beside training: copies of one moment, what stays, and disks that are full."""

import threading
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map

from simclr_ddp.runs import checkpoint
from simclr_ddp.training import saver
from simclr_ddp.training.saver import Saver
from tests.runs.test_checkpoint import assert_is, names, state_of
from tests.support.disk import files_limited_to

CPU = torch.device("cpu")


def test_a_checkpoint_holds_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, write = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (asked.append(state["step"]), write(*arguments)))
    saving = Saver(tmp_path, CPU, keep_last=3)
    state = state_of(7)
    saving.save(state, 7)
    for tensor in (state["model"]["a.weight"], state["optimizers"][0]["state"][0]["momentum_buffer"]):
        tensor.zero_()  # the next step, before or after the thread has written
    assert saving.wait() == "" and len(asked) == 1
    assert_is(checkpoint.load(tmp_path / "step-00000007.pt"), 7)


def test_the_thread_may_be_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training continues while a checkpoint is written; the next one waits for it, so they are written in order."""
    order, write, go = [], checkpoint.save, threading.Event()

    def slow(folder: Path, state: dict, step: int, *more: object) -> None:
        order.append(f"begin {step}")
        assert go.wait(10)
        write(folder, state, step, *more)  # type: ignore[arg-type]
        order.append(f"end {step}")

    monkeypatch.setattr(checkpoint, "save", slow)
    saving = Saver(tmp_path, CPU)
    saving.save(state_of(1), 1)
    assert names(tmp_path) == [], "the caller has its state back before anything is written"
    go.set()
    saving.save(state_of(2), 2)
    assert saving.wait() == "" and order == ["begin 1", "end 1", "begin 2", "end 2"]
    assert names(tmp_path) == ["latest", "step-00000001.pt", "step-00000002.pt"]


def test_copies_on_the_device_are_gone_before_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may be slow, and they are as large as the weights and the optimizer's averages."""
    copies, left, clone = [], [], torch.clone

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        made = clone(tensor)
        copies.append(weakref.ref(made))
        return made

    stream = SimpleNamespace(wait_event=lambda event: None)
    cuda = SimpleNamespace(
        Event=lambda: SimpleNamespace(record=lambda: None),
        Stream=lambda device: stream,
        stream=nullcontext,
        current_stream=lambda: stream,
    )
    monkeypatch.setattr(saver, "torch", SimpleNamespace(clone=copy, cuda=cuda))
    monkeypatch.setattr(saver, "Tensor", SimpleNamespace(cpu=clone))
    monkeypatch.setattr(saver, "map_tensors", lambda value, function: tree_map(function, value))
    monkeypatch.setattr(checkpoint, "save", lambda *_: left.extend(c for c in copies if c() is not None))
    saving = Saver(tmp_path, torch.device("cuda"))
    saving.save({"model": {"weight": torch.ones(3)}}, 1)
    assert saving.wait() == "" and len(copies) == 1 and left == []


def test_when_one_is_due(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [100.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: now[0])
    saving = Saver(tmp_path, CPU, every_steps=20, every_minutes=10, keep_every_steps=15)
    assert [step for step in range(1, 61) if saving.due(step)] == [15, 20, 30, 40, 45, 60]
    now[0] += 601
    assert saving.due(1) and saving.due(2)
    saving.save(state_of(1), 1)
    assert not saving.due(2), "the clock begins again with every checkpoint"
    saving.wait()
    never = Saver(tmp_path, CPU)
    now[0] += 1e6
    assert not any(never.due(step) for step in range(1, 100))


def test_those_of_every_third_epoch_stay(tmp_path: Path) -> None:
    saving = Saver(tmp_path, CPU, keep_last=2, keep_every_steps=15)
    for step in range(5, 65, 5):
        saving.save(state_of(step), step)
    saving.wait()
    assert [p.name for p in checkpoint.all_steps(tmp_path)] == [f"step-{s:08d}.pt" for s in (15, 30, 45, 55, 60)]


def test_a_full_disk_is_reported_and_the_next_save_is_tried(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saving = Saver(tmp_path, CPU, keep_last=1)
    saving.save(state_of(1), 1)
    assert saving.wait() == ""
    with files_limited_to(1000):
        saving.save(state_of(2), 2)
        assert saving.wait()
    said = capfd.readouterr().err
    assert said.startswith("warning: the checkpoint of step 2 could not be written") and "training continues" in said
    assert names(tmp_path) == ["latest", "step-00000001.pt"], "the one before is kept, nothing half is left"
    assert_is(checkpoint.load(tmp_path / "step-00000001.pt"), 1)
    saving.save(state_of(3), 3)
    assert saving.wait() == "" and capfd.readouterr().err == ""
    assert names(tmp_path) == ["latest", "step-00000003.pt"]


def test_room_is_tried_before_training(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint.trial_write(folder, 3_000_000) == "" and names(folder) == []
    with files_limited_to(1_500_000):
        said = checkpoint.trial_write(folder, 3_000_000)
    assert "a checkpoint of 3 MB can't be written" in said and "run_dir=" in said and names(folder) == []
    (tmp_path / "file").touch()
    assert "can't be written" in checkpoint.trial_write(tmp_path / "file" / "checkpoints", 10)

"""Invariant 3: a run can't be lost, only paused. Real processes, killed with real signals."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from simclr_ddp import pretrain
from simclr_ddp.config.options import read_yaml
from simclr_ddp.data.beton import Beton
from simclr_ddp.runs.directory import read_settings
from simclr_ddp.runs.metrics import read_metrics
from simclr_ddp.system import signals
from tests.support import processes
from tests.support.ranks import Ranks
from tests.support.tiny_run import STEPS, assert_same_run, settings, train


@pytest.mark.parametrize(
    ("loader", "count", "precision"),
    [
        ("torch", 1, "bf16"),
        pytest.param("ffcv", 1, "fp16", marks=pytest.mark.slow),
        pytest.param("torch", 4, "fp32", marks=pytest.mark.slow),
        pytest.param("ffcv", 2, "fp32", marks=pytest.mark.slow),
        pytest.param("device", 2, "fp32", marks=pytest.mark.slow),
    ],
    indirect=["loader"],
)
def test_killed_and_started_again_ends_bitwise_equal(
    loader: str, count: int, precision: str, images: Path, ranks: Ranks, tmp_path: Path
) -> None:
    options = [f"precision={precision}", f"data.loader={loader}"]
    ranks.run(count, train, settings(images, tmp_path / "unbroken", *options))
    arguments = settings(images, tmp_path / "killed", *options)
    for step, victim in ((8, 0), (13, count - 1)):  # in the middle of an epoch, 3 steps after a checkpoint
        process = processes.start("simclr_ddp.pretrain", *arguments, ranks=count)
        processes.wait_for_step(tmp_path / "killed", step, process)
        pids = processes.rank_processes(process) if count > 1 else [process.pid]
        os.kill(pids[victim], signal.SIGKILL)
        status, output = processes.finish(process)
        assert status != 0 and ("resuming from" in output) == (step > 8), output
    ranks.run(count, train, arguments)
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")
    assert read_yaml(tmp_path / "killed" / "config.yaml")["starts"][-1]["step"] > 0, "the end began anew"


def test_a_process_that_was_forked_holds_up_no_end() -> None:
    """Imitates a decoding process that hangs: it has the sockets of the thread that receives signals."""
    with signals.stop_signals():
        child = os.fork()
        if child == 0:
            time.sleep(10)
            os._exit(0)
    alive = os.waitpid(child, os.WNOHANG) == (0, 0)
    if alive:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert alive, "its end was waited for"


def test_a_damaged_config_is_written_anew(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = settings(images, tmp_path / "run", "data.workers=0")
    assert pretrain.main([*arguments, "optim.steps=2"]) == 0
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text()[:200] + "\n\t{")
    assert pretrain.main([*arguments, "optim.steps=4", "resume.force=[optim.steps]"]) == 0
    assert "config.yaml is damaged" in capfd.readouterr().err and path.with_name("config.yaml.damaged").exists()
    assert read_settings(tmp_path / "run").optim.steps == 4


def test_a_weight_decay_that_is_forced_counts(images: Path, tmp_path: Path) -> None:
    ends = []
    for decay in ("0.0", "0.5"):
        arguments = settings(images, tmp_path / decay, "data.workers=0", "optim.weight_decay=0.0")
        assert pretrain.main([*arguments, "optim.steps=2"]) == 0
        more = ("optim.steps=4", f"optim.weight_decay={decay}", "resume.force=[optim.steps,optim.weight_decay]")
        assert pretrain.main([*arguments, *more]) == 0
        path = tmp_path / decay / "checkpoints" / "step-00000004.pt"
        ends.append(torch.load(path, weights_only=True)["model"]["encoder.conv1.weight"])
    assert not torch.equal(*ends)


def test_sigterm_saves_and_pauses_and_the_same_command_resumes(
    images: Path, loader: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = settings(images, tmp_path / "run", "checkpoint.every_steps=0", f"data.loader={loader}")
    process = processes.start("simclr_ddp.pretrain", *arguments)
    processes.wait_for_step(tmp_path / "run", 3, process)
    if loader != "torch":  # no memory shared and no other process: neither can be left
        shared = [line for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines() if "/dev/shm/" in line]
        assert all(line.endswith("(deleted)") for line in shared), shared
        assert processes.group(process) == [process.pid]
    process.send_signal(signal.SIGTERM)
    process.wait(180)
    assert not processes.group(process), "a decoding process is left"
    status, output = processes.finish(process)
    assert status == signals.PAUSED and "paused at step" in output, output
    assert pretrain.main(arguments) == 0 and "resuming from" in capfd.readouterr().out
    assert pretrain.main(arguments) == 0 and "is finished" in capfd.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_run_whose_terminal_closes_is_saved(images: Path, tmp_path: Path) -> None:
    """The system sends SIGHUP, and everything that is then written to the terminal fails."""
    arguments = settings(images, tmp_path / "run", "optim.steps=4000", "checkpoint.every_steps=0")
    code = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", code, *processes.command("simclr_ddp.pretrain", *arguments)]
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        command, cwd=processes.ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        shown = b""
        while b"loss" not in shown:  # the progress of a step
            shown += os.read(ours, 1 << 12)
        os.close(ours)
        assert process.wait(120) == signals.PAUSED
    finally:
        processes.kill_group(process)
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))) == 1


def test_a_signal_to_one_rank_pauses_all_at_the_same_step(images: Path, tmp_path: Path) -> None:
    arguments = settings(images, tmp_path / "run", "optim.steps=400", "checkpoint.every_steps=0")
    process = processes.start("simclr_ddp.pretrain", *arguments, ranks=2)
    processes.wait_for_step(tmp_path / "run", 3, process)
    os.kill(processes.rank_processes(process)[1], signal.SIGUSR1)
    status, output = processes.finish(process)
    assert status != 0 and output.count("paused at step") == 1, output
    assert f"exitcode: {signals.PAUSED}" in output.replace(" ", "").replace("exitcode:", "exitcode: ")
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))) == 1


def test_ctrl_c_pauses_although_it_arrives_twice(images: Path, tmp_path: Path) -> None:
    arguments = settings(
        images, tmp_path / "run", "optim.steps=400", "checkpoint.every_steps=0", "data.workers=1", "data.loader=torch"
    )
    process = processes.start("simclr_ddp.pretrain", *arguments, ranks=2)
    processes.wait_for_step(tmp_path / "run", 3, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: launcher, ranks and decoding processes
    status, output = processes.finish(process)
    assert status != 0 and "paused at step" in output, output
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*.pt")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert f"step-{lines[-1]['step']:08d}.pt" == saved.name


def test_sigterm_to_the_complete_group_spares_the_decoding_processes(images: Path, tmp_path: Path) -> None:
    arguments = settings(
        images, tmp_path / "run", "optim.steps=400", "checkpoint.every_steps=0", "data.workers=1", "data.loader=torch"
    )
    process = processes.start("simclr_ddp.pretrain", *arguments)
    processes.wait_for_step(tmp_path / "run", 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    status, output = processes.finish(process)
    assert status == signals.PAUSED and "paused at step" in output, output
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))) == 1


@pytest.mark.slow
def test_an_error_that_only_another_rank_finds_is_reported(images: Path, tmp_path: Path) -> None:
    content = bytearray(images.read_bytes())
    start = 0
    for _ in range(Beton(images).count // 2):  # half of the images: the other rank's own batches hold some, too
        start = content.index(b"\xff\xd8\xff", start + 1)
        content[start : start + 300] = bytes(300)
    (tmp_path / "broken.beton").write_bytes(content)
    shutil.copy(f"{images}.json", tmp_path / "broken.beton.json")
    arguments = settings(tmp_path / "broken.beton", tmp_path / "run", "optim.global_batch_size=2")
    status, output = processes.run("simclr_ddp.pretrain", *arguments, ranks=2)
    assert status != 0 and "can't be decoded" in output, output


def test_an_encoder_of_an_earlier_end_is_not_left_behind(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    short = settings(images, run_dir, "optim.steps=4")
    assert pretrain.main(short) == 0
    before = (run_dir / "encoder.safetensors").read_bytes()
    longer = settings(images, run_dir, "optim.steps=6", "resume.force=[optim.steps]")
    assert pretrain.main(longer) == 0
    assert (run_dir / "encoder.safetensors").read_bytes() != before
    (run_dir / "encoder.safetensors").unlink()  # killed between the last checkpoint and the export
    assert pretrain.main(longer) == 0 and (run_dir / "encoder.safetensors").exists()


def test_settings_that_end_before_the_checkpoint(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(settings(images, tmp_path / "run", "optim.steps=4")) == 0
    assert pretrain.main(settings(images, tmp_path / "run", "optim.steps=2", "resume.force=[optim.steps]")) == 2
    assert "it is at step 4, beyond the 2 steps" in capsys.readouterr().err
    assert pretrain.main(settings(images, tmp_path / "run", "optim.steps=4", "resume.force=[optim.stops]")) == 2
    assert "resume.force=[optim.stops]: optim.stops is no option" in capsys.readouterr().err


def test_a_run_with_only_damaged_checkpoints_does_not_start_anew(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(settings(images, tmp_path / "run", "optim.steps=4")) == 0
    (path,) = (tmp_path / "run" / "checkpoints").glob("step-*.pt")
    path.write_bytes(path.read_bytes()[:1000])
    assert pretrain.main(settings(images, tmp_path / "run", "optim.steps=4")) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 4, "nothing is cut off"


def test_a_resume_does_not_need_the_initial_weights(images: Path, tmp_path: Path) -> None:
    assert pretrain.main(settings(images, tmp_path / "first", "optim.steps=2")) == 0
    weights = tmp_path / "first" / "encoder.safetensors"
    options = (f"model.init={weights}", "resume.force=[optim.steps]")
    assert pretrain.main(settings(images, tmp_path / "run", "optim.steps=2", *options)) == 0
    weights.unlink()
    assert pretrain.main(settings(images, tmp_path / "run", "optim.steps=3", *options)) == 0


def test_started_again_at_once_after_a_kill(images: Path, tmp_path: Path) -> None:
    """Decoding processes outlive a kill -9 by seconds; they must not hold the run directory."""
    arguments = settings(images, tmp_path / "run", "data.workers=1", "data.loader=torch")
    process = processes.start("simclr_ddp.pretrain", *arguments)
    processes.wait_for_step(tmp_path / "run", 7, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "run" / "checkpoints" / ".step-00000099.pt.tmp").write_bytes(b"half")
    try:
        assert pretrain.main(arguments) == 0
    finally:
        processes.finish(process)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "what a killed save left is gone"

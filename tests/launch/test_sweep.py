"""Sweeps whose trials are stubs (stub_trial.py), in seconds; and, marked so, with real training and real SLURM."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState

from launch import summary, sweep
from launch.cluster import status
from launch.cluster import submit as submission
from launch.cluster.settings import Plan, Slurm
from launch.search import report, results, trials
from launch.search.plan import Sweep
from simclr_ddp import pretrain
from simclr_ddp.config import schema
from simclr_ddp.config.options import build, parse_override, read_yaml
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.system import signals
from tests.launch.test_real_slurm import training
from tests.support import processes
from tests.support.output import only_error

CONFIGS = sorted((processes.ROOT / "configs" / "sweep").glob("*.yaml"))
STUB = [sys.executable, str(processes.ROOT / "tests" / "launch" / "stub_trial.py")]
TEMPERATURES = "space.loss.temperature.log=[0.1, 1]"


@pytest.fixture(autouse=True)
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials.Processes, "POLL", 0.02)
    monkeypatch.setattr(sweep, "count_gpus", lambda: "0")  # which starts a process that imports torch
    if "real" in request.node.name:
        monkeypatch.setenv("PYTHONPATH", str(processes.ROOT))
    else:
        monkeypatch.setattr(trials, "PRETRAIN", STUB)
    if request.node.name != "test_the_best_is_a_config_that_gives_its_trial":
        monkeypatch.setattr(report, "save", lambda figure, path: path.touch())


def options(images: Path, *more: str) -> list[str]:
    """A sweep of six trials of four epochs."""
    fixed = {"data.train": images, "optim.global_batch_size": 8, "optim.epochs": 4, "probe.enabled": "true"}
    return [
        *(f"set.{key}={value}" for key, value in fixed.items()),
        "sweep_dir=here",
        "trials=6",
        "grace_epochs=1",
        *more,
    ]


class Forked:
    """A sweep as a process of its own, which need not import torch again."""

    def __init__(self, arguments: list[str]) -> None:
        self.output = Path(tempfile.mkstemp()[1])
        self.pid = os.fork()
        if self.pid == 0:
            file = os.open(self.output, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            status = 1
            try:
                status = sweep.main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def wait(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Until the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and os.waitpid(self.pid, os.WNOHANG) == (0, 0), self.output.read_text()
            time.sleep(0.02)

    def finish(self) -> tuple[int, str]:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status, self.output.read_text()

    def kill(self) -> None:
        """While it does not hold the journal's lock, which the next sweep would take for abandoned after 30 s only."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)
        while Path("here/optuna.journal.lock").exists():
            os.kill(self.pid, signal.SIGCONT)
            time.sleep(0.01)
            os.kill(self.pid, signal.SIGSTOP)
            os.waitpid(self.pid, os.WUNTRACED)
        os.kill(self.pid, signal.SIGKILL)
        self.finish()


def table(folder: str = "here") -> list[dict[str, str]]:
    return list(csv.DictReader(Path(folder, "trials.csv").read_text().splitlines()))


def study(storage: str = "here/optuna.journal", name: str = "sweep") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(storage)))


def starts(number: int, folder: str = "here") -> list[str]:
    path = Path(folder, "trials", f"{number:04d}", "starts")
    return path.read_text().splitlines() if path.exists() else []


# --- what comes out -------------------------------------------------------------------------------------------------


def test_finished_failed_killed_and_pruned_trials(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The spectral one is the last and worst, and stands still in its second epoch."""
    cells = "[gaussian, laplacian, cosine, arccos, spectral]"
    arguments = options(images, "pruner=halving", "name=mixed", f"space.loss.kernel.choice={cells}", TEMPERATURES)

    def lowest_last(drawn: list[dict[str, Any]]) -> bool:
        kernels = [d["loss.kernel"] for d in drawn]
        temperatures = [d["loss.temperature"] for d in drawn]
        return len(set(kernels)) == 5 and kernels.index("spectral") == 5 and min(temperatures) == temperatures[5]

    assert sweep.main([*arguments, f"seed={seed_with(arguments, lowest_last)}"]) == 0
    output = capfd.readouterr().out
    states = {row["loss.kernel"]: row["state"] for row in table()}
    assert states["laplacian"] == states["arccos"] == "failed" and states["spectral"] == "ended early", table()
    assert "finished" in states.values()
    errors = {row["loss.kernel"]: row["error"] for row in table()}
    assert errors["laplacian"] == "error: step 3: it diverges" and errors["arccos"].startswith("killed by SIGKILL")
    (last,) = [row for row in table() if row["loss.kernel"] == "spectral"]
    assert last["epochs"] == "1" and starts(int(last["trial"])) and "paused" in log(int(last["trial"]))
    assert f"trial {last['trial']}: ended early, probe_top1 {float(last['probe_top1']):.4f} at epoch 1" in output
    assert "failed: error: step 3: it diverges" in output and "6 of 6 done" in output
    kept = study(name="mixed").trials
    assert [t.state.name for t in kept].count("FAIL") == sum(row["state"] == "failed" for row in table())
    assert "error: step 3: it diverges" in {t.user_attrs.get("error") for t in kept}
    report = Path("here/report.md").read_text()
    assert "ended early" in report and "error: step 3: it diverges" in report
    finished = list(states.values()).count("finished")
    assert f"No importances: they need 8 finished trials, and there are {finished}." in report
    assert not Path("here/importances.png").exists() and Path("here/parallel.png").exists()


def test_a_trial_that_is_behind_at_its_last_epoch_has_finished(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: self.study.trials[self.number].last_step == 4)
    arguments = options(images, "pruner=halving", "space.loss.kernel.choice=[exponential]", TEMPERATURES)
    assert sweep.main([*arguments, "trials=2"]) == 0
    assert [(row["state"], row["epochs"]) for row in table()] == [("finished", "4")] * 2, table()


def seed_with(arguments: list[str], wanted: Callable[[list[dict[str, Any]]], bool]) -> int:
    """The first seed whose trials draw what is wanted."""
    entries = dict(parse_override(argument) for argument in arguments)
    plan = sweep.make_plan(build(Sweep, [("the test", entries)]))
    seeds = (replace(plan, seed=seed) for seed in range(20000))
    return next(p.seed for p in seeds if wanted([p.drawn(number)[1] for number in range(plan.count)]))


def log(number: int) -> str:
    return Path(f"here/trials/{number:04d}/log.txt").read_text()


def test_the_best_is_a_config_that_gives_its_trial(images: Path) -> None:
    assert sweep.main(options(images, TEMPERATURES, "trials=9", "pruner=none", "at_once=4")) == 0
    best = max(table(), key=lambda row: float(row["probe_top1"]))
    values = read_yaml("here/best.yaml")
    taken = build(Pretrain, [("here/best.yaml", values)])
    ran = build(Pretrain, [("trial", read_yaml(f"{best['run_dir']}/trial.yaml"))])
    assert schema.result_keys(taken) == schema.result_keys(ran)
    assert taken.loss.temperature == float(best["loss.temperature"]) == float(best["probe_top1"])
    assert (taken.run_dir, taken.name) == ("", "sweep-best") and taken.data.train == str(images)
    names = {path.name for path in Path("here").iterdir()}
    figures = {"history.png", "curves.png", "importances.png", "parallel.png"}
    assert names >= figures | {"trials.csv", "report.md", "sweep.yaml", "optuna.journal"}
    assert all(0 < Path("here", name).stat().st_size < 300_000 for name in figures)
    assert [row["trial"] for row in table()] == [str(n) for n in range(9)]
    assert (
        f"| {best['trial']} | {float(best['probe_top1']):.4f} | {best['loss.temperature']} |"
        in Path("here/report.md").read_text().split("|---|---|---|\n")[1].split("\n")[0]
    ), "the best is the table's first"


@pytest.mark.slow
def test_at_once_and_devices_change_nothing_that_is_drawn(images: Path) -> None:
    conditional = "space.loss.mix_weight={uniform: [0, 1], when: {loss.kernel: simple_sum}}"
    space = [TEMPERATURES, "space.loss.kernel.choice=[simple_sum, gaussian]", conditional, "pruner=none"]
    assert sweep.main([*options(images, *space), "sweep_dir=one"]) == 0
    Path("more").mkdir()
    Path("more/hold").touch()  # until all that fit run
    process = Forked([*options(images, *space), "sweep_dir=more", "devices=[0, 1, 2]"])  # fmt: skip
    try:
        process.wait(lambda: all(starts(number, "more") for number in range(3)))
        assert not starts(3, "more"), "one a device"
        assert {starts(number, "more")[0].split()[1] for number in range(3)} == {"0", "1", "2"}
    finally:
        Path("more/hold").unlink()
    status, output = process.finish()
    assert status == 0, output
    one, more = ([{k: v for k, v in row.items() if k != "run_dir"} for row in table(f)] for f in ("one", "more"))
    assert one == more and {row["loss.mix_weight"] == "" for row in one} == {True, False}
    assert all((row["loss.mix_weight"] == "") == (row["loss.kernel"] == "gaussian") for row in one)


def last_below_median(images: Path) -> list[str]:
    """A sweep of three trials that finish, and one that is below their median and stands still."""
    kernels = "space.loss.kernel.choice=[gaussian, spectral]"
    arguments = options(images, TEMPERATURES, kernels, "trials=4", "startup_trials=3")

    def wanted(drawn: list[dict[str, Any]]) -> bool:
        temperatures = [d["loss.temperature"] for d in drawn]
        last = [d["loss.kernel"] for d in drawn] == ["gaussian"] * 3 + ["spectral"]
        return last and temperatures[3] < sorted(temperatures[:3])[1]

    return [*arguments, f"seed={seed_with(arguments, wanted)}"]


def test_trials_side_by_side_share_the_devices_that_there_are(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sweep, "count_gpus", lambda: "2")
    assert sweep.main(options(images, TEMPERATURES, "trials=2", "at_once=2", "pruner=none")) == 0
    assert {starts(number)[0].split()[1] for number in range(2)} == {"0", "1"}
    assert sweep.main([*options(images, TEMPERATURES, "trials=1", "pruner=none"), "sweep_dir=one"]) == 0
    assert len(starts(0, "one")[0].split()) == 1, "a trial alone has what there is"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5, 7")
    assert sweep.visible_devices() == ["GPU-5", "7"]


@pytest.mark.slow
def test_median_pruning(images: Path) -> None:
    assert sweep.main(last_below_median(images)) == 0
    assert [row["state"] for row in table()] == ["finished"] * 3 + ["ended early"]


def test_two_sweeps_in_one_storage(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shared = ["storage=all.journal", TEMPERATURES, "trials=3"]
    other = [*options(images, *shared), "name=two", "sweep_dir=two", "metric=loss"]
    process = Forked(other)
    assert sweep.main([*options(images, *shared), "name=one", "sweep_dir=one"]) == 0
    status, output = process.finish()
    assert status == 0, output
    assert [len(study("all.journal", name).trials) for name in ("one", "two")] == [3, 3]
    assert [t.value for t in study("all.journal", "two").trials] == [1.0] * 3
    assert study("all.journal", "two").direction.name == "MINIMIZE"
    assert [row["state"] for folder in ("one", "two") for row in table(folder)] == ["finished"] * 6
    capfd.readouterr()
    assert sweep.main([*options(images, *shared), "name=one", "sweep_dir=two"]) == 2
    assert "sweep_dir=two: the sweep one in all.journal was begun with one; set name=" in only_error(capfd)
    assert sweep.main([*options(images, *shared), "name=three", "sweep_dir=two"]) == 2
    assert "sweep_dir=two: it belongs to the sweep two; choose another" in only_error(capfd)


# --- interrupted ----------------------------------------------------------------------------------------------------


def test_killed_it_goes_on(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One trial's process lives on and is found again, another's dies with the sweep and is started again."""
    arguments = options(images, TEMPERATURES, "pruner=none", "at_once=2")
    Path("here").mkdir()
    Path("here/hold").touch()
    process = Forked(arguments)
    process.wait(lambda: all(Path(f"here/trials/000{number}/metrics.jsonl").exists() for number in (0, 1)))
    process.kill()
    running = study().trials
    assert [t.state.name for t in running] == ["RUNNING"] * 2
    dead = running[1].user_attrs["handle"]["pid"]
    os.kill(dead, signal.SIGKILL)
    while trials.start_time(dead):
        time.sleep(0.01)
    with Path("here/optuna.journal").open("ab") as file:
        file.write(b'{"op_code": 6, "wor')  # half a line, as of a full disk
    Path("here/hold").unlink()
    assert sweep.main(arguments) == 0
    assert "trial 1 is started again" in capfd.readouterr().out
    rows = table()
    assert [row["state"] for row in rows] == ["finished"] * 6 and len(study().trials) == 6
    assert all(row["probe_top1"] == row["loss.temperature"] and row["epochs"] == "4" for row in rows)
    assert all(len(json_lines(number)) == 4 for number in range(6))
    again = [starts(number) for number in range(6)]
    assert len(again[1]) == 2 and [len(found) for found in again[2:]] == [1] * 4
    assert sweep.main(arguments) == 0, "finished, it says so again"
    assert again == [starts(number) for number in range(6)] and table() == rows


def test_killed_between_the_start_of_a_trial_and_its_note(
    images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The trial has not begun, so that none trains on of which the sweep knows nothing."""
    arguments = options(images, TEMPERATURES, "pruner=none", "trials=1")

    def killed(self: optuna.Trial, key: str, value: Any) -> None:
        if key == "handle":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "set_user_attr", killed)
        assert sweep.main(arguments) == 130
    assert [t.state.name for t in study().trials] == ["RUNNING"], "it is known before it begins"
    time.sleep(0.3)
    assert not starts(0)
    assert sweep.main(arguments) == 0
    assert len(starts(0)) == 1 and [row["state"] for row in table()] == ["finished"]


def test_a_trial_that_another_process_trains_has_not_failed(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = options(images, "grid.loss.kernel=[laplacian]", "set.loss.temperature=0.5")
    Path("here/trials/0000").mkdir(parents=True)
    hold = "import fcntl; f = open('here/trials/0000/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    assert sweep.main(arguments) == 75
    assert "trial 0: another process trains in here/trials/0000; " in capfd.readouterr().out
    assert [row["state"] for row in table()] == ["not done"] and len(starts(0)) == 1 + sweep.AGAIN
    holder.communicate(b"\n")
    Path("here/fixed").touch()
    assert sweep.main(arguments) == 0 and [row["state"] for row in table()] == ["finished"]


def test_failed_trials_run_again_on_request(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = options(images, "grid.loss.kernel=[cosine, laplacian, simple_sum]", "set.loss.temperature=0.5")
    assert sweep.main(arguments) == 0
    assert [row["state"] for row in table()] == ["finished", "failed", "failed"]
    assert table()[2]["error"] == "it finished with probe_top1=nan after 4 epochs" and table()[2]["epochs"] == "1"
    assert "2 trials failed; the same command with retry=failed runs them again" in capfd.readouterr().out
    Path("here/fixed").touch()
    assert sweep.main(arguments) == 0 and len(starts(1)) == 1, "not without the request"
    assert sweep.main([*arguments, "retry=failed"]) == 0
    assert [row["state"] for row in table()] == ["finished", "finished", "failed"]
    assert [len(starts(number)) for number in range(3)] == [1, 2, 2]
    assert [row["trial"] for row in table()] == ["0", "1", "2"] and len(study().trials) == 5
    said = capfd.readouterr().out
    assert "trial 1 failed and is run again: error: step 3: it diverges" in said and "3 of 3 done" in said


def test_killed_its_trial_lives_on(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = options(images, TEMPERATURES, "pruner=none", "trials=1")
    Path("here").mkdir()
    Path("here/hold").touch()
    process = Forked(arguments)
    process.wait(lambda: Path("here/trials/0000/metrics.jsonl").exists())
    process.kill()
    process = Forked(arguments)
    process.wait(lambda: "trial 0 still runs" in process.output.read_text())
    assert len(starts(0)) == 1, "it is not doubled"
    os.kill(process.pid, signal.SIGTERM)
    status, output = process.finish()
    assert status == 75 and "paused" in log(0), output + "it is told to save, though another has started it"


def test_ctrl_c_saves_the_trials_and_the_same_command_goes_on(images: Path) -> None:
    arguments = options(images, TEMPERATURES, "pruner=none", "trials=3")
    Path("here").mkdir()
    Path("here/hold").touch()
    process = Forked(arguments)
    process.wait(lambda: Path("here/trials/0000/metrics.jsonl").exists())
    os.kill(process.pid, signal.SIGINT)
    status, output = process.finish()
    assert status == 75 and "stopped with 0 of 3 trials done; continue: python -m launch.sweep" in output, output
    assert "paused" in log(0) and [row["state"] for row in table()] == ["not done"]
    Path("here/hold").unlink()
    assert sweep.main(arguments) == 0
    assert [row["state"] for row in table()] == ["finished"] * 3 and [len(starts(n)) for n in range(3)] == [2, 1, 1]
    assert len(json_lines(0)) == 4


def test_ctrl_c_as_a_trial_ends_starts_no_other(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = report.write

    def written(*arguments: Any, **options: Any) -> Any:
        if not options:  # after each trial
            os.kill(os.getpid(), signal.SIGINT)
        return write(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(report, "write", written)
        assert sweep.main(options(images, TEMPERATURES, "pruner=none", "trials=3")) == 75
    assert [row["state"] for row in table()] == ["finished"] and not starts(1)
    assert sweep.main(options(images, TEMPERATURES, "pruner=none", "trials=3")) == 0
    assert [len(starts(number)) for number in range(3)] == [1] * 3


def test_trials_that_were_cut_off_start_again_as_many_as_may_run(images: Path) -> None:
    arguments = options(images, TEMPERATURES, "pruner=none", "trials=2")
    Path("here").mkdir()
    Path("here/hold").touch()
    process = Forked([*arguments, "at_once=2"])
    process.wait(lambda: all(Path(f"here/trials/000{number}/metrics.jsonl").exists() for number in (0, 1)))
    os.kill(process.pid, signal.SIGTERM)
    assert process.finish()[0] == 75
    Path("here/hold").unlink()
    assert sweep.main([*arguments, "at_once=1"]) == 0
    assert [len(starts(number)) for number in (0, 1)] == [2, 2]
    end, start = (Path(f"here/trials/{name}").stat().st_mtime_ns for name in ("0000/config.yaml", "0001/starts"))
    assert end < start, "the second waits until the first has finished"


def json_lines(number: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"here/trials/{number:04d}/metrics.jsonl").read_text().splitlines()]


def test_a_second_process_and_other_settings_are_refused(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = options(images, TEMPERATURES, "pruner=none", "trials=2")
    Path("here").mkdir()
    Path("here/hold").touch()
    process = Forked(arguments)
    try:
        process.wait(lambda: starts(0))
        assert sweep.main(arguments) == 2
        assert "sweep_dir=here: another process runs this sweep; wait for it" in only_error(capfd)
    finally:
        Path("here/hold").unlink()
    assert process.finish()[0] == 0
    for change, said in {
        "space.loss.temperature.log=[0.1, 0.9]": "space.loss.temperature.log=[0.1, 0.9]: the sweep sweep in",
        "set.optim.epochs=5": "optim.epochs=5: the sweep",
        "seed=1": "seed of the sweep=1: the sweep",
    }.items():
        assert sweep.main([*arguments, change]) == 2
        assert said in only_error(capfd)
    assert sweep.main([*arguments, "trials=3", "at_once=2"]) == 0
    assert [row["state"] for row in table()] == ["finished"] * 3, "more trials go on with it"


# --- before the first trial -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["set.probe.enabled=false"],
            "metric=probe_top1: trial 0 would not have it, as probe.enabled=false; set.probe.enabled=true",
        ),
        (["set.monitor.every_epochs=1"], "): monitor.images=2000: data.train="),
        (["metric=monitor_rankme"], "as monitor.every_epochs=0; set.monitor.every_epochs=1"),
        (
            ["metric=monitor_lidar", "set.monitor.every_epochs=1", "set.monitor.images=40", "set.monitor.views=0"],
            "as monitor.views=0; set.monitor.views=10",
        ),
        (
            ["metric=monitor_knn_top1", "set.monitor.every_epochs=1", "set.data.train=spirograph"],
            "data.train=spirograph has no classes; set metric=monitor_rankme",
        ),
        (
            ["metric=monitor_rankme", "set.monitor.every_epochs=3", "set.monitor.images=40", "set.optim.steps=12"],
            "monitor.every_epochs=3 and it ends in epoch 3; measure more often",
        ),
        (["set.data.train=spirograph"], "data.train=spirograph has no classes; set metric=contrastive_top1"),
        (["set.data.train=missing.beton"], "missing.beton"),
        (["set.optim.steps=3"], "its 3 steps are not one epoch of 5"),
        (["grace_epochs=4"], "grace_epochs=4: trials have at most 4 epochs, so none could end early"),
        (["space.loss.norm_p.choice=[1, 2]", "space.loss.kernel.choice=[arccos]"], "trial 0 (loss.temperature="),
        (["space.loss.gamma={choice: [1], when: {loss.kernel: laplacian}}"], "it never holds; loss.kernel is one of"),
        (["grid.seed=[0, 1]"], "space and grid are both set; set one of them"),
        (["devices=['0,1']"], "devices=['0,1']: not one device per entry"),
        (["set.run_dir=x"], "set.run_dir: the sweep chooses it for each trial"),
        (["metric=accuracy"], "metric=accuracy: unknown value; choose one of probe_top1"),
        (["slurm=none.yaml"], "config file none.yaml does not exist"),
        (["set.optim.epoch=1"], "unknown option optim.epoch in set; did you mean optim.epochs?"),
    ],
)
def test_mistakes(more: list[str], said: str, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([*options(images, TEMPERATURES), *more]) == 2
    assert said in only_error(capfd)
    assert not Path("here/trials").exists(), "nothing was started"


def test_a_file_and_the_command_line_say_the_same(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        "space:\n  loss.temperature: {log: [0.1, 1]}\n  loss:\n    gamma: {choice: [1], when: {loss.kernel: cosine}}\n"
    )
    said = []
    dotted = ["space.loss.gamma.choice=[1]", "space.loss.gamma.when.loss.kernel=cosine"]
    for arguments in (["mine.yaml"], [TEMPERATURES, *dotted]):
        assert sweep.main([*arguments, *options(images), "--dry-run"]) == 0
        said.append(capfd.readouterr().out)
    assert said[0] == said[1] and said[0].count("loss.gamma=1.0") == 6
    assert sweep.main(["--help"]) == 0
    assert "space                            a mapping" in capfd.readouterr().out
    assert sweep.main(["space=3"]) == 2
    assert "space=3 in the command line: must be a mapping" in only_error(capfd)


def test_a_sweep_without_a_finished_trial(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([*options(images, "space.loss.kernel.choice=[laplacian]"), "trials=2"]) == 1
    assert "error: none of the trials finished; the first error: error: step 3" in capfd.readouterr().err
    assert not Path("here/best.yaml").exists() and Path("here/history.png").exists()


def test_a_dry_run_shows_the_trials(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([*options(images, TEMPERATURES), "--dry-run"]) == 0
    assert capfd.readouterr().out.count("loss.temperature=") == 6 and not Path("here").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_config(path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(processes.ROOT)
    quick = [f"set.data.train={images}", "set.optim.global_batch_size=8", "trials=25", "--dry-run"]
    assert sweep.main([str(path), *quick]) == 0
    trials = capfd.readouterr().out.splitlines()
    assert len(trials) == {"kernel_infonce": 25, "kernels_and_lengths": 30}[path.stem]
    assert f"python -m launch.sweep configs/sweep/{path.name}" in path.read_text()
    if path.stem == "kernel_infonce":
        assert any("kernel=gaussian" in line for line in trials)
        assert all(("mix_weight" in line) == ("_sum" in line) for line in trials)


# --- the report -----------------------------------------------------------------------------------------------------


def ended(count: int, *others: tuple[TrialState, float | None]) -> tuple[sweep.Plan, optuna.Study]:
    """A study of so many finished trials, and others that ended otherwise, whose last value is given."""
    plan = sweep.make_plan(build(Sweep, [("the test", {"space.loss.temperature.log": [0.1, 1], "trials": 20})]))
    study = optuna.create_study(direction="maximize")
    distribution = {"loss.temperature": optuna.distributions.FloatDistribution(0.1, 1, log=True)}
    for number, (state, value) in enumerate([(TrialState.COMPLETE, None)] * count + list(others)):
        drawn = plan.drawn(number)[0]
        last = drawn["loss.temperature"] if state == TrialState.COMPLETE else value
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=last if state == TrialState.COMPLETE else None,
                params=drawn,
                distributions=distribution,
                intermediate_values={} if last is None else {3: last},
            )
        )
    return plan, study


def test_importances_by_any_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.importances(ended(8)[1], "loss")[0].keys() == {"loss.temperature"}
    found = report.importances(ended(7)[1], "loss")
    assert found == ({}, "no importances: they need 8 finished trials, and there are 7")
    taken: list[float] = []

    def before_4_7(*, baseline_quantile: float = 0.1, evaluate_on_local: bool = True) -> None:
        taken.append(baseline_quantile)

    monkeypatch.setattr(report, "PedAnovaImportanceEvaluator", before_4_7)
    monkeypatch.setattr(report, "get_param_importances", lambda study, evaluator: {"a": 0.0, "b": math.nan})
    assert report.importances(ended(8)[1], "loss") == ({"a": 0.0}, "") and taken == [report.GOOD]


# --- the grid -------------------------------------------------------------------------------------------------------


def test_a_grid(images: Path) -> None:
    grid = ["grid.optim.epochs=[2, 3]", "grid.kernel={warm: {loss.temperature: 0.5}, hot: {loss.temperature: 0.9}}"]
    assert sweep.main([*options(images, *grid), "at_once=4"]) == 0
    found = {(row["kernel"], row["optim.epochs"]): (row["probe_top1"], row["epochs"]) for row in table()}
    assert found == {
        ("warm", "2"): ("0.5", "2"),
        ("warm", "3"): ("0.5", "3"),
        ("hot", "2"): ("0.9", "2"),
        ("hot", "3"): ("0.9", "3"),
    }


# --- jobs, with a SLURM that is not there ----------------------------------------------------------------------------


@pytest.mark.usefixtures("cluster")
def test_a_grid_is_one_job_array(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def submit_array(settings: Slurm, plans: list[Plan], at_once: int) -> str:
        asked.append((len(plans), at_once))
        for i, plan in enumerate(plans):
            plan.folder.mkdir()
            with (plan.folder / f"77_{i}_0_log.out").open("w") as log:
                subprocess.run([*STUB, plan.command[1]], stdout=log, check=False)
        return "77"

    monkeypatch.setattr(submission, "submit_array", submit_array)
    ended = {"77_0": status.State("COMPLETED"), "77_1": status.State("FAILED", 1), "77_2": status.State("COMPLETED")}
    monkeypatch.setattr(status, "states", lambda jobs: {job: ended[job] for job in jobs})
    Path("jobs.yaml").write_text("minutes: 10\n")
    arguments = options(images, "grid.loss.kernel=[cosine, laplacian, gaussian]", "slurm=jobs.yaml", "at_once=2")
    assert sweep.main(arguments) == 0
    assert asked == [(3, 2)]
    assert [row["state"] for row in table()] == ["finished", "failed", "finished"]
    assert table()[1]["error"] == "error: step 3: it diverges"
    assert [t.user_attrs["handle"]["job"] for t in study().trials] == ["77_0", "77_1", "77_2"]


@pytest.mark.usefixtures("cluster")
def test_a_job_that_falls_behind_is_cancelled(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[subprocess.Popen[bytes]] = []
    run = subprocess.run

    def submit(settings: Slurm, plan: Plan) -> str:
        jobs.append(subprocess.Popen([*STUB, plan.command[1]]))
        return str(len(jobs) - 1)

    def states(asked: list[str]) -> dict[str, status.State]:
        names = {None: "RUNNING", 0: "COMPLETED", signals.PAUSED: "CANCELLED"}
        return {job: status.State(names[jobs[int(job)].poll()]) for job in asked}

    def scancel(command: list[str], **more: Any) -> Any:
        if command[:2] == ["scancel", "--quiet"]:  # scancel's -q is a quality of service
            return jobs[int(command[-1])].terminate()
        return run(command, **more)

    monkeypatch.setattr(submission, "submit", submit)
    monkeypatch.setattr(status, "states", states)
    monkeypatch.setattr(subprocess, "run", scancel)
    monkeypatch.setattr(trials.Jobs, "POLL", 0.02)
    Path("jobs.yaml").write_text("minutes: 10\n")
    assert sweep.main([*last_below_median(images), "slurm=jobs.yaml", "at_once=1"]) == 0
    assert [row["state"] for row in table()] == ["finished"] * 3 + ["ended early"]
    assert jobs[3].wait() == 75, "it has saved"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for SLURM's commands, whose jobs have ended when they are submitted; and jobs.yaml, settings of jobs.

    In the folder: scripts/JOB, what was submitted; state/JOB, how that ended; refuse, and hold (no job runs its trial),
    if they are there.
    """
    here = tmp_path / "cluster"
    sbatch = f"""
[ -e refuse ] && {{ echo "sbatch: error: too many jobs" >&2; exit 1; }}
job=$((71 + $(ls scripts | wc -l)))
cp "$script" scripts/$job
cd {tmp_path}
sed -n "s/.*run_dir=\\(.*\\) run_folder=.*/\\1/p" "$script" | while read -r run_dir; do
  [ -e {here}/hold ] || {shlex.join(STUB)} "$run_dir/trial.yaml" >/dev/null
done
echo "Submitted batch job $job"
"""
    scontrol = (
        'job="${4%_*}"; echo "JobId=$job JobState=$(cat "state/$job" 2>/dev/null || echo COMPLETED) ExitCode=0:0"'
    )
    for folder in ("bin", "scripts", "state"):
        (here / folder).mkdir(parents=True)
    scontrol = f'[ "$1 $2" != "show config" ] || {{ cat limits 2>/dev/null; exit 0; }}\n{scontrol}'
    squeue = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'  # it says so of jobs that have ended
    for name, content in (("sbatch", sbatch), ("scontrol", scontrol), ("squeue", squeue), ("srun", "")):
        begin = f'#!/bin/bash\nscript=$(realpath "${{@: -1}}")\ncd {here} || exit 1\n'
        (here / "bin" / name).write_text(f"{begin}{content}\n")
        (here / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(trials.Jobs, "POLL", 0.02)
    Path("jobs.yaml").write_text("minutes: 10\n")
    return here


def scripts(cluster: Path) -> list[str]:
    return [path.read_text() for path in sorted((cluster / "scripts").iterdir())]


GRID = ["grid.loss.kernel=[cosine, exponential, gaussian]", "slurm=jobs.yaml"]


def test_a_grid_of_jobs_all_at_once(images: Path, cluster: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(options(images, *GRID)) == 0
    (script,) = scripts(cluster)
    assert "\n#SBATCH --array=0-2%3\n" in script
    said = [line for line in capfd.readouterr().out.splitlines() if "array" in line]
    assert said == [
        "3 trials: array 71, 3 at once, logs here/trials/*/slurm/71_*_0_log.out; cancel: scancel 71",
    ]
    folders = [Path(f"here/trials/000{number}") for number in range(3)]
    assert len({next(folder.glob("slurm/code-*")).resolve() for folder in folders}) == 1, "they share the code"
    for folder in folders:
        (copy,) = folder.glob("slurm/config-*/1/trial.yaml")
        assert copy.read_text() == (folder / "trial.yaml").read_text()


def test_a_grid_above_the_largest_array_runs_in_parts(images: Path, cluster: Path) -> None:
    (cluster / "limits").write_text("MaxArraySize            = 2\nSchedulerParameters     = max_array_tasks=1000\n")
    assert sweep.main(options(images, "grid.seed=[0, 1, 2, 3, 4]", "slurm=jobs.yaml")) == 0
    found = [re.search(r"--array=(\S+)\n", script) for script in scripts(cluster)]
    assert [match[1] if match else "" for match in found] == ["0-1%2", "0-1%2", ""]
    assert [row["state"] for row in table()] == ["finished"] * 5 and sum(len(starts(n)) for n in range(5)) == 5


def test_jobs_of_their_own_are_told_apart(images: Path, cluster: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([*options(images, TEMPERATURES), "trials=2", "slurm=jobs.yaml"]) == 0
    assert [f"\n#SBATCH --job-name=sweep-000{n}\n" in script for n, script in enumerate(scripts(cluster))] == [True] * 2
    log = "here/trials/0001/slurm/72_0_log.out"
    assert f"trial 1: job 72, log {log}; cancel: scancel 72" in capfd.readouterr().out


def test_a_refused_array_is_submitted_again_as_one(
    images: Path, cluster: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (cluster / "refuse").touch()
    assert sweep.main(options(images, *GRID)) == 2
    assert "SLURM refuses the job: too many jobs" in capfd.readouterr().err
    (cluster / "refuse").unlink()
    assert sweep.main(options(images, *GRID, "at_once=2")) == 0
    (script,) = scripts(cluster)
    assert "\n#SBATCH --array=0-2%2\n" in script
    assert [row["state"] for row in table()] == ["finished"] * 3


def test_a_refused_trial_waits(
    images: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    submit = submission.submit
    (cluster / "state" / "71").write_text("RUNNING")

    def sometimes(settings: Slurm, plan: Plan) -> str:
        asked.append(plan.run_dir.name)
        (cluster / "refuse").touch()
        if len(asked) not in (2, 3):
            (cluster / "refuse").unlink()
        if len(asked) == 4:
            (cluster / "state" / "71").unlink()
        return submit(settings, plan)

    monkeypatch.setattr(submission, "submit", sometimes)
    assert sweep.main([*options(images, TEMPERATURES), "trials=4", "slurm=jobs.yaml", "at_once=3"]) == 0
    assert asked == ["0000", "0001", "0001", "0001", "0002", "0003"], "a refusal is the last question of a look"
    said = capfd.readouterr().out.splitlines()
    refused = "trial 1 waits and is submitted again later: SLURM refuses the job: too many jobs"
    assert [line for line in said if "refuses" in line] == [refused]
    assert [row["state"] for row in table()] == ["finished"] * 4 and len(scripts(cluster)) == 4


def test_a_refusal_while_nothing_runs(
    images: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options(images, TEMPERATURES), "trials=3", "slurm=jobs.yaml", "at_once=1"]
    write = report.write

    def written(*more: Any, **options: Any) -> Any:
        (cluster / "refuse").touch()
        return write(*more, **options)

    with monkeypatch.context() as patched:
        patched.setattr(report, "write", written)
        assert sweep.main(arguments) == 2
    assert "error: SLURM refuses the job: too many jobs" in only_error(capfd)
    (cluster / "refuse").unlink()
    assert sweep.main(arguments) == 0
    assert [row["state"] for row in table()] == ["finished"] * 3 and len(scripts(cluster)) == 3


@pytest.mark.parametrize(("state", "jobs"), [("CANCELLED", 1), ("TIMEOUT", 1 + sweep.AGAIN)])
def test_trials_whose_jobs_are_cut_off(
    state: str, jobs: int, images: Path, cluster: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (cluster / "hold").touch()
    for job in range(71, 80):
        (cluster / "state" / str(job)).write_text(state)
    assert sweep.main(options(images, *GRID)) == 75
    said = capfd.readouterr().out
    last = 70 + jobs
    assert f"trial 2: its job {last}_2 ended as {state}; it is saved, and the next start of the sweep continues" in said
    assert "stopped with 0 of 3 trials done; continue: python -m launch.sweep" in said
    assert [row["state"] for row in table()] == ["not done"] * 3 and len(scripts(cluster)) == jobs
    (cluster / "hold").unlink()
    (cluster / "state" / str(last + 1)).write_text("COMPLETED")
    assert sweep.main(options(images, *GRID, "at_once=2")) == 0
    assert [row["state"] for row in table()] == ["finished"] * 3
    assert len(scripts(cluster)) == jobs + 1 and "\n#SBATCH --array=0-2%2\n" in scripts(cluster)[-1]


def test_an_array_that_was_not_noted_is_found(images: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: optuna.Trial, key: str, value: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "set_user_attr", killed)  # which records the handle
        assert sweep.main(options(images, *GRID)) == 130
    assert not any("handle" in t.user_attrs for t in study().trials)
    assert sweep.main(options(images, *GRID)) == 0
    assert len(scripts(cluster)) == 1 and [row["state"] for row in table()] == ["finished"] * 3


def test_the_newest_job_of_a_run(tmp_path: Path) -> None:
    assert results.queued(tmp_path) is None
    (tmp_path / "slurm").mkdir()
    for age, name in enumerate(["88_submitted.pkl", "77_0_submitted.pkl", "9_submitted.pkl", "99_submission.sh"]):
        (tmp_path / "slurm" / name).touch()
        os.utime(tmp_path / "slurm" / name, (1000 - age, 1000 - age))
    assert results.queued(tmp_path) == {"job": "88"}
    os.utime(tmp_path / "slurm" / "77_0_submitted.pkl", (2000, 2000))
    assert results.queued(tmp_path) == {"job": "77_0"}


def test_the_error_of_a_job_is_that_of_its_command(tmp_path: Path) -> None:
    wrapper = "error: rank {} on node1: simclr_ddp.pretrain ended with status 2"
    logs = {
        "7_0_log.out": f"error: lost the other ranks (x): the first says why\n{wrapper.format(0)}\n",
        "7_1_log.out": f"error: rank 1: step 3: it diverges (--debug shows where)\n{wrapper.format(1)}\n",
        "8_0_log.out": f"{wrapper.format(0)}\n",
    }
    for name, text in logs.items():
        (tmp_path / name).write_text(text)
    assert results.job_error(tmp_path, "7") == "error: rank 1: step 3: it diverges"
    (tmp_path / "7_1_log.out").unlink()
    assert results.job_error(tmp_path, "7") == "error: lost the other ranks (x): the first says why"
    assert results.job_error(tmp_path, "8") == wrapper.format(0) and not results.job_error(tmp_path, "9")


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_mistake_in_the_settings_of_the_jobs(
    more: list[str], images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("jobs.yaml").write_text("gpus_per_node: 2\ntasks_per_node: 3\n")
    assert sweep.main(options(images, *GRID, *more)) == 2
    assert "slurm=jobs.yaml: tasks_per_node=3: each of gpus_per_node=2" in only_error(capfd)
    assert not Path("here").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_without_slurm_or_submitit(
    more: list[str], images: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = options(images, *GRID, *more)
    way_out = "leave slurm out to run the trials on this machine"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "which", lambda name: None)
        assert sweep.main(arguments) == 2
        assert (
            f"slurm=jobs.yaml: this machine has no SLURM (sbatch not found); submit from another, or {way_out}"
            in only_error(capfd)
        )
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert sweep.main(arguments) == 2
    said = only_error(capfd)
    assert f"slurm=jobs.yaml: submitit is not installed; pip install '.[slurm]', or {way_out}" in said
    assert not Path("here").exists()


def test_without_optuna(tmp_path: Path) -> None:
    start = "import runpy, sys; sys.modules['optuna'] = None; runpy.run_module('launch.sweep', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", start, "--help"], cwd=processes.ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "error: optuna is not installed: pip install '.[sweep]' adds it\n")


# --- real trials ----------------------------------------------------------------------------------------------------


def real(images: Path, *more: str) -> list[str]:
    """A sweep of two short runs that differ in their learning rate; one of them diverges."""
    _, *fixed = training(images, Path("unused"), "probe.enabled=true", "optim.steps=null", "optim.epochs=6")
    kept = [f"set.{argument}" for argument in fixed if not argument.startswith("run_dir=")]
    return [*kept, "sweep_dir=here", "pruner=none", "grid.optim.base_learning_rate=[0.1, 1e30]", *more]


@pytest.mark.slow
def test_real_trials(images: Path) -> None:
    assert sweep.main(real(images)) == 0
    good, bad = table()
    assert (good["state"], good["epochs"], bad["state"]) == ("finished", "6", "failed")
    assert 0 <= float(good["probe_top1"]) <= 1 and "it diverges" in bad["error"]
    assert pretrain.main(["here/best.yaml", "optim.epochs=1"]) == 0


@pytest.mark.slurm
@pytest.mark.skipif("SIMCLR_SLURM_DIR" not in os.environ, reason="no cluster: SIMCLR_SLURM_DIR is not set")
def test_real_jobs_that_are_found_again_after_a_kill(images: Path) -> None:
    here = Path.cwd() / "here"
    (here.parent / "jobs.yaml").write_text("cpus_per_task: 1\nminutes: 10\n")
    jobs = f"slurm={here.parent / 'jobs.yaml'}"
    space = "space.optim.base_learning_rate={log: [0.1, 0.2]}"
    arguments = [a for a in real(images, space, "trials=2", jobs, f"sweep_dir={here}") if not a.startswith("grid.")]
    process = Forked(arguments)
    process.wait(lambda: (here / "sweep.yaml").exists(), 120)
    process.wait(lambda: sum("handle" in t.user_attrs for t in study().trials) == 2, 120)
    process.kill()
    submitted = [t.user_attrs["handle"]["job"] for t in study().trials]
    assert sweep.main(arguments) == 0
    assert [row["state"] for row in table()] == ["finished"] * 2
    assert [t.user_attrs["handle"]["job"] for t in study().trials] == submitted, "no job was submitted twice"


@pytest.mark.slurm
@pytest.mark.skipif("SIMCLR_SLURM_DIR" not in os.environ, reason="no cluster: SIMCLR_SLURM_DIR is not set")
def test_real_jobs_of_a_search_and_of_a_grid_in_one_storage(
    images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A search whose second trial diverges and whose third falls behind; at the same time a grid of named values."""
    monkeypatch.setattr(trials.Jobs, "POLL", 0.5)
    here = Path.cwd()
    (here / "jobs.yaml").write_text("cpus_per_task: 1\nminutes: 10\n")
    shared = [f"slurm={here}/jobs.yaml", f"storage={here}/all.journal"]
    begin = [argument for argument in real(images, *shared) if not argument.startswith(("grid.", "sweep_dir="))]
    search = [
        *begin,
        "name=search",
        f"sweep_dir={here}/search",
        "metric=loss",
        "trials=4",
        "at_once=1",
        "pruner=median",
        "startup_trials=1",
        "grace_epochs=1",
        "space.loss.temperature.choice=[0.1, 10]",  # the loss is 4 or more at the one, 3.4 at the other
        "space.optim.epochs={choice: [2000], when: {loss.temperature: 0.1}}",
        "space.optim.base_learning_rate.choice=[0.2, 1e30]",
    ]
    order = [(10, 0.2), (10, 1e30), (0.1, 0.2), (10, 0.2)]
    keys = ("loss.temperature", "optim.base_learning_rate")
    seed = seed_with(search, lambda drawn: [tuple(d[key] for key in keys) for d in drawn] == order)
    process = Forked([*search, f"seed={seed}"])
    kernels = "grid.kernel={sharp: {loss.temperature: 0.1}, wide: {loss.kernel: laplacian, loss.temperature: 0.5}}"
    grid = [*begin, "name=grid", f"sweep_dir={here}/grid", kernels, "grid.optim.epochs=[1, 2]", "at_once=2"]
    assert sweep.main(grid) == 0
    status, output = process.finish()
    assert status == 0, output
    times = [
        [(t.datetime_start, t.datetime_complete) for t in study("all.journal", n).trials] for n in ("search", "grid")
    ]
    assert max(t[0][0] for t in times) < min(t[-1][1] for t in times), "at the same time"

    rows = table("search")
    assert [row["state"] for row in rows] == ["finished", "failed", "ended early", "finished"], output
    assert "it diverges" in rows[1]["error"] and int(rows[2]["epochs"]) < 2000
    assert "trial 1: failed: error: " in output and "4 of 4 done" in output
    best = build(Pretrain, [("best.yaml", read_yaml("search/best.yaml"))])
    assert (best.loss.temperature, best.optim.base_learning_rate) == (10, 0.2)
    assert "it diverges" in Path("search/report.md").read_text()

    rows = table("grid")
    jobs = [trial.user_attrs["handle"]["job"] for trial in study("all.journal", "grid").trials]
    assert {job.partition("_")[0] for job in jobs} == {jobs[0].partition("_")[0]} and jobs[3].endswith("_3")
    assert [(row["state"], row["kernel"], row["epochs"]) for row in rows] == [
        ("finished", kernel, epochs) for kernel in ("sharp", "wide") for epochs in ("1", "2")
    ]
    capfd.readouterr()
    assert summary.main(["grid", "rows=loss.kernel,loss.temperature", "columns=optim.epochs", "out=summary"]) == 0
    said = capfd.readouterr().out
    values = {(row["kernel"], row["epochs"]): f"{float(row['probe_top1']):.4g}" for row in rows}
    assert "; 4 of 4 runs" in said
    assert f"| cosine | 0.1 | {values['sharp', '1']} | {values['sharp', '2']} |" in said, said
    assert f"| laplacian | 0.5 | {values['wide', '1']} | {values['wide', '2']} |" in said, said
    assert (here / "summary" / "summary.png").exists()

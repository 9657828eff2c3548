"""Random search, or a grid of runs: `python -m launch.sweep configs/sweep/NAME.yaml [key=value ...]`

Each trial is a pretraining run in SWEEP_DIR/trials, a process of this machine or, with slurm=FILE.yaml, a SLURM job.
What it draws depends on the seed and its number alone. Trials that fall behind are ended early, those that fail are
recorded with their error, those that SLURM refuses wait while others run. Stopped or killed, the same command goes on,
and the trials with it, also with those whose jobs were cancelled. SWEEP_DIR holds trials.csv and best.yaml (which
pretrain takes), new after each trial, and at the end, or when the sweep is stopped, report.md and figures.
Exit status: 0 finished, 75 stopped by a signal or trials cut off, all saved, 1 no trial finished, 2 settings or data.
"""

import importlib.util
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

try:
    import optuna
    from optuna.trial import Trial, TrialState
except ModuleNotFoundError:
    print("error: optuna is not installed: pip install '.[sweep]' adds it", file=sys.stderr)
    sys.exit(2)

from launch import sweep_report
from launch.journal import locked, open_study
from launch.plan import Plan, Sweep, check, make_plan, shown
from launch.space import label_of
from launch.trials import Ending, Handle, Jobs, Processes, epoch_values, queued, write_settings
from simclr_ddp import cli, config
from simclr_ddp.data import cores
from simclr_ddp.metrics import read_metrics
from simclr_ddp.pretrain import PAUSED

FLAGS = {"--dry-run": "check everything, print what each trial would be, and start nothing"}
PATIENCE = 60.0  # seconds that a trial has to save before it is killed
AGAIN = 3  # times that a trial which was cut off is started again, by one process of the sweep


@dataclass
class Running:
    """A trial that has not ended."""

    trial: Trial
    run_dir: Path
    handle: Handle  # empty: it waits to be started
    refused: str = ""  # what SLURM has said of its job, instead of taking it
    seen: bool = False  # running, by this process of the sweep
    again: int = 0  # times that it has been cut off since
    left: bool = False  # to the next start of the sweep
    reported: set[int] = field(default_factory=set)  # epochs
    pruned: bool = False
    kill_at: float = 0.0  # on the monotonic clock


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    again = shlex.join(["python", "-m", "launch.sweep", *arguments])

    def command(settings: Sweep) -> int:
        plan = make_plan(settings)
        check(settings, plan)
        runner = make_runner(settings)
        if "--dry-run" in arguments:
            for number in range(plan.count):
                cli.say(f"trial {number}: {shown(plan.drawn(number)[0])}")
            return 0
        return sweep(settings, plan, runner, again)

    return cli.run(command, Sweep, "[CONFIG.yaml]", __doc__ or "", arguments, FLAGS)


def sweep(settings: Sweep, plan: Plan, runner: Processes | Jobs, again: str) -> int:
    """Run the trials that are left, and write what came out; returns the exit status."""
    with locked(plan.sweep_dir), stop_signals() as told_to_stop:
        study = open_study(settings, plan)
        search = Search(settings, plan, study, runner)
        search.find_again()
        while not told_to_stop() and search.fill():
            search.look()
            if search.running and not told_to_stop():
                time.sleep(runner.POLL)
        stopped = bool(search.running) or search.done < plan.count
        if any(r.handle for r in search.running):
            search.stop()
        best = sweep_report.write(study, plan, settings.metric, last=True)
    if stopped:
        cli.say(f"stopped with {search.done} of {plan.count} trials done; go on: {again}")
        return PAUSED
    if best is None:
        failed = next(
            (t.user_attrs["error"] for t in study.trials if t.state == TrialState.FAIL), "none, all fell behind"
        )
        print(f"error: none of the trials finished; the first that failed: {failed}", file=sys.stderr, flush=True)
        return 1
    return 0


class Search:
    """The loop's state: which trials run. Everything else is in the study, so that another process can go on."""

    def __init__(self, settings: Sweep, plan: Plan, study: optuna.Study, runner: Processes | Jobs) -> None:
        self.running: list[Running] = []
        self._settings, self._plan, self._study, self._runner = settings, plan, study, runner
        self._at_once = at_once(settings, plan)
        self._begin, self._ended = time.monotonic(), 0

    @property
    def done(self) -> int:
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    def find_again(self) -> None:
        """The trials that an earlier process of this sweep has left."""
        for frozen in self._study.get_trials(states=(TrialState.RUNNING,)):
            found = self._take(frozen.number, Trial(self._study, frozen._trial_id))
            found.handle = frozen.user_attrs.get("handle", {})
            if isinstance(self._runner, Jobs) and ("job" in found.handle or not found.handle):
                found.handle = queued(found.run_dir) or found.handle
            if found.handle and ("job" in found.handle) != isinstance(self._runner, Jobs):
                kind = f"SLURM job {found.handle['job']}" if "job" in found.handle else "process of a machine"
                raise ValueError(f"trial {frozen.number} is a {kind}, slurm={self._settings.slurm}: go on as before")
            found.reported, found.pruned = set(frozen.intermediate_values), "pruned" in frozen.user_attrs
        running = [r for r, ending in self._endings() if ending is None]
        for r in self.running:
            cli.say(f"trial {r.trial.number} {'still runs' if r in running else 'is taken up again'}: {r.run_dir}")

    def fill(self) -> bool:
        """Start trials while there is room, those first that wait; whether any runs.

        The waiting ones of a grid are one array of jobs if none runs, else jobs of their own as there is room. One
        that SLURM refuses waits for the next call; ValueError with SLURM's words if none runs.
        """
        grid = bool(self._plan.axes) and isinstance(self._runner, Jobs)
        room = self._at_once - sum(bool(r.handle) for r in self.running)
        waiting = [r for r in self.running if not r.handle and not r.left]
        while (number := len(self._study.get_trials(deepcopy=False))) < self._plan.count:
            if not grid and len(waiting) >= room:
                break
            waiting.append(self._take(number, self._study.ask()))
            cli.say(f"trial {number}: {shown(self._plan.drawn(number)[0])}")
        if grid and room == self._at_once and len(waiting) > 1:
            self._start_array(waiting)
        else:
            for r in waiting[: max(0, room)]:
                try:
                    self._start(r)
                except ValueError as error:
                    if not any(other.handle for other in self.running):
                        raise
                    self._say_refused(r, " ".join(str(error).split()))
                    break  # it would refuse the others, too
        return any(r.handle for r in self.running)

    def look(self) -> None:
        """Report the epochs that have passed, end the trials that fall behind, record those that have ended."""
        for r, ending in self._endings():  # first, so that no line of metrics can come after the last look at them
            r.seen = r.seen or ending is None
            values = epoch_values(read_metrics(r.run_dir / "metrics.jsonl"), self._settings.metric)
            optim = self._plan.settings(r.trial.number).optim
            for epoch in sorted(values.keys() - r.reported):
                if r.pruned and ending is None:
                    break
                r.trial.report(values[epoch], epoch)
                r.reported.add(epoch)
                behind = r.trial.should_prune()  # of one that has ended, too: halving notes its value for the others
                at_its_end = optim.steps is None and epoch >= optim.epochs  # it only has to save
                if behind and ending is None and not at_its_end:
                    r.trial.set_user_attr("pruned", epoch)
                    r.pruned = True
            if ending is None and r.pruned:
                self._end_early(r)
            elif ending is not None:
                self._record(r, ending, values)

    def stop(self) -> None:
        """Have the processes save and end; jobs go on by themselves."""
        begun = [r for r in self.running if r.handle]
        if isinstance(self._runner, Jobs):
            jobs = " ".join(r.handle["job"] for r in begun)
            cli.say(f"the jobs of {len(begun)} trials go on without the sweep; `scancel {jobs}` saves and ends them")
            return
        cli.say(f"{len(begun)} trials save and end")
        for r in begun:
            self._runner.stop(r.run_dir, r.handle)
        end = time.monotonic() + PATIENCE
        while any(ending is None for _, ending in self._endings()) and time.monotonic() < end:
            time.sleep(0.1)

    def _endings(self) -> list[tuple[Running, Ending | None]]:
        """Those that were started, and how each ended; None while it runs."""
        begun = [r for r in self.running if r.handle]
        return list(zip(begun, self._runner.endings([(r.run_dir, r.handle) for r in begun]), strict=True))

    def _take(self, number: int, trial: Trial) -> Running:
        """The trial as one that runs, with what it draws on record."""
        labels = self._plan.drawn(number)[0]
        for axis in self._plan.axes:
            trial.suggest_categorical(axis.name, list(axis.places))
        for d in self._plan.space:
            if d.key not in labels:
                continue
            if d.kind == "choice":
                trial.suggest_categorical(d.key, [label_of(v) for v in d.values])
            elif d.whole:
                trial.suggest_int(d.key, d.values[0], d.values[1], log=d.kind == "log")
            else:
                trial.suggest_float(d.key, d.values[0], d.values[1], log=d.kind == "log")
        self.running.append(Running(trial, self._plan.run_dir(number), {}))
        return self.running[-1]

    def _write(self, r: Running) -> None:
        own: dict[str, Any] = {"name": f"{self._plan.name}-{r.trial.number:04d}", "run_dir": str(r.run_dir)}
        if isinstance(self._runner, Processes) and self._at_once > 1:
            share = max(1, cores() // self._at_once)
            own["threads"] = self._plan.fixed["threads"] or share
            own["data.workers"] = min(self._plan.fixed["data.workers"], share)
        write_settings(self._plan.settings(r.trial.number, **own), r.run_dir)

    def _start(self, r: Running) -> None:
        self._write(r)
        others = [other.handle for other in self.running if other.handle and other is not r]
        self._begun(r, self._runner.start(r.run_dir, others))
        if isinstance(self._runner, Jobs):
            job, number = r.handle["job"], r.trial.number
            cli.say(f"trial {number}: job {job}, its log {r.run_dir}/slurm/{job}_0_log.out; cancel: scancel {job}")

    def _start_array(self, waiting: list[Running]) -> None:
        assert isinstance(self._runner, Jobs)
        for r in waiting:
            self._write(r)
        at_once = min(self._at_once, len(waiting))
        handles = self._runner.start_all([r.run_dir for r in waiting], at_once)
        for r, handle in zip(waiting, handles, strict=True):
            self._begun(r, handle)
        array = handles[0]["job"].partition("_")[0]
        logs = f"{self._plan.sweep_dir}/trials/*/slurm/{array}_*_0_log.out"
        cli.say(f"{len(waiting)} trials: array {array}, {at_once} at once, logs {logs}; cancel: scancel {array}")

    def _say_refused(self, r: Running, words: str) -> None:
        """Once, and again when they are others."""
        if words != r.refused:
            cli.say(f"trial {r.trial.number} waits, and is tried again: {words}")
        r.refused = words

    def _begun(self, r: Running, handle: Handle) -> None:
        r.handle, r.seen, r.refused = handle, True, ""
        r.trial.set_user_attr("handle", handle)

    def _wait(self, r: Running, ending: Ending) -> None:
        """Have a trial that was cut off started again: soon, or, cancelled or cut off often, with the next sweep."""
        r.handle = {}
        r.again += r.seen
        r.left = r.again > AGAIN or (r.seen and "CANCELLED" in ending.error)
        if r.left:
            why = ending.error or f"it was cut off {r.again} times"
            cli.say(f"trial {r.trial.number}: {why}; it is saved, and the next start of the sweep goes on with it")

    def _end_early(self, r: Running) -> None:
        """Tell it once, and kill it if it does not listen."""
        if not r.kill_at or time.monotonic() > r.kill_at:
            self._runner.stop(r.run_dir, r.handle, kill=bool(r.kill_at))
            r.kill_at = time.monotonic() + PATIENCE

    def _record(self, r: Running, ending: Ending, values: dict[int, float]) -> None:
        """Put how the trial ended into the study, or have it started again where it has not."""
        last = max(values, default=0)
        if ending.state == "finished" and last:
            self._study.tell(r.trial, values[last])
            said = f"{self._settings.metric} {values[last]:.4f} after {last} epochs"
        elif r.pruned:
            epoch = max(r.reported)
            self._study.tell(r.trial, state=TrialState.PRUNED)
            said = f"ended early, {self._settings.metric} {values.get(epoch, float('nan')):.4f} at epoch {epoch}"
        elif ending.state in ("paused", "lost"):
            self._wait(r, ending)
            return
        else:
            error = ending.error or f"it finished without {self._settings.metric} in {r.run_dir}/metrics.jsonl"
            r.trial.set_user_attr("error", error)
            self._study.tell(r.trial, state=TrialState.FAIL)
            said = f"failed: {error}"
        self.running.remove(r)
        self._ended += 1
        sweep_report.write(self._study, self._plan, self._settings.metric)
        cli.say(f"trial {r.trial.number}: {said}; {self._standing()}")

    def _standing(self) -> str:
        done = self.done
        left = (time.monotonic() - self._begin) / self._ended * (self._plan.count - done)
        best = sweep_report.best(self._study)
        shown = f", best {best.value:.4f} (trial {best.number})" if best is not None else ""
        return f"{done} of {self._plan.count} done{shown}, {int(left) // 3600}:{int(left) // 60 % 60:02d} h left"


def at_once(settings: Sweep, plan: Plan) -> int:
    return settings.at_once or (plan.count if settings.slurm else max(1, len(settings.devices)))


def make_runner(settings: Sweep) -> Processes | Jobs:
    if settings.slurm:
        from launch.slurm import Slurm, check_settings

        read = {"name": settings.name} | config.read_yaml(settings.slurm)
        jobs: Slurm = config.build(Slurm, [(settings.slurm, read)])
        try:
            check_settings(jobs)
            _check_slurm()
        except ValueError as error:
            raise ValueError(f"slurm={settings.slurm}: {error}") from error
        return Jobs(jobs)
    if any(not device.isalnum() for device in settings.devices):
        raise ValueError(f"devices={settings.devices}: one device a trial is wanted, for example [0, 1]")
    return Processes(settings.devices or (visible_devices() if settings.at_once > 1 else []))


def _check_slurm() -> None:
    """ValueError if no job can be submitted from this machine."""
    from launch.slurm import TOOLS

    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    why = f"no SLURM on this machine ({missing[0]} is not there)" if missing else ""
    if importlib.util.find_spec("submitit") is None:
        why = "submitit is not installed: pip install '.[slurm]' adds it"
    if why:
        raise ValueError(f"{why}; leave slurm= out, and the trials are processes of this machine")


def visible_devices() -> list[str]:
    """The CUDA devices that this process has, by the names that CUDA_VISIBLE_DEVICES takes."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(i) for i in range(torch.cuda.device_count())]
    return [device.strip() for device in chosen.split(",") if device.strip()]


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGTERM, SIGUSR1, SIGHUP or Ctrl-C only sets a flag, which the yielded function tells."""
    told: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

    def handle(number: int, _: object) -> None:
        told.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: bool(told)
    finally:
        for number in numbers:
            signal.signal(number, before[number])


if __name__ == "__main__":
    sys.exit(main())

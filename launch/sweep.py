"""Random search, or a grid of runs: `python -m launch.sweep configs/sweep/NAME.yaml [key=value ...]`

Each trial is a pretraining run in SWEEP_DIR/trials, a process of this machine or, with slurm=FILE.yaml, a SLURM job.
Its values depend only on the seed and its number. Trials that fall behind are ended early, trials that fail are
recorded with their error, and trials that SLURM refuses wait while others run. If the sweep is stopped or killed, the
same command continues it and its trials. SWEEP_DIR holds trials.csv and best.yaml (a config for pretrain), updated
after each trial, and report.md and its plots, written when the sweep ends or is stopped.
Exit status: 0 finished, 75 stopped or trials interrupted, all saved, 1 no trial finished, 2 wrong settings or data.
"""

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import optuna
    from optuna.trial import FrozenTrial, Trial, TrialState
except ModuleNotFoundError:
    print("error: optuna is not installed: pip install '.[sweep]' adds it", file=sys.stderr)
    sys.exit(2)

from launch.cluster.job import PAUSED, STOP, count_gpus, is_held
from launch.cluster.settings import Slurm, check_settings
from launch.cluster.submit import check_slurm
from launch.search import report, seeds
from launch.search.journal import locked, open_study, records
from launch.search.plan import Plan, Sweep, check, make_plan, shown
from launch.search.results import Handle, epoch_values, queued
from launch.search.trials import Ending, Jobs, Processes, write_settings
from simclr_ddp.config import command, options, recipes
from simclr_ddp.runs.metrics import read_metrics
from simclr_ddp.system import console
from simclr_ddp.system.errors import one_line

FLAGS = {"--dry-run": "check everything, print the values of each trial, and start nothing"}
PATIENCE = 60.0  # seconds in which a trial must save before it is killed
AGAIN = 3  # times that one process of the sweep starts an interrupted trial again


@dataclass
class Running:
    """A trial that has not ended."""

    trial: Trial
    number: int
    run_dir: Path
    epochs: int | None  # after which it ends; None if it ends after a number of steps
    handle: Handle = field(default_factory=dict)  # empty: it waits to be started
    refused: str = ""  # SLURM's message when it refused its job
    seen: bool = False  # running, by this process of the sweep
    again: int = 0  # interruptions since
    left: bool = False  # for the next start of the sweep
    reported: set[int] = field(default_factory=set)  # epochs
    pruned: bool = False
    kill_at: float = 0.0  # on the monotonic clock


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    again = shlex.join(["python", "-m", "launch.sweep", *arguments])

    def launch(settings: Sweep) -> int:
        plan, runner = make_plan(settings), make_runner(settings)
        check(settings, plan, runner.ranks)
        if "--dry-run" in arguments:
            for number in range(plan.count):
                console.say(f"trial {number}: {shown(plan.drawn(number)[0])}")
            return 0
        return sweep(settings, plan, runner, again)

    return command.run(launch, Sweep, "[CONFIG.yaml]", __doc__ or "", arguments, FLAGS)


def sweep(settings: Sweep, plan: Plan, runner: Processes | Jobs, again: str) -> int:
    """Run the remaining trials and write the results; returns the exit status."""
    with locked(plan.sweep_dir), stop_signals() as stopping:
        study = open_study(settings, plan)
        search = Search(settings, plan, study, runner)
        search.find_again()
        while not stopping() and search.fill():
            search.look()
            if search.running and not stopping():
                time.sleep(runner.POLL)
        stopped = bool(search.running) or search.done < plan.count
        if any(r.handle for r in search.running):
            search.stop()
        best = report.write(study, plan, settings.metric, final=True)
    failed = [t for t in records(study) if t.state == TrialState.FAIL]
    if failed:
        console.say(f"{len(failed)} trials failed; the same command with retry=failed runs them again")
    if stopped:
        console.say(f"stopped with {search.done} of {plan.count} trials done; continue: {again}")
        return PAUSED
    if best is None:
        why = f"the first error: {failed[0].user_attrs['error']}" if failed else "all ended early"
        print(f"error: none of the trials finished; {why}", file=sys.stderr, flush=True)
        return 1
    return 0


class Search:
    """The trials that run. Everything else is in the study, so that another process can continue the sweep."""

    def __init__(self, settings: Sweep, plan: Plan, study: optuna.Study, runner: Processes | Jobs) -> None:
        self.running: list[Running] = []
        self._settings, self._plan, self._study, self._runner = settings, plan, study, runner
        self._at_once = at_once(settings, plan)
        self._begin, self._ended = time.monotonic(), 0

    @property
    def done(self) -> int:
        return sum(trial.state.is_finished() for trial in records(self._study))

    def find_again(self) -> None:
        """Take over the trials of an earlier process of this sweep, and those that failed if they are to run again."""
        known = records(self._study)
        for frozen in [t for t in known if t.state == TrialState.FAIL] if self._settings.retry else []:
            console.say(f"trial {frozen.number} failed and is run again: {frozen.user_attrs.get('error', '')}")
            for job in self._plan.run_dir(frozen.number).glob("slurm/[0-9]*_submitted.pkl"):
                job.unlink()  # before the attempt begins, or it would be found again as this attempt's
            self._add(frozen.number)
        for frozen in [t for t in known if t.state == TrialState.RUNNING]:
            found = self._take(frozen, frozen.number)
            found.handle = frozen.user_attrs.get("handle", {})
            if isinstance(self._runner, Jobs) and ("job" in found.handle or not found.handle):
                found.handle = queued(found.run_dir) or found.handle
            if found.handle and ("job" in found.handle) != isinstance(self._runner, Jobs):
                kind = f"SLURM job {found.handle['job']}" if "job" in found.handle else "process of a machine"
                raise ValueError(
                    f"slurm={self._settings.slurm}: trial {frozen.number} is a {kind}; continue with slurm as before"
                )
            found.reported, found.pruned = set(frozen.intermediate_values), "pruned" in frozen.user_attrs
        running = [r for r, ending in self._endings() if ending is None]
        for r in self.running:
            console.say(f"trial {r.number} {'still runs' if r in running else 'is started again'}: {r.run_dir}")

    def fill(self) -> bool:
        """Start trials while there is room, waiting ones first; returns whether any runs.

        The waiting trials of a grid become arrays of jobs if none runs, as large as SLURM allows; others single jobs
        as there is room. A trial that SLURM refuses waits for the next call; ValueError with its message if none runs.
        """
        jobs = self._runner if self._plan.axes and isinstance(self._runner, Jobs) else None
        room = self._at_once - sum(bool(r.handle) for r in self.running)
        waiting = [r for r in self.running if not r.handle and not r.left]
        for number in range(len(records(self._study)), self._plan.count):
            if jobs is None and len(waiting) >= room:
                break
            waiting.append(self._add(number))
            console.say(f"trial {number}: {shown(self._plan.drawn(number)[0])}")
        size = jobs.most_tasks() if jobs and room == self._at_once and len(waiting) > 1 else 1
        while waiting and room > 0:
            part, waiting = waiting[:size], waiting[size:]
            try:
                if len(part) > 1:
                    self._start_array(part, min(room, len(part)))
                else:
                    self._start(part[0])
            except ValueError as error:
                if not any(other.handle for other in self.running):
                    raise
                message = one_line(error)
                if message != part[0].refused:
                    console.say(f"trial {part[0].number} waits and is submitted again later: {message}")
                part[0].refused = message
                break  # it would also refuse the others
            room -= len(part)
        return any(r.handle for r in self.running)

    def look(self) -> None:
        """Report the epochs that have passed, end trials that fall behind, record those that have ended."""
        for r, ending in self._endings():  # first, so that no line of metrics is missed
            r.seen = r.seen or ending is None
            values = epoch_values(read_metrics(r.run_dir / "metrics.jsonl"), self._settings.metric)
            for epoch in sorted(epoch for epoch in values.keys() - r.reported if math.isfinite(values[epoch])):
                if r.pruned and ending is None:
                    break
                r.trial.report(values[epoch], epoch)
                r.reported.add(epoch)
                behind = r.trial.should_prune()  # also if it has ended: halving records its value
                at_its_end = r.epochs is not None and epoch >= r.epochs  # it only has to save
                if behind and ending is None and not at_its_end:
                    r.trial.set_user_attr("pruned", epoch)
                    r.pruned = True
            if ending is None and r.pruned:
                self._end_early(r)
            elif ending is not None:
                self._record(r, ending, values)

    def stop(self) -> None:
        """Have the processes save and end; jobs continue without the sweep."""
        begun = [r for r in self.running if r.handle]
        if isinstance(self._runner, Jobs):
            jobs = " ".join(r.handle["job"] for r in begun)
            console.say(f"{len(begun)} jobs continue without the sweep; `scancel {jobs}` saves and ends them")
            return
        console.say(f"{len(begun)} trials are saving")
        for r in begun:
            self._runner.stop(r.run_dir, r.handle)
        end = time.monotonic() + PATIENCE
        while any(ending is None for _, ending in self._endings()) and time.monotonic() < end:
            time.sleep(0.1)

    def _endings(self) -> list[tuple[Running, Ending | None]]:
        """The started trials, and how each ended; None while it runs."""
        begun = [r for r in self.running if r.handle]
        return list(zip(begun, self._runner.endings([(r.run_dir, r.handle) for r in begun]), strict=True))

    def _add(self, number: int) -> Running:
        """A trial that begins, for the first time or again; the study knows it before it is started."""
        self._study.add_trial(self._plan.trial(number))
        return self._take(self._study.get_trials(deepcopy=False)[-1], number)

    def _take(self, frozen: FrozenTrial, number: int) -> Running:
        optim, run_dir = self._plan.settings(number).optim, self._plan.run_dir(number)
        epochs = None if optim.steps else optim.epochs
        self.running.append(Running(Trial(self._study, frozen._trial_id), number, run_dir, epochs))
        return self.running[-1]

    def _write(self, r: Running) -> None:
        own: dict[str, Any] = {"name": f"{self._plan.name}-{r.number:04d}", "run_dir": str(r.run_dir)}
        if isinstance(self._runner, Processes) and self._at_once > 1:
            share = max(1, len(os.sched_getaffinity(0)) // self._at_once)
            own["threads"] = self._plan.fixed["threads"] or share
            own["data.workers"] = min(self._plan.fixed["data.workers"], share)
        write_settings(self._plan.settings(r.number, **own), r.run_dir)

    def _start(self, r: Running) -> None:
        self._write(r)
        others = [other.handle for other in self.running if other.handle and other is not r]
        self._runner.start(r.run_dir, others, lambda handle: self._begun(r, handle))
        if isinstance(self._runner, Jobs):
            job, number = r.handle["job"], r.number
            console.say(f"trial {number}: job {job}, log {r.run_dir}/slurm/{job}_0_log.out; cancel: scancel {job}")

    def _start_array(self, waiting: list[Running], at_once: int) -> None:
        assert isinstance(self._runner, Jobs)
        for r in waiting:
            self._write(r)
        handles = self._runner.start_all([r.run_dir for r in waiting], at_once)
        for r, handle in zip(waiting, handles, strict=True):
            self._begun(r, handle)
        array = handles[0]["job"].partition("_")[0]
        logs = f"{self._plan.sweep_dir}/trials/*/slurm/{array}_*_0_log.out"
        console.say(f"{len(waiting)} trials: array {array}, {at_once} at once, logs {logs}; cancel: scancel {array}")

    def _begun(self, r: Running, handle: Handle) -> None:
        r.handle, r.seen, r.refused = handle, True, ""
        r.trial.set_user_attr("handle", handle)

    def _wait(self, r: Running, ending: Ending) -> None:
        """Start an interrupted trial again: soon, or with the next sweep if it was cancelled or interrupted often."""
        r.handle = {}
        r.again += r.seen
        r.left = r.again > AGAIN or (r.seen and "CANCELLED" in ending.error)
        if r.left:
            why = ending.error or f"it was interrupted {r.again} times"
            console.say(f"trial {r.number}: {why}; it is saved, and the next start of the sweep continues it")

    def _end_early(self, r: Running) -> None:
        """Have it save and end, and kill it if it takes too long."""
        if not r.kill_at or time.monotonic() > r.kill_at:
            self._runner.stop(r.run_dir, r.handle, kill=bool(r.kill_at))
            r.kill_at = time.monotonic() + PATIENCE

    def _record(self, r: Running, ending: Ending, values: dict[int, float]) -> None:
        """Record in the study how the trial ended, or start it again if it was interrupted."""
        if ending.state == "failed" and is_held(r.run_dir / ".lock"):
            ending = Ending("lost", f"another process trains in {r.run_dir}")  # which the sweep does not know
        last = max(values, default=0)
        value = values.get(last, 0.0)
        if ending.state == "finished" and last and math.isfinite(value):
            self._study.tell(r.trial, values[last])
            result = f"{self._settings.metric} {values[last]:.4f} after {last} epochs"
        elif r.pruned:
            epoch = max(r.reported)
            self._study.tell(r.trial, state=TrialState.PRUNED)
            result = f"ended early, {self._settings.metric} {values.get(epoch, float('nan')):.4f} at epoch {epoch}"
        elif ending.state in ("paused", "lost"):
            self._wait(r, ending)
            return
        else:
            error = ending.error or f"it finished without {self._settings.metric} in {r.run_dir}/metrics.jsonl"
            if not math.isfinite(value):
                error = ending.error or f"it finished with {self._settings.metric}={value} after {last} epochs"
            r.trial.set_user_attr("error", error)
            self._study.tell(r.trial, state=TrialState.FAIL)
            result = f"failed: {error}"
        self.running.remove(r)
        self._ended += 1
        report.write(self._study, self._plan, self._settings.metric)
        console.say(f"trial {r.number}: {result}; {self._standing()}")

    def _standing(self) -> str:
        done = self.done
        left = (time.monotonic() - self._begin) / self._ended * (self._plan.count - done)
        best = seeds.best(records(self._study), self._plan, self._settings.metric)
        shown = f", best {best.shown} (trial {best.trial.number})" if best is not None else ""
        return f"{done} of {self._plan.count} done{shown}, {int(left) // 3600}:{int(left) // 60 % 60:02d} h left"


def at_once(settings: Sweep, plan: Plan) -> int:
    return settings.at_once or (plan.count if settings.slurm else max(1, len(settings.devices)))


def make_runner(settings: Sweep) -> Processes | Jobs:
    if settings.slurm:
        file = recipes.find(settings.slurm, "slurm")
        jobs: Slurm = options.build(Slurm, [(file, {"name": settings.name} | options.read_yaml(file))])
        try:
            check_settings(jobs)
            check_slurm("leave slurm out to run the trials on this machine")
        except ValueError as error:
            raise ValueError(f"slurm={settings.slurm}: {error}") from error
        return Jobs(jobs)
    if any(not device.isalnum() for device in settings.devices):
        raise ValueError(f"devices={settings.devices}: not one device per entry; write for example [0, 1]")
    return Processes(settings.devices or (visible_devices() if settings.at_once > 1 else []))


def visible_devices() -> list[str]:
    """The CUDA devices of this process, by the names that CUDA_VISIBLE_DEVICES accepts."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(i) for i in range(int(count_gpus() or 0))]
    return [device.strip() for device in chosen.split(",") if device.strip()]


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, the first signal that asks to stop only sets a flag, which the yielded function returns."""
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, handle) for number in STOP}
    try:
        yield lambda: bool(received)
    finally:
        for number in STOP:
            signal.signal(number, before[number])


if __name__ == "__main__":
    sys.exit(main())

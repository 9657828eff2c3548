"""How a run starts, is saved and ends. All training commands share it: it is generic over their settings and state."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from simclr_ddp.config.schema import Checkpoint
from simclr_ddp.distributed import collectives, rendezvous
from simclr_ddp.distributed.runtime import Runtime, setup
from simclr_ddp.distributed.watchdog import watching
from simclr_ddp.runs import checkpoint
from simclr_ddp.runs.directory import record_start
from simclr_ddp.system.console import say, warn
from simclr_ddp.system.signals import PAUSED, stop_signals
from simclr_ddp.training import preflight
from simclr_ddp.training.plan import Plan
from simclr_ddp.training.reporter import Reporter, StepFailed
from simclr_ddp.training.saver import Saver, dump


class Savable(Protocol):
    """The state of a training run: everything that its steps change."""

    def saved_bytes(self) -> int: ...
    def to_save(self) -> dict[str, Any]: ...


@contextmanager
def joined(device: str, precision: str, threads: int, timeout: float = 600) -> Iterator[Runtime]:
    """Join the process group, if there are several ranks, and leave it at the end."""
    runtime = setup(device, precision, threads, timeout)
    try:
        yield runtime
    finally:
        rendezvous.stop()


def record(
    run_dir: Path,
    settings: Any,
    runtime: Runtime,
    state: Savable,
    start: int,
    results: Sequence[str] = ("encoder.safetensors",),
) -> None:
    """Check that checkpoints can be written, and write config.yaml; all ranks end if the directory has no room.

    results  files of a finished run, which are deleted: an earlier, shorter run has written them
    """
    folder, size = run_dir / "checkpoints", state.saved_bytes()
    fault = collectives.broadcast_object(checkpoint.trial_write(folder, size) if collectives.is_main() else "")
    if fault:
        collectives.fail_together(fault)
    if collectives.is_main():
        warn(preflight.room_for(folder, size, settings.checkpoint.keep_last))
        for name in results:
            (run_dir / name).unlink(missing_ok=True)
        record_start(run_dir, settings, runtime, start)


@contextmanager
def running(
    run_dir: Path, reporter: Reporter, state: Savable, terms: dict[str, Any], timeout: float, repeats: bool = True
) -> Iterator[Callable[[], bool]]:
    """Within this context, signals ask the run to stop, ranks watch each other, and a failed step writes a dump.

    Yields a function that returns whether this process was asked to stop.

    terms    what a checkpoint or dump records about the run: its identity and its config
    repeats  whether simclr_ddp.replay knows this kind of run
    """
    try:
        with stop_signals() as stop_requested, reporter.closed_by_failures(), watching(timeout):
            yield stop_requested
    except StepFailed as failed:
        where = dump(run_dir, failed, terms | state.to_save(), repeats)
        collectives.barrier()  # if a rank left earlier, its launcher would end the rank that writes
        collectives.fail_together(f"{failed}; {where}")


def make_save(
    plan: Plan, reporter: Reporter, state: Savable, terms: dict[str, Any], every: Checkpoint, device: torch.device
) -> Callable[..., None]:
    """Make the function save(step, now=False): rank 0 writes a checkpoint of `step` if one is due, or if `now`."""
    saver = Saver(
        plan.run_dir / "checkpoints",
        device,
        every_steps=every.every_steps,
        every_minutes=every.every_minutes,
        keep_last=every.keep_last,
        keep_every_steps=every.keep_every_epochs * plan.steps_per_epoch,
    )

    def save(step: int, now: bool = False) -> None:
        due = now or (step < plan.total_steps and saver.due(step))
        if not collectives.is_main() or not due:
            return
        if reporter.flush():
            saved = {"step": step} | terms | reporter.to_save() | {"world_size": collectives.world_size()}
            saver.save(saved | state.to_save(), step)
            fault = saver.wait() if now else ""
        else:
            fault = f"metrics.jsonl in {plan.run_dir} can't be written"
        if now and fault:
            raise OSError(
                f"step {step} is not saved ({fault}): make room; the same command then resumes from the last checkpoint"
            )

    return save


def finish(plan: Plan, done: int, reporter: Reporter, save: Callable[..., None], export: Callable[[], None]) -> int:
    """End a run after `done` steps, whether it is finished or paused; return the exit status.

    export  writes the results of a finished run other than its checkpoints; called on all ranks
    """
    collectives.note("the last checkpoint")
    reporter.act()  # raises for a step that failed, which must not be saved
    save(done, now=True)
    finished = done == plan.total_steps
    if finished:
        export()
    collectives.barrier()  # if a rank left earlier, its launcher would end the rank that writes
    reporter.end()
    if finished:
        say(f"finished: {plan.run_dir}")
        return 0
    say(f"paused at step {done} of {plan.total_steps}: the same command resumes the run")
    return PAUSED

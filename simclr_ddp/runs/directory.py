"""A run's plan and its directory: how many steps, where its files lie, and whether a checkpoint belongs to it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from simclr_ddp import checkpoint, cli, config, distributed
from simclr_ddp.config import Pretrain
from simclr_ddp.data import Dataset, steps_per_epoch
from simclr_ddp.runtime import Runtime, describe
from simclr_ddp.schedule import learning_rate, peak_learning_rate

# With another value of these, tensors of the model or of the optimizer do not fit, whatever resume.force says.
SHAPES = {"model.arch", "model.width", "model.stem", "head.kind", "head.layers", "head.hidden", "head.out"}
SHAPES |= {"probe.enabled", "optim.name"}


@dataclass(frozen=True)
class Plan:
    """Steps, learning rate and place of a run; equal on all ranks."""

    run_dir: Path
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_learning_rate: float
    schedule: str
    micro_batches: int

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.peak_learning_rate, self.warmup_steps, self.total_steps, self.schedule)


def make_plan(settings: Pretrain, dataset: Dataset) -> Plan:
    """Raises ValueError where settings and data do not fit together."""
    optim, world_size = settings.optim, distributed.world_size()
    if optim.global_batch_size % world_size:
        raise ValueError(
            f"optim.global_batch_size={optim.global_batch_size} does not divide among {world_size} ranks: "
            f"take a multiple of {world_size}, or another number of processes"
        )
    micro = optim.micro_batch_size
    if micro is not None and (optim.global_batch_size % micro or micro % world_size):
        raise ValueError(
            f"optim.micro_batch_size={micro} is wanted to divide optim.global_batch_size={optim.global_batch_size} "
            f"and to be a multiple of the {world_size} ranks"
        )
    check_options(settings, dataset)
    steps = steps_per_epoch(dataset, optim.global_batch_size)
    total, warmup = optim.steps or optim.epochs * steps, round(optim.warmup_epochs * steps)
    if warmup >= total:
        cli.warn(
            f"optim.warmup_epochs={optim.warmup_epochs:g} is {warmup} steps, the run has {total}: the learning rate "
            "never reaches its peak; warm up for less, or train for longer"
        )
    return Plan(
        run_dir=Path(distributed.from_main(str(default_run_dir(settings)))),
        steps_per_epoch=steps,
        total_steps=total,
        warmup_steps=warmup,
        peak_learning_rate=peak_learning_rate(optim.base_learning_rate, optim.scaling, optim.global_batch_size),
        schedule=optim.schedule,
        micro_batches=optim.global_batch_size // (micro or optim.global_batch_size),
    )


def check_options(settings: Pretrain, dataset: Dataset) -> None:
    """ValueError for options of the model and the images that exclude each other."""
    if settings.compile and settings.model.checkpoint_stages:
        raise ValueError("model.checkpoint_stages=true can't be compiled: compile=false is wanted with it")
    if dataset.numbers is not None and settings.data.size != 32:
        raise ValueError(f"data.size={settings.data.size}: Spirograph views are 32 pixels wide, data.size=32 is wanted")


def default_run_dir(settings: Pretrain) -> Path:
    """Where a training run lies: the same settings are the same run. ValueError for a name that leads elsewhere."""
    if "/" in settings.name:
        raise ValueError(f"name={settings.name} leads to another folder: a name without / is wanted, or run_dir=...")
    return Path(settings.run_dir or f"runs/{settings.name}-{config.short_hash(config.result_keys(settings))}")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory, making it if need be; all ranks end if it can't be written or another run holds it."""
    lock, fault = _lock(run_dir) if distributed.is_main() else (None, "")
    fault = distributed.from_main(fault)
    if fault:
        distributed.fail_together(fault)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(run_dir: Path) -> tuple[int | None, str]:
    """(open lock file, "") or (None, what is wrong)"""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        return None, f"run_dir={run_dir} can't be written ({error.strerror}): run_dir=... takes another"
    try:
        # A record lock ends with this process. One by flock would live on in its decoding processes, which notice
        # a kill -9 only seconds later, and refuse the run that is started again at once.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(lock)
        return None, f"another process is training in {run_dir}: wait for it, or run_dir=... takes another"
    except OSError:
        cli.warn(f"{run_dir} lies on a file system without locks: nothing stops a second run in it")
    return lock, ""


def identity(settings: Pretrain, runtime: Runtime, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint must agree in with the run that goes on from it: dotted keys, and the data's fingerprint."""
    keys = config.result_keys(settings)
    del keys["data.train"]  # a file may move; its fingerprint stays
    return keys | {"precision": runtime.precision, "data fingerprint": dataset.fingerprint}


def check_agreement(settings: Pretrain, runtime: Runtime, dataset: Dataset) -> None:
    """End all ranks if one of them has other settings, versions or data."""
    own = ("run_dir", "data.train", "data.test", "data.loader", "data.workers", "device", "threads")  # each machine's
    same = {key: value for key, value in config.dotted(settings).items() if key not in own}
    mine = same | identity(settings, runtime, dataset) | {"the version of torch": torch.__version__}
    several = distributed.world_size() > 1
    data = [dataset.source, dataset.images.digest() if several and dataset.images is not None else ""]
    (first, first_data), *others = distributed.from_all([mine, data])
    for rank, (theirs, their_data) in enumerate(others, start=1):
        for key, value in theirs.items():
            if value != first.get(key):
                distributed.fail_together(
                    f"{key} is {first.get(key)} on rank 0, but {value} on rank {rank}: all ranks want the same "
                    "command, versions and files"
                )
        if their_data[1] != first_data[1]:  # of the bytes themselves: the fingerprint is what stands beside them
            distributed.fail_together(
                f"{their_data[0]} on rank {rank} does not hold the bytes that {first_data[0]} on rank 0 does: "
                "simclr_ddp.doctor tells which is damaged, copy or write it again"
            )


def find_checkpoint(plan: Plan, settings: Pretrain, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The newest valid checkpoint of the run directory, on every rank; None if there is none.

    wanted  what it must agree in: `identity`

    All ranks end, naming the key, if it differs in one that resume.force does not name; other settings that differ are
    printed. A key that it lacks is newer than it: it was made with what is the default now.
    """
    force = settings.resume.force
    unknown = [key for key in force if key not in wanted]
    if unknown:
        distributed.fail_together(
            f"resume.force={unknown} names no option that a checkpoint is compared in: --help lists them"
        )
    folder = plan.run_dir / "checkpoints"
    found = checkpoint.newest(folder, cli.warn) if distributed.is_main() else None
    damaged = len(list(folder.glob("*.damaged"))) if folder.is_dir() else 0
    name, damaged = distributed.from_main([found.name if found else "", damaged])
    if not name and damaged:
        distributed.fail_together(
            f"no checkpoint in {folder} is whole ({damaged} damaged): run_dir=... starts another run"
        )
    if not name:
        return None
    saved = checkpoint.load(folder / name)
    if saved["step"] > plan.total_steps:
        distributed.fail_together(
            f"{plan.run_dir} is at step {saved['step']}, beyond the {plan.total_steps} steps of these settings: "
            "more epochs or steps go on with it, run_dir=... starts another run"
        )
    defaults = config.dotted(type(settings)())
    for key in sorted(wanted.keys() | saved["identity"].keys()):
        then, now = saved["identity"].get(key, defaults.get(key)), wanted.get(key)
        if then != now and key not in force:
            anyway = f", resume.force=[{key}] goes on anyway" if key in wanted and key not in SHAPES else ""
            distributed.fail_together(
                f"{key} is {now}, but the checkpoint {name} in {plan.run_dir} was made with {then}: "
                f"run_dir=... starts another run{anyway}"
            )
        if then != now:
            cli.say(f"resume.force: {key} changes from {then} to {now}")
    before = defaults | config.dotted(saved["config"])
    for key, now in config.dotted(settings).items():
        if key in wanted or key == "run_dir" or key.startswith("resume.") or before.get(key) == now:
            continue
        cli.say(f"{key} changes from {before.get(key)} to {now}")
    if saved["world_size"] != distributed.world_size():
        cli.say(f"the run was on {saved['world_size']} ranks and goes on with {distributed.world_size()}")
    cli.say(f"going on from {folder / name}")
    return saved


def read_settings(run_dir: Path) -> Pretrain:
    """The settings in a run directory's config.yaml; ValueError if it is no run directory."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} is no run directory: it holds no config.yaml")
    values = {k: v for k, v in config.read_yaml(path).items() if not k.startswith("starts")}
    return config.build(Pretrain, [(str(path), values)])


def record_start(settings: Pretrain, runtime: Runtime, plan: Plan, step: int) -> None:
    """Write config.yaml: the resolved settings, and for every start so far its step, versions and hardware."""
    path = plan.run_dir / "config.yaml"
    starts: list[Any] = []
    if path.exists():
        try:
            starts = [s for s in config.read_yaml(path).get("starts", []) if s["step"] < step]
        except (ValueError, TypeError, KeyError) as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.replace(aside)
            cli.warn(f"{path} is damaged ({' '.join(str(error).split())[:120]}): kept as {aside.name}, written anew")
    starts.append({"step": step} | describe(runtime))
    text = OmegaConf.to_yaml(OmegaConf.create(config.plain(settings) | {"starts": starts}))
    checkpoint.replace_atomically(path, lambda temporary: temporary.write_text(text))

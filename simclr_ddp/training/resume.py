"""Find the checkpoint that a run resumes from, and check that settings and data agree with it."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from simclr_ddp.config import options
from simclr_ddp.config.identity import identity_keys
from simclr_ddp.config.schema import Finetune, Pretrain
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.runs import checkpoint
from simclr_ddp.system import console

# If one of these changes, tensors of the model or of the optimizer no longer fit, so resume.force does not help.
SHAPES = {"model.arch", "model.width", "model.stem", "head.kind", "head.layers", "head.hidden", "head.out"}
SHAPES |= {"probe.enabled", "optim.name", "frozen", "from_layer", "optim.average_decay"}
DATA = "data fingerprint"  # key of the data's content in a checkpoint


def identity(settings: Pretrain, runtime: Runtime, dataset: Dataset) -> dict[str, Any]:
    """Return the values in which a checkpoint and a resumed run must agree: dotted keys, and the data's fingerprint."""
    return identity_keys(settings) | {"precision": runtime.precision, DATA: dataset.fingerprint}


def check_agreement(settings: Pretrain | Finetune, expected: dict[str, Any], dataset: Dataset) -> None:
    """End all ranks if one of them has other settings, versions, data, or values that a checkpoint must agree with."""
    local = {"run", "run_dir", "output", "train", "test", "loader", "workers", "device", "threads", "labels.list"}
    same = {key: value for key, value in options.dotted(settings).items() if key.removeprefix("data.") not in local}
    mine = same | expected | {"the version of torch": torch.__version__}
    several = collectives.world_size() > 1
    data = [dataset.source, dataset.file.digest() if several and dataset.stored else ""]
    (first, first_data), *others = collectives.all_gather_object([mine, data])
    for rank, (theirs, their_data) in enumerate(others, start=1):
        for key, value in theirs.items():
            if value != first.get(key):
                collectives.fail_together(
                    f"{key} is {first.get(key)} on rank 0, but {value} on rank {rank}: start all ranks with the same "
                    "command, versions and files"
                )
        if their_data[1] != first_data[1]:  # hashes of the bytes; the fingerprint is only read from the file
            collectives.fail_together(
                f"{their_data[0]} on rank {rank} differs from {first_data[0]} on rank 0: find the damaged one with "
                "simclr_ddp.doctor, then copy or write it again"
            )


def find_checkpoint(
    run_dir: Path,
    total_steps: int,
    settings: Pretrain | Finetune,
    expected: dict[str, Any],
    dataset: Dataset,
    idle: Collection[str],
    result: str = "encoder.safetensors",
) -> dict[str, Any] | None:
    """Return the newest valid checkpoint of the run directory, on every rank; None if there is none.

    expected  the values in which it must agree with this run: `identity`
    dataset   the training images, which may have had another fingerprint in an earlier version
    idle      options without effect next to the others
    result    the file that a finished run has exported

    It may differ in the keys of resume.force, in which data.train (or train) is the content of the data. All ranks end,
    naming the keys, if it differs in another one; other settings that differ are printed. A key that the checkpoint
    lacks is newer than it: it was written with what is the default now.
    """
    force = settings.resume.force
    forced = {DATA if key in ("data.train", "train") else key for key in force}
    unknown = forced - set(expected) - set(idle)
    if unknown:
        collectives.fail_together(
            f"resume.force={options.shown(force)}: {', '.join(sorted(unknown))} is no option in which a run may differ "
            "from its checkpoint; see --help"
        )
    folder = run_dir / "checkpoints"
    found = checkpoint.newest(folder, console.warn) if collectives.is_main() else None
    damaged = len(list(folder.glob("*.damaged"))) if folder.is_dir() else 0
    name, damaged = collectives.broadcast_object([found.name if found else "", damaged])
    if not name and damaged:
        collectives.fail_together(
            f"run_dir={run_dir}: no checkpoint in {folder} is complete ({damaged} damaged); run_dir=... starts another "
            "run"
        )
    if not name:
        return None
    saved = checkpoint.load(folder / name)
    if saved["step"] > total_steps:
        collectives.fail_together(
            f"run_dir={run_dir}: it is at step {saved['step']}, beyond the {total_steps} steps of these settings; "
            "more optim.epochs or optim.steps continue it, run_dir=... starts another run"
        )
    differing = _differing(saved, expected, options.dotted(type(settings)()))
    if DATA in differing and dataset.is_known_as(differing[DATA][0]):
        del differing[DATA]
    if differing.keys() - forced:
        collectives.fail_together(_refusal(run_dir, name, differing, forced, dataset, options.options(type(settings))))
    if is_finished(run_dir, saved["step"], total_steps, result):
        return saved
    for key, (then, now) in differing.items():
        console.say(f"resume.force: {key} changes from {options.shown(then)} to {options.shown(now)}")
    before = options.dotted(type(settings)()) | options.dotted(saved["config"])
    for key, now in options.dotted(settings).items():
        if key in expected or key == "run_dir" or key.startswith("resume.") or before.get(key) == now:
            continue
        console.say(f"{key} changes from {options.shown(before.get(key))} to {options.shown(now)}")
    if saved["world_size"] != collectives.world_size():
        console.say(f"ranks: the run was on {saved['world_size']} and resumes on {collectives.world_size()}")
    console.say(f"resuming from {folder / name}")
    return saved


def is_finished(run_dir: Path, step: int, total_steps: int, result: str = "encoder.safetensors") -> bool:
    """Return, on every rank, whether the run has taken all steps and exported its result, a file in its directory.

    Rank 0 looks: machines may see a file of a shared disk at different times.
    """
    return step >= total_steps and bool(collectives.broadcast_object((run_dir / result).exists()))


def _differing(saved: dict[str, Any], expected: dict[str, Any], defaults: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {key: (value then, value now)} of the keys in which the checkpoint differs from this run.

    Earlier versions saved options without effect too, and model.init as it was typed.
    """
    then = defaults | saved["identity"]
    if "model.init" in then:
        then["model.init"] = os.path.normpath(then["model.init"])
    keys = expected.keys() | (saved["identity"].keys() - defaults.keys())
    return {key: (then.get(key), expected.get(key)) for key in sorted(keys) if then.get(key) != expected.get(key)}


def _refusal(
    run_dir: Path,
    name: str,
    differing: dict[str, tuple[Any, Any]],
    forced: set[str],
    dataset: Dataset,
    known: Collection[str],
) -> str:
    """Return the message for a checkpoint that differs in keys that are not forced: the first, and all remedies."""
    train = "data.train" if "data.train" in known else "train"
    first = next(key for key in differing if key not in forced)
    then, now = differing[first]
    if first == DATA:
        what = f"{train}={dataset.source}: its content ({now}) is not that of the checkpoint"
        made = f" ({then})"
    else:
        what, made = f"{first}={options.shown(now)}: the checkpoint", f" was made with {options.shown(then)}"
    others = [key for key in differing if key not in forced and key != first]
    also = f", and differs in {', '.join(others)} too" if others else ""
    keys = options.shown(sorted(train if key == DATA else key for key in forced | differing.keys()))
    forcible = {*known, DATA} - SHAPES
    anyway = f", resume.force={keys} resumes anyway" if differing.keys() <= forcible else ""
    return f"{what} {name} in {run_dir}{made}{also}; run_dir=... starts another run{anyway}"

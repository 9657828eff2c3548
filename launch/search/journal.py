"""A sweep's record: its study in Optuna's journal, and the lock that lets one process at a time work on it."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from launch.search.plan import DIRECTIONS, Plan, Sweep
from launch.search.results import write_text
from simclr_ddp.config import options, schema
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.system import console, files


def open_study(settings: Sweep, plan: Plan) -> optuna.Study:
    """The sweep's study in the storage. Raises ValueError if it exists and was begun with other settings."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = Path(settings.storage or plan.sweep_dir / "optuna.journal")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path))  # O_EXCL: atomic on NFS 3 and later; an abandoned one is noticed by its age
    repair(path, lock)
    try:
        storage = JournalStorage(JournalFileBackend(str(path), lock))
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"storage={path}: damaged, or not a journal of Optuna; choose another file") from error
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "median": lambda: optuna.pruners.MedianPruner(settings.startup_trials, settings.grace_epochs),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(settings.grace_epochs, settings.reduction, 0),
        "none": optuna.pruners.NopPruner,
    }
    study = optuna.create_study(
        storage=storage,
        study_name=settings.name,
        direction=StudyDirection[DIRECTIONS[settings.metric].upper()],
        pruner=pruners["none" if plan.axes else settings.pruner](),
        load_if_exists=True,
    )
    mine = identity(settings, plan, path)
    theirs = study.user_attrs.get("identity", mine)
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            raise ValueError(
                f"{key}={mine.get(key)}: the sweep {settings.name} in {path} was begun with {theirs.get(key)}; set "
                "name=... to begin another (only trials, at_once, devices, slurm, retry and the pruner may change)"
            )
    study.set_user_attr("identity", mine)
    marker = plan.sweep_dir / "sweep.yaml"
    if marker.exists() and (before := options.read_yaml(marker).get("name")) != settings.name:
        raise ValueError(f"sweep_dir={plan.sweep_dir}: it belongs to the sweep {before}; choose another")
    write_text(marker, options.to_yaml(settings))
    return study


def records(study: optuna.Study) -> list[FrozenTrial]:
    """The trials by their numbers in the plan; of one that was run again the newest attempt."""
    newest = {t.user_attrs.get("number", t.number): copy(t) for t in study.get_trials(deepcopy=False)}
    for number, trial in newest.items():
        trial.number = number
    return [newest[number] for number in sorted(newest)]


def identity(settings: Sweep, plan: Plan, storage: Path) -> dict[str, Any]:
    """What must be equal when a sweep is continued."""
    base = schema.result_keys(options.build(Pretrain, plan.layers))
    place = os.path.relpath(plan.sweep_dir.resolve(), storage.parent.resolve())
    chosen = {k: v for k, v in options.dotted(settings).items() if k.startswith(("space.", "grid."))}
    return base | chosen | {"sweep_dir": place, "metric": settings.metric, "seed of the sweep": settings.seed}


def repair(path: Path, lock: JournalFileOpenLock) -> None:
    """Remove a half-written line of a writer that died; the next line would be appended to it."""
    if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n"):
        return
    lock.acquire()
    try:
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()


@contextmanager
def locked(sweep_dir: Path) -> Iterator[None]:
    """Hold the sweep directory, making it if necessary; ValueError if another process holds it."""
    with ExitStack() as held:
        try:
            known = held.enter_context(files.locked(sweep_dir / ".lock"))
        except BlockingIOError:
            raise ValueError(
                f"sweep_dir={sweep_dir}: another process runs this sweep; wait for it, or set name=... to begin another"
            ) from None
        if not known:
            console.warn(f"sweep_dir={sweep_dir}: its file system has no locks; do not start a second sweep in it")
        yield

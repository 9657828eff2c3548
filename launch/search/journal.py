"""A sweep's record: its study in Optuna's journal, and the lock that lets one process at a time work on it."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.study import StudyDirection

from launch.plan import DIRECTIONS, Plan, Sweep
from simclr_ddp import cli, config
from simclr_ddp.config import Pretrain

MAY_CHANGE = "trials, at_once, devices, slurm and the pruner may change"


class Drawn(optuna.samplers.BaseSampler):
    """Optuna asks the plan what its trials draw."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self._plan.drawn(trial.number)[0][param_name]


def open_study(settings: Sweep, plan: Plan) -> optuna.Study:
    """The sweep's study in the storage. Raises ValueError if it is there and was begun with other settings."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = Path(settings.storage or plan.sweep_dir / "optuna.journal")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path))  # O_EXCL: atomic on NFS 3 and later; a stale one is noticed by its age
    mend(path, lock)
    try:
        storage = JournalStorage(JournalFileBackend(str(path), lock))
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"storage={path} is damaged, or no journal of Optuna: storage=... begins another") from error
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "median": lambda: optuna.pruners.MedianPruner(settings.startup_trials, settings.grace_epochs),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(settings.grace_epochs, settings.reduction, 0),
        "none": optuna.pruners.NopPruner,
    }
    study = optuna.create_study(
        storage=storage,
        study_name=settings.name,
        direction=StudyDirection[DIRECTIONS[settings.metric]],
        sampler=Drawn(plan),
        pruner=pruners["none" if plan.axes else settings.pruner](),
        load_if_exists=True,
    )
    mine = identity(settings, plan, path)
    theirs = study.user_attrs.get("identity", mine)
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            raise ValueError(
                f"{key} is {mine.get(key)}, but the sweep {settings.name} in {path} was begun with {theirs.get(key)}: "
                f"name=... begins another; {MAY_CHANGE}"
            )
    study.set_user_attr("identity", mine)
    marker = plan.sweep_dir / "sweep.yaml"
    if marker.exists() and (before := config.read_yaml(marker).get("name")) != settings.name:
        raise ValueError(f"sweep_dir={plan.sweep_dir} is of the sweep {before}: sweep_dir=... takes another")
    marker.write_text(config.to_yaml(settings))
    return study


def identity(settings: Sweep, plan: Plan, storage: Path) -> dict[str, Any]:
    """What a sweep must agree in with the one that it goes on with."""
    base = config.result_keys(config.build(Pretrain, plan.layers))
    place = os.path.relpath(plan.sweep_dir.resolve(), storage.parent.resolve())
    chosen = {k: v for k, v in config.dotted(settings).items() if k.startswith(("space.", "grid."))}
    return base | chosen | {"sweep_dir": place, "metric": settings.metric, "seed of the sweep": settings.seed}


def mend(path: Path, lock: JournalFileOpenLock) -> None:
    """Cut a line that was half written when its writer died; the next would be added to it."""
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
    """Hold the sweep directory, making it if need be; ValueError if another process has it."""
    sweep_dir.mkdir(parents=True, exist_ok=True)
    with (sweep_dir / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"another process runs the sweep in {sweep_dir}: wait for it, or name=... begins another"
            ) from None
        except OSError:
            cli.warn(f"{sweep_dir} lies on a file system without locks: nothing stops a second sweep in it")
        yield

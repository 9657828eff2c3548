"""What simclr_ddp.doctor can check of a training run before its job is queued."""

from typing import TYPE_CHECKING

from simclr_ddp.config.schema import Pretrain

if TYPE_CHECKING:
    from simclr_ddp.data.dataset import Dataset
    from simclr_ddp.training.plan import Plan


def check(run: Pretrain, ranks: int, opened: dict[str, "Dataset"]) -> "Plan":
    """The plan of the run on that many ranks. Raises ValueError or OSError if it could not start.

    opened  {data.train: its data} of earlier calls; this call adds its own
    """
    from simclr_ddp.data.dataset import open_dataset  # here, since they import torch
    from simclr_ddp.training.components import make_objective
    from simclr_ddp.training.plan import make_plan

    make_objective(run)
    if run.data.train not in opened:
        opened[run.data.train] = open_dataset(run.data.train, "train")
    return make_plan(run, opened[run.data.train], ranks)


def check_room(run: Pretrain, plan: "Plan") -> None:
    """ValueError if the run's checkpoints do not fit on the disk."""
    from simclr_ddp.training.forecast import checkpoint_bytes
    from simclr_ddp.training.preflight import room_for

    folder = plan.run_dir.absolute() / "checkpoints"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if fault := room_for(there, checkpoint_bytes(run), run.checkpoint.keep_last):
        raise ValueError(fault)

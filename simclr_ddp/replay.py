"""Repeat the step at which a run failed, and report where: `python -m simclr_ddp.replay DUMP key=value ...`

A loss or gradient that is not finite stops all ranks, and the run directory then holds dumps/step-N.pt: the parameters
and optimizers before that step. The images and their augmentation follow from the settings. The command runs on any
number of processes; each reports on its part of the batch. Exit status: 0 if the step fails again, 3 if it does not,
which points to the hardware, the precision or the number of ranks.
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_ddp.config import command, options
from simclr_ddp.config.schema import Pretrain, Replay
from simclr_ddp.system import console

if TYPE_CHECKING:
    from torch import Tensor, nn

FINE = 3


def main(argv: list[str] | None = None) -> int:
    return command.run(replay, Replay, "DUMP", __doc__ or "", argv)


def replay(request: Replay) -> int:
    # Imported here, so that --help needs no torch.
    from simclr_ddp.data.dataset import open_dataset
    from simclr_ddp.distributed import collectives
    from simclr_ddp.runs import checkpoint
    from simclr_ddp.training.components import make_training
    from simclr_ddp.training.lifecycle import joined
    from simclr_ddp.training.plan import make_plan

    saved = checkpoint.load(Path(request.dump))
    if "failed" not in saved:
        raise ValueError(f"{request.dump} is a checkpoint, not the dump of a failed step; RUN_DIR/dumps holds dumps")
    settings = options.build(Pretrain, [(request.dump, options.dotted(saved["config"]))])
    settings.data.train = request.train or settings.data.train
    precision = request.precision or saved["identity"]["precision"]
    with joined(request.device, precision, request.threads) as runtime:
        dataset = open_dataset(settings.data.train, "train", settings.data.spirograph)
        if not dataset.is_known_as(saved["identity"]["data fingerprint"]):
            raise ValueError(
                f"train={dataset.source}: these are not the images of the run; train=FILE.beton must name its own"
            )
        step, then = saved["step"], saved["failed"]
        reset = _reset_statistics(saved["model"])
        training = make_training(settings, runtime, dataset, make_plan(settings, dataset), saved)
        state = training.state
        broken = [name for name, p in state.model.named_parameters() if not p.isfinite().all()]
        console.say(f"parameters before the step: {_names(broken)}")
        if reset:
            console.say(
                "batch norm's running statistics, which training does not use, were not finite: reset to 0 and 1"
            )
        with closing(training.batches(range(step, step + 1))) as batches:
            batch = next(batches)
        views = training.augment(batch.inputs, step // training.plan.steps_per_epoch, batch.sample)
        _say(f"views: from {views.min():.4g} to {views.max():.4g}, {_count(views)}")
        first = FirstFault(state.model)
        loss, y = training.forward_backward(batch, step)
        _say(first.message or "every module's output is finite")
        bad = batch.sample[~y.isfinite().all(2).all(0)].tolist()
        if bad:
            _say(f"images whose projections are not finite: {', '.join(map(str, bad[:20]))}{' ...' * (len(bad) > 20)}")
        norms = y.float().norm(dim=2)
        _say(f"norms of the projections: from {norms.min():.4g} to {norms.max():.4g}")
        scale = state.scaler.get_scale()
        bad = [n for n, p in state.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        _say(f"gradients: {_names(bad)}" + (f" (of a loss scaled by {scale:g})" if scale != 1 else ""))
        norm = state.gradient_norm()
        mean = collectives.all_reduce_sum(loss.clone()) / collectives.world_size()
        console.say(f"then: loss {then['loss']:g}, gradient norm {then['gradient_norm']:g}")
        console.say(f"now:  loss {mean:g}, gradient norm {norm:g}")
        return 0 if not (mean.isfinite() and norm.isfinite()) else FINE


class FirstFault:
    """Watches the outputs of all modules; `message` names the first output that is not finite."""

    def __init__(self, model: "nn.Module") -> None:
        self.message = ""
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _, __, output, name=name: self._look(name, output))

    def _look(self, name: str, output: "Tensor") -> None:
        if not self.message and not output.isfinite().all():
            kind = str(output.dtype).removeprefix("torch.")
            self.message = f"first output that is not finite: {name} ({kind}, {_count(output)})"


def _reset_statistics(model: dict[str, "Tensor"]) -> bool:
    """Reset running statistics that are not finite to their initial values; return whether there were any."""
    reset = False
    for name, value in model.items():
        if name.endswith(("running_mean", "running_var")) and not value.isfinite().all():
            value.fill_(float(name.endswith("running_var")))
            reset = True
    return reset


def _count(values: "Tensor") -> str:
    bad = int((~values.isfinite()).sum())
    return f"{bad:,} of {values.numel():,} values not finite" if bad else "all finite"


def _names(names: list[str]) -> str:
    return f"{len(names)} not finite: {', '.join(names[:5])}{' ...' * (len(names) > 5)}" if names else "all finite"


def _say(text: str) -> None:
    """Print a line on every rank, with the rank's number if there are several."""
    from simclr_ddp.distributed import collectives

    rank = f"rank {collectives.rank()}: " if collectives.world_size() > 1 else ""
    console.say(f"{rank}{text}", every_rank=True)


if __name__ == "__main__":
    sys.exit(main())

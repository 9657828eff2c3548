"""Repeat the step at which a run stopped, and say where it went wrong: `python -m simclr_ddp.replay DUMP key=value ...`

A loss or gradient that is not finite stops all ranks, and the run directory then holds dumps/step-N.pt: parameters and
optimizers as they were before that step. Its images and their augmentation follow from the settings. On any number of
processes: each says what it finds among its own share of the batch. Exit status: 0 if the step fails again, 3 if it
does not, which points to the hardware, the precision or the number of ranks.
"""

import sys
from pathlib import Path

from torch import Tensor, nn

from simclr_ddp import checkpoint, cli, config, distributed
from simclr_ddp.config import Pretrain, Replay
from simclr_ddp.data import open_dataset
from simclr_ddp.pretrain import make_augmentation, make_batches, make_objective, make_parallel
from simclr_ddp.run import make_plan
from simclr_ddp.runtime import setup
from simclr_ddp.state import State
from simclr_ddp.step import forward_backward

FINE = 3


def main(argv: list[str] | None = None) -> int:
    return cli.run(replay, Replay, "DUMP", __doc__ or "", argv)


def replay(wanted: Replay) -> int:
    saved = checkpoint.load(Path(wanted.dump))
    if "failed" not in saved:
        raise ValueError(f"{wanted.dump} is a checkpoint, and no dump of a step that failed: RUN_DIR/dumps holds those")
    settings = config.build(Pretrain, [(wanted.dump, config.dotted(saved["config"]))])
    settings.data.train = wanted.train or settings.data.train
    runtime = setup(wanted.device, wanted.precision or saved["identity"]["precision"], wanted.threads)
    try:
        dataset = open_dataset(settings.data.train, "train")
        if dataset.fingerprint != saved["identity"]["data fingerprint"]:
            raise ValueError(
                f"train={dataset.source} holds other images than the run had: train=FILE.beton names its own"
            )
        step, then = saved["step"], saved["failed"]
        mended = _mend(saved["model"])
        state = State(settings, runtime, dataset, saved)
        broken = [name for name, p in state.model.named_parameters() if not p.isfinite().all()]
        cli.say(f"parameters before the step: {_names(broken)}")
        if mended:
            cli.say(
                "batch norm's running statistics, which training does not use, were not finite: put back to 0 and 1"
            )
        steps = dataset.count // settings.optim.global_batch_size
        batches = make_batches(settings, dataset, runtime.device, range(step, step + 1))
        model = make_parallel(settings, runtime, state)
        batch = next(batches)
        batches.close()
        augment, objective = make_augmentation(settings, dataset, runtime), make_objective(settings)
        views = augment(batch.inputs, step // steps, batch.sample)
        _say(f"views: from {views.min():.4g} to {views.max():.4g}, {_count(views)}")
        first = FirstFault(state.model)
        parts = make_plan(settings, dataset).micro_batches
        loss, y = forward_backward(model, state, runtime, objective, augment, batch, step // steps, parts)
        _say(first.told or "every module's output is finite")
        bad = batch.sample[~y.isfinite().all(2).all(0)].tolist()
        if bad:
            _say(
                f"projections that are not finite: of images {', '.join(map(str, bad[:20]))}{' ...' * (len(bad) > 20)}"
            )
        norms = y.float().norm(dim=2)
        _say(f"norms of the projections: from {norms.min():.4g} to {norms.max():.4g}")
        scale = state.scaler.get_scale()
        bad = [n for n, p in state.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        _say(f"gradients: {_names(bad)}" + (f" (of a loss scaled by {scale:g})" if scale != 1 else ""))
        norm = state.gradient_norm()
        mean = distributed.all_sum(loss.clone()) / distributed.world_size()
        cli.say(f"then: loss {then['loss']:g}, gradient norm {then['gradient_norm']:g}")
        cli.say(f"now:  loss {mean:g}, gradient norm {norm:g}")
        return 0 if not (mean.isfinite() and norm.isfinite()) else FINE
    finally:
        distributed.stop()


class FirstFault:
    """Watches the outputs of all modules; `told` names the first that is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.told = ""
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _, __, output, name=name: self._look(name, output))

    def _look(self, name: str, output: Tensor) -> None:
        if not self.told and not output.isfinite().all():
            kind = str(output.dtype).removeprefix("torch.")
            self.told = f"first output that is not finite: {name} ({kind}, {_count(output)})"


def _mend(model: dict[str, Tensor]) -> bool:
    """Put running statistics that are not finite back to their start; whether there were any."""
    mended = False
    for name, value in model.items():
        if name.endswith(("running_mean", "running_var")) and not value.isfinite().all():
            value.fill_(float(name.endswith("running_var")))
            mended = True
    return mended


def _count(values: Tensor) -> str:
    bad = int((~values.isfinite()).sum())
    return f"{bad:,} of {values.numel():,} values not finite" if bad else "all finite"


def _names(names: list[str]) -> str:
    return f"{len(names)} not finite: {', '.join(names[:5])}{' ...' * (len(names) > 5)}" if names else "all finite"


def _say(text: str) -> None:
    """A line of every rank's own."""
    print(f"rank {distributed.rank()}: {text}" if distributed.world_size() > 1 else text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

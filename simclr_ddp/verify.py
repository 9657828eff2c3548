"""Check that several processes take the same steps as one: `python -m simclr_ddp.verify [CONFIG.yaml] key=value ...`

The data, model, objective and optimizer of the config are trained for
a few steps at the full learning rate on one process, and again on 2 and 4 gloo processes of this machine that share the
same small batch, in float64 unless `precision` says otherwise. The command prints the loss, its gradients with respect
to embeddings and parameters, and the parameters after the last step, and writes them to parity.json in the run
directory.

Any other loss of two views can be checked likewise, on the output of a linear model:

    python -m simclr_ddp.verify verify.loss=lightly.loss:NTXentLoss verify.arguments=[gather_distributed=true]

Exit status: 0 if all agree, 1 if not.
"""

import json
import sys

from simclr_ddp.config import command, options
from simclr_ddp.config.schema import Verify
from simclr_ddp.system import console, files


def main(argv: list[str] | None = None) -> int:
    return command.run(verify, Verify, "[CONFIG.yaml]", __doc__ or "", argv)


def verify(settings: Verify) -> int:
    # Imported here, so that --help needs no torch.
    import torch

    from simclr_ddp.data.dataset import open_dataset
    from simclr_ddp.distributed.runtime import Runtime
    from simclr_ddp.runs.directory import default_run_dir
    from simclr_ddp.runs.provenance import describe
    from simclr_ddp.training.parity import TOLERANCE, compare, run_on, table
    from simclr_ddp.training.plan import check_options
    from simclr_ddp.training.schedule import peak_learning_rate

    chosen, folder = settings.verify, default_run_dir(settings)
    settings.precision = "fp64" if settings.precision == "auto" else settings.precision
    micro_batches = 2 if settings.optim.micro_batch_size else 1
    if 1 in chosen.ranks or any(chosen.images % (micro_batches * count) for count in chosen.ranks):
        raise ValueError(
            f"verify.images={chosen.images}: it must be a multiple of each of verify.ranks={list(chosen.ranks)}, which "
            f"must be at least 2{', times 2 micro-batches' if micro_batches == 2 else ''}; choose a multiple of all"
        )
    peak = 0.0
    if not chosen.loss:
        dataset, optim = open_dataset(settings.data.train, "train", settings.data.spirograph), settings.optim
        check_options(settings, dataset)
        if dataset.count < chosen.images:
            raise ValueError(
                f"verify.images={chosen.images}: data.train={dataset.source} holds {dataset.count} images; take fewer"
            )
        peak = peak_learning_rate(optim.base_learning_rate, optim.scaling, optim.global_batch_size)
    alone = run_on(1, settings, peak)
    moved = alone.pop("moved")
    rows = []
    for count in chosen.ranks:
        shared = run_on(count, settings, peak)
        rows += [compare(name, count, alone[name], shared[name]) for name in alone]
    limit = TOLERANCE[settings.precision]
    agree = all(row["difference"] <= limit for row in rows)
    subject = chosen.loss or f"{settings.loss.kernel} loss, {settings.model.arch} x {settings.model.width:g}"
    console.say(f"{subject}: {chosen.images} images, {settings.precision}\n\n{table(rows, limit)}\n")
    if not chosen.loss:
        console.say(f"parameters moved by {float(moved):.2%} in {chosen.steps} steps")
        if float(moved) < 0.01:
            console.warn(
                "the parameters hardly moved, so the last rows say little: a higher optim.base_learning_rate moves them"
            )
        record = {
            "agree": agree,
            "tolerance": limit,
            "moved": float(moved),
            "rows": rows,
            "settings": options.plain(settings),
            "runtime": describe(Runtime(torch.device("cpu"), settings.precision, 1)),
        }
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1) + "\n"
        files.replace_atomically(folder / "parity.json", lambda temporary: temporary.write_text(text))
        console.say(f"written to {folder / 'parity.json'}")
    console.say("any number of ranks is the same run" if agree else "the number of ranks CHANGES the run")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

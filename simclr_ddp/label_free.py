"""Measure an encoder without labels: `python -m simclr_ddp.label_free RUN_DIR_OR_CHECKPOINT key=value ...`

Measures the representations of the test images, or of the training images if the run has no test images: RankMe,
effective rank, participation ratio, alpha-ReQ and uniformity; and LiDAR and alignment of augmented views of some of the
images, with the crop, flip and colour distortion of training but no blur. simclr_ddp/evaluation/label_free.py has the
formulas and their sources. For comparison, an untrained encoder of the same architecture is measured too.

Under torchrun all ranks share the forward passes. The results are written to evaluations/ in the run directory, as by
linear_eval.
"""

import sys
import time
from pathlib import Path
from typing import Any

from simclr_ddp.config import command, options
from simclr_ddp.config.schema import LabelFree
from simclr_ddp.system import console


def main(argv: list[str] | None = None) -> int:
    return command.run(label_free, LabelFree, "RUN", __doc__ or "", argv)


def label_free(settings: LabelFree) -> int:
    """Measure the encoder of `settings.run`, print a table and write a file of results; return the exit status."""
    import torch

    from simclr_ddp.data.draws import monitored
    from simclr_ddp.distributed import collectives
    from simclr_ddp.distributed.watchdog import watching
    from simclr_ddp.evaluation.features import averaging, embed, representations
    from simclr_ddp.evaluation.label_free import measure
    from simclr_ddp.evaluation.labels import about
    from simclr_ddp.evaluation.subject import (
        check_crop,
        describe_encoder,
        on_main,
        open_encoder,
        open_images,
        say_loader,
        write_results,
    )
    from simclr_ddp.runs import evaluations
    from simclr_ddp.runs.encoder import hash_of, random_encoder
    from simclr_ddp.runs.provenance import describe
    from simclr_ddp.training import lifecycle, preflight

    begin = time.perf_counter()
    loading: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "loader": settings.loader,
    }
    with lifecycle.joined(settings.device, settings.precision, settings.threads, settings.timeout) as runtime:
        loaded, own_size = open_encoder(settings.run, settings.size, settings.crop)
        split = "test" if settings.test or loaded.settings.get("data.test") else "train"
        dataset = open_images(settings.test, split, "test", loaded)
        check_crop(settings.crop, dataset)
        averaged = averaging(settings.views, settings.seed, loaded.settings, loaded.spec)
        if settings.augmented == 1 or (settings.augmented and not loaded.settings):
            why = "two views are the fewest" if loaded.settings else "the augmentation of the run is not known"
            raise ValueError(f"augmented={settings.augmented}: {why}; set augmented=0 to leave LiDAR and alignment out")
        uncropped = loaded.spec._replace(crop=0.0)
        of_view = [averaging(1, settings.seed + i, loaded.settings, uncropped) for i in range(settings.augmented)]
        some = monitored(settings.seed, dataset.count, settings.images)
        folder, size = Path(settings.output) if settings.output else loaded.folder, loaded.spec.size
        on_main(lambda: evaluations.trial_write(folder / evaluations.FOLDER))
        console.say(f"{loaded.file}: {loaded.spec.arch} x {loaded.spec.width:g}, {dataset.count:,} {split} images")
        say_loader(dataset, views=settings.views, size=size, **loading)
        preflight.evaluation((dataset,), size=size, **loading)

        encoders = {"trained": (loaded.encoder, loaded.hash)}
        if settings.random_encoder:
            untrained = random_encoder(loaded.spec, settings.seed)
            encoders["random"] = untrained, hash_of(untrained.state_dict())
        results = {}
        with watching(settings.timeout, "start the command again"):
            for name, (encoder, weights) in encoders.items():
                title, start = f"{name} encoder", time.perf_counter()
                cache = folder if settings.cache else None
                common: dict[str, Any] = loading | {"averaged": averaged}
                h = embed(encoder, weights, dataset, loaded.spec, runtime, folder=cache, title=title, **common)
                views = [
                    representations(
                        encoder,
                        dataset,
                        uncropped,
                        runtime,
                        index=some,
                        averaged=view,
                        title=f"{title}, view {i + 1} of {settings.augmented}",
                        **loading,
                    )
                    for i, view in enumerate(of_view)
                ]
                seconds = round(time.perf_counter() - start, 3)
                stacked = torch.stack(views, 1).to(runtime.device) if views else None
                results[name] = measure(h.to(runtime.device), stacked) | {"forward_seconds": seconds}
        hardware = describe(runtime)
    if not collectives.is_main():
        return 0

    drawn = bool(settings.views or settings.augmented)
    record = {
        **describe_encoder(settings.run, loaded),
        "own_size": own_size,
        "test": about(dataset, split),
        "protocol": {
            "name": "label_free",
            "views": settings.views,
            "augmented": settings.augmented,
            "images": len(some) if settings.augmented else 0,
            "seed": settings.seed if drawn else 0,
            "size": size if size != own_size else 0,
            "precision": runtime.precision,
        }
        | ({"crop": settings.crop} if settings.crop else {}),
        "settings": options.plain(settings),
        "results": results,
        "runtime": hardware,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    write_results(folder, record, table(results))
    return 0


def table(results: dict[str, dict[str, float]]) -> str:
    """Format the metrics with one column per encoder."""
    titles = {"trained": "trained", "random": "random encoder"}
    lines = ["  ".join([" " * 22, *(titles[name].rjust(15) for name in results)])]
    for key in results["trained"]:
        cells = (f"{found[key]:.5g}" if key in found else "" for found in results.values())
        lines.append("  ".join([key.replace("_", " ").ljust(22), *(cell.rjust(15) for cell in cells)]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Write representations of images: `python -m simclr_ddp.embed RUN_DIR_OR_CHECKPOINT key=value ...`

Writes the representation h of every image of a data set, in the order of its file, and with embeddings=true also its
embedding z, projected by the head and normalised as in the loss. views=M averages the representations of M augmented
views of each image (Foster et al. 2021); z is then the embedding of the average. Under torchrun all ranks share the
images and give the same bytes.

The file is embeddings/<checkpoint>-<data>.safetensors in the run directory (output=... chooses another folder), or next
to the given file: h [images, D], z [images, d], labels, and names of the classes in its metadata. format=npy writes
arrays .h.npy and .z.npy, with a table .parquet of each image's file, label, class and split.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_ddp.config import command
from simclr_ddp.config.schema import Embed
from simclr_ddp.system import console
from simclr_ddp.system.files import replace_atomically, short_hash

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from simclr_ddp.data.dataset import Dataset
    from simclr_ddp.runs.encoder import Head

FOLDER = "embeddings"


def main(argv: list[str] | None = None) -> int:
    return command.run(embed, Embed, "RUN", __doc__ or "", argv)


def embed(settings: Embed) -> int:
    """Write the representations of one data set; return the exit status."""
    from simclr_ddp.distributed import collectives
    from simclr_ddp.distributed.watchdog import watching
    from simclr_ddp.evaluation import features
    from simclr_ddp.evaluation.subject import check_crop, on_main, open_encoder, open_images, say_loader
    from simclr_ddp.runs import evaluations
    from simclr_ddp.runs.encoder import load_head
    from simclr_ddp.training import lifecycle, preflight

    loading: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "loader": settings.loader,
    }
    with lifecycle.joined(settings.device, settings.precision, settings.threads, settings.timeout) as runtime:
        loaded, _ = open_encoder(settings.run, settings.size, settings.crop)
        dataset, size = open_images(settings.data, settings.split, "data", loaded), loaded.spec.size
        check_crop(settings.crop, dataset)
        averaged = features.averaging(settings.views, settings.seed, loaded.settings, loaded.spec)
        folder = Path(settings.output) if settings.output else loaded.folder
        heads: list[Head] = []

        def check() -> str:
            if settings.embeddings:
                heads.append(load_head(loaded))
            if settings.format == "npy":
                import_pyarrow()
                file_names(dataset)
            return evaluations.trial_write(folder / FOLDER)

        on_main(check)
        say_loader(dataset, views=settings.views, size=size, **loading)
        preflight.evaluation((dataset,), size=size, **loading)
        with watching(settings.timeout, "start the command again"):
            h = features.embed(
                loaded.encoder,
                loaded.hash,
                dataset,
                loaded.spec,
                runtime,
                averaged=averaged,
                folder=folder if settings.cache else None,
                title=f"{loaded.file}, {settings.split}",
                **loading,
            )
        if not collectives.is_main():
            return 0
        if not h.isfinite().all():
            raise ValueError(f"{loaded.file}: its representations are not finite; use an earlier checkpoint")
        arrays = {"h": h}
        if heads:
            arrays["z"] = features.project(h, heads[0], runtime, settings.batch_size)
    key = features.key_of(loaded.hash, dataset, loaded.spec, runtime, averaged)
    checkpoint = "encoder" if loaded.step is None else f"step{loaded.step:08d}"
    name = f"{checkpoint}-{Path(dataset.source).stem}.{short_hash(key | {'split': settings.split, 'z': bool(heads)})}"
    about = key | {"source": dataset.source, "split": settings.split, "step": loaded.step, "classes": dataset.classes}
    write = write_safetensors if settings.format == "safetensors" else write_npy
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for path in write(folder / FOLDER / name, arrays, dataset, about):
        console.say(f"written to {path}")
    return 0


def import_pyarrow() -> Any:
    """Import pyarrow.parquet. Raises ValueError if it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            "format=npy: pyarrow, which writes the table of the images, is not installed; install it with "
            "pip install pyarrow, or choose format=safetensors"
        ) from error
    return parquet


def file_names(dataset: "Dataset") -> list[str] | None:
    """Names of the image files, if they are stored. Raises ValueError if they are those of another data set."""
    return dataset.file.names() if dataset.stored else None


def write_safetensors(path: Path, arrays: "dict[str, Tensor]", dataset: "Dataset", about: dict[str, Any]) -> list[Path]:
    import torch

    from simclr_ddp.runs.encoder import export_tensors

    path = path.with_name(f"{path.name}.safetensors")
    if dataset.labels is not None:
        arrays = arrays | {"labels": torch.from_numpy(dataset.labels)}
    export_tensors(path, arrays, {name: json.dumps(value) for name, value in about.items()})
    return [path]


def write_npy(path: Path, arrays: "dict[str, Tensor]", dataset: "Dataset", about: dict[str, Any]) -> list[Path]:
    import numpy as np
    import pyarrow

    from simclr_ddp.evaluation.labels import number_names

    parquet, paths = import_pyarrow(), []
    for name, values in arrays.items():
        paths.append(path.with_name(f"{path.name}.{name}.npy"))
        replace_atomically(paths[-1], partial(save_array, values.numpy()))
    columns: dict[str, Any] = {"index": np.arange(dataset.count), "split": [about["split"]] * dataset.count}
    if names := file_names(dataset):
        columns["file"] = names
    if dataset.labels is not None and dataset.has_classes:
        columns["label"] = dataset.labels
        if dataset.classes:
            columns["class"] = [dataset.classes[i] for i in dataset.labels]
    elif dataset.labels is not None:
        columns |= dict(zip(number_names(dataset), dataset.labels.T, strict=True))
    paths.append(path.with_name(f"{path.name}.parquet"))
    table = pyarrow.table(columns, metadata={name: json.dumps(value) for name, value in about.items()})
    replace_atomically(paths[-1], lambda temporary: parquet.write_table(table, temporary))
    return paths


def save_array(values: "np.ndarray", path: Path) -> None:
    import numpy as np

    with path.open("wb") as file:  # np.save would add .npy to the name
        np.save(file, values, allow_pickle=False)


if __name__ == "__main__":
    sys.exit(main())

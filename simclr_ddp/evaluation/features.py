"""What the evaluators share: the encoder of a run, a checkpoint or a file, and the representations it gives."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from simclr_ddp import checkpoint, cli, config, distributed
from simclr_ddp.data import Dataset, evaluation_batches, evaluation_images, usable_workers
from simclr_ddp.model import Encoder
from simclr_ddp.runtime import Runtime


class Spec(NamedTuple):
    """How to build an encoder and feed it."""

    arch: str
    width: float
    stem: str
    size: int  # pixels, height and width of an image
    mean: list[float]  # subtracted from the channels of [0, 1] images, which are then
    std: list[float]  # divided by these


class Loaded(NamedTuple):
    encoder: Encoder  # float32, on the CPU
    spec: Spec
    settings: dict[str, Any]  # of the run, by dotted key; {} where they are not known
    file: Path  # what was read
    folder: Path  # where results go
    step: int | None  # None where the file does not say it


def load_encoder(path: str | Path) -> Loaded:
    """The encoder of a run directory, a training checkpoint (.pt) or an exported encoder (.safetensors); on all ranks.

    Of a run directory its encoder.safetensors, or where training has not ended its newest valid checkpoint. Raises
    ValueError in one sentence if there is none.
    """
    path = Path(path)
    file, folder = path, path.parent
    if path.is_dir():
        file, folder = path / distributed.from_main(_in_run(path) if distributed.is_main() else ""), path
        if file == path:
            raise ValueError(
                f"{path} holds neither encoder.safetensors nor a valid checkpoint: "
                "give the directory of a run that has saved something, or such a file"
            )
    elif not path.exists():
        raise ValueError(f"there is no run {path}: give a run directory, a checkpoint (.pt) or an encoder.safetensors")
    if file.suffix == ".safetensors":
        spec, settings, weights, step = _exported(file)
    else:
        spec, settings, weights, step = _checkpoint(file)
    encoder = Encoder(spec.arch, spec.width, spec.stem)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} does not hold a {spec.arch} x {spec.width:g}, as it says: {reason}") from error
    return Loaded(encoder, spec, settings, file, folder, step)


def random_encoder(spec: Spec, seed: int) -> Encoder:
    """An untrained encoder of the same kind; the weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(spec.arch, spec.width, spec.stem)


def _in_run(run_dir: Path) -> str:
    """The file to read, relative to the run directory; "" if there is none. It may be training: nothing is touched."""
    if (run_dir / "encoder.safetensors").exists():
        return "encoder.safetensors"
    for path in reversed(checkpoint.all_steps(run_dir / "checkpoints")):
        try:
            checkpoint.load(path)
        except ValueError as error:
            cli.warn(f"{error}; going on with the one before")
        else:
            return str(path.relative_to(run_dir))
    return ""


def _exported(file: Path) -> tuple[Spec, dict[str, Any], dict[str, Tensor], int | None]:
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} can't be read as safetensors ({error}): copy or export it again") from error
    try:
        mean, std = json.loads(metadata["mean"]), json.loads(metadata["std"])
        spec = Spec(
            metadata["arch"], float(metadata["width"]), metadata["stem"], int(metadata["size"]), list(mean), list(std)
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{file} does not say how to build its encoder ({type(error).__name__} {error}): "
            "an encoder.safetensors of a run of this tool is wanted"
        ) from error
    record = file.parent / "config.yaml"
    settings = config.read_yaml(record) if record.exists() else {}
    step = metadata.get("step", "")
    return spec, {k: v for k, v in settings.items() if k != "starts"}, weights, int(step) if step.isdigit() else None


def _checkpoint(file: Path) -> tuple[Spec, dict[str, Any], dict[str, Tensor], int]:
    wanted = "a checkpoint of a training run of this tool, or an encoder.safetensors, is wanted"
    try:
        saved = checkpoint.load(file)
    except ValueError as error:
        raise ValueError(f"{error}: {wanted}") from error
    weights = {k.removeprefix("encoder."): v for k, v in saved["model"].items() if k.startswith("encoder.")}
    try:
        settings = config.dotted(saved["config"])
        keys = (
            "model.arch",
            "model.width",
            "model.stem",
            "data.size",
            "data.augmentation.mean",
            "data.augmentation.std",
        )
        spec = Spec(*(settings[key] for key in keys))
    except (KeyError, AttributeError) as error:
        raise ValueError(f"checkpoint {file} holds no settings of a pretraining run: {wanted}") from error
    return spec, settings, weights, saved["step"]


@torch.no_grad()
def representations(
    encoder: Encoder,
    dataset: Dataset,
    spec: Spec,
    runtime: Runtime,
    *,
    batch_size: int,
    workers: int,
    loader: str,
    title: str,
    index: np.ndarray | None = None,
) -> Tensor:
    """[n, D] on the CPU of rank 0, [0, D] on the others: h of the evaluation views of the images `index`, or of all.

    index  [n] positions in the file; None: all, in its order

    The encoder is in evaluation mode: batch norm uses its running statistics. float32, or float64 under precision
    fp64. Each rank takes a contiguous share of the images, none of them twice, in batches of batch_size, which are
    gathered as they come. `title` begins the lines of progress.
    """
    encoder = encoder.to(runtime.device, runtime.dtype).eval()
    encoder.to(memory_format=encoder.memory_format)
    images = evaluation_images(dataset, spec.mean, spec.std, runtime.dtype)
    index = np.arange(dataset.count) if index is None else index
    shares = np.array_split(np.arange(len(index)), distributed.world_size())
    batches = evaluation_batches(
        dataset,
        index[shares[distributed.rank()]],
        size=spec.size,
        batch_size=batch_size,
        workers=usable_workers(workers, distributed.local_world_size()),
        loader=loader,
        device=runtime.device,
    )
    main = distributed.is_main()
    h_all = torch.empty(len(index) if main else 0, encoder.width_out, dtype=runtime.dtype)
    for first in _progress(range(0, len(shares[0]), batch_size), len(index), batch_size, title):
        # Shares differ by at most one image, but then maybe by one batch: every rank gathers equally often.
        block = torch.zeros(1, batch_size, encoder.width_out, dtype=runtime.dtype, device=runtime.device)
        batch = next(batches, None)
        if batch is not None:
            with runtime.autocast():
                h = encoder(images(batch.inputs)[0].contiguous(memory_format=encoder.memory_format))
            block[0, : len(h)] = h
        gathered = distributed.gather(block)[0].cpu()
        for share, rows in zip(shares if main else [], gathered.split(batch_size), strict=main):
            place = share[first : first + batch_size]
            h_all[torch.from_numpy(place)] = rows[: len(place)]
    return h_all


def _progress(firsts: range, count: int, batch_size: int, title: str) -> Iterator[int]:
    """The values of the range; a bar with rate and time left on a terminal, a line every ten seconds elsewhere."""
    world_size = distributed.world_size()
    on_terminal = distributed.is_main() and sys.stderr.isatty()
    bar = tqdm(total=count, desc=title, unit=" images", disable=not on_terminal, dynamic_ncols=True)
    start = last = time.perf_counter()
    for first in firsts:
        yield first
        now, done = time.perf_counter(), min((first + batch_size) * world_size, count)
        rate = done / (now - start)
        bar.update(done - bar.n)
        if not on_terminal and (now - last > 10 or done == count):
            last = now
            cli.say(f"{title}: {done:,} of {count:,} images, {rate:,.0f} images/s, {(count - done) / rate:.0f} s left")
    bar.close()

"""Writing and reading of encoder.safetensors, the result of a run."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data.transform import Transform
from simclr_ddp.distributed import collectives
from simclr_ddp.models.backbone import Backbone
from simclr_ddp.models.backbones import make_encoder
from simclr_ddp.models.simclr import projection_head
from simclr_ddp.runs import checkpoint
from simclr_ddp.runs.evaluations import weights_hash
from simclr_ddp.system import console
from simclr_ddp.system.errors import one_line
from simclr_ddp.system.files import not_a_file, replace_atomically


def export_encoder(path: Path, encoder: nn.Module, metadata: dict[str, str]) -> None:
    """Write the encoder as safetensors with torchvision's key names and metadata to rebuild it.

    Equal encoders with equal metadata give equal bytes.
    """
    export_tensors(path, encoder.state_dict(), metadata)


def export_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors; equal ones with equal metadata give equal bytes. Raises OSError if it can't."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory, such as tied weights
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} can't be written ({one_line(error, 120)}); free space there") from error
        _sort_metadata(temporary)

    replace_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a .safetensors file, which the library writes in random order.

    The header is JSON; the first 8 bytes of the file hold its length, including trailing spaces.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the header is not formatted as by safetensors"
        file.seek(8)
        file.write(text.ljust(length))


class Spec(NamedTuple):
    """Architecture and input format of an encoder."""

    arch: str
    width: float
    stem: str
    size: int  # height and width of an image in pixels
    mean: list[float]  # subtracted from the channels of [0, 1] images
    std: list[float]  # by which the channels are then divided
    crop: float = 0.0  # of evaluation views: see data.crops.evaluation_box


class Loaded(NamedTuple):
    encoder: Backbone  # float32, on the CPU
    spec: Spec
    settings: dict[str, Any]  # settings of the run by dotted key; {} if unknown
    file: Path  # file that was read
    folder: Path  # folder for results: the run directory, or that of the file
    step: int | None  # None if unknown
    hash: str  # of the weights as they are stored

    @property
    def transform(self) -> Transform:
        """Map a PIL image to the evaluation view [3, size, size] that the encoder expects."""
        return Transform(self.spec.size, self.spec.mean, self.spec.std, self.spec.crop)


class Stored(NamedTuple):
    """The content of a file."""

    spec: Spec
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    step: int | None


def load_encoder(path: str | Path) -> Loaded:
    """Load the encoder of a run directory, a checkpoint (.pt) or an exported encoder (.safetensors) on all ranks.

    A run directory is represented by its encoder.safetensors or, while it is training, by its newest valid checkpoint.
    Rank 0 reads. Raises ValueError if there is no encoder.

        loaded = load_encoder("runs/cifar10")
        h = loaded.encoder.eval()(loaded.transform(image)[None])
    """
    path = Path(path)
    found: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    if collectives.is_main():
        try:
            file, stored = _in_run(path) if path.is_dir() else (path, _read(path))
        except (ValueError, OSError) as error:
            found = {"fault": str(error)}
        else:
            weights = stored.weights
            found = {"file": str(file)} | {k: v for k, v in stored._asdict().items() if k != "weights"}
    found = collectives.broadcast_object(found)
    if "fault" in found:
        raise ValueError(found["fault"])
    weights = collectives.broadcast_tensors(weights)
    file, spec = Path(found["file"]), Spec(*found["spec"])
    encoder = make_encoder(spec.arch, spec.width, spec.stem, spec.size)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{file} does not contain the {spec.arch} x {spec.width:g} of its metadata ({one_line(error, 200)}); "
            "export it again"
        ) from error
    folder = path if path.is_dir() else path.parent
    if folder.name == "checkpoints" and (folder.parent / "config.yaml").exists():
        folder = folder.parent
    return Loaded(encoder, spec, found["settings"], file, folder, found["step"], hash_of(weights))


def hash_of(weights: dict[str, Tensor]) -> str:
    """Hash of an encoder's weights, which are on the CPU."""
    return weights_hash((n, t.contiguous().flatten().view(torch.uint8).numpy().data) for n, t in weights.items())


class Head(NamedTuple):
    """Projection head of a checkpoint, in evaluation mode, and how its projections become embeddings."""

    module: nn.Module  # float32, on the CPU
    squared_radius: float  # of normalised embeddings, in the norm
    norm_p: float


def load_head(loaded: Loaded) -> Head:
    """Read the projection head of the checkpoint that an encoder comes from; only rank 0 needs it.

    An exported encoder comes from the checkpoint of its step in its run directory. Raises ValueError if that is not
    there, or holds another encoder.
    """
    file = loaded.file
    if file.suffix == ".safetensors":
        file = loaded.folder / "checkpoints" / f"step-{loaded.step or 0:08d}.pt"
        found = [path for path in checkpoint.all_steps(file.parent) if path != file]
        such = f", such as {found[-1]}" if found else ""
        way_out = f"{loaded.file} holds no projection head; give a checkpoint of the run{such}"
        if not file.exists():
            raise ValueError(way_out)
        try:
            same = hash_of(_checkpoint(file).weights) == loaded.hash
        except ValueError:  # of another command, or damaged
            same = False
        if not same:
            raise ValueError(f"{way_out} ({file} holds another encoder)")
    saved = checkpoint.load(file)
    settings, prefix = options.dotted(saved["config"]), "projection_head."
    head = untrained_head(settings, loaded.encoder.width_out, seed=0)
    head.load_state_dict({k.removeprefix(prefix): v for k, v in saved["model"].items() if k.startswith(prefix)})
    return Head(head.eval(), settings["loss.radius"] ** 2, settings["loss.norm_p"])


def untrained_head(settings: dict[str, Any], width: int, seed: int) -> nn.Module:
    """Create a projection head like that of a run, for representations of that width; settings are by dotted key."""
    kind, layers, hidden, out = (settings[f"head.{name}"] for name in ("kind", "layers", "hidden", "out"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return projection_head(kind, width, layers, hidden, out)


def random_encoder(spec: Spec, seed: int) -> Backbone:
    """Create an untrained encoder of the same architecture, whose weights depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_encoder(spec.arch, spec.width, spec.stem, spec.size)


def _in_run(run_dir: Path) -> tuple[Path, Stored]:
    """Read the encoder of a run directory, in which a run may be training. Nothing is changed on disk."""
    file, tried = run_dir / "encoder.safetensors", set[Path]()
    if file.exists():
        return file, _read(file)
    while new := [path for path in checkpoint.all_steps(run_dir / "checkpoints") if path not in tried]:
        tried.add(new[-1])
        try:
            return new[-1], _checkpoint(new[-1])
        except (ValueError, OSError) as error:
            if not new[-1].exists():
                continue  # the run has deleted it, since it has saved a newer one
            if isinstance(error, OSError):
                raise
            console.warn(f"{error}; using the previous checkpoint")
    raise ValueError(
        f"{run_dir} contains neither encoder.safetensors nor a valid checkpoint; "
        "give the directory of a run that has saved one, or such a file"
    )


def _read(file: Path) -> Stored:
    if fault := not_a_file(file):
        raise ValueError(f"{file} {fault}; give a run directory, a checkpoint (.pt) or an encoder.safetensors")
    return _exported(file) if file.suffix == ".safetensors" else _checkpoint(file)


def _exported(file: Path) -> Stored:
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} can't be read as safetensors ({error}); copy or export it again") from error
    try:
        mean, std = json.loads(metadata["mean"]), json.loads(metadata["std"])
        width, size, crop = float(metadata["width"]), int(metadata["size"]), float(metadata.get("crop", 0))
        spec = Spec(metadata["arch"], width, metadata["stem"], size, list(mean), list(std), crop)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{file} has no valid metadata of its encoder ({type(error).__name__} {error}); "
            "give an encoder.safetensors written by this tool"
        ) from error
    record = file.parent / "config.yaml"
    settings = options.read_yaml(record) if record.exists() else {}
    step = metadata.get("step", "")
    settings = {k: v for k, v in settings.items() if k != "starts"}
    return Stored(spec, settings, weights, int(step) if step.isdigit() else None)


def _checkpoint(file: Path) -> Stored:
    way_out = "give a checkpoint of a training run of this tool, or an encoder.safetensors"
    try:
        saved = checkpoint.load(file)
    except ValueError as error:
        raise ValueError(f"{error}; {way_out}") from error
    weights = {k.removeprefix("encoder."): v for k, v in saved["model"].items() if k.startswith("encoder.")}
    try:
        settings = options.dotted(saved["config"])
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
        raise ValueError(f"checkpoint {file} contains no settings of a pretraining run; {way_out}") from error
    return Stored(spec, settings, weights, saved["step"])


def encoder_metadata(settings: Pretrain, step: int) -> dict[str, str]:
    """Metadata to rebuild the encoder, with its step."""
    model, data = settings.model, settings.data
    mean, std = data.augmentation.mean, data.augmentation.std
    return spec_metadata(Spec(model.arch, model.width, model.stem, data.size, mean, std), step)


def spec_metadata(spec: Spec, step: int | None) -> dict[str, str]:
    """Metadata to rebuild the encoder, with its step."""
    return ({"crop": repr(spec.crop)} if spec.crop else {}) | {
        "arch": spec.arch,
        "width": repr(spec.width),
        "stem": spec.stem,
        "size": str(spec.size),
        "mean": repr(list(spec.mean)),
        "std": repr(list(spec.std)),
        "step": "" if step is None else str(step),
    }

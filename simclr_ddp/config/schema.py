"""Every option of every command: typed dataclasses whose defaults are the Spirograph run.

The value that wins is default < YAML file < `key=value`. OmegaConf holds the types; this module adds the limits
and choices of each option, and error sentences that name the key, the value and the way out.
"""

import difflib
import json
import math
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


def option(
    default: Any,
    meaning: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    length: int | None = None,
) -> Any:
    """A dataclass field with its help text, allowed values, least and greatest value (inclusive; infinity only where
    `high` says so) and length of a list."""
    metadata = {"meaning": meaning, "choices": choices, "low": low, "high": high, "length": length}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    return field(default_factory=cls)


LOADERS = ("auto", "ffcv", "torch", "device")
LOADER_MEANING = (
    "who decodes a .beton file: all give the same pixels; auto takes ffcv where it is installed, else torch; device "
    "decodes a small set once, keeps it there and cuts there"
)
WORKERS_MEANING = (
    "decoders per rank, at most its cores: threads of ffcv and device (at least 1), processes of torch (0: in place)"
)


@dataclass
class Augmentation:
    crop_scale: list[float] = option(
        [0.08, 1.0], "least and largest area of a crop, as a share of the image", low=0, high=1, length=2
    )
    flip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    strength: float = option(0.5, "colour jitter strength s: brightness, contrast, saturation 0.8s, hue 0.2s", low=0)
    jitter: float = option(0.8, "probability of the colour jitter", low=0, high=1)
    order: str = option("permuted", "order of the four colour operations, per image", ("permuted", "fixed"))
    greyscale: float = option(0.2, "probability of greyscale", low=0, high=1)
    blur: list[float] = option([0.0, 0.0], "probability of Gaussian blur, per view", low=0, high=1, length=2)
    solarize: list[float] = option([0.0, 0.0], "probability of solarization, per view", low=0, high=1, length=2)
    mean: list[float] = option([0.4914, 0.4822, 0.4465], "subtracted from each channel of [0, 1] images", length=3)
    std: list[float] = option([0.2023, 0.1994, 0.2010], "each channel is divided by it after the mean", length=3)


@dataclass
class Data:
    train: str = option("spirograph", "training images: a .beton file, or `spirograph` for the generated set")
    test: str = option("spirograph", "test images for the evaluators: a .beton file, `spirograph`, or empty")
    size: int = option(32, "height and width of a view in pixels", low=8)
    loader: str = option("auto", LOADER_MEANING, LOADERS)
    workers: int = option(4, WORKERS_MEANING, low=0)
    augmentation: Augmentation = section(Augmentation)


@dataclass
class Model:
    arch: str = option("resnet18", "encoder", ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"))
    width: float = option(0.5, "multiplies every channel count of the encoder", low=0.01, high=16)
    stem: str = option("stl", "first layers: 3x3, 3x3 + pool/3, or 7x7/2 + pool/2", ("cifar", "stl", "imagenet"))
    init: str = option("random", "`random`, `torchvision` (its ImageNet weights), or a file of weights")
    checkpoint_stages: bool = option(
        False, "keep only the inputs of the encoder's four stages and compute them again backward: less memory, slower"
    )


@dataclass
class Head:
    kind: str = option("nonlinear", "projection head", ("nonlinear", "linear", "none"))
    layers: int = option(2, "dense layers of the nonlinear head", low=2)
    hidden: int | None = option(None, "width of its hidden layers; null takes the encoder's", low=1)
    out: int = option(128, "width of the embedding; concat_sum splits it in halves", low=1)


@dataclass
class Loss:
    kernel: str = option(
        "cosine",
        "similarity kernel (README: one formula each)",
        ("cosine", "gaussian", "laplacian", "exponential", "simple_sum", "concat_sum", "arccos", "spectral"),
    )
    temperature: float = option(0.2, "divides the log-kernel: cosine/t, -distance^gamma/t; arccos multiplies", low=1e-6)
    gamma: float = option(1.0, "power of the distance: exponential, simple_sum and concat_sum", low=0.01, high=64)
    mix_weight: float = option(0.5, "weight of the gamma kernel in the sums; the Gaussian has the rest", low=0, high=1)
    mix_level: str = option("kernel", "what the sums add: kernels (the paper) or losses (its code)", ("kernel", "loss"))
    second_temperature: float | None = option(None, "of the Gaussian in the sums; null: same as temperature", low=1e-6)
    order: int = option(1, "arc-cosine order, 1 to 3", low=1, high=3)
    norm_p: float = option(2.0, "norm that puts embeddings on the sphere; inf allowed", low=1, high=math.inf)
    distance_p: float = option(
        2.0,
        "norm of the distance: gaussian, laplacian and exponential; inf allowed; slower than 2",
        low=1,
        high=math.inf,
    )
    precision: str = option("fp32", "of the gradient's products; bf16: off by 1e-4 to 5e-3 of it", ("fp32", "bf16"))
    gather: str = option(
        "fp32", "what ranks send; bf16: half the bytes, embeddings rounded to 8 bits", ("fp32", "bf16")
    )
    backend: str = option(
        "tiled",
        "what computes it; triton: experimental, NVIDIA GPUs only, not measured yet; no sums, arccos, spectral",
        ("tiled", "triton"),
    )
    radius: float = option(1.0, "radius of that sphere", low=1e-6)


@dataclass
class Optim:
    name: str = option("lars", "optimizer", ("lars", "sgd", "adamw"))
    global_batch_size: int = option(256, "images per step over all ranks", low=2)
    micro_batch_size: int | None = option(None, "of them, images over all ranks that the encoder holds at once", low=2)
    epochs: int = option(8, "passes over the training images", low=1)
    steps: int | None = option(None, "steps in all, instead of epochs", low=1)
    base_learning_rate: float = option(1.0, "before scaling by the batch size", low=1e-12)
    scaling: str = option("linear", "x N/256, x sqrt(N)/4 (equal at 4,096), or x 1", ("linear", "sqrt", "none"))
    warmup_epochs: float = option(1.0, "linear rise of the learning rate from 0", low=0)
    weight_decay: float = option(1e-6, "not applied to biases and batch norm", low=0)
    momentum: float = option(0.9, "of LARS and SGD; AdamW's first beta", low=0, high=0.9999)
    schedule: str = option("cosine", "after the warm-up: cosine to 0, or constant", ("cosine", "constant"))
    trust_coefficient: float = option(0.001, "LARS: step length as a fraction of a tensor's norm, at rate 1", low=0)


@dataclass
class Probe:
    enabled: bool = option(True, "train a linear classifier on the detached representation, where there are classes")
    learning_rate: float = option(1e-3, "of its AdamW", low=0)
    validation_fraction: float = option(0.1, "images whose labels it never sees, scored every epoch", low=0, high=1)


@dataclass
class Resume:
    force: list[str] = option([], "keys that may differ from the checkpoint's, for example [optim.epochs]")


@dataclass
class Checkpoint:
    every_steps: int = option(500, "save every so many steps; 0: never by steps", low=0)
    every_minutes: float = option(10.0, "save every so many minutes; 0: never by time", low=0)
    keep_last: int = option(2, "checkpoints to keep", low=1)
    keep_every_epochs: int = option(0, "besides, save and keep one every so many epochs; 0: none", low=0)


@dataclass
class Log:
    wandb: bool = option(False, "mirror metrics.jsonl to Weights & Biases (WANDB_MODE=offline needs no key)")
    tensorboard: bool = option(False, "mirror metrics.jsonl to TensorBoard files in the run directory")
    every_steps: int = option(10, "one line of metrics every so many steps", low=1)


@dataclass
class Debug:
    check_ranks_every: int = option(0, "compare the bits of all parameters among the ranks every so many steps", low=0)


@dataclass
class Pretrain:
    name: str = option("spirograph", "begins the name of the run directory; a config file's name by default")
    seed: int = option(0, "of weights, order and augmentation", low=0, high=2**63 - 1)
    run_dir: str = option("", "output; empty: runs/<name>-<hash of the keys that change the result>")
    device: str = option("auto", "auto takes CUDA where there is one", ("auto", "cuda", "cpu"))
    precision: str = option("auto", "auto: bf16 where the processor has it", ("auto", "bf16", "fp16", "fp32", "fp64"))
    threads: int = option(0, "CPU threads per rank; 0 shares the cores among the ranks here", low=0, high=1024)
    timeout: float = option(
        600, "seconds without progress after which the run ends; a silent rank ends it after 120 at most", low=3
    )
    compile: bool = option(False, "torch.compile model and augmentation: other roundings")
    data: Data = section(Data)
    model: Model = section(Model)
    head: Head = section(Head)
    loss: Loss = section(Loss)
    optim: Optim = section(Optim)
    probe: Probe = section(Probe)
    resume: Resume = section(Resume)
    checkpoint: Checkpoint = section(Checkpoint)
    log: Log = section(Log)
    debug: Debug = section(Debug)


@dataclass
class Parity:
    ranks: list[int] = option([2, 4], "numbers of processes to compare with one", low=2)
    images: int = option(16, "of the batch that they share, instead of optim.global_batch_size", low=4)
    steps: int = option(3, "of training, at full learning rate", low=1)
    loss: str = option("", "package.module:Class of another loss of two views, instead of the config's run")
    arguments: list[str] = option([], "name=value, to make that loss with")


@dataclass
class Verify(Pretrain):
    verify: Parity = section(Parity)


@dataclass
class Examination:
    ranks: int = option(0, "processes of the run on this machine; 0: one a GPU, or one", low=0)
    steps: int = option(10, "of a trial that tells how long the run will take; 0: no trial", low=0)


@dataclass
class Doctor(Pretrain):
    doctor: Examination = section(Examination)


@dataclass
class Replay:
    dump: str = option(MISSING, "dumps/step-N.pt in a run directory")
    train: str = option("", "training images, where their file has moved; empty: the run's data.train")
    device: str = option("auto", "auto takes CUDA where there is one", ("auto", "cuda", "cpu"))
    precision: str = option("", "another than the run's", ("", "bf16", "fp16", "fp32", "fp64"))
    threads: int = option(0, "CPU threads per rank; 0 shares the cores among the ranks here", low=0, high=1024)


@dataclass
class LinearEval:
    run: str = option(MISSING, "run directory, checkpoint (.pt) or encoder.safetensors")
    train: str = option("", "labelled training images; empty: the run's data.train")
    test: str = option("", "test images; empty: the run's data.test")
    convention: str = option(
        "C", "C: 1/2 |W|^2 + C sum of losses (scikit-learn's); mean: mean loss + strength |W|^2", ("C", "mean")
    )
    strengths: list[float] = option(
        [], "of the penalty, to choose from; empty: 45, C from 1e-6 to 1e5 or mean from 1e-10 to 10", low=0
    )
    validation_fraction: float = option(0.1, "of the training images, to choose the strength on", low=0, high=1)
    tolerance: float = option(1e-6, "norm of the gradient, relative to zero weights, at which L-BFGS stops", low=0)
    max_iterations: int = option(1000, "of L-BFGS for each strength", low=1)
    size: int = option(0, "height and width of an image in pixels; 0: the run's data.size", low=0)
    batch_size: int = option(256, "images per forward pass and rank", low=1)
    random_encoder: bool = option(True, "evaluate an untrained encoder of the same kind beside it")
    seed: int = option(0, "of the validation split and the untrained encoder", low=0, high=2**63 - 1)
    device: str = option("auto", "auto takes CUDA where there is one", ("auto", "cuda", "cpu"))
    precision: str = option("fp32", "of the forward passes", ("auto", "bf16", "fp16", "fp32", "fp64"))
    threads: int = option(0, "CPU threads per rank; 0 shares the cores among the ranks here", low=0, high=1024)
    loader: str = option("auto", LOADER_MEANING, LOADERS)
    workers: int = option(4, WORKERS_MEANING, low=0)


@dataclass
class WriteDataset:
    source: str = option(MISSING, "image folder, folder of CIFAR batches, `cifar10`, `cifar100` or `spirograph`")
    out: str = option(MISSING, "the .beton file to write")
    split: str = option("", "part of a named data set (empty: train), or of a folder that holds train/, test/ or val/")
    on_error: str = option("stop", "at an image that can't be decoded: stop, or leave it out", ("stop", "skip"))
    mode: str = option("auto", "how pixels are stored; auto: raw only where there is no JPEG", ("auto", "jpeg", "raw"))
    quality: int = option(90, "of images that must be re-encoded as JPEG", low=1, high=100)
    images: int | None = option(None, "write only the first so many images", low=1)
    overwrite: bool = option(False, "replace a file that exists")


@dataclass
class Visualize:
    run: str = option(MISSING, "run directory")
    images: int = option(8, "images on the page of views", low=1)
    views: int = option(6, "augmented views of each", low=1)
    maps: str = option(
        "all", "maps of test images: PCA and t-SNE (which takes a minute), PCA alone, or none", ("all", "pca", "none")
    )
    points: int = option(2000, "test images on the maps: a random choice, always the same", low=10)
    test: str = option("", "images for the maps; empty: the run's data.test")
    device: str = option("auto", "auto takes CUDA where there is one", ("auto", "cuda", "cpu"))


# What can be changed without changing the parameters that come out.
HARMLESS = (
    *("name", "run_dir", "device", "threads", "timeout", "compile", "data.test", "data.loader", "data.workers"),
    "model.checkpoint_stages",
)
HARMLESS_SECTIONS = ("resume.", "checkpoint.", "log.", "debug.", "verify.", "doctor.")


def options(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> dataclass field, for every option of a config class."""
    found: dict[str, Any] = {}
    for f in fields(cls):
        if is_dataclass(f.type):
            found |= options(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            found[prefix + f.name] = f
    return found


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Dotted keys and values of a YAML file."""
    if not Path(path).is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in Path("configs").glob("*/*.yaml")], 1, 0.75)
        hint = f"did you mean {near[0]}?" if near else "see configs/ for those that come with the tool"
        raise ValueError(f"config file {path} does not exist: {hint}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml's, OmegaConf's and the codec's errors have no common class
        raise ValueError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} holds no `key: value` pairs")
    return _flat({str(k): v for k, v in values.items()})


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` -> (key, value): lists, quoted texts and null are YAML, all else is text for the option's type."""
    key, _, value = text.partition("=")
    if value not in ("null", "~") and value[:1] not in ("[", "{", '"', "'"):
        return key, value
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index,call-overload]
    except Exception as error:  # yaml's and OmegaConf's errors have no common class
        raise ValueError(f"{text}: the value is not valid YAML ({' '.join(str(error).split())})") from error


def build(cls: type, layers: list[tuple[str, dict[str, Any]]]) -> Any:
    """An instance of the config class from defaults and layers of (origin, {dotted key: value}); the last wins.

    Raises ValueError with one sentence for an unknown key, a wrong type, a value out of range or a missing one.
    """
    known = options(cls)
    config: DictConfig = OmegaConf.structured(cls)
    for origin, values in layers:
        for key, value in values.items():
            _take(config, known, origin, key, value)
    for key in known:
        if OmegaConf.is_missing(config, key):
            raise ValueError(f"{key} is missing: {known[key].metadata['meaning']}")
    return OmegaConf.to_object(config)


def checked(cls: type, origin: str, key: str, value: Any) -> Any:
    """The value as the option `key` of the config class takes it; raises ValueError as `build` does."""
    scratch = _scratch(cls)
    _take(scratch, options(cls), origin, key, value)
    taken = OmegaConf.select(scratch, key)
    return list(taken) if OmegaConf.is_list(taken) else taken


@lru_cache
def _scratch(cls: type) -> DictConfig:
    return OmegaConf.structured(cls)


def _take(config: DictConfig, known: dict[str, Any], origin: str, key: str, value: Any) -> None:
    """Set one option, checked. What lies below an option that is a mapping is an entry of it, dots and all."""
    mapping = next((name for name, f in known.items() if f.type == dict[str, Any] and key.startswith(f"{name}.")), "")
    if key not in known and not mapping:
        near = difflib.get_close_matches(key, known, 1, 0.6)
        near = near or [name for name in known if name.endswith("." + key)]
        hint = f"did you mean {near[0]}?" if near else "--help lists every option"
        raise ValueError(f"unknown option {key} in {origin}: {hint}")
    if value == MISSING:
        raise ValueError(f"{key}={value} in {origin}: {_type_name(known[mapping or key])} is wanted")
    try:
        if mapping:
            for entry, entered in _flat({key.removeprefix(f"{mapping}."): value}).items():
                OmegaConf.select(config, mapping)[entry] = entered
            return
        OmegaConf.update(config, key, value)
        taken = OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}={value} in {origin}: {_type_name(known[mapping or key])} is wanted") from error
    _check_value(key, known[key], taken)


def _type_name(f: Any) -> str:
    names: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names |= {int | None: "a whole number or null", float | None: "a number or null"}
    return (
        names.get(f.type)
        or {
            list[float]: "a list of numbers",
            list[int]: "a list of whole numbers",
            list[str]: "a list of texts",
            dict[str, Any]: "a mapping",
        }[f.type]
    )


def _check_value(key: str, f: Any, value: Any) -> None:
    choices, low, high, length = (f.metadata[name] for name in ("choices", "low", "high", "length"))
    if length is not None and len(value) != length:
        raise ValueError(f"{key}={list(value)} has {len(value)} numbers: {length} are wanted")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(choices)} is wanted"
        raise ValueError(f"{key}={value} is not known: {hint}")
    for number in value if OmegaConf.is_list(value) else [value]:
        if isinstance(number, float) and high != math.inf and not math.isfinite(number):
            raise ValueError(f"{key}={number}: a finite number is wanted")
        if low is not None and number is not None and not number >= low:
            raise ValueError(f"{key}={number} is too small: at least {low:g} is wanted")
        if high is not None and number is not None and not number <= high:
            raise ValueError(f"{key}={number} is too large: at most {high:g} is wanted")


def plain(config: Any) -> dict:
    """The config as nested dictionaries of plain values, for YAML, JSON and checkpoints."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def dotted(config: Any) -> dict[str, Any]:
    """{dotted key: value} of a config object, or of the dictionaries `plain` made of one."""
    return _flat(config if isinstance(config, dict) else plain(config))


def result_keys(config: Any) -> dict[str, Any]:
    """The dotted keys that change what a run computes, with their values."""
    return {k: v for k, v in dotted(config).items() if k not in HARMLESS and not k.startswith(HARMLESS_SECTIONS)}


def short_hash(values: dict[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def help_text(cls: type) -> str:
    """One line an option: name, type, default, meaning and choices."""
    lines = []
    for key, f in options(cls).items():
        default = f.default if f.default_factory is DATACLASS_MISSING else f.default_factory()
        shown = "required" if default is MISSING else json.dumps(default)
        choices = f" ({' | '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        lines.append(f"  {key:<32} {_type_name(f):<24} {shown:<12} {f.metadata['meaning']}{choices}")
    return "\n".join(lines)

"""Initial weights of an encoder: random, torchvision's, or from a file."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor

from simclr_ddp.distributed import collectives
from simclr_ddp.models.backbone import Backbone
from simclr_ddp.models.backbones import create_timm, expected_input
from simclr_ddp.system.errors import one_line
from simclr_ddp.system.files import not_a_file


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a .pt / .pth file that holds only tensors and plain values.

    A training checkpoint of this tool, or a state dict under `model` or `state_dict`, is unpacked; the prefixes
    `module.` and `encoder.` are stripped. Only what weights_only=True allows is unpickled.
    """
    loaded = _named_tensors(path)
    for prefix in ("module.", "encoder."):
        if any(key.startswith(prefix) for key in loaded):
            loaded = {key.removeprefix(prefix): v for key, v in loaded.items() if key.startswith(prefix)}
    return loaded


def _named_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file with their names in it."""
    path = Path(path)
    if path.is_dir():
        path = path / "encoder.safetensors"
    if fault := not_a_file(path):
        raise ValueError(f"weights: {path} {fault}; give a .safetensors or .pt file, or a finished run's directory")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # safetensors', pickle's and zip's errors have no common class
        raise ValueError(f"weights {path} can't be read: {one_line(error, 200)}") from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        found = f"a dict of {_some(map(str, loaded))}" if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise ValueError(
            f"weights {path} hold no state dict but {found}; give a file of named tensors such as conv1.weight"
        )
    return loaded


def _some(names: Iterable[str]) -> str:
    """The first four names."""
    names = list(names)
    return f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"


def _mismatch(init: str, state: dict[str, Tensor], first: str) -> str:
    """Say how the names in a file differ from the expected ones, and what to do."""
    weights = {} if init == "torchvision" else _named_tensors(init)
    fitting = Counter(
        name.removesuffix(key)
        for name, tensor in weights.items()
        for key in _tails(name)
        if key in state and state[key].shape == tensor.shape
    )
    prefixes = [prefix for prefix, count in fitting.items() if count >= 0.95 * len(state)]
    if prefixes:
        names = " and ".join(prefixes)
        return (
            f"its tensors are named {prefixes[0]}{first}, expected is {first}; save "
            f"{'those' if len(prefixes) == 1 else 'one group'} with the prefix {names} without it"
        )
    found = weights.get(first)
    shape = f"has the shape {list(found.shape)}" if found is not None else "is missing"
    expected = f", expected is {list(state[first].shape)}" if first in state else ""
    names = f"; the file has {_some(weights)}" if weights and found is None else ""
    return f"the first mismatch is {first}, which {shape}{expected}{names}; give weights of the same arch and width"


def _tails(name: str) -> Iterator[str]:
    """The ends of a dotted name."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def initialize(encoder: Backbone, init: str, arch: str, width: float, size: int = 224) -> str:
    """Initialise an encoder as `model.init` says; return a phrase that describes what was loaded.

    init  random, torchvision (its newest ImageNet weights for arch, downloaded by rank 0 if not cached), timm (the
          weights that timm knows for its model), auto (the one of the two that fits, or random where those weights
          don't exist or can't be downloaded), or a file
    size  height and width of the images, to which position embeddings of timm's models are interpolated

    Tensors that the encoder lacks (a classifier) or has in another shape (the stem) are skipped and named. Raises
    ValueError if fewer than 95 % of the encoder's tensors are found, or if the file has additional blocks: all tensors
    of a deeper encoder would fit.
    """
    if init == "random":
        return "random"
    if init == "auto":
        try:
            return initialize(encoder, "timm" if arch.startswith("timm/") else "torchvision", arch, width, size)
        except ValueError as problem:
            return f"random, since no ImageNet weights are there ({problem})"
    if init == "timm":
        weights = _timm_weights(arch, size)
    elif init == "torchvision":
        if ":" in arch or arch.startswith("timm/"):
            raise ValueError(f"model.init=torchvision: has no weights of model.arch={arch}; set random or a file")
        if width != 1:
            raise ValueError(f"model.init=torchvision: no weights exist for model.width={width}; set model.width=1")
        weights = _torchvision_weights(arch)
    else:
        weights = _adapted(encoder, read_weights(init))
    state = encoder.state_dict()
    fitting = {k: v for k, v in weights.items() if k in state and state[k].shape == v.shape}
    # Weights from before torch 0.4.1, including some of torchvision's, have no num_batches_tracked.
    missing = [k for k in state if k not in fitting and not k.endswith("num_batches_tracked")]
    further = [k for k in weights if k not in state and k.startswith("layer")]
    if len(missing) > 0.05 * len(state) or further:
        raise ValueError(
            f"model.init={init}: only {len(fitting)} of the {len(state)} tensors of {arch} x {width:g} fit: "
            f"{_mismatch(init, state, (missing or further)[0])}"
        )
    encoder.load_state_dict(fitting, strict=False)
    left = f"; random: {', '.join(missing)}" if missing else ""
    unused = [k for k in weights if k not in fitting]
    left += f"; not used: {_some(unused)}" if unused else ""
    left += f"; {expected_input(arch)}" if init == "timm" else ""
    return f"{len(fitting)} of {len(state)} tensors from {init}{left}"


def _adapted(encoder: Backbone, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and interpolate the weights of a file as timm does for the model, if it is one of timm's."""
    network = getattr(encoder, "network", None)
    adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if adapt is None or not type(network).__module__.startswith("timm."):
        return weights
    return {name: tensor for name, tensor in adapt(weights, network).items() if isinstance(tensor, Tensor)}


def _timm_weights(arch: str, size: int) -> dict[str, Tensor]:
    """Load timm's weights on all ranks. Raises ValueError on all of them if one can't."""
    if not arch.startswith("timm/"):
        raise ValueError(f"model.init=timm: model.arch={arch} is no model of timm; set model.arch=timm/NAME")
    weights, problem = _downloaded(lambda: create_timm(arch, size, pretrained=True)[0].state_dict())
    if problem:
        raise ValueError(f"model.init=timm: {problem}; give a local file, or set model.init=random")
    return weights


def _torchvision_weights(arch: str) -> dict[str, Tensor]:
    """Load torchvision's weights on all ranks. Raises ValueError on all of them if one can't."""
    url = torchvision.models.get_model_weights(arch).DEFAULT.url
    load = partial(
        torch.hub.load_state_dict_from_url, url, map_location="cpu", progress=False, check_hash=True, weights_only=True
    )
    weights, problem = _downloaded(load)
    if problem:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"model.init=torchvision: {url} can't be downloaded ({problem}); copy the file to {folder}, or set "
            "model.init=random"
        )
    return weights


def _downloaded(load: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], str]:
    """What `load` returns on this rank, and the first error of any rank or "".

    The first rank of each machine downloads, then the others read.
    """
    weights, problem = {}, ""
    for downloads in (True, False):
        if downloads == (collectives.local_rank() == 0):
            try:
                weights = load()
            except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: damaged
                problem = one_line(error, 300)
        collectives.barrier()
    return weights, next((text for text in collectives.all_gather_object(problem) if text), "")

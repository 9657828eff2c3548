"""Encoders by name: the ResNets of this tool, timm's models, and functions of the user.

resnet18, ...                           simclr_ddp.models.resnet
timm/NAME or timm/NAME,key=value,...    timm.create_model(NAME, key=value, ...)
package.module:function                 a function with the decorator `simclr_ddp.backbone`
"""

import ast
import difflib
import re
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.models.backbone import Backbone
from simclr_ddp.models.resnet import Encoder
from simclr_ddp.system.errors import one_line

RANDOM = ("Drop", "StochasticDepth", "MultiheadAttention", "LSTM", "GRU")  # in names of modules that may drop values
REFUSED = ("pretrained", "checkpoint", "cache", "num_classes")  # beginnings of arguments that would read other files
PREFIX = "network."


def make_encoder(
    arch: str, width: float = 1.0, stem: str = "imagenet", size: int = 224, *, checkpoint_stages: bool = False
) -> Backbone:
    """Build an encoder with random weights.

    width, stem  of this tool's ResNets; others have no use for them
    size         height and width of the images, for models that must know it

    Batch norms of others become cross-rank. Raises ValueError for an unknown model, one that is random while it trains
    (dropout), whose runs would depend on the number of ranks, and one that does not return [B, D].
    """
    if ":" not in arch and not arch.startswith("timm/"):
        return Encoder(arch, width, stem, checkpoint_stages)
    if checkpoint_stages:
        raise ValueError(f"checkpoint_stages=true: the stages of model.arch={arch} are not known; leave it out")
    return ForeignEncoder(arch, size)


class ForeignEncoder(Backbone):
    """Module of somebody else; the names in its state dict are its own.

    arch  timm/NAME,key=value,... or package.module:function
    size  height and width of the images
    """

    def __init__(self, arch: str, size: int) -> None:
        super().__init__()
        network, self.fixed_size = _timm(arch, size) if arch.startswith("timm/") else (_called(arch), False)
        self.network = CrossRankBatchNorm.convert(network)
        _check_deterministic(arch, self.network)
        self.width_out = _width(arch, self.network.eval(), size)
        self.network.train()
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, images: Tensor) -> Tensor:
        h: Tensor = self.network(images)
        return h


def timm_arguments(arch: str) -> tuple[str, dict[str, Any]]:
    """Split timm/NAME,key=value,... into the name and the arguments; values are Python literals or strings."""
    name, *words = re.split(r",(?=\w+=)", arch.removeprefix("timm/"))
    arguments: dict[str, Any] = {}
    for word in words:
        key, is_set, text = word.partition("=")
        if not key.isidentifier() or not is_set or key.startswith(REFUSED):
            raise ValueError(f"model.arch={arch}: {word} is no argument of an architecture; leave it out")
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[key] = text
    return name, arguments


def create_timm(arch: str, size: int, *, pretrained: bool = False) -> tuple[nn.Module, bool]:
    """Return timm's model without classifier, and whether it takes images of one size only."""
    if find_spec("timm") is None:
        raise ValueError(f"model.arch={arch}: timm is not installed; pip install '.[timm]'")
    import timm

    name, arguments = timm_arguments(arch)
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 1)
        hint = f"did you mean timm/{near[0]}?" if near else "timm.list_models() has all names"
        raise ValueError(f"model.arch={arch}: timm has no model {name}; {hint}")
    try:
        known = timm.get_pretrained_cfg(name)
        fixed = bool(known is not None and known.fixed_input_size)
        sized = {"img_size": size} if fixed else {}
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **(sized | arguments)), fixed
    except Exception as error:  # every model raises errors of its own
        raise ValueError(
            f"model.arch={arch}: timm can't make it for images of {size} pixels ({one_line(error, 200)})"
        ) from error


def expected_input(arch: str) -> str:
    """The images that timm's weights were trained on, as options of a run."""
    import timm

    known: Any = timm.get_pretrained_cfg(timm_arguments(arch)[0])
    values = {"size": known.input_size[-1], "augmentation.mean": list(known.mean), "augmentation.std": list(known.std)}
    return "they were trained with " + " ".join(f"data.{key}={value}" for key, value in values.items())


def _timm(arch: str, size: int) -> tuple[nn.Module, bool]:
    network, fixed = create_timm(arch, size)
    return _plain_batch_norms(network), fixed


def _plain_batch_norms(network: nn.Module) -> nn.Module:
    """Replace timm's batch norms with an activation of their own by a class that is cross-rank."""
    from timm.layers.norm_act import BatchNormAct2d

    class BatchNormAct(CrossRankBatchNorm):
        def __init__(self, norm: BatchNormAct2d) -> None:
            super().__init__(norm.num_features)
            self.take(norm)
            self.drop, self.act = norm.drop, norm.act

        def forward(self, input: Tensor) -> Tensor:
            out: Tensor = self.act(self.drop(super().forward(input)))
            return out

    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, BatchNormAct2d):
                setattr(module, name, BatchNormAct(child))
    return network


def _called(arch: str) -> nn.Module:
    """Return what the user's function returns. The module is not imported before its source is found to mark it."""
    module, _, name = arch.partition(":")
    file = _source(module)
    if file is None:
        raise ValueError(f"model.arch={arch}: there is no module {module}; add its folder to PYTHONPATH")
    unmarked = f"model.arch={arch}: {file} has no function {name} with the decorator @simclr_ddp.backbone above it"
    if not _is_marked(file, name):
        raise ValueError(unmarked)
    function = getattr(import_module(module), name)
    if not getattr(function, "is_backbone", False):
        raise ValueError(unmarked)
    network = function()
    if not isinstance(network, nn.Module):
        raise ValueError(f"model.arch={arch}: returns a {type(network).__name__}; must be a torch.nn.Module")
    return network


def _source(module: str) -> Path | None:
    """The source file of a module, found without importing it or its packages."""
    path, found = None, None
    names = module.split(".")
    for i in range(len(names)):
        try:
            found = PathFinder.find_spec(".".join(names[: i + 1]), path)
        except (ImportError, ValueError, KeyError):
            return None
        if found is None:
            return None
        path = found.submodule_search_locations
    return Path(found.origin) if found and found.origin and found.origin.endswith(".py") else None


def _is_marked(file: Path, name: str) -> bool:
    """Whether the file defines a function of that name with a decorator called backbone."""
    try:
        body = ast.parse(file.read_text()).body
    except (SyntaxError, ValueError):
        return False
    functions = [f for f in body if isinstance(f, ast.FunctionDef) and f.name == name]
    marks = [getattr(mark, "attr", getattr(mark, "id", "")) for f in functions for mark in f.decorator_list]
    return "backbone" in marks


def _check_deterministic(arch: str, network: nn.Module) -> None:
    for name, module in network.named_modules():
        drops = any(word in type(module).__name__ for word in RANDOM)
        keys = ("drop_prob", "drop_rate", "p", "prob", "dropout") if drops else ("drop_rate",)
        rate = next((rate for rate in (getattr(module, key, None) for key in keys) if rate), 0.0)
        if rate:
            raise ValueError(
                f"model.arch={arch}: {name or 'it'} is {type(module).__name__} at rate {rate:g}, whose random numbers "
                "belong to no image, so that runs would depend on the number of ranks; set its rate to 0"
            )


@torch.no_grad()
def _width(arch: str, network: Callable[[Tensor], Any], size: int) -> int:
    """Number of features that the network returns for an image."""
    try:
        h = network(torch.zeros(1, 3, size, size))
    except Exception as error:  # a model may raise anything for images of a size that it can't take
        raise ValueError(
            f"model.arch={arch}: fails for images of {size} pixels ({one_line(error, 200)}); set data.size"
        ) from error
    if not isinstance(h, Tensor) or h.ndim != 2:
        found = f"shape {list(h.shape)}" if isinstance(h, Tensor) else f"a {type(h).__name__}"
        raise ValueError(f"model.arch={arch}: returns {found} for one image; must be [1, D]")
    return h.shape[1]


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(prefix + PREFIX)]:
        state[prefix + key.removeprefix(prefix + PREFIX)] = state.pop(key)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + PREFIX + key.removeprefix(prefix)] = state.pop(key)

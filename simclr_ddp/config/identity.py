"""Which options make a run what it is: all that change its result, except those without effect next to others."""

import os
from collections.abc import Callable
from itertools import groupby
from typing import Any

from simclr_ddp.config import options, schema
from simclr_ddp.config.schema import Pretrain

RESNETS = options.options(Pretrain)["model.arch"].metadata["choices"]
MIXTURES = ("simple_sum", "concat_sum")


def without_effect(values: dict[str, Any]) -> dict[str, str]:
    """Return {dotted key: the setting that leaves it without effect} for all options of a run, {dotted key: value}."""
    found: dict[str, str] = {}

    def unused(unless: bool, because: str, *keys: str) -> None:
        if not unless:
            found.update(dict.fromkeys(keys, f"{because}={options.shown(values[because])}"))

    kernel, head = values["loss.kernel"], values["head.kind"]
    sums = [f"loss.{name}" for name in ("mix_weight", "mix_level", "second_temperature")]
    unused(kernel in MIXTURES, "loss.kernel", *sums)
    unused(kernel in (*MIXTURES, "exponential"), "loss.kernel", "loss.gamma")
    unused(kernel == "arccos", "loss.kernel", "loss.order")
    unused(kernel != "spectral", "loss.kernel", "loss.temperature")
    own = [f"model.{name}" for name in ("width", "stem")]
    unused(values["model.arch"] in RESNETS, "model.arch", *own)
    unused(head == "nonlinear", "head.kind", "head.layers", "head.hidden")
    unused(head != "none", "head.kind", "head.out")
    unused(values["optim.name"] == "lars", "optim.name", "optim.trust_coefficient", "optim.unadapted_rate")
    unused(values["optim.steps"] is None, "optim.steps", "optim.epochs")
    unused(values["probe.enabled"], "probe.enabled", "probe.learning_rate", "probe.validation_fraction")
    monitored = [f"monitor.{name}" for name in ("images", "views", "k")]
    unused(values["monitor.every_epochs"] > 0, "monitor.every_epochs", *monitored)
    colours = [f"data.augmentation.{name}" for name in ("strength", "order")]
    unused(values["data.augmentation.jitter"] > 0, "data.augmentation.jitter", *colours)
    rendered = [key for key in values if key.startswith("data.augmentation.")]
    unused(values["data.train"] != "spirograph", "data.train", *rendered)
    return found


def finetune_without_effect(values: dict[str, Any]) -> dict[str, str]:
    """Return the same as `without_effect` for the options of finetune."""
    found: dict[str, str] = {}

    def unused(unless: bool, because: str, *keys: str) -> None:
        if not unless:
            found.update(dict.fromkeys(keys, f"{because}={options.shown(values[because])}"))

    name, grid = values["optim.name"], values["grid.learning_rates"] or values["grid.weight_decays"]
    unused(name == "lars", "optim.name", "optim.trust_coefficient", "optim.unadapted_rate")
    unused(values["optim.momentum"] > 0, "optim.momentum", "optim.nesterov")
    unused(name == "sgd", "optim.name", "optim.nesterov")
    unused(values["optim.steps"] is None, "optim.steps", "optim.epochs")
    unused(not values["frozen"], "frozen", "freeze_bn", "bn_momentum", "optim.layer_decay", "checkpoint_stages")
    unused(not values["freeze_bn"], "freeze_bn", "bn_momentum")
    unused(not values["labels.list"], "labels.list", "labels.fraction")
    unused(bool(grid), "grid.learning_rates", "grid.validation_fraction", "grid.validate_every_epochs")
    return found


def identity_keys(config: Any) -> dict[str, Any]:
    """Return the options in which equal runs agree, as {dotted key: value}: all but the training images themselves.

    Their file may move, so that they are identified by their content.
    """
    unused = without_effect(options.dotted(config))
    keys = {k: v for k, v in schema.result_keys(config).items() if k not in unused and k != "data.train"}
    return keys | {"model.init": os.path.normpath(keys["model.init"])}


def changed_keys(config: Any) -> dict[str, Any]:
    """Return those of the `identity_keys` that have not their default, so that new options rename no run."""
    defaults = options.dotted(Pretrain())
    return {k: v for k, v in identity_keys(config).items() if v != defaults[k]}


def idle_options(config: Any, unused: Callable[[dict[str, Any]], dict[str, str]] = without_effect) -> list[str]:
    """Return warnings that name the options that were set to another value than their default and have no effect.

    Without optim.epochs, for which `options.build` decides. `unused` is that function of the command.
    """
    values, defaults, warnings = options.dotted(config), options.dotted(type(config)()), []
    for because, group in groupby(unused(values).items(), lambda item: item[1]):
        idle = [k for k, _ in group if values[k] != defaults[k] and k != "optim.epochs"]
        if idle:
            named = ", ".join(f"{key}={options.shown(values[key])}" for key in idle)
            warnings.append(f"{named}: no effect with {because}; leave it at its default")
    return warnings

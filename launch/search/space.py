"""The values in which the trials of a sweep differ: the space of a random search, or the axes of a grid.

    space:
      loss.kernel: {choice: [cosine, laplacian, exponential]}
      loss.temperature: {log: [0.05, 1]}                         # or uniform; integers where the option is one
      loss.gamma: {uniform: [0.5, 2], when: {loss.kernel: exponential}}
    grid:
      optim.epochs: [100, 200]
      kernel:                                                    # a name for each set of values
        sharp: {loss.kernel: cosine, loss.temperature: 0.1}
        wide: {loss.kernel: laplacian, loss.temperature: 0.3}

A value is a function of the seed, the trial's number and the key, whatever else is searched, finishes or fails.
"""

import json
import math
import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain

KINDS = ("log", "uniform", "choice")
SPECIFICATION = re.compile(rf"(.+?)\.({'|'.join(KINDS)}|when\.(.+))")
INTEGER, NUMBER = (int, int | None), (float, float | None)
OWN = ("name", "run_dir")  # the sweep chooses them for each trial


@dataclass
class Dimension:
    """A key of the search and the distribution of its values."""

    key: str
    kind: str = ""
    values: list[Any] = field(default_factory=list)  # the lowest and the highest, or the choices
    when: dict[str, list[Any]] = field(default_factory=dict)  # {key: values} under which it is drawn; empty: always
    integer: bool = False


@dataclass
class Axis:
    """An axis of the grid: a label and settings for each of its places."""

    name: str
    places: dict[str | int | float | bool | None, dict[str, Any]] = field(default_factory=dict)


def parse_space(entries: dict[str, Any]) -> list[Dimension]:
    """The dimensions, each after those that its conditions name; entries as in {"loss.gamma.when.loss.kernel": ...}.

    Raises ValueError naming the entry.
    """
    found: dict[str, Dimension] = {}
    for entry, value in entries.items():
        match = SPECIFICATION.fullmatch(entry)
        if match is None:
            kinds = "{log: [low, high]}, {uniform: [low, high]} or {choice: [...]}"
            raise ValueError(f"space.{entry}={value}: no distribution; write {kinds}")
        key, kind, other = match.groups()
        dimension = found.setdefault(key, Dimension(key))
        if other:
            values = value if isinstance(value, list) else [value]
            dimension.when[other] = [options.checked(Pretrain, f"space.{key}.when", other, v) for v in values]
        elif dimension.kind:
            raise ValueError(f"space.{key}: it has both {dimension.kind} and {kind}; leave one out")
        else:
            dimension.kind, dimension.values = kind, _values(key, kind, value)
            dimension.integer = options.options(Pretrain)[key].type in INTEGER
    for key, dimension in found.items():
        if not dimension.kind:
            raise ValueError(f"space.{key}: it has a condition but no values; add log, uniform or choice")
    return _ordered(found)


def sample(space: list[Dimension], fixed: dict[str, Any], seed: int, number: int) -> dict[str, Any]:
    """{key: value} of a trial, without the keys whose conditions don't hold.

    fixed   {key: value} of what all trials share, which conditions may also use
    """
    drawn: dict[str, Any] = {}
    for d in space:
        if all((fixed | drawn)[key] in values for key, values in d.when.items()):
            drawn[d.key] = _draw(d, _share(seed, number, d.key))
    return drawn


def parse_grid(entries: dict[str, Any]) -> list[Axis]:
    """The axes; entries as in {"optim.epochs": [100, 200], "kernel.sharp.loss.temperature": 0.1}."""
    axes: dict[str, Axis] = {}
    known = options.options(Pretrain)
    for entry, value in entries.items():
        name, _, rest = entry.partition(".")
        label, _, key = rest.partition(".")
        if entry in known or not key:
            if not isinstance(value, list) or not value:
                options.checked(Pretrain, "grid", entry, value)  # has a better message if the key is wrong
                raise ValueError(f"grid.{entry}={value}: not a list of values; write [VALUE, ...]")
            _refuse_own(entry)
            taken = [options.checked(Pretrain, "grid", entry, v) for v in value]
            axes[entry] = Axis(entry, {label_of(v): {entry: v} for v in taken})
            if len(axes[entry].places) < len(value):
                raise ValueError(f"grid.{entry}={value}: a value occurs twice; remove one")
        else:
            _refuse_own(key)
            place = axes.setdefault(name, Axis(name)).places.setdefault(label, {})
            place[key] = options.checked(Pretrain, f"grid.{name}.{label}", key, value)
    keys = [{key for place in axis.places.values() for key in place} for axis in axes.values()]
    if twice := [key for i, some in enumerate(keys) for key in some if any(key in others for others in keys[:i])]:
        raise ValueError(f"{twice[0]} is set by two axes of the grid; remove it from one")
    return list(axes.values())


def cells(axes: list[Axis]) -> int:
    return math.prod(len(axis.places) for axis in axes)


def cell(axes: list[Axis], number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """({axis: label}, {key: value}) of a cell of the grid; the last axis varies fastest."""
    labels: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for axis in reversed(axes):
        number, place = divmod(number, len(axis.places))
        label = list(axis.places)[place]
        labels, settings = {axis.name: label} | labels, axis.places[label] | settings
    return labels, settings


def label_of(value: Any) -> Any:
    """The value itself, or the text of a list."""
    return json.dumps(value) if isinstance(value, list) else value


def _values(key: str, kind: str, value: Any) -> list[Any]:
    """The ends or choices, checked: values that the option accepts, in the right order."""
    _refuse_own(key)
    listed = value if isinstance(value, list) and value else [value]
    taken = [options.checked(Pretrain, "space", key, v) for v in listed]
    if listed is not value:
        raise ValueError(f"space.{key}.{kind}={value}: not a list; write [VALUE, ...]")
    if kind == "choice":
        return taken
    if options.options(Pretrain)[key].type not in INTEGER + NUMBER:
        raise ValueError(f"space.{key}.{kind}={value}: {key} is not a number; use choice")
    if len(taken) != 2 or None in taken or not taken[0] < taken[1]:
        raise ValueError(f"space.{key}.{kind}={value}: expected two numbers in ascending order; write [low, high]")
    if not all(math.isfinite(v) for v in taken) or (kind == "log" and taken[0] <= 0):
        raise ValueError(f"space.{key}.{kind}={value}: the ends must be finite{' and above 0' * (kind == 'log')}")
    return taken


def _refuse_own(key: str) -> None:
    if key in OWN:
        raise ValueError(f"{key}: the sweep chooses it for each trial; set sweep_dir=... to choose the folder")


def _ordered(found: dict[str, Dimension]) -> list[Dimension]:
    ordered: list[Dimension] = []
    while len(ordered) < len(found):
        placed = {d.key for d in ordered}
        ready = [d for d in found.values() if d.key not in placed and (d.when.keys() & found.keys()) <= placed]
        if not ready:
            left = ", ".join(key for key in found if key not in placed)
            raise ValueError(f"space: the conditions (when) of {left} depend on each other; remove one")
        ordered += ready
    return ordered


def _share(seed: int, number: int, key: str) -> float:
    """A number in [0, 1), equal for equal arguments."""
    return int.from_bytes(sha256(f"{seed} {number} {key}".encode()).digest()[:6], "big") / 2**48


def _draw(d: Dimension, share: float) -> Any:
    """The value at that quantile; numbers have four digits, so that they can be typed."""
    if d.kind == "choice":
        return d.values[int(share * len(d.values))]
    low, high = d.values
    end = high + 1 if d.integer else high
    value = low * (end / low) ** share if d.kind == "log" else low + (end - low) * share
    return min(high, math.floor(value) if d.integer else max(low, float(f"{value:.4g}")))

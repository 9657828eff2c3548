"""Typed options: declaration, parsing of YAML files and command lines, checks, and the text of --help."""

import difflib
import json
import math
import os
import re
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simclr_ddp.system import console
from simclr_ddp.system.errors import one_line
from simclr_ddp.system.files import not_a_file


def option(
    default: Any,
    meaning: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    length: int | None = None,
    hint: str = "",
    secret: bool = False,
    path: bool = False,
    replaces: str = "",
    pattern: str = "",
) -> Any:
    """Declare a dataclass field with help text, choices, smallest and largest value, and length of a list.

    Limits are inclusive; infinity is allowed only if `high` is infinite.

    hint      explains the limits
    secret    messages do not show the value
    path      whether it may be a path, in which ~ and, in a file, $NAME are replaced
    pattern   regular expression of further values beside the choices
    replaces  option that has no effect if this one is not null; of the two, the one that is set later wins
    """
    metadata = {"meaning": meaning, "choices": choices, "low": low, "high": high, "length": length}
    metadata |= {"hint": hint, "secret": secret, "path": path, "replaces": replaces, "pattern": pattern}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    return field(default_factory=cls)


def options(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: dataclass field} for all options of a config class."""
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


class _Loader(yaml.SafeLoader):
    """Reads YAML as most people write it, by the core schema of YAML 1.2: `no` and `on` are words, 1e-6 is a number.

    A number with leading zeros is a text until the type of its option is known. A key that is given twice is an error.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise ValueError(f"{key.value} is given twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for kind, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{pattern})$"), first)
COMMAND_LINE = "the command line"  # origin of its layers
LARGEST = 1 << 20  # bytes of a config file


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file as {dotted key: value}."""
    fault = not_a_file(Path(path))
    if fault == "does not exist":
        near = difflib.get_close_matches(str(path), [str(p) for p in Path("configs").glob("*/*.yaml")], 1, 0.75)
        hint = f"did you mean {near[0]}?" if near else "see configs/ for the included files"
        raise ValueError(f"config file {path} does not exist; {hint}")
    if fault:
        inside = Path(path, "config.yaml")
        hint = f"did you mean {inside}?" if inside.is_file() else "give a YAML file"
        raise ValueError(f"config file {path} {fault}; {hint}")
    if Path(path).stat().st_size > LARGEST:
        raise ValueError(f"config file {path} has more than {LARGEST:,} bytes; give a YAML file")
    try:
        values = _Loader(Path(path).read_text("utf-8")).get_single_data() or {}
    except Exception as error:  # errors of yaml and the codec have no common class
        tabs = "; indent with spaces, not with tabs" if "'\\t'" in str(error) else ""
        raise ValueError(f"config file {path} is not valid YAML: {one_line(error, 300)}{tabs}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} does not consist of `key: value` pairs")
    return _flat({str(k): v for k, v in values.items()})


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value`; lists, quoted strings and null are parsed as YAML, all else is a string for the type."""
    key, _, value = text.partition("=")
    if value not in ("null", "~") and value[:1] not in ("[", "{", '"', "'"):
        return key, value
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index,call-overload]
    except Exception as error:  # errors of yaml and OmegaConf have no common class
        raise ValueError(f"{text}: the value is not valid YAML ({one_line(error)})") from error


def build(cls: type, layers: list[tuple[str, dict[str, Any]]]) -> Any:
    """Build the config class from defaults and layers of (origin, {dotted key: value}); the last layer wins.

    Raises ValueError for an unknown key, a wrong type, a value out of range or a missing value.
    """
    known = options(cls)
    config: DictConfig = OmegaConf.structured(cls)
    for origin, values in layers:
        for key, value in values.items():
            if key == "starts":  # in the config.yaml of a run: when it was started, and where
                continue
            if value in (None, {}) and any(name.startswith(f"{key}.") for name in known):
                continue  # `optim:` with nothing below it
            _take(config, known, origin, key, value)
        for key, f in known.items():
            if f.metadata["replaces"] in values:
                _settle(config, key, f.metadata["replaces"], known, origin, values)
    for key in known:
        if OmegaConf.is_missing(config, key):
            raise ValueError(f"{key} is missing; expected {key}=<{known[key].metadata['meaning']}>")
    return OmegaConf.to_object(config)


def checked(cls: type, origin: str, key: str, value: Any) -> Any:
    """Convert and check a value of the option `key` of the config class; raises ValueError like `build`."""
    scratch = _scratch(cls)
    _take(scratch, options(cls), origin, key, value)
    taken = OmegaConf.select(scratch, key)
    return list(taken) if OmegaConf.is_list(taken) else taken


@lru_cache
def _scratch(cls: type) -> DictConfig:
    return OmegaConf.structured(cls)


def _settle(
    config: DictConfig, key: str, replaced: str, known: dict[str, Any], origin: str, values: dict[str, Any]
) -> None:
    """Let the later of two options win that exclude each other, `key` and the one that it replaces, with a word."""
    value, other = (OmegaConf.select(config, name) for name in (key, replaced))
    if value is None or (key in values and other == known[replaced].default):
        return
    if key in values:
        console.warn(f"{replaced}={other} in {origin}: no effect with {key}={value} there; remove one of them")
    else:
        console.warn(f"{replaced}={other} in {origin} replaces {key}={value}, which was set before")
        OmegaConf.update(config, key, None)


def _take(config: DictConfig, known: dict[str, Any], origin: str, key: str, value: Any) -> None:
    """Set one option after checks. A key below an option that is a mapping is an entry of it, including dots."""
    mapping = next((name for name, f in known.items() if f.type == dict[str, Any] and key.startswith(f"{name}.")), "")
    if key not in known and not mapping:
        inside = [name for name in known if name.startswith(f"{key}.")]
        raise ValueError(f"unknown option {key} in {origin}; {_similar(key, known, inside)}")
    f = known.get(key)
    if f is not None and f.type is str and isinstance(value, bool | float | None):
        way_out = "leave it out, or write '' for none" if value is None else "put it in quotes"
        raise ValueError(f"{key}={shown(value)} in {origin}: must be a string; {way_out}")
    if f is not None and f.metadata["path"] and isinstance(value, str):
        value = _expanded(key, value, variables=origin != COMMAND_LINE)
    if value == MISSING:
        raise ValueError(f"{key}={value} in {origin}: must be {_type_name(known[mapping or key])}")
    try:
        if mapping:
            for entry, entered in _flat({key.removeprefix(f"{mapping}."): value}).items():
                OmegaConf.select(config, mapping)[entry] = entered
            return
        OmegaConf.update(config, key, value)
        taken = OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        text = "..." if known[mapping or key].metadata["secret"] else value
        raise ValueError(f"{key}={text} in {origin}: must be {_type_name(known[mapping or key])}") from error
    _check_value(key, known[key], taken)


def _similar(key: str, known: dict[str, Any], inside: list[str]) -> str:
    """Return a hint for an unknown option: options whose last part is the same, ends the same, or is similar."""
    if inside:
        return f"{key} is a section, whose options are {', '.join(inside[:3])} ...; write one of them"
    word = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == word]
    ending = [name for name in known if name.endswith(f"_{word}") or (len(word) > 1 and _initials(name).endswith(word))]
    # The probe shares names with the run itself, which is more often meant.
    near = same if any(not name.startswith("probe.") for name in same) else [*ending, *same]

    def likeness(name: str) -> float:
        pairs = ((key, name), (word, name.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    near = near or [name for name in sorted(known, key=likeness, reverse=True)[:1] if likeness(name) >= 0.6]
    return f"did you mean {' or '.join(near[:3])}?" if near and key else "--help lists every option"


def _initials(name: str) -> str:
    """Return the first letters of the words of an option's last part: blr of optim.base_learning_rate."""
    return "".join(part[0] for part in name.rpartition(".")[2].split("_"))


def _expanded(key: str, value: str, variables: bool) -> str:
    """Replace ~ and, if `variables`, $NAME in a path. Raises ValueError if there is no such user or variable.

    On a command line the shell has replaced variables, but no ~ after key=.
    """
    found = os.path.expanduser(value)
    if os.path.exists(found):
        return found
    if found.startswith("~"):
        raise ValueError(f"{key}={value}: there is no home folder {found.partition('/')[0]}; write the complete path")
    if not variables:
        return found
    found = os.path.expandvars(found)
    if missing := re.search(r"\$(\w+|\{[^}]*\})", found):
        raise ValueError(f"{key}={value}: the variable {missing[0]} is not set; set it, or write the complete path")
    return found


def _type_name(f: Any) -> str:
    names: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    names |= {int | None: "an integer or null", float | None: "a number or null"}
    return (
        names.get(f.type)
        or {
            list[float]: "a list of numbers",
            list[int]: "a list of integers",
            list[str]: "a list of strings",
            dict[str, Any]: "a mapping",
        }[f.type]
    )


def _check_value(key: str, f: Any, value: Any) -> None:
    choices, low, high, length = (f.metadata[name] for name in ("choices", "low", "high", "length"))
    why = f" ({f.metadata['hint']})" * bool(f.metadata["hint"])
    if length is not None and len(value) != length:
        raise ValueError(f"{key}={list(value)}: has {len(value)} numbers; must have {length}")
    if choices and value not in choices and not re.fullmatch(f.metadata["pattern"] or "(?!)", str(value)):
        near = difflib.get_close_matches(str(value), choices, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
        raise ValueError(f"{key}={value}: unknown value; {hint}")
    for number in value if OmegaConf.is_list(value) else [value]:
        if isinstance(number, float) and high != math.inf and not math.isfinite(number):
            raise ValueError(f"{key}={number}: must be a finite number")
        if low is not None and number is not None and not number >= low:
            raise ValueError(f"{key}={number}: too small; must be at least {low:g}{why}")
        if high is not None and number is not None and not number <= high:
            raise ValueError(f"{key}={number}: too large; must be at most {high:g}{why}")


def shown(value: Any) -> str:
    """Return a value as it is typed after `key=`."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def plain(config: Any) -> dict:
    """Convert a config to nested dictionaries of plain values, for YAML, JSON and checkpoints."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def dotted(config: Any) -> dict[str, Any]:
    """Return {dotted key: value} of a config object or of the result of `plain`."""
    return _flat(config if isinstance(config, dict) else plain(config))


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def help_text(cls: type) -> str:
    """Format one line per option with name, type, default, meaning and choices."""
    lines = []
    for key, f in options(cls).items():
        default = f.default if f.default_factory is DATACLASS_MISSING else f.default_factory()
        shown = "required" if default is MISSING else json.dumps(default)
        choices = f" ({' | '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        lines.append(f"  {key:<32} {_type_name(f):<24} {shown:<12} {f.metadata['meaning']}{choices}")
    return "\n".join(lines)

"""Options: which value wins, what is refused and how, and that each one is documented and read."""

import ast
import contextlib
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simclr_ddp
from simclr_ddp import config
from simclr_ddp.config import LinearEval, Pretrain, Visualize, WriteDataset

COMMANDS = (Pretrain, LinearEval, WriteDataset, Visualize, config.Verify, config.Doctor, config.Replay)
REQUIRED: dict[type, dict[str, str]] = {
    Pretrain: {},
    LinearEval: {"run": "r"},
    WriteDataset: {"source": "s", "out": "o"},
    Visualize: {"run": "r"},
    config.Verify: {},
    config.Doctor: {},
    config.Replay: {"dump": "d"},
}


def given_on_the_line(*texts: str) -> dict[str, Any]:
    return dict(config.parse_override(text) for text in texts)


def build(*texts: str, yaml: dict[str, Any] | None = None, cls: type = Pretrain) -> Any:
    layers = [("file.yaml", yaml)] if yaml else []
    return config.build(cls, [*layers, ("the command line", given_on_the_line(*texts))])


def value(text: str) -> Any:
    return config.dotted(build(text))[text.partition("=")[0]]


def error(*texts: str, cls: type = Pretrain) -> str:
    with pytest.raises(ValueError) as caught:
        build(*texts, cls=cls)
    return str(caught.value)


# --- which value wins -----------------------------------------------------------------------------------------------


def test_default_then_yaml_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 3\noptim:\n  epochs: 30\n  weight_decay: 1e-4\nhead:\n  hidden: 64\n")
    made = build("optim.epochs=7", "head.hidden=null", yaml=config.read_yaml(file))
    assert (made.seed, made.optim.epochs, made.optim.weight_decay, made.head.hidden) == (3, 7, 1e-4, None)
    assert made.optim.momentum == Pretrain().optim.momentum
    assert build() == Pretrain()


def test_nothing_is_shared_between_two_configs() -> None:
    one, other = build(), build()
    one.data.augmentation.blur.append(1.0)
    one.resume.force.append("seed")
    assert other == Pretrain() == build()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.weight_decay=1e-6", 1e-6),
        ("optim.weight_decay=1.e-6", 1e-6),
        ("optim.weight_decay=1E-6", 1e-6),
        ("optim.base_learning_rate=2", 2.0),
        ("optim.steps=null", None),
        ("optim.steps=12", 12),
        ("data.augmentation.blur=[0.5,1]", [0.5, 1.0]),
        ("data.augmentation.blur=[0.5, 1e-1]", [0.5, 0.1]),
        ("resume.force=[optim.epochs,seed]", ["optim.epochs", "seed"]),
        ("resume.force=[]", []),
        ("log.wandb=true", True),
        ("log.wandb=False", False),
        ("loss.norm_p=inf", math.inf),
        ("run_dir=a=b", "a=b"),
        ("run_dir=/tmp/x y", "/tmp/x y"),
        ("seed=9223372036854775807", 2**63 - 1),
    ],
)
def test_values(text: str, expected: Any) -> None:
    assert value(text) == expected and type(value(text)) is type(expected)


def test_scientific_notation_in_yaml(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-6 for a text."""
    file = tmp_path / "a.yaml"
    file.write_text("optim: {weight_decay: 1e-6, trust_coefficient: 2e-2}\nprobe.learning_rate: 1e-2\n")
    made = build(yaml=config.read_yaml(file))
    assert (made.optim.weight_decay, made.optim.trust_coefficient, made.probe.learning_rate) == (1e-6, 0.02, 0.01)


@pytest.mark.parametrize("cls", COMMANDS)
def test_what_is_written_is_what_is_read(cls: type, tmp_path: Path) -> None:
    made = build(*(f"{k}={v}" for k, v in REQUIRED[cls].items()), cls=cls)
    (tmp_path / "a.yaml").write_text(config.to_yaml(made))
    assert config.build(cls, [("a.yaml", config.read_yaml(tmp_path / "a.yaml"))]) == made
    assert config.build(cls, [("dotted", config.dotted(made))]) == made


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim.weight_decy=1", ["unknown option optim.weight_decy in the command line", "optim.weight_decay?"]),
        ("epochs=3", ["did you mean optim.epochs?"]),
        ("temperature=3", ["did you mean loss.temperature?"]),
        ("qqq=3", ["unknown option qqq", "--help lists every option"]),
        ("optim=3", ["unknown option optim "]),
        ("=3", ["unknown option"]),
        ("optim.epochs=ten", ["optim.epochs=ten", "a whole number is wanted"]),
        ("optim.epochs=2.5", ["optim.epochs=2.5", "a whole number is wanted"]),
        ("optim.epochs=null", ["optim.epochs=None", "a whole number is wanted"]),
        ("optim.epochs=[1]", ["a whole number is wanted"]),
        ("optim.steps=x", ["a whole number or null is wanted"]),
        ("optim.steps=???", ["optim.steps=???", "a whole number or null is wanted"]),
        ("optim.momentum=much", ["a number is wanted"]),
        ("loss.second_temperature=x", ["a number or null is wanted"]),
        ("log.wandb=maybe", ["log.wandb=maybe", "true or false is wanted"]),
        ("name=[1,2]", ["text is wanted"]),
        ("name=${nothing}", ["name=${nothing}", "text is wanted"]),
        ("data.augmentation.blur=0.5", ["a list of numbers is wanted"]),
        ("data.augmentation.blur=[0.5]", ["has 1 numbers: 2 are wanted"]),
        ("data.augmentation.mean=[0,0,0,0]", ["has 4 numbers: 3 are wanted"]),
        ("data.augmentation.blur=[a,b]", ["a list of numbers is wanted"]),
        ("resume.force=optim.epochs", ["a list of texts is wanted"]),
        ("loss.kernel=gausian", ["loss.kernel=gausian is not known: did you mean gaussian?"]),
        ("optim.name=zzz", ["one of lars, sgd, adamw is wanted"]),
        ("optim.epochs=0", ["optim.epochs=0 is too small: at least 1 is wanted"]),
        ("optim.weight_decay=-1e-6", ["is too small: at least 0 is wanted"]),
        ("loss.temperature=0", ["loss.temperature=0.0 is too small: at least 1e-06 is wanted"]),
        ("loss.temperature=nan", ["a finite number is wanted"]),
        ("optim.base_learning_rate=inf", ["a finite number is wanted"]),
        ("data.augmentation.std=[nan,1,1]", ["a finite number is wanted"]),
        ("data.augmentation.flip=2", ["data.augmentation.flip=2.0 is too large: at most 1 is wanted"]),
        ("data.augmentation.blur=[0.5,1.5]", ["data.augmentation.blur=1.5 is too large"]),
        ("loss.order=4", ["loss.order=4 is too large: at most 3"]),
        ("loss.gamma=65", ["loss.gamma=65.0 is too large: at most 64"]),
        ("seed=-1", ["seed=-1 is too small"]),
        ("seed=99999999999999999999", ["is too large"]),
        ("name='", ["name=': the value is not valid YAML"]),
        ("name=[", ["not valid YAML"]),
    ],
)
def test_errors_name_key_value_and_way_out(text: str, parts: list[str]) -> None:
    told = error(text)
    assert all(part in told for part in parts), told


@pytest.mark.parametrize("cls", [LinearEval, WriteDataset, Visualize])
def test_a_missing_one_is_named(cls: type) -> None:
    required = REQUIRED[cls]
    for key in required:
        given = [f"{k}={v}" for k, v in required.items() if k != key]
        assert error(*given, cls=cls).startswith(f"{key} is missing: ")


def test_errors_in_a_file_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown option optim.epoch in file.yaml: did you mean optim.epochs\?"):
        build(yaml={"optim.epoch": 3})
    file = tmp_path / "bad.yaml"
    for content, message in (("a: [1", "is not valid YAML"), ("- 1\n- 2\n", "holds no `key: value` pairs")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            config.read_yaml(file)
    file.write_text("")
    assert config.read_yaml(file) == {}  # an empty file leaves all defaults
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="is not valid YAML"):
        config.read_yaml(tmp_path / "bytes.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        config.read_yaml(tmp_path / "missing.yaml")


def test_a_missing_file_suggests_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "pretrain").mkdir(parents=True)
    (tmp_path / "configs" / "pretrain" / "cifar10.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"did you mean configs/pretrain/cifar10.yaml\?"):
        config.read_yaml("configs/pretrain/cifar.yaml")
    with pytest.raises(ValueError, match="see configs/"):
        config.read_yaml("q")


@given(st.text())
@settings(max_examples=120, deadline=None)
def test_parsing_any_text_gives_a_value_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        config.parse_override(text)


@given(
    st.sampled_from(sorted(config.options(Pretrain))), st.text() | st.from_regex(r"[-0-9.eE\[\],{}:$?~' nulinfa]{0,12}")
)
@settings(max_examples=120, deadline=None)
def test_any_value_of_any_option_is_taken_or_refused_with_a_value_error(key: str, text: str) -> None:
    try:
        made = build(f"{key}={text}")
    except ValueError:
        return
    config.short_hash(config.result_keys(made))
    assert config.build(Pretrain, [("again", config.dotted(made))]) == made or "nan" in text.lower() or "$" in text


# --- the options themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", COMMANDS)
def test_every_option_has_a_meaning_and_a_line_of_help(cls: type) -> None:
    lines = config.help_text(cls).splitlines()
    assert len(lines) == len(config.options(cls))
    for (key, option), line in zip(config.options(cls).items(), lines, strict=True):
        assert len(option.metadata["meaning"]) > 5, key
        assert line.split()[0] == key and option.metadata["meaning"] in line
        assert all(choice in line for choice in option.metadata["choices"])
        default = dataclasses.MISSING if option.default is dataclasses.MISSING else option.default
        if default not in (dataclasses.MISSING, "", "???"):
            assert str(default).lower().replace("none", "null") in line, key


@pytest.mark.parametrize("cls", COMMANDS)
def test_defaults_keep_their_own_limits(cls: type) -> None:
    made = build(*(f"{k}={v}" for k, v in REQUIRED[cls].items()), cls=cls)
    for key, default in config.dotted(made).items():
        config.build(cls, [("required", REQUIRED[cls]), ("default", {key: default})])


@functools.cache
def attributes_read() -> set[tuple[str, str]]:
    """(config class, attribute) of every `x.attribute` in the sources, x known by annotation or assignment.

    Within one function: `settings: Pretrain` gives settings.optim the class Optim, and so on through
    `optim = settings.optim`; a parameter's annotation counts too.
    """
    classes = {c.__name__: c for c in vars(config).values() if isinstance(c, type) and dataclasses.is_dataclass(c)}
    found: set[tuple[str, str]] = set()

    def class_of(node: ast.expr, known: dict[str, type]) -> type | None:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(owner := class_of(node.value, known), type):
                types = {f.name: f.type for f in dataclasses.fields(owner)}
                return types[node.attr] if dataclasses.is_dataclass(types.get(node.attr)) else None
            return None
        return None

    for path in Path(simclr_ddp.__file__).parent.glob("*.py"):
        if path.name == "config.py":
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            known: dict[str, type] = {}
            for argument in [*function.args.args, *function.args.kwonlyargs]:
                if isinstance(argument.annotation, ast.Name) and argument.annotation.id in classes:
                    known[argument.arg] = classes[argument.annotation.id]
            for node in ast.walk(function):
                if isinstance(node, ast.Assign):
                    target, source = node.targets[0], node.value
                    pairs = [(target, source)]
                    if isinstance(target, ast.Tuple) and isinstance(source, ast.Tuple):
                        pairs = list(zip(target.elts, source.elts, strict=False))
                    for left, right in pairs:
                        owner = class_of(right, known)
                        if isinstance(left, ast.Name) and owner:
                            known[left.id] = owner
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and (owner := class_of(node.value, known)):
                    found.add((owner.__name__, node.attr))
    return found


def owner_of(cls: type, key: str) -> type:
    for part in key.split(".")[:-1]:
        cls = next(f.type for f in dataclasses.fields(cls) if f.name == part)
    return cls


READ_OTHERWISE = {
    ("Data", "test"),  # by labelled.py, from the dotted settings of the run it evaluates: "data.test"
}


@pytest.mark.parametrize("cls", [cls for cls in COMMANDS if Pretrain not in cls.__bases__])
def test_every_option_is_read_somewhere(cls: type) -> None:
    read = attributes_read() | READ_OTHERWISE
    assert [k for k in config.options(cls) if (owner_of(cls, k).__name__, k.rpartition(".")[2]) not in read] == []


def test_the_search_for_readers_finds_what_is_not_there() -> None:
    assert ("Loss", "temperature") in attributes_read() and ("Augmentation", "flip") in attributes_read()
    assert ("Optim", "nesterov") not in attributes_read() and len(attributes_read()) > 50


# --- the run's name -------------------------------------------------------------------------------------------------


def other_value(key: str, old: Any) -> Any:
    choices = config.options(Pretrain)[key].metadata["choices"]
    if choices:
        return next((c for c in choices if c != old), None)
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return old + 1
    if isinstance(old, float):
        return old / 2 + 0.01 if old > 0 else 0.5
    if isinstance(old, list):
        return [v / 2 + 0.01 for v in old] if old else ["seed"]
    return 3 if old is None else f"{old}x"


@pytest.mark.parametrize("key", config.options(Pretrain))
def test_the_hash_changes_with_what_changes_the_result_and_only_then(key: str) -> None:
    harmless = {"name", "run_dir", "device", "threads", "compile", "data.test", "data.loader", "data.workers"}
    harmless |= {"resume.force", "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep_last"}
    harmless |= {"checkpoint.keep_every_epochs", "timeout", "debug.check_ranks_every", "model.checkpoint_stages"}
    harmless |= {"log.wandb", "log.tensorboard", "log.every_steps"}
    new = other_value(key, config.dotted(Pretrain())[key])
    if new is None:
        assert key == "data.loader"
        return
    changed = config.build(Pretrain, [("here", {key: new})])
    same = config.short_hash(config.result_keys(changed)) == config.short_hash(config.result_keys(Pretrain()))
    assert same == (key in harmless)


def test_the_hash_is_short_and_stable() -> None:
    assert config.short_hash({"b": 1, "a": [0.1]}) == config.short_hash({"a": [0.1], "b": 1}) == "31f1fae3"

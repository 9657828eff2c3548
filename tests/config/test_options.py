"""Options: which value wins, what is refused and how, and that each one is documented and read."""

import ast
import contextlib
import dataclasses
import functools
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simclr_ddp
from simclr_ddp.config import options, schema
from simclr_ddp.config.schema import LinearEval, Pretrain, Visualize, WriteDataset
from simclr_ddp.system import files
from simclr_ddp.training.components import Training
from tests.support.source import parsed

COMMANDS = (Pretrain, LinearEval, WriteDataset, Visualize, schema.Verify, schema.Doctor, schema.Replay)
REQUIRED: dict[type, dict[str, str]] = {
    Pretrain: {},
    LinearEval: {"run": "r"},
    WriteDataset: {"source": "s", "out": "o"},
    Visualize: {"run": "r"},
    schema.Verify: {},
    schema.Doctor: {},
    schema.Replay: {"dump": "d"},
}


def given_on_the_line(*texts: str) -> dict[str, Any]:
    return dict(options.parse_override(text) for text in texts)


def build(*texts: str, yaml: dict[str, Any] | None = None, cls: type = Pretrain) -> Any:
    layers = [("file.yaml", yaml)] if yaml else []
    return options.build(cls, [*layers, ("the command line", given_on_the_line(*texts))])


def value(text: str) -> Any:
    return options.dotted(build(text))[text.partition("=")[0]]


def error(*texts: str, cls: type = Pretrain) -> str:
    with pytest.raises(ValueError) as caught:
        build(*texts, cls=cls)
    return str(caught.value)


# --- which value wins -----------------------------------------------------------------------------------------------


def test_default_then_yaml_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 3\noptim:\n  epochs: 30\n  weight_decay: 1e-4\nhead:\n  hidden: 64\n")
    made = build("optim.epochs=7", "head.hidden=null", yaml=options.read_yaml(file))
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
    made = build(yaml=options.read_yaml(file))
    assert (made.optim.weight_decay, made.optim.trust_coefficient, made.probe.learning_rate) == (1e-6, 0.02, 0.01)


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("name: no", "name", "no"),
        ("name: on", "name", "on"),
        ("name: 007", "name", "007"),
        ("name: 12", "name", "12"),
        ("name: 2026-11-30", "name", "2026-11-30"),
        ("name: 12:30:45", "name", "12:30:45"),
        ("name: 'null'", "name", "null"),
        ("seed: 010", "seed", 10),
        ("seed: 0", "seed", 0),
        ("optim.steps: ~", "optim.steps", None),
        ("optim.steps:", "optim.steps", None),
        ("optim: {weight_decay: 1e5}", "optim.weight_decay", 1e5),
        ("optim: {weight_decay: 1}", "optim.weight_decay", 1.0),
        ("optim: {weight_decay: .5e-3}", "optim.weight_decay", 5e-4),
        ("loss.norm_p: .inf", "loss.norm_p", math.inf),
        ("log: {wandb: on}", "log.wandb", True),
        ("log: {wandb: yes}", "log.wandb", True),
        ("probe: {enabled: off}", "probe.enabled", False),
        ("probe: {enabled: False}", "probe.enabled", False),
        ("data.augmentation.blur: [1, 0]", "data.augmentation.blur", [1.0, 0.0]),
        ("optim:\nseed: 3", "seed", 3),
        ("optim: {}\nseed: 3", "seed", 3),
        ("a: &common {epochs: 3}\n", "", "unknown option a.epochs"),
        ("optim: &common {epochs: 3}\nhead: {out: 64}", "optim.epochs", 3),
        ("name: 1e5", "", "name=100000.0 in a.yaml: must be a string; put it in quotes"),
        ("name: true", "", "name=true in a.yaml: must be a string; put it in quotes"),
        ("run_dir:", "", "run_dir=null in a.yaml: must be a string; leave it out, or write '' for none"),
        ("seed: 0x10", "", "seed=0x10 in a.yaml: must be an integer"),
        ("optim: 3", "", "optim is a section, whose options are optim.name, "),
        ("seed: 1\noptim: {epochs: 3}\nseed: 2", "", "seed is given twice, again in line 3"),
        ("optim:\n  epochs: 3\n  epochs: 3", "", "epochs is given twice, again in line 3"),
        ("optim:\n\tepochs: 3", "", "indent with spaces, not with tabs"),
        ("a: 1\n---\nb: 2", "", "is not valid YAML: expected a single document"),
        ("[" * 9999, "", "is not valid YAML"),
        ("#" * 1_100_000, "", "has more than 1,048,576 bytes"),
    ],
)
def test_yaml_means_what_it_says(
    text: str, key: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """YAML 1.1 takes `no` for false, 010 for 8, 12:30:45 for 45045, and 1e5 for a text."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(text)
    if key:
        found = options.dotted(options.build(Pretrain, [("a.yaml", options.read_yaml("a.yaml"))]))[key]
        assert found == expected and type(found) is type(expected)
    else:
        with pytest.raises(ValueError, match=re.escape(expected)):
            options.build(Pretrain, [("a.yaml", options.read_yaml("a.yaml"))])


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo is a named pipe, not a file; give a YAML file"):
        options.read_yaml(tmp_path / "fifo")
    with pytest.raises(ValueError, match="is a folder, not a file; give a YAML file"):
        options.read_yaml(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(ValueError, match=f"is a folder, not a file; did you mean {tmp_path}/config.yaml"):
        options.read_yaml(tmp_path)


def test_paths_are_expanded_and_names_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(
        "run_dir: ~/runs/x\ndata: {train: $SCRATCH/a.beton, test: '${SCRATCH}/b$.beton'}\n"
    )
    made = build(yaml=options.read_yaml(tmp_path / "a.yaml"))
    assert (made.run_dir, made.data.train, made.data.test) == (
        "/home/me/runs/x",
        "/scratch/a.beton",
        "/scratch/b$.beton",
    )
    assert value("model.init=~/w.pt") == "/home/me/w.pt" and value("name=$SCRATCH~") == "$SCRATCH~"
    assert value("run_dir=a~b") == "a~b"
    assert value("run_dir=$HOME/x") == "$HOME/x", "the shell has left it as it is, since it was quoted"
    with pytest.raises(ValueError, match=r"run_dir=\$NOWHERE/x: the variable \$NOWHERE is not set; "):
        build(yaml={"run_dir": "$NOWHERE/x"})
    assert "run_dir=~nobody-here/x" in error("run_dir=~nobody-here/x")
    (tmp_path / "a$b.beton").touch()
    assert build(yaml={"data.train": "a$b.beton"}).data.train == "a$b.beton"
    assert {key for key, f in options.options(Pretrain).items() if f.metadata["path"]} == {
        "run_dir",
        "data.train",
        "data.test",
        "model.init",
    }


def test_of_steps_and_epochs_the_later_wins(capsys: pytest.CaptureFixture[str]) -> None:
    def length(*layers: dict[str, Any]) -> tuple[int | None, int, str]:
        made = options.build(Pretrain, [(f"layer {i}", layer) for i, layer in enumerate(layers, 1)])
        return made.optim.steps, made.optim.epochs, capsys.readouterr().err

    steps, epochs = {"optim.steps": 6}, {"optim.epochs": 1}
    shown = "warning: optim.epochs=1 in layer 2 replaces optim.steps=6, which was set before\n"
    assert length(steps, epochs) == (None, 1, shown)
    assert length(epochs, steps) == (6, 1, "")
    shown = "warning: optim.epochs=1 in layer 1: no effect with optim.steps=6 there; remove one of them\n"
    assert length(steps | epochs) == (6, 1, shown)
    assert length(steps | {"optim.epochs": 8}) == (6, 8, ""), "a complete config"
    assert length(epochs | {"optim.steps": None}) == (None, 1, "")


def test_the_config_of_a_run_is_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(options.to_yaml(build("seed=3")) + "starts:\n- {step: 0, gpu: null}\n")
    assert build(yaml=options.read_yaml(tmp_path / "config.yaml")) == build("seed=3")


@pytest.mark.parametrize("cls", COMMANDS)
def test_what_is_written_is_what_is_read(cls: type, tmp_path: Path) -> None:
    made = build(*(f"{k}={v}" for k, v in REQUIRED[cls].items()), cls=cls)
    (tmp_path / "a.yaml").write_text(options.to_yaml(made))
    assert options.build(cls, [("a.yaml", options.read_yaml(tmp_path / "a.yaml"))]) == made
    assert options.build(cls, [("dotted", options.dotted(made))]) == made


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim.weight_decy=1", ["unknown option optim.weight_decy in the command line", "optim.weight_decay?"]),
        ("epochs=3", ["did you mean optim.epochs?"]),
        ("lr=3", ["did you mean optim.base_learning_rate or probe.learning_rate?"]),
        ("temperature=3", ["did you mean loss.temperature?"]),
        ("batch_size=64", ["did you mean optim.global_batch_size or optim.micro_batch_size?"]),
        ("data.batch_size=64", ["did you mean optim.global_batch_size or optim.micro_batch_size?"]),
        ("learning_rate=1", ["did you mean optim.base_learning_rate or probe.learning_rate?"]),
        ("wieght_decay=1", ["did you mean optim.weight_decay?"]),
        ("temprature=1", ["did you mean loss.temperature?"]),
        ("qqq=3", ["unknown option qqq", "--help lists every option"]),
        ("optim=3", ["unknown option optim "]),
        ("=3", ["unknown option"]),
        ("optim.epochs=ten", ["optim.epochs=ten", "must be an integer"]),
        ("optim.epochs=2.5", ["optim.epochs=2.5", "must be an integer"]),
        ("optim.epochs=null", ["optim.epochs=None", "must be an integer"]),
        ("optim.epochs=[1]", ["must be an integer"]),
        ("optim.steps=x", ["must be an integer or null"]),
        ("optim.steps=???", ["optim.steps=???", "must be an integer or null"]),
        ("optim.momentum=much", ["must be a number"]),
        ("loss.second_temperature=x", ["must be a number or null"]),
        ("log.wandb=maybe", ["log.wandb=maybe", "must be true or false"]),
        ("name=[1,2]", ["must be a string"]),
        ("name=${nothing}", ["name=${nothing}", "must be a string"]),
        ("data.augmentation.blur=0.5", ["must be a list of numbers"]),
        ("data.augmentation.blur=[0.5]", [": has 1 numbers; must have 2"]),
        ("data.augmentation.mean=[0,0,0,0]", [": has 4 numbers; must have 3"]),
        ("data.augmentation.blur=[a,b]", ["must be a list of numbers"]),
        ("resume.force=optim.epochs", ["must be a list of strings"]),
        ("loss.kernel=gausian", ["loss.kernel=gausian: unknown value; did you mean gaussian?"]),
        ("optim.name=zzz", ["choose one of lars, sgd, adamw"]),
        ("optim.epochs=0", ["optim.epochs=0: too small; must be at least 1"]),
        ("optim.weight_decay=-1e-6", [": too small; must be at least 0"]),
        ("loss.temperature=0", ["loss.temperature=0.0: too small; must be at least 1e-06"]),
        ("loss.temperature=nan", ["must be a finite number"]),
        ("optim.base_learning_rate=inf", ["must be a finite number"]),
        ("data.augmentation.std=[nan,1,1]", ["must be a finite number"]),
        ("data.augmentation.flip=2", ["data.augmentation.flip=2.0: too large; must be at most 1"]),
        ("data.augmentation.blur=[0.5,1.5]", ["data.augmentation.blur=1.5: too large"]),
        ("data.augmentation.mean=[123.675,116.28,103.53]", ["mean=123.675: too large; must be at most 1", "by 255"]),
        ("data.augmentation.std=[58.395,57.12,57.375]", ["std=58.395: too large; must be at most 1", "by 255"]),
        ("data.augmentation.std=[0.2,0,0.2]", ["std=0.0: too small; must be at least 0.001"]),
        ("data.augmentation.std=[0.2,0.2,-0.2]", ["std=-0.2: too small"]),
        ("data.augmentation.mean=[0.2,.nan,0.2]", ["mean=nan: must be a finite number"]),
        ("loss.order=4", ["loss.order=4: too large; must be at most 3"]),
        ("loss.gamma=65", ["loss.gamma=65.0: too large; must be at most 64"]),
        ("seed=-1", ["seed=-1: too small"]),
        ("seed=99999999999999999999", [": too large"]),
        ("name='", ["name=': the value is not valid YAML"]),
        ("name=[", ["not valid YAML"]),
    ],
)
def test_errors_name_key_value_and_way_out(text: str, parts: list[str]) -> None:
    shown = error(text)
    assert all(part in shown for part in parts), shown


@pytest.mark.parametrize("cls", [LinearEval, WriteDataset, Visualize])
def test_a_missing_one_is_named(cls: type) -> None:
    required = REQUIRED[cls]
    for key in required:
        given = [f"{k}={v}" for k, v in required.items() if k != key]
        assert error(*given, cls=cls).startswith(f"{key} is missing; expected ")


def test_errors_in_a_file_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown option optim.epoch in file.yaml; did you mean optim.epochs\?"):
        build(yaml={"optim.epoch": 3})
    file = tmp_path / "bad.yaml"
    for content, message in (("a: [1", "is not valid YAML"), ("- 1\n- 2\n", "does not consist of `key: value` pairs")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            options.read_yaml(file)
    file.write_text("")
    assert options.read_yaml(file) == {}  # an empty file leaves all defaults
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="is not valid YAML"):
        options.read_yaml(tmp_path / "bytes.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        options.read_yaml(tmp_path / "missing.yaml")


def test_a_missing_file_suggests_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "pretrain").mkdir(parents=True)
    (tmp_path / "configs" / "pretrain" / "cifar10.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"did you mean configs/pretrain/cifar10.yaml\?"):
        options.read_yaml("configs/pretrain/cifar.yaml")
    with pytest.raises(ValueError, match="see configs/"):
        options.read_yaml("q")


@given(st.text())
@settings(max_examples=120, deadline=None)
def test_parsing_any_text_gives_a_value_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        options.parse_override(text)


@given(
    st.sampled_from(sorted(options.options(Pretrain))),
    st.text() | st.from_regex(r"[-0-9.eE\[\],{}:$?~' nulinfa]{0,12}"),
)
@settings(max_examples=120, deadline=None)
def test_any_value_of_any_option_is_taken_or_refused_with_a_value_error(key: str, text: str) -> None:
    try:
        made = build(f"{key}={text}")
    except ValueError:
        return
    files.short_hash(schema.result_keys(made))
    assert options.build(Pretrain, [("again", options.dotted(made))]) == made or "nan" in text.lower() or "$" in text


# --- the options themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", COMMANDS)
def test_every_option_has_a_meaning_and_a_line_of_help(cls: type) -> None:
    lines = options.help_text(cls).splitlines()
    assert len(lines) == len(options.options(cls))
    for (key, option), line in zip(options.options(cls).items(), lines, strict=True):
        assert len(option.metadata["meaning"]) > 5, key
        assert line.split()[0] == key and option.metadata["meaning"] in line
        assert all(choice in line for choice in option.metadata["choices"])
        default = dataclasses.MISSING if option.default is dataclasses.MISSING else option.default
        if default not in (dataclasses.MISSING, "", "???"):
            assert str(default).lower().replace("none", "null") in line, key


@pytest.mark.parametrize("cls", COMMANDS)
def test_defaults_keep_their_own_limits(cls: type) -> None:
    made = build(*(f"{k}={v}" for k, v in REQUIRED[cls].items()), cls=cls)
    for key, default in options.dotted(made).items():
        options.build(cls, [("required", REQUIRED[cls]), ("default", {key: default})])


@functools.cache
def attributes_read() -> set[tuple[str, str]]:
    """(config class, attribute) of every `x.attribute` in the sources, x known by annotation or assignment.

    Within one function: `settings: Pretrain` gives settings.optim the class Optim, and so on through
    `optim = settings.optim`; a parameter's annotation counts too.
    """
    classes = {c.__name__: c for c in vars(schema).values() if isinstance(c, type) and dataclasses.is_dataclass(c)}
    classes["Training"] = Training  # whose field `settings` is one of them
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

    for path in Path(simclr_ddp.__file__).parent.rglob("*.py"):
        if path.name == "schema.py":
            continue
        for function in ast.walk(parsed(path)):
            if not isinstance(function, ast.FunctionDef):
                continue
            known: dict[str, type] = {}
            for argument in [*function.args.args, *function.args.kwonlyargs]:
                of = argument.annotation
                of = of.left if isinstance(of, ast.BinOp) else of  # Pretrain | Finetune: they share the sections read
                if isinstance(of, ast.Name) and of.id in classes:
                    known[argument.arg] = classes[of.id]
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
                # f(**vars(section)): f refuses names that it does not take
                whole = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "vars"
                if whole and (owner := class_of(node.args[0], known)):
                    found |= {(owner.__name__, field.name) for field in dataclasses.fields(owner)}
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
    assert [k for k in options.options(cls) if (owner_of(cls, k).__name__, k.rpartition(".")[2]) not in read] == []


def test_the_search_for_readers_finds_what_is_not_there() -> None:
    assert ("Loss", "temperature") in attributes_read() and ("Augmentation", "flip") in attributes_read()
    assert ("Optim", "nesterov") not in attributes_read() and len(attributes_read()) > 50


# --- the run's name -------------------------------------------------------------------------------------------------


def other_value(key: str, old: Any) -> Any:
    choices = options.options(Pretrain)[key].metadata["choices"]
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


@pytest.mark.parametrize("key", options.options(Pretrain))
def test_the_hash_changes_with_what_changes_the_result_and_only_then(key: str) -> None:
    harmless = {"name", "run_dir", "device", "threads", "compile", "data.test", "data.loader", "data.workers"}
    harmless |= {"resume.force", "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep_last"}
    harmless |= {"checkpoint.keep_every_epochs", "timeout", "debug.check_ranks_every", "model.checkpoint_stages"}
    harmless |= {"monitor.every_epochs", "monitor.images", "monitor.views", "monitor.k"}
    harmless |= {"log.wandb", "log.tensorboard", "log.every_steps"}
    new = other_value(key, options.dotted(Pretrain())[key])
    if new is None:
        assert key == "data.loader"
        return
    changed = options.build(Pretrain, [("here", {key: new})])
    same = files.short_hash(schema.result_keys(changed)) == files.short_hash(schema.result_keys(Pretrain()))
    assert same == (key in harmless)


def test_the_hash_is_short_and_stable() -> None:
    assert files.short_hash({"b": 1, "a": [0.1]}) == files.short_hash({"a": [0.1], "b": 1}) == "31f1fae3"

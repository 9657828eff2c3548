"""What sweeps draw: parsing, conditions, and values that depend on the seed and the number alone."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.search.plan import Sweep, make_plan
from launch.search.space import cell, cells, parse_grid, parse_space, sample
from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.training.components import make_objective
from tests.support import processes

FIXED = {"loss.kernel": "cosine", "seed": 0}
NUMBERS = st.floats(1e-6, 1e6, allow_nan=False)
KERNELS = ["cosine", "gaussian", "laplacian", "exponential"]


def entries(**more: Any) -> dict[str, Any]:
    return {
        "loss.kernel.choice": KERNELS,
        "loss.gamma.choice": [0.5, 1],
        "loss.gamma.when.loss.kernel": "exponential",
        "loss.temperature.log": [0.01, 1],
        "optim.epochs.uniform": [3, 5],
        **more,
    }


# --- the space ------------------------------------------------------------------------------------------------------


def test_every_kind_of_value() -> None:
    space = parse_space(entries(**{"head.out.log": [1, 1024]}))
    drawn = [sample(space, FIXED, 0, number) for number in range(600)]
    assert {d["loss.kernel"] for d in drawn} == set(KERNELS)
    assert {d["optim.epochs"] for d in drawn} == {3, 4, 5}, "both ends, and whole"
    counts = [sum(2**i <= d["head.out"] < 2 ** (i + 1) for d in drawn) for i in range(10)]
    assert all(isinstance(d["head.out"], int) for d in drawn) and min(counts) > 30, "log-uniform"
    decades = [math.floor(math.log10(d["loss.temperature"])) for d in drawn]
    assert 240 < decades.count(-2) < 360 and 240 < decades.count(-1) < 360
    assert all(d["loss.temperature"] == float(f"{d['loss.temperature']:.4g}") for d in drawn), "can be typed"


def test_a_condition_holds() -> None:
    space = parse_space(entries())
    for number in range(100):
        drawn = sample(space, FIXED, 0, number)
        assert ("loss.gamma" in drawn) == (drawn["loss.kernel"] == "exponential")


def test_a_condition_on_a_setting_and_on_a_conditional_key() -> None:
    chain = {
        "probe.learning_rate.choice": [0.1],
        "probe.learning_rate.when.loss.gamma": [0.5],
        "loss.gamma.choice": [0.5, 1.0],
        "loss.gamma.when.loss.kernel": ["exponential", "simple_sum"],
    }
    space = parse_space(chain)
    assert [d.key for d in space] == ["loss.gamma", "probe.learning_rate"]
    assert sample(space, {"loss.kernel": "cosine", "loss.gamma": 1.0}, 0, 0) == {}
    drawn = [sample(space, {"loss.kernel": "simple_sum", "loss.gamma": 1.0}, 0, number) for number in range(50)]
    assert {len(d) for d in drawn} == {1, 2}
    assert all((d["loss.gamma"] == 0.5) == ("probe.learning_rate" in d) for d in drawn)


SMALL = parse_space({"loss.temperature.log": [0.01, 1]})
LARGE = parse_space(dict(reversed(entries().items())))


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6))
@settings(deadline=None)
def test_a_value_depends_on_seed_number_and_key_alone(seed: int, number: int) -> None:
    small, large = SMALL, LARGE
    one, other = sample(small, FIXED, seed, number), sample(large, FIXED, seed, number)
    assert one["loss.temperature"] == other["loss.temperature"]
    assert other == sample(large, FIXED, seed, number)
    assert sample(small, FIXED, seed, number) != sample(small, FIXED, seed, number + 1)


def test_the_same_on_every_machine() -> None:
    drawn = sample(parse_space(entries()), FIXED, 7, 3)
    assert drawn == {"loss.kernel": "cosine", "loss.temperature": 0.1151, "optim.epochs": 5}


@given(st.sampled_from(["log", "uniform"]), NUMBERS, NUMBERS, st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_numbers_stay_between_their_ends(kind: str, a: float, b: float, number: int) -> None:
    entry = {f"loss.radius.{kind}": [a, b]}
    if a >= b:
        with pytest.raises(ValueError, match=r"space\.loss\.radius\..*write \[low, high\]"):
            parse_space(entry)
        return
    assert a <= sample(parse_space(entry), FIXED, 0, number)["loss.radius"] <= b


@given(
    st.dictionaries(
        st.sampled_from(["loss.gamma", "seed", "x", "loss.kernel.when", "probe.enabled", "optim", ""]).flatmap(
            lambda key: st.sampled_from(["", ".log", ".uniform", ".choice", ".when.seed", ".when.y", "."]).map(
                key.__add__
            )
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists, max_leaves=4
        ),
        max_size=3,
    )
)
@settings(max_examples=150, deadline=None)
def test_nonsense_is_refused_in_one_sentence(nonsense: dict[str, Any]) -> None:
    for parse in (parse_space, parse_grid):
        try:
            parsed = parse(nonsense)
        except ValueError as error:
            assert str(error) and "\n" not in str(error).strip()
        else:
            assert len(parsed) <= len(nonsense)


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("loss.temprature.log", [0.1, 1], "unknown option loss.temprature in space; did you mean loss.temperature?"),
        ("loss.temperature", 0.1, "space.loss.temperature=0.1: no distribution; write {log: [low, high]}"),
        ("loss.temperature.log", [0, 1], "loss.temperature=0.0: too small"),
        ("optim.weight_decay.log", [0, 1], "space.optim.weight_decay.log=[0, 1]: the ends must be finite and above 0"),
        ("loss.temperature.log", [1, 0.1], "expected two numbers in ascending order; write [low, high]"),
        ("loss.temperature.log", ["hot", 1], "loss.temperature=hot in space: must be a number"),
        ("loss.temperature.choice", 0.1, "space.loss.temperature.choice=0.1: not a list; write [VALUE, ...]"),
        ("loss.temperature.choice", [], "loss.temperature=[] in space: must be a number"),
        ("loss.kernel.uniform", ["cosine", "gaussian"], "loss.kernel is not a number; use choice"),
        ("loss.kernel.choice", ["cosin"], "loss.kernel=cosin: unknown value; did you mean cosine?"),
        ("optim.epochs.uniform", [1.5, 3], "optim.epochs=1.5 in space: must be an integer"),
        ("run_dir.choice", ["a"], "run_dir: the sweep chooses it for each trial"),
        ("loss.gamma.when.loss.kernel", "cosine", "space.loss.gamma: it has a condition but no values"),
        ("loss.gamma.when.loss.kernl", "cosine", "unknown option loss.kernl in space.loss.gamma.when"),
        ("loss.temperature.uniform", [0.1, 1], "space.loss.temperature: it has both log and uniform"),
        ("loss.norm_p.uniform", [1, math.inf], "space.loss.norm_p.uniform=[1, inf]: the ends must be finite"),
    ],
)
def test_mistakes_in_a_space(entry: str, value: Any, said: str) -> None:
    first = {"loss.temperature.log": [0.1, 1]} if "both log and uniform" in said else {}
    with pytest.raises(ValueError) as error:
        parse_space({**first, entry: value})
    assert said in str(error.value)


def test_conditions_that_wait_for_each_other() -> None:
    circle = {
        "loss.gamma.choice": [0.5],
        "loss.gamma.when.loss.radius": 1,
        "loss.radius.choice": [1],
        "loss.radius.when.loss.gamma": 0.5,
    }
    with pytest.raises(ValueError, match=r"loss\.gamma, loss\.radius depend on each other"):
        parse_space(circle)


def test_the_ends_of_the_shipped_search_can_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(processes.ROOT)
    path = processes.ROOT / "configs" / "sweep" / "kernel_infonce.yaml"
    plan = make_plan(options.build(Sweep, [(str(path), options.read_yaml(path))]))
    (weight,) = [d for d in plan.space if d.key == "loss.mix_weight"]
    for value in weight.values:
        for kernel in weight.when["loss.kernel"]:
            own = {"loss.kernel": kernel, "loss.mix_weight": value}
            make_objective(options.build(Pretrain, [*plan.layers, ("the test", own)]))


# --- the grid -------------------------------------------------------------------------------------------------------


def test_five_kernels_by_two_lengths() -> None:
    axes = parse_grid({"loss.kernel": [*KERNELS, "spectral"], "optim.epochs": [100, 200]})
    assert cells(axes) == 10
    drawn = [cell(axes, i) for i in range(10)]
    assert drawn[0] == ({"loss.kernel": "cosine", "optim.epochs": 100},) * 2
    assert drawn[1][1] == {"loss.kernel": "cosine", "optim.epochs": 200}
    assert len({tuple(settings.values()) for _, settings in drawn}) == 10


def test_values_with_names() -> None:
    axes = parse_grid(
        {
            "kernel.sharp.loss.kernel": "cosine",
            "kernel.sharp.loss.temperature": 0.1,
            "kernel.wide.loss.kernel": "laplacian",
            "data.augmentation.blur": [[0.0, 0.0], [0.5, 0.5]],
        }
    )
    assert [cell(axes, i)[0]["kernel"] for i in range(4)] == ["sharp", "sharp", "wide", "wide"]
    assert cell(axes, 1) == (
        {"kernel": "sharp", "data.augmentation.blur": "[0.5, 0.5]"},
        {"loss.kernel": "cosine", "loss.temperature": 0.1, "data.augmentation.blur": [0.5, 0.5]},
    )


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"loss.kernl": ["cosine"]}, "unknown option loss.kernl in grid; did you mean loss.kernel?"),
        ({"loss.kernel": "cosine"}, "grid.loss.kernel=cosine: not a list of values; write [VALUE, ...]"),
        ({"loss.kernel": ["cosine", "cosin"]}, "loss.kernel=cosin: unknown value"),
        ({"optim.epochs": [1, 1]}, "grid.optim.epochs=[1, 1]: a value occurs twice"),
        ({"kernel.a.loss.kernel": "cosine", "loss.kernel": ["cosine"]}, "loss.kernel is set by two axes"),
        ({"kernel.a.loss.temperature": "hot"}, "loss.temperature=hot in grid.kernel.a: must be a number"),
        ({"kernel.a.run_dir": "here"}, "run_dir: the sweep chooses it for each trial"),
        ({"name": ["a"]}, "name: the sweep chooses it for each trial"),
    ],
)
def test_mistakes_in_a_grid(grid: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_grid(grid)
    assert said in str(error.value)

"""The Triton kernels by Triton's interpreter, on the CPU; tests/test_gpu.py has what needs a GPU."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

from simclr_ddp import KernelInfoNCE
from simclr_ddp.config import schema
from simclr_ddp.config.options import build
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.losses import log_sums
from simclr_ddp.losses.contrastive import contrastive_loss
from simclr_ddp.losses.kernels import Objective
from simclr_ddp.training import preflight
from simclr_ddp.training.components import make_objective


def _lacks_triton() -> str:
    """Why these tests can't run, or "". Before 3.3 its interpreter knows less of the language."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    found = version("triton")
    return "" if tuple(map(int, found.split(".")[:2])) >= (3, 3) else f"Triton is {found}: these tests need 3.3"


needs_triton = pytest.mark.skipif(bool(_lacks_triton()), reason=_lacks_triton())
KERNELS = ("cosine", "gaussian", "laplacian", "gamma 0.5", "gamma 1.5", "gamma 3.0", "radius 2")
COLD = ("cosine, cold", "gaussian, cold", "laplacian, cold")
CASES = ("1 images, width 16", "2 images, width 16", "17 images, width 100", "whole batch", "sub-batch", "two ranks")

Errors = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def errors() -> Errors:
    """Of all cases of tests/support/interpreted.py: one process, as importing torch and Triton takes long."""
    command = [sys.executable, "-m", "tests.support.interpreted"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Errors = json.loads(done.stdout)
    return found


def worst(found: dict[str, float], *names: str) -> float:
    return max(value for name, value in found.items() if not names or name.startswith(names))


@needs_triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_equals_float64(name: str, case: str, errors: Errors) -> None:
    assert worst(errors[f"{name}: {case}"]) < 6e-6  # 4.2e-6 without AVX-512


@needs_triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", COLD)
def test_equals_float64_at_low_temperature(name: str, case: str, errors: Errors) -> None:
    """Where a rounding of a dot product counts a hundred times."""
    assert worst(errors[f"{name}: {case}"]) < 5e-5


@needs_triton
@pytest.mark.parametrize("name", ["cosine", "laplacian"])
def test_many_blocks_and_widths(name: str, errors: Errors) -> None:
    for case in ("100 images, width 100", "17 images, width 300", "blocks"):
        assert worst(errors[f"{name}: {case}"]) < 6e-6  # 4.2e-6 without AVX-512


@needs_triton
@pytest.mark.parametrize("name", ["cosine", "laplacian"])
def test_bf16_rounds_the_products_of_the_gradient_alone(name: str, errors: Errors) -> None:
    found = errors[f"{name}: bf16"]
    assert found["loss"] < 4e-6 and 1e-5 < found["gradient"] < 3e-3


@needs_triton
@pytest.mark.parametrize("name", ["laplacian", "gamma 3.0"])
def test_pairs_within_the_floor(name: str, errors: Errors) -> None:
    assert worst(errors[f"{name}: near pairs"]) < 4e-6


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_what_is_not_a_number_stays_so(name: str, errors: Errors) -> None:
    assert errors[f"{name}: not a number"] == {"sums": 0, "gradient": 0}


@needs_triton
@pytest.mark.parametrize("name", ["cosine", "laplacian"])
def test_second_derivatives_are_the_plain_form_s(name: str, errors: Errors) -> None:
    assert worst(errors[f"{name}: second derivative"]) < 1e-5


@needs_triton
def test_no_environment_brings_it_to_a_cpu(errors: Errors) -> None:
    assert errors["usable on a CPU"]["usable"] == 0


@pytest.mark.parametrize("kernel", ["cosine", "exponential"])
def test_where_it_cannot_it_says_so(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and without Triton."""
    z = torch.nn.functional.normalize(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    monkeypatch.setattr(log_sums, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed; backend='tiled' computes the same"):
        contrastive_loss(z, z, 0, Objective(kernel, backend="triton"))
    monkeypatch.undo()
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(ValueError, match=r"in torch\.float32 of width 8 on cpu; backend='tiled'"):
        contrastive_loss(z, z, 0, Objective(kernel, backend="triton"))


@pytest.mark.parametrize(
    ("settings", "names"),
    [({"kernel": k}, f"kernel={k}") for k in ("simple_sum", "concat_sum", "arccos")]
    + [({"kernel": "gaussian", "distance_p": 1.0}, "distance_p=1.0")],
)
def test_kernels_that_it_lacks_are_refused_at_once(settings: dict, names: str) -> None:
    with pytest.raises(ValueError, match=f"backend='triton': {names} is not supported; set backend='tiled'"):
        KernelInfoNCE(**settings, backend="triton")


@pytest.mark.parametrize(
    ("arguments", "device", "says"),
    [
        ({}, "cpu", "it needs a GPU, and this run is on the CPU"),
        ({"head.out": 513}, "cuda", "it takes embeddings of at most 512 numbers, and head.out=513"),
        ({"precision": "fp64"}, "cuda", "it computes in float32, and precision=fp64"),
        ({"head.kind": "none", "head.out": 1024}, "cuda", ""),  # the encoder's 256 count
        (
            {"head.kind": "none", "model.arch": "resnet50", "model.width": 1.0},
            "cuda",
            "it takes embeddings of at most 512 numbers, and with head.kind=none those of model.arch=resnet50, "
            "model.width=1 have 2,048",
        ),
    ],
)
def test_a_run_that_it_cannot_compute_does_not_start(arguments: dict, device: str, says: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    settings = build(Pretrain, [("the test", {"loss.backend": "triton", **arguments})])
    assert make_objective(settings).objective.backend == "triton"
    runtime = Runtime(torch.device(device), settings.precision, 1)
    if not says:
        preflight.loss_backend(settings, runtime)
        return
    with pytest.raises(ValueError, match=f"^loss.backend=triton: {says}; set loss.backend=tiled$"):
        preflight.loss_backend(settings, runtime)


def test_it_is_part_of_what_a_run_is() -> None:
    """As loss.precision is: it changes the order of additions."""
    assert schema.result_keys(Pretrain())["loss.backend"] == "tiled"


def test_a_backend_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        KernelInfoNCE(backend="tritom")


@needs_triton
@pytest.mark.parametrize(("name", "gamma"), [("forward", 0.0), ("backward", 1.0)])
def test_compiles_for_a_gpu_and_stages_move_no_arithmetic(name: str, gamma: float) -> None:
    """What autotuning chooses must not change a bit: float operations and how threads share a block are the same.

    By Triton's compiler for an H100, which needs none; whether its results are the same bits tests/test_gpu.py asks.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: there is nothing to compile")
    code = [compiled(name, gamma, stages) for stages in (1, 2, 3)]
    assert code[0][0]["fma.rn.f32"] > 500 and not any("mma" in word for word in code[0][0])  # full float32
    assert code[0] == code[1] == code[2]


@needs_triton
@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_compiles_for_other_gpus(name: str, capability: int) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: there is nothing to compile")
    operations, _ = compiled(name, 1.0, 2, capability)
    assert operations["max.NaN.f32"] > 0 and not any("mma" in word for word in operations)


def compiled(name: str, gamma: float, stages: int, capability: int = 90) -> tuple[Counter[str], list[str]]:
    """How often each float operation stands in the program for vectors of 128 numbers, and the layouts of blocks."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_for

    from simclr_ddp.losses import triton_log_sums

    kernel, shape = getattr(triton_log_sums, f"_{name}"), triton_log_sums.SHAPES[128]
    constants = {"D": 128, "GAMMA": gamma, "ROWS": shape.rows, "COLUMNS": shape.columns, "WIDTH": shape.width}
    constants |= {"PRODUCT": "ieee"} | ({"PADDED": 128, "WIDENED": False} if name == "backward" else {})
    whole = ("length", "row_images", "column_images", "row_first", "column_first", "size")
    types = {a: "i32" if a in whole else "fp32" if a in ("unit", "least") else "*fp32" for a in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if types[a].startswith("*")}
    source = ASTSource(kernel, types, constants, aligned)
    options = {"num_warps": shape.warps, "num_stages": stages}
    code = compile_for(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    words = re.findall(
        r"^\s+((?:fma|mul|add|sub|max|min|ex2|lg2|div|sqrt|neg|mma|wgmma)\S*)", code["ptx"], re.MULTILINE
    )
    floats = Counter(word for word in words if "f32" in word or "mma" in word)
    return floats, re.findall(r"^#blocked.*", code["ttgir"], re.MULTILINE)

"""`python -m benchmarks.loss`: what it compares is the same loss, what is another is refused, and what it writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import loss, loss_tools
from benchmarks.loss_tools import COMPARED, KERNELS, OURS, make, missing, work
from simclr_ddp import KernelInfoNCE, tiled
from simclr_ddp.losses import contrastive_loss, normalize
from tests.ranks import Ranks
from tests.test_p_distance import by_definition
from tests.test_tiled import plain


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def exact(kernel: str, y_a: Tensor, y_b: Tensor) -> tuple[float, Tensor]:
    """By whole matrices, in float64."""
    objective = KernelInfoNCE(**KERNELS[kernel]).objective
    y = torch.stack([y_a, y_b]).double().requires_grad_()
    z = normalize(y, objective.squared_radius, objective.norm_p)
    value = (by_definition if objective.distance_p != 2 else plain)(z, z, 0, objective)
    return value.item(), torch.autograd.grad(value, y)[0].flatten(0, 1)


@pytest.mark.parametrize("name", COMPARED)
def test_all_compute_the_same_loss(name: str) -> None:
    if missing(name):
        pytest.skip(f"the package of {name} is not here: `make peers`")
    y_a, y_b = loss.embeddings(24, 16)
    wanted, slope = exact(COMPARED[name], y_a, y_b)
    value, gradient = loss.reference(COMPARED[name], y_a, y_b)
    assert value == pytest.approx(wanted, rel=1e-10) and (gradient - slope).norm() < 1e-10 * slope.norm()
    _, value, gradient = loss.once(make(name), y_a, y_b)
    allowed = loss.ALLOWED if name.startswith("Kernel-InfoNCE") or name.endswith("bf16") else (1e-5, 1e-5)
    assert value == pytest.approx(wanted, rel=allowed[0])
    assert (gradient - slope).norm() < allowed[1] * slope.norm()


def benchmark(out: Path, *arguments: str) -> int:
    return loss.main(["--widths", "8", "--repeats", "2", "--out", str(out), "--threads", "1", *arguments])


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "product_rate", lambda: 1e10)
    monkeypatch.setattr(loss, "copy_rate", lambda: 1e10)


def test_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loss, "_available_bytes", lambda: 2_000_000)  # 8 matrices of 512 x 512 are more
    assert benchmark(tmp_path, "--images", "256,16", "--ranks", "0", "--only", "ours cosine,ours laplacian,plain") == 0
    results = json.loads((tmp_path / "cpu.json").read_text())
    rows = {(row["name"], row["images"]): row for row in results["rows"]}
    assert list(rows) == [(n, i) for i in (16, 256) for n in ("ours cosine", "ours laplacian", "plain")]
    for (name, images), row in rows.items():
        if (name, images) == ("plain", 256):
            assert row["left_out"] == "it wants about 0 GB, 0 GB are free"
            continue
        assert 0 < row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2] and row["repeats"] == 2
        assert row["loss_error"] < 1e-4 and row["gradient_error"] < 1e-4 and row["memory_bytes"] >= 0
        assert ("operations" in row) == name.startswith("ours")
    assert torch.__version__.startswith(results["machine"]["packages"]["torch"]) and results["machine"]["processor"]
    assert (tmp_path / "cpu.png").stat().st_size > 10_000
    assert "left out: it wants" in capsys.readouterr().out


def test_another_loss_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = loss_tools.plain
    monkeypatch.setattr(loss_tools, "plain", lambda y_a, y_b: right(y_a, y_b.roll(1, 0)))  # other pairs
    assert benchmark(tmp_path, "--images", "16", "--ranks", "0", "--only", "ours cosine,plain") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the loss of plain is ") and told.count("\n") == 1
    monkeypatch.setattr(loss_tools, "plain", lambda y_a, y_b: right(y_a, y_b) + 0.1 * (y_a - y_a.detach()).sum())
    assert benchmark(tmp_path, "--images", "16", "--ranks", "0", "--only", "ours cosine,plain") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lightning"], "--only lightning is no loss: choose among ours cosine"),
        (["--images", "1"], "--images 1: numbers of at least 2"),
        (["--repeats", "ten"], "--repeats ten"),
        (["--image", "16"], "unknown argument --image"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert loss.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_times_are_foretold() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "plain", "width": 8, "images": 2048, "seconds": [1.0, 2.0, 3.0]},
        {"name": "lightly", "width": 8, "images": 2048, "left_out": "it wants more"},
    ]
    assert loss.foretold({"name": "plain", "width": 8, "images": 8192}, rows) == 32.0
    assert loss.foretold({"name": "plain", "width": 16, "images": 8192}, rows) == 0.0
    assert loss.foretold({"name": "lightly", "width": 8, "images": 8192}, rows) > loss.LONGEST


@pytest.mark.parametrize("name", [n for n in OURS if work(n, 64, 8) is not None])
@pytest.mark.parametrize("kept", [True, False])
def test_counted_operations(name: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own count, of the products and not of the sums inside them."""
    monkeypatch.setattr(tiled, "TILE", 16)
    monkeypatch.setattr(tiled, "KEPT", 10**9 if kept else 0)

    def in_place(out: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    objective = make(name).objective  # type: ignore[attr-defined]
    z = normalize(torch.stack(loss.embeddings(64, 8))).requires_grad_()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        contrastive_loss(z, z, 0, objective).backward()
    counted = work(name, 64, 8)
    assert counted is not None and counter.get_total_flops() == counted[0]


def test_memory_that_others_want() -> None:
    assert [loss_tools.whole_bytes(name, 65536) for name in OURS] == [0] * len(OURS)
    assert loss_tools.whole_bytes("plain", 65536) > 5e11
    assert loss_tools.whole_bytes("metric learning", 512) > 1.7e10  # 2.2 GB were measured at 256


def on_ranks() -> list[dict[str, Any]]:
    return loss.measure_together(64, 8, 2, ["ours cosine", "ours laplacian"], [])


def test_on_ranks(ranks: Ranks) -> None:
    first, second = ranks.run(2, on_ranks)
    assert first == second
    for row in first:
        assert row["ranks"] == 2 and row["seconds"][1] > 0 and row["repeats"] == 2
        assert row["busiest_share"] == 0.5
    assert loss_tools.busiest_share(4096, 1) == 1.0 and 0.25 <= loss_tools.busiest_share(4096, 4) < 0.27


@pytest.mark.slow
def test_processes_of_its_own(tmp_path: Path) -> None:
    assert benchmark(tmp_path, "--images", "16", "--ranks", "1,2", "--only", "ours cosine") == 0
    rows = json.loads((tmp_path / "cpu.json").read_text())["rank_rows"]
    assert [(row["name"], row["ranks"]) for row in rows] == [("ours cosine", 1), ("ours cosine", 2)]

"""`python -m benchmarks.loss`: what it compares is the same loss, what is another is refused, and what it writes."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import loss
from benchmarks.support import loss_reference, loss_report, loss_tools
from benchmarks.support.loss_tools import COMPARED, KERNELS, OURS, make, missing, work
from simclr_ddp import KernelInfoNCE
from simclr_ddp.losses import tiling
from simclr_ddp.losses.contrastive import contrastive_loss, normalize
from tests.losses.test_p_norm import by_definition
from tests.losses.test_tiled import plain
from tests.support.ranks import Ranks


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
    _, value, gradient = loss.once(make(name), y_a, y_b)
    allowed = loss.ALLOWED if name.startswith("Kernel-InfoNCE") or name.endswith("bf16") else (1e-5, 1e-5)
    assert value == pytest.approx(wanted, rel=allowed[0])
    assert (gradient - slope).norm() < allowed[1] * slope.norm()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("images", [24, 40])
def test_references(kernel: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole, and of a batch too large for it the value and some rows of the gradient, from blocks of pairs."""
    monkeypatch.setattr(loss_reference, "COMPLETE", 24)
    monkeypatch.setattr(loss_reference, "SAMPLE", 7)
    monkeypatch.setattr(loss_reference, "BLOCK", 11)
    y_a, y_b = loss.embeddings(images, 16)
    wanted, slope = exact(kernel, y_a, y_b)
    found = loss_reference.reference(kernel, y_a, y_b)
    assert found is not None and found.value == pytest.approx(wanted, rel=1e-10)
    whole = images == 24 or kernel == "spectral"
    assert (found.rows is None) == whole and len(found.gradient) == (2 * images if whole else 14)
    rows = slope if found.rows is None else slope[found.rows]
    assert (found.gradient - rows).norm() < 1e-10 * rows.norm()
    monkeypatch.setattr(loss_reference, "LONGEST", 0.0)
    assert (loss_reference.reference(kernel, y_a, y_b) is None) == (not whole)


def benchmark(out: Path, *arguments: str) -> int:
    return loss.main(["--widths", "8", "--repeats", "2", "--out", str(out), "--threads", "1", *arguments])


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "product_rate", lambda: 1e10)
    monkeypatch.setattr(loss, "copy_rate", lambda: 2e9)


def test_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loss, "available_bytes", lambda: 2_000_000)  # 14 bytes for each of 512 x 512 pairs are more
    monkeypatch.setattr(loss_reference, "COMPLETE", 16)
    assert benchmark(tmp_path, "--images", "256,16", "--ranks", "0", "--only", "ours cosine,ours laplacian,plain") == 0
    results = json.loads((tmp_path / "cpu.json").read_text())
    rows = {(row["name"], row["images"]): row for row in results["rows"]}
    assert list(rows) == [(n, i) for i in (16, 256) for n in ("ours cosine", "ours laplacian", "plain")]
    for (name, images), row in rows.items():
        if (name, images) == ("plain", 256):
            assert row["left_out"] == "it needs about 0 GB, 0 GB are free"
            continue
        assert 0 < row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2] and row["repeats"] == 2
        assert row["loss_error"] < 1e-4 and row["gradient_error"] < 1e-4 and row["memory_bytes"] >= 0
        assert row["gradient_rows"] == {16: 32, 256: 256}[images]
        assert ("operations" in row) == name.startswith("ours")
        if "operations" in row:
            assert row["share_of_products"] == pytest.approx(row["operations"] / row["seconds"][1] / 1e10)
            assert row["share_of_copies"] == pytest.approx(row["bytes"] / row["seconds"][1] / 2e9)
    assert torch.__version__.startswith(results["machine"]["packages"]["torch"]) and results["machine"]["processor"]
    assert (tmp_path / "cpu.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "left out: it needs" in said and said.count(" of 256") == 2


def test_the_nearer_bound() -> None:
    assert loss.roofline((80, 30), 2.0, (100.0, 50.0)) == {
        "share_of_products": 0.4,
        "share_of_copies": 0.3,
        "bound": "products",
    }
    assert loss.roofline((80, 30), 2.0, (100.0, 20.0))["bound"] == "copies"
    row = {"images": 64, "width": 8, "name": "ours cosine", "seconds": [1.0, 2.0, 3.0], "memory_bytes": 0}
    row |= {"loss_error": 1e-7, "gradient_error": 2e-6, "gradient_rows": 128}
    lines = [loss_report.line(row | loss.roofline((80, 30), 2.0, (100.0, rate))) for rate in (50.0, 20.0)]
    assert [line.split()[-5:] for line in lines] == [
        ["1.0e-07", "2.0e-06", "0.40", "0.30", "products"],
        ["1.0e-07", "2.0e-06", "0.40", "0.75", "copies"],
    ]


def test_another_loss_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = loss_tools.plain
    monkeypatch.setattr(loss_tools, "plain", lambda y_a, y_b: right(y_a, y_b.roll(1, 0)))  # other pairs
    assert benchmark(tmp_path, "--images", "16", "--ranks", "0", "--only", "ours cosine,plain") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the loss of plain is ") and said.count("\n") == 1
    monkeypatch.setattr(loss_tools, "plain", lambda y_a, y_b: right(y_a, y_b) + 0.1 * (y_a - y_a.detach()).sum())
    assert benchmark(tmp_path, "--images", "16", "--ranks", "0", "--only", "ours cosine,plain") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lightning"], "--only lightning: it is no loss; choose from ours cosine"),
        (["--images", "1"], "--images 1: numbers of at least 2"),
        (["--repeats", "ten"], "--repeats ten: one number of at least 2 is expected, for example --repeats 10"),
        (["--repeats", "10,2"], "--repeats 10,2: one number"),
        (["--repeats", "1"], "--repeats 1: one number"),
        (["--threads", "2,1"], "--threads 2,1: one number of at least 0"),
        (["--image", "16"], "unknown argument --image"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert loss.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_one_of_torchruns_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(loss, "in_group", lambda *_: pytest.fail("it measures"))
    assert loss.main([]) == 2
    assert capsys.readouterr().err == (
        "error: RANK is set, as torchrun sets it: unset it and start one process, which starts --ranks\n"
    )


def test_sizes_that_ranks_cannot_share_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is predicted from them."""
    befores = []

    def together(images: int, width: int, repeats: int, names: list[str], before: list[Any]) -> list[dict[str, Any]]:
        befores.append([row["images"] for row in before])
        return [{"name": name, "images": images, "width": width, "ranks": 4, "seconds": [1.0] * 3} for name in names]

    monkeypatch.setattr(loss, "setup", lambda *_: None)
    monkeypatch.setattr(loss.collectives, "world_size", lambda: 4)
    monkeypatch.setattr(loss.rendezvous, "stop", lambda: None)
    monkeypatch.setattr(loss, "measure_together", together)
    rows = loss.in_group([2048, 2050, 4096], [8], 2, ["ours cosine", "lightly"])
    assert [(row["name"], row["images"]) for row in rows] == [
        (name, images) for images in (2048, 2050, 4096) for name in ("ours cosine", "lightly")
    ]
    assert [row.get("left_out") for row in rows] == [None] * 2 + ["not divisible by the ranks"] * 2 + [None] * 2
    assert befores == [[], [2048, 2048]]
    assert "2050    8 ours cosine          left out: not divisible" in loss_report.rank_table(rows[2:4])


def test_losses_that_ranks_do_not_share_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(tmp_path, "--images", "16", "--ranks", "2", "--only", "plain") == 0
    line = "no measurement on ranks: only ours cosine, ours laplacian, rows only, lightly support it"
    assert line in capsys.readouterr().out.splitlines()


def test_ours_is_held_to_the_precision_it_promises() -> None:
    gradient = torch.ones(4, 3)
    exact = loss_reference.Reference(1.0, gradient.double(), None)
    for value, slope in ((1.0 + 2e-4, gradient), (1.0, gradient * 1.002)):
        with pytest.raises(ValueError, match="the loss of ours cosine is "):
            loss.check("ours cosine", value, slope, exact)
        for name in ("ours cosine bf16", "plain", "Kernel-InfoNCE 2"):
            assert loss.check(name, value, slope, exact)["gradient_rows"] == 4


def test_times_are_predicted() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "plain", "width": 8, "images": 2048, "seconds": [1.0, 2.0, 3.0]},
        {"name": "lightly", "width": 8, "images": 2048, "left_out": "it wants more"},
        {"name": "ours spectral", "width": 8, "images": 2048, "seconds": [1.0, 2.0, 3.0]},
        {"name": "metric learning", "width": 8, "images": 2048, "seconds": [1.0, 2.0, 3.0]},
    ]
    assert loss.predicted({"name": "ours spectral", "width": 8, "images": 8192}, rows) == 8.0
    assert loss.predicted({"name": "metric learning", "width": 8, "images": 8192}, rows) == 128.0
    assert loss.predicted({"name": "plain", "width": 8, "images": 8192}, rows) == 32.0
    assert loss.predicted({"name": "plain", "width": 16, "images": 8192}, rows) == 0.0
    assert loss.predicted({"name": "lightly", "width": 8, "images": 8192}, rows) > loss.LONGEST


IN_PLACE = (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_)


@pytest.mark.parametrize("name", [n for n in OURS if work(n, 64, 8) is not None])
@pytest.mark.parametrize("kept", [True, False])
def test_counted_operations(name: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own count, of the products and not of the sums inside them."""
    monkeypatch.setattr(tiling, "TILE", 16)
    monkeypatch.setattr(tiling, "KEPT", 10**9 if kept else 0)

    def in_place(out: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    objective = make(name).objective  # type: ignore[attr-defined]
    z = normalize(torch.stack(loss.embeddings(64, 8))).requires_grad_()
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(IN_PLACE, in_place)) as counter:
        contrastive_loss(z, z, 0, objective).backward()
    counted = work(name, 64, 8)
    assert counted is not None and counter.get_total_flops() == counted[0]


def test_memory_that_others_want() -> None:
    assert [loss_tools.matrix_bytes(name, 65536) for name in OURS] == [0] * len(OURS)
    assert 2.3e11 < loss_tools.matrix_bytes("plain", 65536) < 2.5e11
    assert 2.2e9 < loss_tools.matrix_bytes("metric learning", 256) < 2.4e9  # 2.2 GB were measured


@pytest.mark.slow
@pytest.mark.parametrize("name", loss_tools.PEAK)
def test_memory_that_others_take(name: str) -> None:
    """In a process of its own: memory that others freed here would not count."""
    if missing(name):
        pytest.skip(f"the package of {name} is not here: `make peers`")
    script = f"""from benchmarks import loss
from benchmarks.support import loss_tools
assert not loss_tools.missing({name!r})
made = loss_tools.make({name!r})
loss.once(made, *loss.embeddings(2, 8))
print(loss.peak_memory(made, *loss.embeddings(2048, 8)))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(loss_tools.matrix_bytes(name, 2048), rel=0.15)


def on_ranks() -> list[dict[str, Any]]:
    names = [name for name in loss.ON_RANKS if not missing(name)]
    before = loss_reference.COMPLETE, loss_reference.SAMPLE
    loss_reference.COMPLETE, loss_reference.SAMPLE = 32, 8
    rows = [row for images in (32, 64) for row in loss.measure_together(images, 8, 2, names, [])]
    loss_reference.COMPLETE, loss_reference.SAMPLE = before
    return rows


def test_on_ranks(ranks: Ranks) -> None:
    first, second = ranks.run(2, on_ranks)
    names = [name for name in loss.ON_RANKS if not missing(name)]
    assert first == second and [row["name"] for row in first] == names * 2
    for row in first:
        assert row["ranks"] == 2 and row["seconds"][1] > 0 and row["repeats"] == 2
        assert row["busiest_share"] == (0.5 if row["name"] in OURS else None)
        assert row["loss_error"] < 1e-5 and row["gradient_error"] < 1e-5
        assert row["gradient_rows"] == {32: 64, 64: 16}[row["images"]]
    assert loss_tools.busiest_share(4096, 1) == 1.0 and 0.25 <= loss_tools.busiest_share(4096, 4) < 0.27


def another_on_ranks(wrong: str) -> str:
    """Negatives of the own rank alone, or a gradient that is not the sum over ranks."""
    right = make("ours cosine")
    losses = {
        "negatives": make("plain"),
        "gradient": lambda y_a, y_b: right(y_a, y_b) + 0.1 * (y_a - y_a.detach()).sum(),
    }
    try:
        loss.check_together({"ours cosine": losses[wrong]}, loss.embeddings(32, 8))
    except (ValueError, SystemExit) as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


@pytest.mark.parametrize("wrong", ["negatives", "gradient"])
def test_another_loss_is_caught_on_ranks(wrong: str, ranks: Ranks) -> None:
    said = ranks.run(2, another_on_ranks, wrong)
    assert said[0].startswith("ValueError the loss of ours cosine is ") and said[1] == "SystemExit 2"


@pytest.mark.slow
def test_processes_of_its_own(tmp_path: Path) -> None:
    assert benchmark(tmp_path, "--images", "16", "--ranks", "1,2", "--only", "ours cosine") == 0
    rows = json.loads((tmp_path / "cpu.json").read_text())["rank_rows"]
    assert [(row["name"], row["ranks"]) for row in rows] == [("ours cosine", 1), ("ours cosine", 2)]

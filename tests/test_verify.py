"""The parity certificate passes what is right, and finds what is wrong."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simclr_ddp import verify
from simclr_ddp.config.schema import Verify
from simclr_ddp.distributed import collectives
from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
from simclr_ddp.training import parity
from tests.support.ranks import Ranks
from tests.support.tiny_run import settings

SMALL = ("verify.images=8", "verify.ranks=[2]", "verify.steps=2", "model.width=0.0625", "optim.base_learning_rate=0.5")


class Local(nn.Module):
    """A published mistake: negatives of this rank alone."""

    def forward(self, y_a: Tensor, y_b: Tensor) -> Tensor:
        z = nn.functional.normalize(torch.cat([y_a, y_b]), dim=1)
        similarity = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
        positive = torch.arange(len(z)).roll(len(y_a))
        return nn.functional.cross_entropy(similarity, positive)


class OwnSlice(KernelInfoNCE):
    """Another: gathered, but the gradient of the own slice alone, 1 / W of the right one."""

    def forward(self, y_a: Tensor, y_b: Tensor) -> Tensor:
        share = 1 / collectives.world_size()
        return super().forward(*(y * share + y.detach() * (1 - share) for y in (y_a, y_b)))


class Dying(Local):
    """Ends the process of the last of several ranks, or of one `alone`, by a signal (negative) or with a status."""

    def __init__(self, how: int, alone: bool) -> None:
        super().__init__()
        self.how, self.alone = how, alone

    def forward(self, y_a: Tensor, y_b: Tensor) -> Tensor:
        if (collectives.world_size() == 1) != self.alone:
            return super().forward(y_a, y_b)
        if collectives.rank() == collectives.world_size() - 1:
            print(f"died at {time.time()}", file=sys.stderr, flush=True)
            if self.how < 0:
                os.kill(os.getpid(), -self.how)
            sys.exit(self.how)
        time.sleep(600)
        return super().forward(y_a, y_b)


def measured(settings: Verify, peak: float) -> dict[str, Tensor]:
    found = parity.measure_loss(settings) if settings.verify.loss else parity.measure(settings, peak)
    return {name: values.double().flatten() for name, values in found.items()}


@pytest.fixture
def with_ranks(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with the ranks that are there, instead of processes of its own."""
    monkeypatch.setattr(parity, "run_on", lambda count, *arguments: ranks.run(count, measured, *arguments)[0])


@pytest.mark.parametrize(
    ("how", "alone", "said"),
    [
        (-signal.SIGKILL, True, "rank 0 of 1 was ended by SIGKILL"),
        pytest.param(-signal.SIGKILL, False, "rank 1 of 2 was ended by SIGKILL", marks=pytest.mark.slow),
        pytest.param(3, False, "rank 1 of 2 ended with status 3", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_ends_the_command(
    how: int, alone: bool, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify.loss=tests.test_verify:Dying", f"verify.arguments=[how={how},alone={str(alone).lower()}]"]
    assert verify.main([*arguments, "verify.ranks=[2]", "verify.images=8"]) == 2
    lines = capfd.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("error:"))
    assert said in line and "fewer verify.ranks" in line
    (died,) = (float(line.split()[2]) for line in lines if line.startswith("died at"))
    assert time.time() - died < 120, "and not when the other rank gives up, after minutes"


def test_fewer_images_than_the_runs_batch_are_enough(
    with_ranks: None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file holds 40, and the run's batch is 256; the learning rate stays that of the run."""
    peaks = []
    run_on = parity.run_on
    monkeypatch.setattr(parity, "run_on", lambda count, settings, peak: peaks.append(peak) or run_on(1, settings, peak))
    arguments = [*settings(images, tmp_path / "run"), *SMALL, "optim.global_batch_size=256"]
    assert verify.main(arguments) == 0
    assert set(peaks) == {0.5}
    assert verify.main([*arguments, "verify.images=64"]) == 2
    assert "verify.images=64: data.train=" in capfd.readouterr().err


def test_a_config_agrees_and_the_stamp_says_so(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*settings(images, tmp_path / "run"), *SMALL]) == 0
    record = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert record["agree"] and record["moved"] > 0.01 and record["tolerance"] == 1e-10
    assert [row["quantity"] for row in record["rows"]] == [
        "loss",
        "gradient of the embeddings",
        "gradient of the parameters",
        "parameters after 2 steps",
    ]
    assert all(row["ranks"] == 2 and row["difference"] < 1e-10 for row in record["rows"])
    assert all(row["cosine"] == pytest.approx(1) == row["norm_ratio"] for row in record["rows"])
    assert "any number of ranks is the same run" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("loss", "status", "ratio"),
    [
        ("simclr_ddp:KernelInfoNCE", 0, 1.0),
        ("tests.test_verify:Local", 1, None),
        ("tests.test_verify:OwnSlice", 1, 0.5),
    ],
)
def test_losses_of_others_are_judged(
    loss: str, status: int, ratio: float | None, with_ranks: None, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify.arguments=[kernel=laplacian,temperature=0.5]"] if "Local" not in loss else []
    assert verify.main([f"verify.loss={loss}", *arguments, "verify.images=8", "verify.ranks=[2]"]) == status
    rows = {line[:30].strip(): line[30:].split() for line in capfd.readouterr().out.splitlines()}
    assert rows["gradient of the parameters"][-1] == ("ok" if status == 0 else "DIFFERENT")
    if ratio is not None:
        assert float(rows["gradient of the parameters"][5]) == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify.ranks=[3]"], "verify.images=16: it must be a multiple of each of verify.ranks=[3]"),
        (["verify.loss=nowhere:Loss"], "verify.loss=nowhere:Loss: it can't be imported"),
        (["verify.loss=simclr_ddp:Nothing"], "verify.loss=simclr_ddp:Nothing: it can't be imported"),
        (["verify.loss=simclr_ddp:KernelInfoNCE", "verify.arguments=[kernel=unknown]"], "unknown"),
        (["data.train=missing.beton"], "missing.beton"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify.main(arguments) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error:"))
    assert said in line

"""The learning rate at its ends and joint, and the numbers of steps."""

import math
from itertools import pairwise
from pathlib import Path

import pytest

from simclr_ddp.config import options, schema
from simclr_ddp.data.dataset import Dataset
from simclr_ddp.training.plan import Plan, make_plan
from simclr_ddp.training.schedule import learning_rate, peak_learning_rate


def plan(count: int, *overrides: str) -> Plan:
    settings = options.build(schema.Pretrain, [("here", dict(options.parse_override(text) for text in overrides))])
    return make_plan(settings, Dataset("here", count, None, None, ""))


def test_ends_and_joint() -> None:
    rate = [learning_rate(step, 2.0, 10, 110, "cosine") for step in range(111)]
    assert rate[0] == 0
    assert rate[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert rate[10] == 2.0  # the last of the line is the first of the cosine
    assert rate[60] == pytest.approx(1.0)
    assert rate[35] == pytest.approx(1 + math.sqrt(0.5))
    assert rate[110] == 0  # where step 110 would be: the last update is one before


def test_constant() -> None:
    rate = [learning_rate(step, 2.0, 10, 110, "constant") for step in range(110)]
    assert rate[:10] == pytest.approx([0.2 * step for step in range(10)]) and set(rate[10:]) == {2.0}


def test_without_warm_up_the_first_update_is_a_full_one() -> None:
    assert learning_rate(0, 2.0, 0, 10, "cosine") == 2.0 == learning_rate(0, 2.0, 0, 10, "constant")


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 2), (10, 11), (10, 10), (3, 7), (970, 97_000)])
def test_it_falls_after_the_warm_up_and_never_rises_at_the_end(warmup: int, total: int) -> None:
    """Defect K7: steps counted otherwise than the loader's, so that the cosine passes its end and rises again."""
    rate = [learning_rate(step, 1.0, warmup, total, "cosine") for step in range(total)]
    assert all(a < b for a, b in pairwise(rate[: warmup + 1]))
    assert all(a > b for a, b in pairwise(rate[warmup:]))
    assert all(0 < r <= 1 for r in rate[1:])
    if total - warmup > 100:
        assert rate[-1] < 1e-6


@pytest.mark.parametrize(
    ("images", "batch", "epochs", "total", "warmup"),
    [
        (50_000, 512, 1000, 97_000, 970),  # CIFAR
        (1_281_167, 4096, 100, 31_200, 3120),  # ImageNet
        (45_000, 256, 200, 35_000, 1750),  # K7: 175 whole batches an epoch, and a partial one that is not trained on
    ],
)
def test_step_counts(images: int, batch: int, epochs: int, total: int, warmup: int) -> None:
    made = plan(images, f"optim.global_batch_size={batch}", f"optim.epochs={epochs}", "optim.warmup_epochs=10")
    assert (made.total_steps, made.warmup_steps) == (total, warmup)
    assert made.steps_per_epoch == images // batch == total // epochs
    assert made.learning_rate(warmup) == made.peak_learning_rate
    assert 0 < made.learning_rate(total - 1) < made.learning_rate(total - 2) < 1e-6 * made.peak_learning_rate


def test_steps_instead_of_epochs_and_parts_of_an_epoch_of_warm_up() -> None:
    made = plan(1000, "optim.global_batch_size=100", "optim.steps=37", "optim.warmup_epochs=0.25")
    assert (made.total_steps, made.warmup_steps) == (37, 2)
    assert plan(1000, "optim.schedule=constant").learning_rate(20) == plan(1000).peak_learning_rate


def test_scaling_of_the_peak() -> None:
    """0.3 N/256 and 0.075 sqrt(N) of the paper, 4.8 at N = 4,096 both."""
    assert peak_learning_rate(0.3, "linear", 4096) == pytest.approx(4.8)
    assert peak_learning_rate(0.3, "sqrt", 4096) == pytest.approx(4.8)
    assert peak_learning_rate(0.3, "linear", 512) == pytest.approx(0.6)
    assert peak_learning_rate(0.3, "sqrt", 256) == pytest.approx(0.075 * 16)
    assert peak_learning_rate(0.3, "none", 512) == 0.3
    made = plan(5000, "optim.global_batch_size=1024", "optim.base_learning_rate=0.3", "optim.scaling=sqrt")
    assert made.peak_learning_rate == pytest.approx(2.4)


def test_the_run_directory_is_named_after_the_config() -> None:
    assert plan(1000).run_dir.parent == Path("runs") and plan(1000).run_dir.name.startswith("spirograph-")
    assert plan(1000, "run_dir=here").run_dir == Path("here")

"""How many kernels a training step launches: steps of whole recipes, counted on the CPU (tests.support.launches)."""

import json
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from simclr_ddp.config.options import build, dotted
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.data import batches
from simclr_ddp.data.augmentations import Augmentation
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.distributed import batch_norm, collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
from simclr_ddp.models.simclr import SimCLR
from simclr_ddp.training import components
from simclr_ddp.training.optim import set_learning_rate
from simclr_ddp.training.plan import make_plan
from simclr_ddp.training.probe import Probe
from simclr_ddp.training.sanity import LearningRateGuard
from simclr_ddp.training.state import State
from tests.support import cuda_kernels
from tests.support.launches import Launches
from tests.support.ranks import Ranks

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "pretrain"
PARTS = [
    *((batches, "view_uniforms", "draws"), (Augmentation, "__call__", "augmentation"), (SimCLR, "forward", "forward")),
    *((KernelInfoNCE, "forward", "loss"), (KernelInfoNCE, "top1", "top1"), (Probe, "loss", "probe")),
    *((torch.Tensor, "backward", "backward"), (State, "step", "update"), (State, "gradient_norm", "gradient norm")),
    *((LearningRateGuard, "before", "guard"), (LearningRateGuard, "after", "guard")),
]


def counted_step(recipe: str, folder: Path, *more: str) -> dict[str, int]:
    """Kernels of each part of a recipe's second step (the first one makes the momentum), on few images."""
    file = dotted(OmegaConf.to_container(OmegaConf.load(CONFIGS / recipe)))
    here = {"run_dir": folder / str(collectives.rank()), "device": "cpu", "threads": 1, "data.workers": 0}
    here |= {"data.loader": "torch", "data.test": "", "log.every_steps": 1000, "optim.warmup_epochs": 0}
    changed = [("the test", here | dict(pair.split("=") for pair in more))]
    settings = build(Pretrain, [(recipe, file), *changed])
    runtime = Runtime(torch.device("cpu"), settings.precision, 1)
    dataset = open_dataset(settings.data.train, "train")
    plan = make_plan(settings, dataset)
    plan.run_dir.mkdir(exist_ok=True)
    counts = Launches()

    def within(inner: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            with counts.part(part):
                return inner(*given, **options)

        return run

    # What takes the way of CUDA where there are several ranks; on one rank it is nn.BatchNorm's.
    fused = cuda_kernels.on("CPU") if collectives.world_size() > 1 else nullcontext()
    with pytest.MonkeyPatch.context() as patch, fused:
        patch.setattr(batch_norm, "uses_fused_kernels", lambda _: collectives.world_size() > 1)
        for owner, name, part in PARTS:
            patch.setattr(owner, name, within(getattr(owner, name), part))
        training = components.make_training(settings, runtime, dataset, plan)
        reporter = components.make_reporter(training, 0)
        guard = LearningRateGuard(training.state.optimizer, 1.0, 1.0)
        with counts, closing(training.batches(range(2))) as given:
            for step in range(2):  # as in pretrain
                counts.clear()
                set_learning_rate(training.state.optimizer, plan.learning_rate(step))
                loss, y = training.forward_backward(next(given), step)
                record = training.agree(loss, y, accuracy=reporter.due(step))
                with guard.update(plan.learning_rate(step)):
                    training.state.step(skip=record.failed)
        reporter.end()
    return counts.totals()


# On one rank, without torch.compile. "rest" is all but the augmentation and its draws. The goals of a whole step are
# 450 and 700; it takes what "all" says, which docs/scaling.md and benchmarks/gpu/predictions.json quote.
@pytest.mark.parametrize(
    ("recipe", "precision", "most"),
    [
        (
            *("cifar10.yaml", "fp32"),
            {"update": 46, "augmentation": 144, "draws": 45, "forward": 73, "backward": 150, "rest": 360, "all": 540},
        ),
        ("cifar10.yaml", "bf16", {"all": 592}),
        (
            *("imagenet_resnet50.yaml", "fp32"),
            {"update": 79, "augmentation": 207, "draws": 45, "forward": 180, "backward": 290, "rest": 645, "all": 885},
        ),
        ("imagenet_resnet50.yaml", "bf16", {"all": 1003}),
    ],
)
def test_launches_of_a_step(
    recipe: str, precision: str, most: dict[str, int], images: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Counted of narrow models, which have as many tensors."""
    more = f"data.train={images}", f"precision={precision}", "optim.global_batch_size=4", "model.width=0.125"
    (counts,) = ranks.run(1, counted_step, recipe, tmp_path, *more)
    counts["rest"] = sum(counts.values()) - counts["augmentation"] - counts["draws"]
    counts["all"] = counts["rest"] + counts["augmentation"] + counts["draws"]
    assert {part: counts[part] for part in most if counts[part] > most[part]} == {}, counts
    if precision == "bf16":
        assert f"{most['all']:,}" in (ROOT / "docs" / "scaling.md").read_text()
        predictions = json.loads((ROOT / "benchmarks" / "gpu" / "predictions.json").read_text())
        assert predictions[f"{recipe.partition('_')[0].removesuffix('10.yaml')} kernels"]["predicted"][0] == most["all"]


@pytest.mark.parametrize(
    ("recipe", "layers"), [("cifar10.yaml", 22), pytest.param("imagenet_resnet50.yaml", 55, marks=pytest.mark.slow)]
)
def test_cross_rank_batch_norm_adds_few_launches(
    recipe: str, layers: int, images: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """On CUDA: 13 forward and 3 backward for each layer."""
    more = f"data.train={images}", "precision=fp32", "optim.global_batch_size=4", "model.width=0.125"
    (alone,) = ranks.run(1, counted_step, recipe, tmp_path, *more)
    for counts in ranks.run(2, counted_step, recipe, tmp_path, *more):
        assert counts["forward"] - alone["forward"] <= 13 * layers + 1, counts
        # DistributedDataParallel adds two for each parameter, of which a layer and its weights have three.
        assert counts["backward"] - alone["backward"] <= 3 * layers + 6 * layers, counts

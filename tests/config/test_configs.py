"""The files under configs/: they load, say how they are run, and hold the published settings."""

from pathlib import Path

import pytest

from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
from simclr_ddp.training import forecast
from simclr_ddp.training.components import make_objective

FOLDER = Path(__file__).parents[2] / "configs" / "pretrain"
FILES = sorted(FOLDER.glob("*.yaml"))
CIFAR10, IMAGENET = [0.4914, 0.4822, 0.4465], [0.485, 0.456, 0.406]

# methods of Chen et al. 2020 and Tan et al. 2023: view size, colour strength, blur, mean, stem
PUBLISHED = {
    "cifar10": (32, 0.5, [0.0, 0.0], CIFAR10, "cifar"),
    "cifar10_resnet50_1000ep": (32, 0.5, [0.0, 0.0], CIFAR10, "cifar"),
    "cifar100": (32, 0.5, [0.0, 0.0], [0.5071, 0.4865, 0.4409], "cifar"),
    "stl10": (96, 1.0, [0.5, 0.5], [0.4409, 0.4279, 0.3868], "stl"),
    "tiny_imagenet": (64, 1.0, [0.5, 0.5], IMAGENET, "cifar"),
    "imagenet_resnet50": (224, 1.0, [0.5, 0.5], IMAGENET, "imagenet"),
    "imagenet_kernel_infonce": (224, 1.0, [0.5, 0.5], IMAGENET, "imagenet"),
}


def load(path: Path) -> Pretrain:
    return options.build(Pretrain, [(str(path), options.read_yaml(path))])


def test_spirograph_yaml_is_the_defaults() -> None:
    assert load(FOLDER / "spirograph.yaml") == options.build(Pretrain, [])
    text = (FOLDER / "spirograph.yaml").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert body.strip() == options.to_yaml(options.build(Pretrain, [])).strip(), "every option is written out"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_loads_and_says_how_it_is_run(path: Path) -> None:
    assert isinstance(make_objective(load(path)), KernelInfoNCE)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for entry in ("Data", "Command", "Recipe", "Hardware", "Metric"):
        assert any(line.startswith(f"# {entry}:") for line in head), f"{path.name} has no line `# {entry}:`"
    command = next(line for line in head if "# Command:" in line)
    assert path.name in command or path.stem == "spirograph"


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_ones(name: str) -> None:
    settings = load(FOLDER / f"{name}.yaml")
    a = settings.data.augmentation
    assert (settings.data.size, a.strength, a.blur, a.mean, settings.model.stem) == PUBLISHED[name]
    assert (a.jitter, a.greyscale, a.flip, a.crop_scale) == (0.8, 0.2, 0.5, [0.08, 1.0])


@pytest.mark.parametrize("micro_batch_size", [None, 1024])
def test_the_head_quotes_what_the_doctor_predicts(micro_batch_size: int | None) -> None:
    path = FOLDER / "imagenet_kernel_infonce.yaml"
    settings, head = load(path), path.read_text()
    settings.optim.micro_batch_size = micro_batch_size
    for finding in (forecast.gpu_memory(settings, 8), forecast.arithmetic(settings, 8)):
        assert finding.text.partition(" (a prediction")[0] in head
    for override in ({"loss.kernel": "laplacian"}, {"loss.mix_level": "loss", "loss.mix_weight": 1}):
        options.build(Pretrain, [(str(path), options.read_yaml(path)), ("the head", override)])


def test_every_config_is_covered() -> None:
    assert {path.stem for path in FILES} == PUBLISHED.keys() | {"spirograph", "cifar10_cpu", "cifar10_gpu", "photos"}

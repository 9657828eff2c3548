"""The files under configs/finetune/: they load, say how they are run, and hold the published settings."""

from pathlib import Path

import pytest

from simclr_ddp.config import options
from simclr_ddp.config.schema import Finetune
from simclr_ddp.training.schedule import peak_learning_rate

FOLDER = Path(__file__).parents[2] / "configs" / "finetune"

# Chen et al. 2020, B.5, B.6 and B.8: frozen, batch, epochs, steps, peak learning rate, fraction of labels, combinations
PUBLISHED = {
    "linear_sgd": (True, 4096, 90, None, 1.6, 1, 1),
    "linear_sgd_cifar": (True, 512, 100, None, 0.2, 1, 1),
    "labels_1_percent": (False, 4096, 60, None, 0.8, 0.01, 1),
    "labels_10_percent": (False, 4096, 30, None, 0.8, 0.1, 1),
    "labels_1_percent_v2": (False, 1024, 60, None, 0.005 * 1024**0.5, 0.01, 1),
    "transfer": (False, 256, 30, 20000, 0.05, 1, 56),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_ones(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    settings = options.build(Finetune, [(str(path), options.read_yaml(path)), ("here", {"run": "a"})])
    optim, a, grid = settings.optim, settings.augmentation, settings.grid
    peak = peak_learning_rate(optim.base_learning_rate, optim.scaling, optim.global_batch_size)
    combinations = (len(grid.learning_rates) or 1) * (len(grid.weight_decays) or 1)
    values = optim.global_batch_size, optim.epochs, optim.steps, pytest.approx(peak), settings.labels.fraction
    assert (settings.frozen, *values, combinations) == PUBLISHED[name]
    second = name.endswith("v2")
    assert (optim.name, settings.from_layer) == (("lars", 1) if second else ("sgd", 0))
    assert (optim.nesterov, optim.momentum, optim.weight_decay) == (True, 0.9, 0)
    assert (optim.warmup_epochs, optim.schedule) == (0, "cosine")
    assert (a.crop_scale, a.flip, a.strength, a.greyscale) == ([0.08, 1.0], 0.5, 0, 0)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for entry in ("Data", "Command", "Recipe", "Hardware", "Metric"):
        assert any(line.startswith(f"# {entry}:") for line in head), f"{path.name} has no line `# {entry}:`"
    assert path.name in path.read_text()


def test_every_config_is_covered() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == PUBLISHED.keys()

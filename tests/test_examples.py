"""The examples of docs/examples, each on one and two ranks: the parameters of one process with all images."""

import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simclr_ddp import KernelInfoNCE
from tests.support.processes import ROOT
from tests.support.ranks import Ranks

FOLDER = ROOT / "docs/examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).double()


def views() -> Tensor:
    return torch.randn(2, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def trained_by(name: str) -> dict[str, Tensor]:
    """State after an example on this rank, which finds the variables that torchrun sets."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    try:
        found: nn.Module = example(name).train(network(), views())
    finally:
        if "accelerate" in sys.modules:  # it remembers the first number of processes
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        for key in ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
            os.environ.pop(key, None)
    return {key: value.detach().clone() for key, value in found.state_dict().items()}


def expected() -> dict[str, Tensor]:
    """The state of a plain loop in one process."""
    model, objective, x = network(), KernelInfoNCE(temperature=0.2), views()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        y = model(x.flatten(0, 1)).unflatten(0, (2, -1))
        optimizer.zero_grad()
        objective(y[0], y[1]).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("name", EXAMPLES)
def test_two_ranks_have_the_parameters_of_one_process(name: str, ranks: Ranks) -> None:
    wanted: dict[str, Any] = expected()
    first = network().state_dict()
    assert (wanted["0.weight"] - first["0.weight"]).abs().max() > 1e-3
    for world_size in (1, 2):
        for found in ranks.run(world_size, trained_by, name):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11)

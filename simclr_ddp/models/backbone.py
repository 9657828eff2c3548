"""What every encoder is, whoever has written it."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., nn.Module])


class Backbone(nn.Module):
    """Module that maps images [B, 3, H, W] to representations [B, width_out]."""

    width_out: int
    memory_format: torch.memory_format = torch.contiguous_format  # of images and weights
    fixed_size: bool = False  # whether it takes images of one size only

    def stages(self) -> tuple[nn.Module, ...]:
        """Consecutive parts, which may be recomputed and have a learning rate each; () if they are not known."""
        return ()


def backbone(function: Function) -> Function:
    """Decorator of a function that `model.arch=package.module:function` may name.

    The function returns a module that maps images [B, 3, H, W] to representations [B, D]. Without this mark it is not
    called: the name may come from the file of somebody else's encoder.

        @simclr_ddp.backbone
        def tiny() -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 64))
    """
    function.is_backbone = True  # type: ignore[attr-defined]
    return function

"""Warnings about recipes that can't learn, for mistakes that have cost others complete series of runs.

A published reproduction ran LARS (trust coefficient 0.001) at a learning rate of 0.001: no weight could move by
more than 18 % in 200 epochs, and every accuracy stayed below that of random features.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from simclr_ddp.losses.kernel_info_nce import KernelInfoNCE
from simclr_ddp.system.console import warn
from simclr_ddp.training.optim import LARS, global_norm

STEPS = 20
# Motion of the weights per update at the full rate, relative to their norm. Working recipes lie between 0.001 and
# 0.05: base rates of 0.3 to 1.5 x N/256, momentum 0.9, N from 128 to 4,096.
LEAST, MOST = 2e-4, 0.3
TYPICAL = 5e-3


class LearningRateGuard:
    """Compares update and weight norms over the first updates of a run under LARS, without synchronising."""

    def __init__(self, optimizer: torch.optim.Optimizer, base: float, peak: float, start: int = 0) -> None:
        # After a resume the momentum still holds larger rates from before, so only runs that start anew are judged.
        self._active = isinstance(optimizer, LARS) and peak > 0 and start == 0
        self._weights: list[Tensor] = optimizer.param_groups[0]["params"]
        self._base, self._peak = base, peak
        self._before: list[Tensor] = []
        self._rates: list[Tensor] = []

    @contextmanager
    def update(self, learning_rate: float) -> Iterator[None]:
        """Watch the update made in this context; once, after the first updates, warn if the rate can't work."""
        self.before(learning_rate)
        yield
        warn(self.after(learning_rate))

    @torch.no_grad()
    def before(self, learning_rate: float) -> None:
        """Copy the weights before an update."""
        if self._active and learning_rate > 0:
            self._before = [torch.empty_like(w) for w in self._weights]
            torch._foreach_copy_(self._before, self._weights)

    @torch.no_grad()
    def after(self, learning_rate: float) -> str | None:
        """Compare the weights after an update; once, after the first updates, return a warning if there is one."""
        if not self._before:
            return None
        moved = global_norm(list(torch._foreach_sub(self._weights, self._before)))
        self._rates.append(moved / global_norm(self._before) / learning_rate)
        self._before = []
        if len(self._rates) < STEPS:
            return None
        self._active = False
        # The last updates count: by then the momentum has built up.
        motion = torch.stack(self._rates[STEPS // 2 :]).median().item() * self._peak
        if LEAST <= motion <= MOST or motion != motion:
            return None
        small = motion < LEAST
        if motion == 0:
            return "the weights do not move at all under LARS: is optim.trust_coefficient=0 intended?"
        suggestion = self._base * TYPICAL / motion
        return (
            f"learning rate too {'small' if small else 'large'} for LARS: at optim.base_learning_rate={self._base:g} "
            f"an update moves the weights by {motion:.1e} of their norm, but {'at least' if small else 'at most'} "
            f"{LEAST if small else MOST:g} is expected; try optim.base_learning_rate={suggestion:.2g}"
        )


def loss_warning(mean_loss: float, objective: KernelInfoNCE, global_batch_size: int, optimizer: str) -> str | None:
    """Return a warning if the loss, an epoch after the warm-up, is still within 10 % of that of an untrained model."""
    untrained = objective.untrained_loss(global_batch_size)
    attainable = objective.attainable_loss(global_batch_size)
    if untrained is None or attainable is None or mean_loss < untrained - 0.1 * (untrained - attainable):
        return None
    if mean_loss > untrained + 0.1:
        cause = "it diverges or collapsed at the start; lower optim.base_learning_rate or raise loss.temperature"
    elif optimizer == "lars":
        cause = "learning rate too small for LARS? optim.base_learning_rate=0.3 to 1.5 with linear scaling is usual"
    else:
        cause = f"the learning rate is probably too small for {optimizer}, or loss.temperature too low"
    return (
        f"the loss is {mean_loss:.3f} an epoch after the warm-up, and an untrained model has log(2N-1) = "
        f"{untrained:.3f}: {cause}"
    )

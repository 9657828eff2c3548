"""LARS, and the optimizers of a run with their parameter groups."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, the rule of the SimCLR reference code (You et al. 2017 with changes).

    For each tensor w with gradient g, in a group with adapt=True:

        g   <- g + weight_decay * w
        rho  = trust_coefficient * |w| / |g|      (1 where |w| or |g| is 0; no epsilon)
        v   <- momentum * v + lr * rho * g        (the rate is inside the momentum)
        w   <- w - v

    Groups with adapt=False (biases, batch norm) take rho = 1 and no decay. The denominator is the norm of the sum
    g + weight_decay * w, not the sum of norms of You et al., eq. 6. Multi-tensor, without host synchronisation.

    unadapted_rate replaces the 1 of both cases. With a loss of 1/k of another and 1/k of its weight decay,
    unadapted_rate=k gives the updates of that other loss, since only rho adapts to the scale of the gradient.

    The attributes `found_inf` (0-dim tensor) and `grad_scale` work as in torch's fused optimizers: set before step(),
    the first makes it a no-op on the device, the second divides the gradients. torch.amp.GradScaler sets both.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        unadapted_rate: float = 1.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)
        self.unadapted_rate = unadapted_rate  # not in the groups, which checkpoints hold

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "a closure would need a second gradient"
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            for w in weights:
                if "momentum_buffer" not in self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
            buffers = [self.state[w]["momentum_buffer"] for w in weights]
            gradients = [w.grad for w in weights]
            if scale is not None:
                gradients = list(torch._foreach_div(gradients, scale))
            if group["weight_decay"] != 0 and group["adapt"]:
                gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            if group["adapt"]:
                updates = torch._foreach_mul(gradients, _rates(weights, gradients, group, self.unadapted_rate))
            else:
                updates = torch._foreach_mul(gradients, group["lr"] * self.unadapted_rate)
            torch._foreach_add_(updates, torch._foreach_mul(buffers, group["momentum"]))
            if found_inf is None:
                torch._foreach_copy_(buffers, updates)
            else:
                _choose_(buffers, updates, found_inf)
            torch._foreach_sub_(weights, updates)


def _rates(
    weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any], unadapted_rate: float
) -> tuple[Tensor, ...]:
    """Return the learning rate times the trust ratio of each tensor."""
    norms = torch.stack(torch._foreach_norm([*weights, *gradients])).view(2, -1)
    ratios = torch.where((norms > 0).all(0), group["trust_coefficient"] * norms[0] / norms[1], unadapted_rate)
    return (ratios * group["lr"]).unbind()


def _choose_(values: Sequence[Tensor], changes: Sequence[Tensor], skip: Tensor) -> None:
    """Set values <- changes; if `skip` is not 0, keep values and set changes <- 0. It takes four launches.

    The bits are multiplied by 0 or 1 and added as integers, because as floats 0 times NaN would be NaN.
    """
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values[0].element_size()]
    skipped = (skip != 0).to(kind)
    bits, of_changes = [v.view(kind) for v in values], [c.view(kind) for c in changes]
    torch._foreach_mul_(bits, skipped)
    torch._foreach_mul_(of_changes, 1 - skipped)
    torch._foreach_add_(bits, of_changes)


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (weights, biases and batch-norm parameters) of a model; the module's type decides which is which."""
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (others if name == "bias" or isinstance(module, _BatchNorm) else weights).append(parameter)
    return weights, others


def make_optimizer(
    model: nn.Module,
    name: str,
    weight_decay: float,
    momentum: float,
    trust_coefficient: float,
    unadapted_rate: float = 1.0,
) -> torch.optim.Optimizer:
    """Build LARS, SGD or AdamW; batch norm and biases have no weight decay (and no adaptation by LARS)."""
    weights, others = parameter_groups(model)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if name == "lars":
        groups[0]["adapt"], groups[1]["adapt"] = True, False
    return optimizer_of(groups, name, momentum, trust_coefficient, unadapted_rate)


def optimizer_of(
    groups: list[dict[str, Any]],
    name: str,
    momentum: float,
    trust_coefficient: float,
    unadapted_rate: float = 1.0,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Build LARS, SGD or AdamW for groups of parameters; `nesterov` is for SGD with momentum.

    The learning rate starts at 0 and is set before every step. SGD and AdamW are torch's fused implementations, which
    support found_inf, as LARS does.
    """
    if name == "lars":
        return LARS(groups, 0.0, momentum, trust_coefficient=trust_coefficient, unadapted_rate=unadapted_rate)
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov and momentum > 0, fused=True)
        for group in groups:
            for parameter in group["params"]:  # torch leaves the buffer uninitialised if the first step is skipped
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups, lr=0.0, betas=(momentum, 0.999), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of each group: `rate` times the group's `rate_factor`, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of all entries of a list of tensors, a scalar on their device, without host sync."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))

"""LARS, and the optimizers of a run with their parameter groups."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, the rule of the SimCLR reference code (You et al. 2017 with changes).

    For each tensor w with gradient g, in a group with adapt=True:

        g   <- g + weight_decay * w
        rho  = trust_coefficient * |w| / |g|      (1 where |w| or |g| is 0; no epsilon)
        v   <- momentum * v + lr * rho * g        (the rate is inside the momentum)
        w   <- w - v

    Groups with adapt=False take rho = 1 and no decay. Biases and norms belong there, which `parameter_groups` finds:

        weights, others = parameter_groups(model)
        optimizer = LARS([{"params": weights}, {"params": others, "adapt": False}], lr=4.8, weight_decay=1e-6)

    The denominator is the norm of the sum g + weight_decay * w, not the sum of norms of You et al., eq. 6. It works on
    many tensors at once, without host synchronisation. Parameters that FSDP2 shards (DTensor) are updated shard by
    shard, with the norms of complete tensors.

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
            trained = [w for w in group["params"] if w.grad is not None]
            for weights in ([w for w in trained if _sharded(w) is kind] for kind in (False, True)):
                if weights:
                    self._update(weights, group, scale, found_inf)

    def _update(
        self, weights: list[Tensor], group: dict[str, Any], scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Update tensors of one group, all of which are sharded or none."""
        for w in weights:
            if "momentum_buffer" not in self.state[w]:
                self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        buffers = _local([self.state[w]["momentum_buffer"] for w in weights])
        gradients = [w.grad for w in weights if w.grad is not None]
        if scale is not None:
            gradients = list(torch._foreach_div(gradients, scale))
        if group["weight_decay"] != 0 and group["adapt"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        if group["adapt"]:
            updates = torch._foreach_mul(_local(gradients), _rates(weights, gradients, group, self.unadapted_rate))
        else:
            updates = torch._foreach_mul(_local(gradients), group["lr"] * self.unadapted_rate)
        torch._foreach_add_(updates, torch._foreach_mul(buffers, group["momentum"]))
        if found_inf is None:
            torch._foreach_copy_(buffers, updates)
        else:
            _choose_(buffers, updates, found_inf)
        torch._foreach_sub_(_local(weights), updates)


def _sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank holds a part."""
    return hasattr(tensor, "to_local")


def _local(tensors: Sequence[Any]) -> list[Tensor]:
    """This rank's parts of the tensors, which share their memory."""
    return [t.to_local() if _sharded(t) else t for t in tensors]


def _rates(
    weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any], unadapted_rate: float
) -> tuple[Tensor, ...]:
    """Return the learning rate times the trust ratio of each tensor."""
    norms: Any = torch.stack(torch._foreach_norm([*weights, *gradients]))
    norms = (norms.full_tensor() if _sharded(norms) else norms).view(2, -1)
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
    """Return (weights, other parameters) of a model; an optimizer decays and LARS adapts only the weights.

    The others are vectors (biases, norms, scales), parameters of norms, and those that belong to a module with
    submodules without being its weights: class tokens, position embeddings.
    """
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parametrized = isinstance(module, ParametrizationList)  # of weight norm and the like
            token = "weight" not in name and not parametrized and next(module.children(), None) is not None
            (others if parameter.dim() < 2 or isinstance(module, NORMS) or token else weights).append(parameter)
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

"""KernelInfoNCE: the contrastive objective as a module that gathers negatives across ranks.

It works in any training loop, with or without DistributedDataParallel.
"""

import math
from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor, nn

from simclr_ddp.distributed import collectives
from simclr_ddp.losses.contrastive import contrastive_accuracy, contrastive_loss, normalize
from simclr_ddp.losses.kernels import Objective, is_number, log_kernel
from simclr_ddp.losses.matmul import not_compiled
from simclr_ddp.losses.p_norm import PDistance
from simclr_ddp.losses.tile_kernels import PRECISIONS


class DistributedRanks:
    """Ranks of the default process group, as the protocol `simclr_ddp.losses.tile_kernels.Ranks`."""

    def __init__(self) -> None:
        self.index, self.count = collectives.rank(), collectives.world_size()

    def gather(self, z: Tensor) -> Tensor:
        """Gather [..., B, D] of each rank into [..., N, D]; the gradient is summed over ranks."""
        return collectives.gather(z.flatten(0, -3)).unflatten(0, z.shape[:-2])

    def all_rows(self, local: Tensor) -> Tensor:
        """Gather [*, B] of each rank into [*, N]."""
        return torch.cat(collectives.all_gather(local), dim=1)

    def log_sum(self, values: Tensor) -> Tensor:
        """Elementwise log2 of the sum over ranks of 2^values; -inf where all are -inf."""
        largest = collectives.all_reduce_max(values.clone()).clamp_(
            min=torch.finfo(values.dtype).min
        )  # -inf - -inf is NaN
        return self.sum((values - largest).exp2_()).log2_().add_(largest)

    def sum(self, values: Tensor) -> Tensor:
        collectives.note("a sum of the loss over ranks")
        return collectives.all_reduce_sum(values)


def _constant(z: Tensor) -> Tensor:
    """Gather [2, n, d] of each rank into [2, N, d], without a gradient."""
    return torch.cat(collectives.all_gather(z), dim=1)


def _rounded(z: Tensor) -> Tensor:
    """Round to bfloat16 values; the gradient passes unchanged."""
    return z + (z.bfloat16().to(z.dtype) - z).detach()  # exact: neither the difference nor the sum is rounded


def _constant_in_bf16(z: Tensor) -> Tensor:
    """Gather bfloat16 values like `_constant`, sent as bytes, which all backends support."""
    blocks = collectives.all_gather(z.detach().bfloat16().view(torch.uint8))
    return torch.cat([block.view(torch.bfloat16) for block in blocks], dim=1).to(z.dtype)


class KernelInfoNCE(nn.Module):
    """Kernel-InfoNCE loss of two views over the global batch of all ranks.

    kernel              cosine (NT-Xent), gaussian, laplacian, exponential, simple_sum, concat_sum, arccos, spectral
    temperature         divides the log-kernel: cosine / t, -distance^gamma / t (simclr_ddp.losses.contrastive)
    gamma               power of the distance in exponential, simple_sum and concat_sum, at most 64
    mix_weight, mix_level, second_temperature   of simple_sum and concat_sum (simclr_ddp.losses.kernels.Objective)
    order               order of the arc-cosine kernel, 1 to 3
    radius, norm_p      embeddings are scaled to this radius in this norm
    distance_p          norm of the distance in gaussian, laplacian and exponential, from 1 to math.inf
    precision           fp32 or bf16, for the matrix products of the gradient (simclr_ddp.losses.tile_kernels.Problem)
    backend             tiled or triton; the latter is experimental and needs a GPU (simclr_ddp.losses.triton_log_sums)
    gather              fp32 or bf16, the format in which ranks send embeddings. bf16 halves the bytes and rounds the
                        embeddings on any number of ranks, including one: at t = 0.1 the gradient is off by 0.002 to
                        0.02 of its norm, more for closer views

    Raises ValueError for invalid combinations of settings.
    """

    def __init__(
        self,
        kernel: str = "cosine",
        temperature: float = 0.1,
        *,
        gamma: float = 1.0,
        mix_weight: float = 0.5,
        mix_level: str = "kernel",
        second_temperature: float | None = None,
        order: int = 1,
        radius: float = 1.0,
        norm_p: float = 2.0,
        distance_p: float = 2.0,
        precision: str = "fp32",
        backend: str = "tiled",
        gather: str = "fp32",
    ) -> None:
        super().__init__()
        if gather not in PRECISIONS:
            raise ValueError(f"gather={gather!r}: unknown value; choose one of {', '.join(PRECISIONS)}")
        if gather == "bf16" and kernel == "spectral":
            raise ValueError("gather='bf16': the kernel spectral also sends a gradient; set gather='fp32'")
        self.gather = gather
        self.objective = Objective(
            kernel=kernel,
            temperature=temperature,
            gamma=gamma,
            mix_weight=mix_weight,
            mix_level=mix_level,
            second_temperature=second_temperature,
            order=order,
            squared_radius=radius * abs(radius) if is_number(radius) else radius,  # negative is rejected
            norm_p=norm_p,
            distance_p=distance_p,
            precision=precision,
            backend=backend,
        )

    def extra_repr(self) -> str:
        """The arguments of the constructor, for print(module)."""
        values = vars(self.objective) | {"radius": self.objective.squared_radius**0.5, "gather": self.gather}
        return ", ".join(f"{name}={values[name]!r}" for name in signature(type(self)).parameters)

    @not_compiled
    def forward(self, y_a: Tensor, y_b: Tensor) -> Tensor:
        """This rank's mean loss, a scalar.

        y_a, y_b  [n, d] raw projections of the two views of this rank's images; n must be equal on all ranks

        Embeddings are gathered over the default process group, if there is one. Averaged over ranks, as
        DistributedDataParallel averages gradients, value and gradient are those of one process with all
        N = n * world_size images. The precision is at least float32, also under autocast and regardless of
        torch.set_float32_matmul_precision. torch.compile breaks the graph here, so fullgraph=True is not possible;
        transformations of torch.func raise ValueError.
        """
        if self.objective.kernel == "spectral":  # its gradient goes through all ranks' embeddings
            z, z_all, first = self._gathered(y_a, y_b, collectives.gather)
            return contrastive_loss(z, z_all, first, self.objective)
        z, z_all, first = self._gathered(y_a, y_b)
        return contrastive_loss(z, z_all, first, self.objective, DistributedRanks() if z_all is not z else None)

    @not_compiled
    @torch.no_grad()
    def top1(self, y_a: Tensor, y_b: Tensor) -> Tensor:
        """Fraction of this rank's anchors that are closest to their positive: a scalar in [0, 1]."""
        z, z_all, first = self._gathered(y_a, y_b)
        return contrastive_accuracy(z, z_all, first, self.objective)

    def untrained_loss(self, global_batch_size: int) -> float | None:
        """Loss if all pairs are equally similar, log(2N - 1); None for spectral, which has no such value."""
        return None if self.objective.kernel == "spectral" else math.log(2 * global_batch_size - 1)

    def attainable_loss(self, global_batch_size: int) -> float | None:
        """Loss of identical positives and orthogonal negatives, close to the minimum; None for spectral."""
        if self.objective.kernel == "spectral":
            return None
        mu, kernel = self.objective.squared_radius, log_kernel(self.objective)
        if isinstance(kernel, PDistance):
            differences = math.sqrt(mu) * torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
            positive, negative = kernel(differences).tolist()
            return math.log1p((2 * global_batch_size - 2) * math.exp(negative - positive))
        dot, square = torch.tensor([mu, 0.0], dtype=torch.float64), torch.tensor([0.0, 2 * mu], dtype=torch.float64)
        if self.objective.kernel == "concat_sum":  # each half has half of the squared norm
            dot, square = dot.expand(2, 2) / 2, square.expand(2, 2) / 2
        positive, negative = kernel(dot, square).tolist()
        return math.log1p((2 * global_batch_size - 2) * math.exp(negative - positive))

    def _gathered(
        self, y_a: Tensor, y_b: Tensor, gather: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, int]:
        gather = gather or (_constant if self.gather == "fp32" else _constant_in_bf16)
        if torch._C._are_functorch_transforms_active():
            raise ValueError(
                "KernelInfoNCE: torch.func can't transform it, since its gradient is computed in tiles; use "
                "torch.autograd.grad, also with create_graph=True"
            )
        if y_a.shape != y_b.shape or y_a.dim() != 2:
            raise ValueError(f"expected two tensors of one shape [n, d], got {tuple(y_a.shape)} and {tuple(y_b.shape)}")
        with torch.autocast(y_a.device.type, enabled=False):
            z = normalize(torch.stack([y_a, y_b]), self.objective.squared_radius, self.objective.norm_p)
            z = z if self.gather == "fp32" else _rounded(z)
        z_all = z if collectives.world_size() == 1 else gather(z)
        return z, z_all, collectives.local_slice(z_all.shape[1]).start

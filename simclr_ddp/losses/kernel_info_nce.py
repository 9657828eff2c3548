"""KernelInfoNCE: the contrastive objective as a module that gathers negatives across ranks.

A drop-in for any training loop, with or without DistributedDataParallel.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from simclr_ddp import distributed
from simclr_ddp.losses import Objective, _is_number, contrastive_accuracy, contrastive_loss, log_kernel, normalize
from simclr_ddp.p_distance import PDistance
from simclr_ddp.products import not_compiled
from simclr_ddp.tiled import PRECISIONS


class _Ranks:
    """The ranks of the default process group, as `simclr_ddp.tiled` asks for them."""

    def __init__(self) -> None:
        self.index, self.count = distributed.rank(), distributed.world_size()

    def gather(self, z: Tensor) -> Tensor:
        """[..., B, D] of this rank -> [..., N, D] of all; its gradient is summed over ranks."""
        return distributed.gather(z.flatten(0, -3)).unflatten(0, z.shape[:-2])

    def all_rows(self, own: Tensor) -> Tensor:
        """[*, B] -> [*, N]"""
        return torch.cat(distributed.of_all(own), dim=1)

    def log_sum(self, parts: Tensor) -> Tensor:
        """log2 of the sum over ranks of 2^parts, elementwise; -inf where all parts are."""
        largest = distributed.all_max(parts.clone()).clamp_(min=torch.finfo(parts.dtype).min)  # -inf - -inf is NaN
        return self.sum((parts - largest).exp2_()).log2_().add_(largest)

    def sum(self, values: Tensor) -> Tensor:
        distributed.note("a sum of the loss over ranks")
        return distributed.all_sum(values)


def _constant(z: Tensor) -> Tensor:
    """[2, n, d] of this rank -> [2, N, d] of all ranks, without a gradient."""
    return torch.cat(distributed.of_all(z), dim=1)


def _rounded(z: Tensor) -> Tensor:
    """Values of bfloat16; the gradient passes as if they were z's own."""
    return z + (z.bfloat16().to(z.dtype) - z).detach()  # exactly: neither the difference nor the sum is rounded


def _constant_in_bf16(z: Tensor) -> Tensor:
    """`_constant` of values of bfloat16, sent as such; as bytes, which all backends know."""
    blocks = distributed.of_all(z.detach().bfloat16().view(torch.uint8))
    return torch.cat([block.view(torch.bfloat16) for block in blocks], dim=1).to(z.dtype)


class KernelInfoNCE(nn.Module):
    """Kernel-InfoNCE loss of two views over the global batch of all ranks.

    kernel              cosine (NT-Xent), gaussian, laplacian, exponential, simple_sum, concat_sum, arccos, spectral
    temperature         its convention is each kernel's own: cosine / t, -distance^gamma / t (simclr_ddp.losses)
    gamma               power of the distance in exponential and in the sums, at most 64
    mix_weight, mix_level, second_temperature   of the sums
    order               1 to 3, of arccos
    radius, norm_p      embeddings are put on the sphere of this radius in this norm
    distance_p          norm of the distance in gaussian, laplacian and exponential, from 1 to math.inf
    precision           fp32 or bf16, of the products that make the gradient (simclr_ddp.tiled.Problem)
    backend             tiled, or triton: experimental, and only on a GPU (simclr_ddp.triton_log_sums)
    gather              fp32 or bf16, as which ranks send embeddings. bf16 is half the bytes, and rounds them on any
                        number of ranks, one as well: at t = 0.1 the gradient is off by 0.002 to 0.02 of its norm, the
                        more the closer the views are

    Raises ValueError for settings that make no sense together.
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
            raise ValueError(f"gather is {gather!r}: choose one of {', '.join(PRECISIONS)}")
        if gather == "bf16" and kernel == "spectral":
            raise ValueError("gather is 'bf16', but spectral sends a gradient as well: set fp32")
        self.gather = gather
        self.objective = Objective(
            kernel=kernel,
            temperature=temperature,
            gamma=gamma,
            mix_weight=mix_weight,
            mix_level=mix_level,
            second_temperature=second_temperature,
            order=order,
            squared_radius=radius * abs(radius) if _is_number(radius) else radius,  # below 0: refused
            norm_p=norm_p,
            distance_p=distance_p,
            precision=precision,
            backend=backend,
        )

    @not_compiled
    def forward(self, y_a: Tensor, y_b: Tensor) -> Tensor:
        """This rank's mean loss, a scalar.

        y_a, y_b  [n, d] raw projections of the two views of this rank's images; equally many on every rank

        Gathers over the default process group if there is one. Averaged over ranks, as DistributedDataParallel
        averages gradients, value and gradient are those of one process with all N = n * world_size images. Computed
        in at least float32, also under autocast and whatever torch.set_float32_matmul_precision says. In a loop that
        torch.compile compiles it runs as it is, between two graphs: fullgraph=True can't hold it.
        """
        if self.objective.kernel == "spectral":  # its gradient goes through all ranks' embeddings
            z, z_all, first = self._gathered(y_a, y_b, distributed.gather)
            return contrastive_loss(z, z_all, first, self.objective)
        z, z_all, first = self._gathered(y_a, y_b)
        return contrastive_loss(z, z_all, first, self.objective, _Ranks() if z_all is not z else None)

    @not_compiled
    @torch.no_grad()
    def top1(self, y_a: Tensor, y_b: Tensor) -> Tensor:
        """Fraction of this rank's anchors whose positive is their nearest of all: a scalar in [0, 1]."""
        z, z_all, first = self._gathered(y_a, y_b)
        return contrastive_accuracy(z, z_all, first, self.objective)

    def untrained_loss(self, global_batch_size: int) -> float | None:
        """log(2N - 1), the loss where all pairs look alike; None for spectral, which has no such value."""
        return None if self.objective.kernel == "spectral" else math.log(2 * global_batch_size - 1)

    def attainable_loss(self, global_batch_size: int) -> float | None:
        """The loss of identical positives among orthogonal negatives, about the best there is; None for spectral."""
        if self.objective.kernel == "spectral":
            return None
        mu, kernel = self.objective.squared_radius, log_kernel(self.objective)
        if isinstance(kernel, PDistance):
            differences = math.sqrt(mu) * torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
            positive, negative = kernel(differences).tolist()
            return math.log1p((2 * global_batch_size - 2) * math.exp(negative - positive))
        dot, square = torch.tensor([mu, 0.0], dtype=torch.float64), torch.tensor([0.0, 2 * mu], dtype=torch.float64)
        if self.objective.kernel == "concat_sum":  # each half with half of the squared norm
            dot, square = dot.expand(2, 2) / 2, square.expand(2, 2) / 2
        positive, negative = kernel(dot, square).tolist()
        return math.log1p((2 * global_batch_size - 2) * math.exp(negative - positive))

    def _gathered(
        self, y_a: Tensor, y_b: Tensor, gather: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, int]:
        gather = gather or (_constant if self.gather == "fp32" else _constant_in_bf16)
        if y_a.shape != y_b.shape or y_a.dim() != 2:
            raise ValueError(f"two equal shapes [n, d] are wanted, got {tuple(y_a.shape)} and {tuple(y_b.shape)}")
        with torch.autocast(y_a.device.type, enabled=False):
            z = normalize(torch.stack([y_a, y_b]), self.objective.squared_radius, self.objective.norm_p)
            z = z if self.gather == "fp32" else _rounded(z)
        z_all = z if distributed.world_size() == 1 else gather(z)
        return z, z_all, distributed.own_slice(z_all.shape[1]).start

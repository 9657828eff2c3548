"""Compare the Triton kernels in Triton's interpreter with float64: prints {case: {what: relative error}} as JSON.

It is a separate program, `TRITON_INTERPRET=1 python -m tests.support.interpreted`, because triton reads the variable
when it is imported, and other tests may have imported it. tests/losses/test_triton_log_sums.py checks the errors.
"""

import json
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simclr_ddp.losses import log_sums, tile_kernels, triton_log_sums
from simclr_ddp.losses.contrastive import contrastive_loss, log_kernels, normalize
from simclr_ddp.losses.kernels import Objective, log_kernel, tile_kernel
from simclr_ddp.losses.triton_log_sums import Shape, Side

SHAPES = ((1, 16), (2, 16), (17, 100))  # images, width
SMALL = Shape(16, 16, 16, 4)  # blocks: several of rows, of columns and of the width


def objectives() -> dict[str, Objective]:
    found = {k: Objective(k, 0.2) for k in ("cosine", "gaussian", "laplacian")}
    found |= {f"gamma {g}": Objective("exponential", 0.2, gamma=g) for g in (0.5, 1.5, 3.0)}
    found |= {f"{k}, cold": Objective(k, 0.01) for k in ("cosine", "gaussian", "laplacian")}
    return found | {"radius 2": Objective("laplacian", 0.2, squared_radius=4.0)}


def views(total: int, width: int, objective: Objective, seed: int = 0) -> Tensor:
    """Return z [2, N, D] in float64, with values rounded to float32."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(total, width, generator=generator, dtype=torch.float64)
    y = torch.stack([y, y + 0.5 * torch.randn(y.shape, generator=generator, dtype=torch.float64)])
    return normalize(y, objective.squared_radius).float().double()


def exact(z: Tensor, z_all: Tensor, first: int, objective: Objective) -> Tensor:
    """Compute the log-sums from complete matrices."""
    return log_kernels(z, z_all, first, log_kernel(objective))[1].logsumexp(dim=1)


def error(got: Tensor, expected: Tensor) -> float:
    """Return the error relative to the norm; inf if a value isn't a number."""
    value = ((got.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()
    return value if math.isfinite(value) else math.inf


def problem(objective: Objective, first: int = 0, ranks: Any = None) -> tile_kernels.Problem:
    kernel, form = tile_kernel(objective), partial(exact, first=first, objective=objective)
    return tile_kernels.Problem(kernel, form, first, objective.precision, ranks, "triton")


def by_hook(z: Tensor, z_all: Tensor | None, upstream: Tensor, of: tile_kernels.Problem) -> tuple[Tensor, ...]:
    """Return the log-sums of float32 copies, and the gradients of their weighted sum."""
    leaf = z.float().requires_grad_()
    columns = leaf if z_all is None else z_all.float().requires_grad_(of.ranks is None)
    sums = log_sums.log_sums(leaf, columns, of)
    leaves = [t for t in (leaf, columns) if t.requires_grad][: 1 if z_all is None else 2]
    return sums.detach(), *torch.autograd.grad((sums * upstream.float()).sum(), leaves)


def of_loss(objective: Objective, total: int, width: int) -> dict[str, float]:
    """Compare the loss of a complete batch and its gradient; for one image, which has no negatives, both are 0."""
    exactly = replace(objective, backend="tiled", precision="fp32")
    results = []
    for dtype, of in ((torch.float32, objective), (torch.float64, exactly)):
        leaf = views(total, width, objective).to(dtype).requires_grad_()
        loss = contrastive_loss(leaf, leaf, 0, of)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    if total == 1:
        return {"loss": abs(results[0][0].item()), "gradient": results[0][1].norm().item()}
    (got, expected), (gradient, wanted) = zip(*results, strict=True)
    return {"loss": error(got, expected), "gradient": error(gradient, wanted)}


def complete_batch(objective: Objective) -> dict[str, float]:
    """Compare log-sums and gradient if every image is an anchor, with weights of both signs."""
    z = views(17, 16, objective).requires_grad_()
    upstream = torch.linspace(-1, 2, 34, dtype=torch.float64)
    expected = exact(z, z, 0, objective)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), z)
    sums, gradient = by_hook(z.detach(), None, upstream, problem(objective))
    return {"sums": error(sums, expected.detach()), "gradient": error(gradient, wanted)}


def sub_batch(objective: Objective) -> dict[str, float]:
    """Compare log-sums and gradients of anchors 5 to 15 of 37 images, with a gradient also in the columns."""
    z_all = views(37, 20, objective).requires_grad_()
    z = z_all.detach()[:, 5:16].clone().requires_grad_()
    upstream = torch.linspace(-1, 2, 22, dtype=torch.float64)
    expected = exact(z, z_all, 5, objective)
    wanted = torch.autograd.grad((expected * upstream).sum(), (z, z_all))
    sums, *found = by_hook(z.detach(), z_all.detach(), upstream, problem(objective, 5))
    errors = [error(got, of) for got, of in zip(found, wanted, strict=True)]
    return {"sums": error(sums, expected.detach()), "rows": errors[0], "columns": errors[1]}


@dataclass
class OneOfTwo:
    """One of two ranks, the other of which is simulated: holds its answer, and checks what this rank sends."""

    index: int
    answer: Tensor
    count: int = 2

    def all_rows(self, own: Tensor) -> Tensor:
        half = self.answer.shape[1] // 2
        torch.testing.assert_close(own, self.answer[:, self.index * half :][:, :half], rtol=1e-4, atol=1e-4)
        return self.answer


def two_ranks(objective: Objective) -> dict[str, float]:
    """Compare two ranks with different weights; the gradient is that of the sum over both."""
    z_all = views(18, 20, objective).requires_grad_()
    upstream = torch.linspace(-1, 2, 36, dtype=torch.float64)
    expected = exact(z_all, z_all, 0, objective)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), z_all)
    log2_sums = expected.detach() * tile_kernels.LOG2_E
    answer = torch.cat([log2_sums.view(2, -1), upstream.view(2, -1)]).float()
    errors = {}
    for rank, own in ((0, slice(0, 9)), (1, slice(9, 18))):
        weights = upstream.view(2, -1)[:, own].flatten()
        of = problem(objective, own.start, OneOfTwo(rank, answer))
        sums, gradient = by_hook(z_all.detach()[:, own], z_all.detach(), weights, of)
        errors[f"sums {rank}"] = error(sums, expected.detach().view(2, -1)[:, own].flatten())
        errors[f"gradient {rank}"] = error(gradient, wanted[:, own])
    return errors


def blocks(objective: Objective) -> dict[str, float]:
    """Check that other blocks and several runs of columns give the same result."""
    z, kernel = views(40, 40, objective).float(), tile_kernel(objective)
    expected = exact(z.double(), z.double(), 0, objective)
    assert triton_log_sums.column_ranges(Side(z, 0), Side(z, 0), SMALL)[0] > 1
    sums = triton_log_sums.log_sums(Side(z, 0), Side(z, 0), kernel, SMALL)
    side = Side(z, 0, sums, torch.full_like(sums, 0.01))
    gradients = [triton_log_sums.gradient(side, side, kernel, "fp32", shape) for shape in (SMALL, None)]
    return {
        "sums": error(sums / tile_kernels.LOG2_E, expected),
        "gradient": error(gradients[0], gradients[1].double()),
        "again": 0.0 if torch.equal(gradients[0], triton_log_sums.gradient(side, side, kernel, "fp32", SMALL)) else 1.0,
    }


def near_pairs(objective: Objective) -> dict[str, float]:
    """Compare pairs of different images closer than the floor: they have a kernel value, but no slope.

    They are far from all other images, otherwise float32 could not resolve the difference.
    """
    z = views(12, 16, objective)
    z[:, 7] = z[:, 2] * (1 + 1e-7)
    leaf = z.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(exact(leaf, leaf, 0, objective).sum(), leaf)
    sums, gradient = by_hook(z, None, torch.ones(24), problem(objective))
    return {"sums": error(sums, exact(z, z, 0, objective)), "gradient": error(gradient, wanted)}


def not_a_number(objective: Objective) -> dict[str, float]:
    """Count the rows in which a NaN embedding, as row or as column, stays unnoticed: row 3 pairs with all except 20."""
    z, kernel = views(17, 16, objective).float(), tile_kernel(objective)
    sums = triton_log_sums.log_sums(Side(z, 0), Side(z, 0), kernel)
    z[0, 3, 5] = math.nan
    side, seen_by = Side(z, 0, sums, torch.ones(34)), torch.arange(34) != 20
    gradient = triton_log_sums.gradient(side, side, kernel, "fp32").flatten(0, 1)
    unseen = (triton_log_sums.log_sums(side, side, kernel).isfinite(), gradient.isfinite().any(dim=1))
    return {name: float((rows & seen_by).sum()) for name, rows in zip(("sums", "gradient"), unseen, strict=True)}


def second_derivative(objective: Objective) -> dict[str, float]:
    """Compare the second derivative, which uses the plain form, in float32."""
    norms = []
    for dtype, of in ((torch.float32, objective), (torch.float64, replace(objective, backend="tiled"))):
        leaf = views(7, 16, objective).to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(contrastive_loss(leaf, leaf, 0, of), leaf, create_graph=True)
        norms.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    return {"second": error(norms[0], norms[1])}


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("error: set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    cosine = torch.zeros(2, 1, 16)
    usable = triton_log_sums.usable(cosine, tile_kernels.Cosine(1.0))  # on a CPU it never is by itself
    triton_log_sums.usable = lambda z, kernel: z.dtype == torch.float32 and triton_log_sums.supports(kernel)
    found: dict[str, dict[str, float]] = {"usable on a CPU": {"usable": float(usable)}}
    for name, plain in objectives().items():
        objective = replace(plain, backend="triton")
        for total, width in SHAPES:
            found[f"{name}: {total} images, width {width}"] = of_loss(objective, total, width)
        found[f"{name}: whole batch"] = complete_batch(objective)
        found[f"{name}: sub-batch"] = sub_batch(objective)
        found[f"{name}: two ranks"] = two_ranks(objective)
    for name, objective in objectives().items():
        found[f"{name}: not a number"] = not_a_number(objective)
    for name in ("cosine", "laplacian"):
        objective = Objective(name, 0.2, backend="triton")
        found[f"{name}: blocks"] = blocks(objective)
        found[f"{name}: second derivative"] = second_derivative(objective)
        found[f"{name}: 100 images, width 100"] = of_loss(objective, 100, 100)
        found[f"{name}: 17 images, width 300"] = of_loss(objective, 17, 300)
        found[f"{name}: bf16"] = of_loss(replace(objective, precision="bf16"), 17, 64)
    found["laplacian: near pairs"] = near_pairs(Objective("laplacian", 0.2, backend="triton"))
    found["gamma 3.0: near pairs"] = near_pairs(Objective("exponential", 0.2, gamma=3.0, backend="triton"))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

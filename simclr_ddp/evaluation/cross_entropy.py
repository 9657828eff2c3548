"""Mean cross-entropy of several linear models over samples, its gradients, and its curvature."""

from collections.abc import Sequence

import torch
from torch import Tensor

from simclr_ddp.evaluation.chunks import Features

_SAMPLE = 4  # rows per feature from which the curvature is estimated


class CrossEntropy:
    """Mean cross-entropy over the selected samples of models w [..., K, D + 1] (bias last), and its derivatives.

    labels  [n] int64 below `classes`; a class without samples is allowed
    rows    [m] int64, the selected samples

    Classes come before samples: for few classes, products and softmax are then twice as fast on a CPU.
    """

    def __init__(self, samples: Features, labels: Tensor, rows: Tensor, classes: int) -> None:
        self.samples, self.labels, self.rows, self.classes = samples, labels, rows, classes
        self.features, self.device, self.count = samples.width, samples.device, len(rows)

    def at(self, w: Tensor, l2: Sequence[float], dtype: torch.dtype) -> tuple[list[float], Tensor]:
        """Mean cross-entropy + l2 * |W|^2 of the models w [A, K, D + 1] float64, and its gradients, like w.

        dtype  of products and softmax; chunks are summed in float64
        """
        loss, gradient = self.sums(w.to(dtype))
        gradient = gradient.view_as(w)
        penalty = torch.tensor(l2, dtype=torch.float64, device=w.device)
        gradient -= gradient.mean(1, keepdim=True)  # exactly 0, but for rounding, which would shift all classes
        gradient /= self.count
        gradient[..., :-1] += 2 * penalty[:, None, None] * w[..., :-1]
        return (loss / self.count + penalty * w[..., :-1].square().sum((1, 2))).tolist(), gradient

    def averaged_hessian(self, w: Tensor) -> Tensor:
        """Hessian [D + 1, D + 1] float64 at w [K, D + 1], averaged over the classes and over evenly spaced samples."""
        rows = self.rows[:: max(1, self.count // max(1000, _SAMPLE * self.features))]
        return self.hessian_sum(w.float(), rows) / len(rows)

    def sums(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the samples, float64: cross-entropy [A] and its gradient [A * K, D + 1] of the models w."""
        (models, k, d), dtype = (len(w), self.classes, self.features), w.dtype
        matrix = w.flatten(0, 1)
        weight, bias = matrix[:, :-1].contiguous(), matrix[:, -1:]
        loss = torch.zeros(models, dtype=torch.float64, device=w.device)
        gradient = torch.zeros(models * k, d + 1, dtype=torch.float64, device=w.device)
        for part, z in self.samples.chunks(self.rows, models * k, dtype):
            target = self.labels[part].expand(models, 1, -1)
            log_p = torch.addmm(bias, weight, z.T).view(models, k, -1).log_softmax(1)
            loss -= log_p.gather(1, target).sum((1, 2), dtype=torch.float64)
            residual = log_p.exp_()
            residual.scatter_(1, target, residual.gather(1, target) - 1)
            residual = residual.flatten(0, 1)
            gradient[:, :-1] += residual @ z
            gradient[:, -1] += residual.sum(1)
        return loss, gradient

    def hessian_sum(self, w: Tensor, rows: Tensor) -> Tensor:
        """Sum over the samples `rows` of the averaged Hessian [D + 1, D + 1] float64 at w [K, D + 1] float32."""
        d = self.features
        hessian = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=w.device)
        for _, z in self.samples.chunks(rows, max(d, self.classes), torch.float32):
            p = torch.addmm(w[:, -1:], w[:, :-1], z.T).softmax(0)
            weights = (1 - p.square_().sum(0)) / (self.classes - 1)
            scaled = z * weights[:, None]
            hessian[:d, :d] += z.T @ scaled
            hessian[d, :d] += scaled.sum(0)
            hessian[d, d] += weights.sum()
        hessian[:d, d] = hessian[d, :d]
        return hessian

"""Mean cross-entropy of several linear models over samples, its gradients, and its curvature."""

from collections.abc import Sequence

import torch
from torch import Tensor

from simclr_ddp.evaluation.chunks import Features

_SAMPLE = 4  # rows per feature from which the averaged curvature is estimated
_COUPLED_SAMPLE = 20  # and that of all classes
_COUPLED_ROWS = 2048  # read at a time for it


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
        rows = self._sample(_SAMPLE)
        return self.hessian_sum(w.float(), rows) / len(rows)

    def coupled_hessian(self, w: Tensor) -> Tensor:
        """Hessian [K * (D + 1), K * (D + 1)] float64 at w [K, D + 1], averaged over evenly spaced samples.

        It is singular where all classes shift alike; there, it is that of their average instead.
        """
        rows, (k, d) = self._sample(_COUPLED_SAMPLE), w.shape
        hessian = self.coupled_hessian_sum(w.float(), rows).div_(len(rows)).view(k, d, k, d)
        average = hessian.diagonal(dim1=0, dim2=2).sum(2) / k
        return hessian.add_(average[None, :, None, :] / k).view(k * d, k * d)

    def _sample(self, per_feature: int) -> Tensor:
        """Evenly spaced samples [m], int64: at least 1,000, if there are so many."""
        return self.rows[:: max(1, self.count // max(1000, per_feature * self.features))]

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

    def coupled_hessian_sum(self, w: Tensor, rows: Tensor) -> Tensor:
        """Sum over the samples `rows` of the Hessian [K * (D + 1), K * (D + 1)] float64 at w [K, D + 1] float32."""
        k, d = w.shape
        hessian = torch.zeros(k * d, k * d, dtype=torch.float64, device=w.device)
        for part in rows.split(_COUPLED_ROWS):
            x = torch.cat([z for _, z in self.samples.chunks(part, k * d, torch.float32)])
            z = torch.cat([x, x.new_ones(len(x), 1)], 1)
            p = (z @ w.T).double().softmax(1)
            products = (p.float()[:, :, None] * z[:, None, :]).flatten(1)
            for block in range(k):  # only those above the diagonal
                place, rest = slice(block * d, (block + 1) * d), slice((block + 1) * d, None)
                spread = p[:, block] * (1 - p[:, block])  # p - p^2 would be lost to rounding where p is close to 1
                hessian[place, place] += z.T @ (z * spread.float()[:, None])
                hessian[place, rest] -= products[:, place].T @ products[:, rest]
        return hessian.triu() + hessian.triu(1).T

"""Metrics of representations that need no labels: ranks, decay of the spectrum, LiDAR, alignment, uniformity, overlap.

All are computed in float64 from sums over images, so that the images may be divided among ranks in any way: every rank
calls `measure` with its rows, which may be none, and all get the same values. No n x n matrix is held.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from simclr_ddp.distributed import collectives
from simclr_ddp.evaluation.knn import nearest

EPSILON = 1e-7  # added to each share of RankMe and LiDAR
DELTA = 1e-4  # added to the diagonal of LiDAR's within-image covariance
FIT = range(6, 101)  # positions of the eigenvalues, from 1, in the fit of alpha-ReQ
BLOCK, ROWS = 1024, 4096  # rows of the two sides of a tile of similarities: 32 MiB; ROWS are summed up at a time


def measure(h: Tensor, views: Tensor | None = None) -> dict[str, float]:
    """Metrics of the representations of all ranks, each of which passes those of its images.

    h      [n, D] of one view of each image, usually the evaluation view; n may be 0 on some ranks
    views  [m, q, D] of q >= 2 augmented views of each of m images, for `lidar` and `alignment`; None omits both

    Keys: rankme, effective_rank, participation_ratio, alpha_req, uniformity; with views also lidar and alignment.
    `alpha_req` is missing if fewer than two eigenvalues above rounding errors are in its range. Ranks are 0 if there is
    nothing to measure: all values are 0 (rankme), or all images have equal representations (the others).

    With several ranks, tensors must be on the device of the process group. Raises ValueError, on all ranks, if there
    are fewer than two images or a value is not finite.
    """
    sums = [*_moments(h), *(_scatter(views) if views is not None else ())]
    n, total, gram, *of_views = _over_ranks(sums)
    raw = _eigenvalues(gram)[: int(n)]
    mean = total / n
    rounding = float(raw[0] / n) * len(total) * torch.finfo(raw.dtype).eps
    spectrum = _eigenvalues(gram / n - torch.outer(mean, mean), rounding)
    found = {
        "rankme": rankme(raw.sqrt()),
        "effective_rank": effective_rank(spectrum.sqrt()),
        "participation_ratio": participation_ratio(spectrum),
    }
    alpha = alpha_req(spectrum)
    if alpha is not None:
        found["alpha_req"] = alpha
    found["uniformity"] = uniformity(h)
    if views is not None:
        m, of_means, outer_of_means, within, distance = of_views
        mean = of_means / m
        square = outer_of_means / m
        between = square - torch.outer(mean, mean)
        found["lidar"] = lidar(torch.where(_is_rounding(between, square), 0, between), within / m)
        found["alignment"] = float(distance / m)
    return found


def rankme(singular_values: Tensor) -> float:
    """exp(-sum p log p) with p_i = s_i / sum(s) + 1e-7, from the singular values of the matrix [n, D], not centred.

    Garrido et al. 2023 (arXiv 2210.02885), equations 1 and 2. It is at most D, but for the 1e-7.
    """
    return _exp_entropy(singular_values, EPSILON)


def effective_rank(singular_values: Tensor) -> float:
    """exp(-sum p log p) with p_i = s_i / sum(s), from the singular values of the centred matrix [n, D]; 1 to D.

    Roy and Vetterli 2007, "The effective rank". RankMe is the same function, without subtraction of the mean, which
    for the non-negative outputs of a ResNet is a large part of the matrix.
    """
    return _exp_entropy(singular_values)


def participation_ratio(eigenvalues: Tensor) -> float:
    """sum(l)^2 / sum(l^2) of the eigenvalues l of the covariance; from 1 to D. Gao et al. 2017
    (bioRxiv 214262)."""
    square = eigenvalues.square().sum()
    return float(eigenvalues.sum() ** 2 / square) if square > 0 else 0.0


def alpha_req(eigenvalues: Tensor) -> float | None:
    """Decay alpha of the eigenvalues of the covariance in descending order, l_i ~ i^-alpha; None without two to fit.

    Agrawal et al. 2022, "alpha-ReQ", by the fit of their published library (arnab39/reptrix), which follows Stringer et
    al. 2019: minus the slope of log l_i over log i for i = 6 .. 100, by least squares with weights 1 / i, so that each
    factor of i counts alike. The first eigenvalues don't follow the power law, and the last ones are dominated by the
    finite number of images. With fewer than 100 dimensions, all after the fifth are fitted.
    """
    last = min(FIT.stop - 1, int((eigenvalues > 0).sum()))
    if last <= FIT.start:
        return None
    i = torch.arange(FIT.start, last + 1, dtype=eigenvalues.dtype, device=eigenvalues.device)
    x, y, weight = i.log(), eigenvalues[FIT.start - 1 : last].log(), 1 / i
    x = x - (weight * x).sum() / weight.sum()
    return -float((weight * x * y).sum() / (weight * x * x).sum())


def lidar(between: Tensor, within: Tensor) -> float:
    """exp(-sum p log p) with p_i = l_i / sum(l) + 1e-7, from the eigenvalues l of W^-1/2 B W^-1/2.

    between  [D, D] B, the covariance of the images' mean representations over their views
    within   [D, D] the mean over images of the covariance of an image's views; W is within + 1e-4 I

    Thilak et al. 2023 (arXiv 2312.04000): the rank of linear discriminant analysis with images as classes. All means
    are plain (not n - 1). It depends on the scale of the representations by the 1e-4 only.
    """
    # At least the rounding errors of the covariance, which for huge representations are above DELTA.
    ridge = max(DELTA, float(within.diagonal().sum()) * len(within) * torch.finfo(within.dtype).eps)
    regularised = within + ridge * torch.eye(len(within), dtype=within.dtype, device=within.device)
    factor = torch.linalg.cholesky(regularised)  # L^-1 B L^-T has the same eigenvalues
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    return _exp_entropy(_eigenvalues((whitened + whitened.mT) / 2), EPSILON)


def uniformity(h: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of different images, for representations of length 1.

    Wang and Isola 2020 (arXiv 2005.10242), with t = 2: 0 if all are equal, and -4 if all are orthogonal, which a
    uniform distribution approaches with many dimensions. All ranks call it together, like `measure`.
    """
    x = normalize(h.double())
    counts = [int(count) for count in collectives.all_gather(torch.tensor([len(x)], device=x.device))]
    total = x.new_zeros(())
    for first in range(0, max(counts), BLOCK):
        rows = x.new_zeros(min(BLOCK, max(counts) - first), x.shape[1])
        mine = x[first : first + BLOCK]
        rows[: len(mine)] = mine
        for count, others in zip(counts, collectives.all_gather(rows), strict=True):
            present = others[: max(0, count - first)]
            for part in x.split(ROWS):
                total += (4 * (part @ present.T) - 4).exp_().sum()  # |x - y|^2 = 2 - 2 cos
    total -= (4 * x.square().sum(1) - 4).exp().sum()  # an image with itself
    n = sum(counts)
    return float((collectives.all_reduce_sum(total) / (n * (n - 1))).log())


def neighbours(h: Tensor, k: int) -> Tensor:
    """The k nearest neighbours by cosine of each of n images among the others, int64 [n, k], from h [n, D]."""
    return torch.cat([index for _, index in nearest(h, h, k, own=True)])


def overlap(first: Tensor, second: Tensor) -> float:
    """Mean fraction of the k neighbours [n, k] of an image that it has in both, such as two epochs; from 0 to 1.

    Huh et al. 2024 (arXiv 2405.07987), who compare two models by it: mutual nearest neighbours.
    """
    common = sum((first == column[:, None]).sum() for column in second.unbind(1))
    return float(common / first.numel())


def _exp_entropy(values: Tensor, epsilon: float = 0.0) -> float:
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum() + epsilon
    return float(torch.special.entr(shares).sum().exp())


def _eigenvalues(matrix: Tensor, rounding: float = 0.0) -> Tensor:
    """Eigenvalues of a positive semidefinite matrix, descending; those of the size of rounding errors are set to 0."""
    values = torch.linalg.eigvalsh(matrix).flip(0)
    limit = max(rounding, float(values[0]) * len(values) * torch.finfo(values.dtype).eps)
    return torch.where(values > limit, values, 0)


def _is_rounding(difference: Tensor, minuend: Tensor) -> Tensor:
    """Whether a covariance is nothing but the rounding errors of the subtraction that made it: bool, 0-dim."""
    limit = len(minuend) * torch.finfo(minuend.dtype).eps
    return difference.diagonal().sum() <= limit * minuend.diagonal().sum()


def _moments(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of rows, their sum [D], and the sum of their outer products [D, D], of this rank in float64."""
    total = torch.zeros(h.shape[1], dtype=torch.float64, device=h.device)
    gram = total.new_zeros(len(total), len(total))
    for rows in h.split(ROWS):
        x = rows.double()
        total += x.sum(0)
        gram += x.mT @ x
    return total.new_tensor(float(len(h))), total, gram


def _scatter(views: Tensor) -> tuple[Tensor, ...]:
    """Sums over the images of this rank in float64: their number, the mean m over an image's views [D], m m^T and the
    covariance of its views [D, D], and the mean squared distance of two of its views of length 1."""
    m, q, width = views.shape
    if q < 2:
        raise ValueError(f"views {tuple(views.shape)}: an image has one view; give at least two, [m, q, D]")
    of_means = torch.zeros(width, dtype=torch.float64, device=views.device)
    outer, within, distance = of_means.new_zeros(width, width), of_means.new_zeros(width, width), of_means.new_zeros(())
    for images in views.split(max(1, ROWS // q)):
        x = images.double()
        mean = x.mean(1)
        of_means += mean.sum(0)
        outer += mean.mT @ mean
        centred = (x - mean[:, None]).flatten(0, 1)
        within += centred.mT @ centred / q
        unit = normalize(x, dim=2)
        # Over the pairs of an image: sum |u_i - u_j|^2 = q sum |u_i|^2 - |sum u_i|^2.
        distance += (q * unit.square().sum() - unit.sum(1).square().sum()) / (q * (q - 1) / 2)
    return of_means.new_tensor(float(m)), of_means, outer, within, distance


def _over_ranks(sums: list[Tensor]) -> list[Tensor]:
    """Sum each tensor over all ranks, in one all_reduce."""
    flat = collectives.all_reduce_sum(torch.cat([values.flatten() for values in sums]))
    if not flat.isfinite().all():
        raise ValueError("h: contains values that are not finite; use an earlier checkpoint")
    if flat[0] < 2:
        raise ValueError(f"h: representations of {int(flat[0])} images have no spread; give at least two images")
    parts = flat.split([values.numel() for values in sums])
    return [part.view(values.shape) for part, values in zip(parts, sums, strict=True)]

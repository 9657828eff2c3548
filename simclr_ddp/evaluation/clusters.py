"""Clusters of representations: k-means by cosine (Dhillon and Modha 2001)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from simclr_ddp.data.draws import uniforms

ITERATIONS = 50  # limit; assignments usually stop changing before


def clusters(h: Tensor, k: int, seed: int = 0) -> Tensor:
    """Assign representations h [n, D] to at most k clusters: int64 [n], numbered from the largest cluster, 0, on.

    The first centres are drawn as by k-means++ (Arthur and Vassilvitskii 2007). The draws depend on the seed only.
    """
    x = normalize(h.float())
    draws, centres = uniforms(seed, 0, np.arange(k), 0, 0), x[:0]
    far = x.new_full((len(x),), 2, dtype=torch.float64)  # distance 1 - cosine to the nearest centre
    for draw in draws:
        total = far.cumsum(0)
        if total[-1] <= 1e-9 * len(x):  # fewer than k different directions
            break
        chosen = int(torch.searchsorted(total, float(draw) * total[-1], right=True))
        centres = torch.cat([centres, x[chosen : chosen + 1]])
        far = torch.minimum(far, (1 - x @ centres[-1]).clamp(min=0).double())
    found = (x @ centres.T).argmax(1)
    for _ in range(ITERATIONS):
        sums = one_hot(found, len(centres)).to(x).T @ x
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums), centres)
        before, found = found, (x @ centres.T).argmax(1)
        if torch.equal(before, found):
            break
    size = found.bincount(minlength=len(centres))
    rank = size.argsort(descending=True, stable=True).argsort()
    return rank[found]

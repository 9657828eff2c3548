"""k nearest neighbours on frozen representations (Wu et al. 2018, arXiv 1805.01978, section 3.4).

The k vectors of the bank with the largest cosine similarity to a query vote for their classes, each with the weight
exp(cosine / temperature). Classes with equal votes are ranked by their number, the lowest first; of vectors with equal
similarity the first in the bank are the nearest. Nothing is approximate.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from simclr_ddp.data.dataset import Dataset
from simclr_ddp.distributed import collectives
from simclr_ddp.evaluation.labels import labels_of
from simclr_ddp.evaluation.linear import classification_metrics

TILE = {"cpu": 2**24, "cuda": 2**28}  # similarities that are held at a time, in float32: 64 MiB and 1 GiB


def knn_predict(
    bank: Tensor | np.ndarray,
    bank_labels: Tensor | np.ndarray,
    query: Tensor | np.ndarray,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> Tensor:
    """Rank the classes for every query, best first: int64 [m, K]; column 0 is the prediction.

    bank         [n, D] representations of the labelled images, of any float dtype
    bank_labels  [n] int64 classes from 0 to K - 1
    query        [m, D] representations to classify
    k            neighbours that vote, from 1 to n

    Raises ValueError for arguments that don't fit together and for values that are not finite.
    """
    return _predict(*_checked(bank, bank_labels, query, k, temperature), k, temperature, own=False)


def leave_one_out_predict(
    bank: Tensor | np.ndarray, labels: Tensor | np.ndarray, *, k: int = 200, temperature: float = 0.1
) -> Tensor:
    """Like `knn_predict` for each vector of the bank, whose neighbours are the others: int64 [n, K]; k is below n."""
    bank, labels, _ = _checked(bank, labels, bank, k, temperature)
    _check_others(bank, k, own=True)
    return _predict(bank, labels, bank, k, temperature, own=True)


def shared_predict(bank: Tensor, labels: Tensor, query: Tensor | None, *, k: int, temperature: float) -> Tensor:
    """Rank the five best classes for every query, with the queries shared over the ranks: int64 [m, min(5, K)].

    query  None: every vector of the bank, as in `leave_one_out_predict`

    All ranks pass the same tensors and get the same result. Tiles of queries are dealt to the ranks in turn, so any
    number of ranks multiply the same matrices. Raises ValueError as `knn_predict` does.
    """
    own = query is None
    bank, labels, query = _checked(bank, labels, bank if query is None else query, k, temperature)
    _check_others(bank, k, own)
    ranks, tile = collectives.world_size(), _tile(bank)
    mine = _predict(bank, labels, query, k, temperature, own, (collectives.rank(), ranks))[:, :5]
    rounds = -(-len(query) // (tile * ranks))  # of one tile for each rank
    block = mine.new_zeros(rounds * tile, mine.shape[1])
    block[: len(mine)] = mine
    blocks = [part.unflatten(0, (rounds, tile)) for part in collectives.all_gather(block)]
    return torch.stack(blocks, dim=1).flatten(0, 2)[: len(query)]


def _predict(
    bank: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float, own: bool, share: tuple[int, int] = (0, 1)
) -> Tensor:
    classes = int(labels.max()) + 1
    found = [labels.new_empty(0, classes)]
    for similarity, index in nearest(bank, query, k, own, share):
        collectives.note("the nearest neighbours")
        # Relative to the weight of the nearest, so that no temperature overflows or underflows.
        weights = ((similarity.double() - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(index), classes).scatter_add_(1, labels[index], weights)
        found.append(votes.sort(dim=1, descending=True, stable=True).indices)
    return torch.cat(found)


def nearest(
    bank: Tensor, query: Tensor, k: int, own: bool = False, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (cosines [b, k], positions in the bank int64 [b, k]), the largest cosine first, for b queries at a time.

    own    query i is vector i of the bank, which is not its own neighbour
    share  (r, W): yield only the tiles r, r + W, r + 2 W ...
    """
    tile = _tile(bank)
    bank, query = normalize(bank.float()), normalize(query.float())
    for first in range(share[0] * tile, len(query), share[1] * tile):
        similarity = query[first : first + tile] @ bank.T
        if own:
            similarity.diagonal(first).fill_(-2)
        found, index = similarity.topk(min(k + 1, len(bank)), dim=1)
        # Where equal similarities straddle the end, topk keeps any of them.
        tied = (found[:, k - 1] == found[:, -1]).nonzero()[:, 0] if found.shape[1] > k else range(0)
        for row in tied:
            index[row, :k] = similarity[row].sort(descending=True, stable=True).indices[:k]
        yield found[:, :k], index[:, :k]


def _check_others(bank: Tensor, k: int, own: bool) -> None:
    if own and k >= len(bank):
        raise ValueError(f"k={k}: each of {len(bank)} vectors has {len(bank) - 1} neighbours; choose a smaller k")


def _tile(bank: Tensor) -> int:
    """Number of queries whose similarities are held at a time."""
    return max(1, TILE[bank.device.type] // len(bank))


def _checked(bank: object, labels: object, query: object, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    x, y, q = (torch.as_tensor(values) for values in (bank, labels, query))
    if x.ndim != 2 or q.ndim != 2 or x.shape[1] != q.shape[1] or y.shape != x.shape[:1] or not len(x):
        raise ValueError(
            f"bank {tuple(x.shape)}, bank_labels {tuple(y.shape)} and query {tuple(q.shape)} don't fit; give [n, D], "
            "[n] and [m, D]"
        )
    if y.is_floating_point() or int(y.min()) < 0:
        raise ValueError("bank_labels: must be the numbers of classes, from 0; select the images that have a label")
    if not 1 <= k <= len(x):
        raise ValueError(f"k={k}: the bank holds {len(x)} vectors; choose k from 1 to {len(x)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    for name, values in (("bank", x), ("query", q)):
        if not values.isfinite().all():
            raise ValueError(f"{name}: contains values that are not finite; use an earlier checkpoint")
    return x, y.long(), q


def classify(
    x_train: Tensor,
    x_test: Tensor | None,
    train: Dataset,
    test: Dataset,
    *,
    k: int,
    temperature: float,
    device: torch.device,
    name: str,
) -> tuple[dict[str, Any], np.ndarray]:
    """Metrics of one encoder, and the predicted class of each test image, int64 [m]; all ranks call it together.

    x_train, x_test  representations [n, D], [m, D] on rank 0; without x_test, each training image is classified by all
                     others
    """
    begin = time.perf_counter()
    given = {"bank": x_train} if x_test is None else {"bank": x_train, "query": x_test}
    vectors = {key: x.to(device) for key, x in collectives.broadcast_tensors(given).items()}
    if not all(bool(x.isfinite().all()) for x in vectors.values()):
        raise ValueError(f"representations of the {name} encoder are not finite; use an earlier checkpoint")
    labels = labels_of(train, device)
    best = shared_predict(vectors["bank"], labels, vectors.get("query"), k=k, temperature=temperature).cpu()
    expected = labels_of(test, torch.device("cpu"))
    match = best == expected[:, None]
    ranks = torch.where(match.any(1), match.int().argmax(1), match.shape[1])
    metrics = classification_metrics(ranks, expected, train.class_count)
    return metrics | {"neighbour_seconds": round(time.perf_counter() - begin, 3)}, best[:, 0].numpy()

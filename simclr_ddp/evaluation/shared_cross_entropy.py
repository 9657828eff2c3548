"""Cross-entropy whose samples are split over all ranks, while rank 0 alone solves.

Rank 0 sends the features once, of which every rank keeps its part. For a pass it sends the models, and all ranks sum
over their parts: two transfers of the size of the gradient. Only rank 0 takes decisions, so ranks of different machines
can't disagree. W ranks add the same terms in another order than one, so solutions are equal within the tolerance, not
bit for bit. Rank 0 has all features, in memory or in a file.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from simclr_ddp.distributed import collectives
from simclr_ddp.evaluation.chunks import Features
from simclr_ddp.evaluation.cross_entropy import CrossEntropy

_PIECE = 2**24  # numbers of the features that are sent at once


class Helpers:
    """The other ranks, to which rank 0 gives tensors whose names say what to do with them: see _help."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def give(self, **tensors: Tensor) -> None:
        self._wait()
        collectives.broadcast_tensors({name: tensor.cpu() for name, tensor in tensors.items()})


class Shared:
    """Features and labels [n] below `classes`, of which every rank keeps a part; samples are then selected."""

    def __init__(self, helpers: Helpers, samples: Features, labels: Tensor, classes: int) -> None:
        self.helpers, self.samples, self.labels, self.classes = helpers, samples, labels, classes
        scaling = {"mean": samples.mean, "factor": samples.factor}
        sizes = torch.tensor([samples.count, samples.width, classes])
        helpers.give(sizes=sizes, **{name: tensor for name, tensor in scaling.items() if tensor is not None})
        for part in torch.arange(samples.count).split(max(1, _PIECE // samples.width)):
            helpers.give(x=samples.x[part], labels=labels[part])

    def select(self, rows: Tensor) -> CrossEntropy:
        """Cross-entropy over the samples `rows` [m], int64."""
        self.helpers.give(rows=rows)
        return _SharedCrossEntropy(self, rows)


class _SharedCrossEntropy(CrossEntropy):
    """Rank 0's: the sums of its own samples and of the other ranks'."""

    def __init__(self, shared: Shared, rows: Tensor) -> None:
        super().__init__(shared.samples, shared.labels, rows, shared.classes)
        self._helpers = shared.helpers
        own = _part(rows, shared.samples.count)
        self._own = CrossEntropy(shared.samples, shared.labels, own, shared.classes)

    def sums(self, w: Tensor) -> tuple[Tensor, Tensor]:
        self._helpers.give(models=w)
        return _sums(self._own, w)

    def hessian_sum(self, w: Tensor, rows: Tensor) -> Tensor:
        self._helpers.give(model=w, of_rows=rows)
        return collectives.all_reduce_sum(self._own.hessian_sum(w, _part(rows, self.samples.count)))

    def coupled_hessian_sum(self, w: Tensor, rows: Tensor) -> Tensor:
        self._helpers.give(coupled_model=w, of_rows=rows)
        return collectives.all_reduce_sum(self._own.coupled_hessian_sum(w, _part(rows, self.samples.count)))


@contextmanager
def helping(device: torch.device) -> Iterator[Helpers | None]:
    """Let rank 0 work in the block with the help of the others, who leave when it does; None without other ranks."""
    with collectives.while_main_works() as wait:
        if collectives.world_size() == 1:
            yield None
        elif collectives.is_main():
            helpers = Helpers(wait)
            yield helpers
            helpers.give()
        else:
            _help(wait, device)
            yield None


def _help(wait: Callable[[], None], device: torch.device) -> None:
    """Do what rank 0 asks for, until it gives nothing more."""
    n = features = classes = seen = filled = 0
    x = labels = torch.empty(0)
    scaling: dict[str, Tensor] = {}
    selected: CrossEntropy | None = None
    while True:
        wait()
        given = collectives.broadcast_tensors({})
        if not given:
            return
        if "sizes" in given:
            n, features, classes = given.pop("sizes").tolist()
            scaling = {name: tensor.to(device) for name, tensor in given.items()}
            seen = filled = 0
        elif "x" in given:  # the next samples, of which some may belong to this rank
            mine = _part(torch.arange(seen, seen + len(given["x"])), n) - seen
            if not seen:
                size = len(_part(torch.arange(n), n))
                x = torch.empty(size, features, dtype=given["x"].dtype, device=device)
                labels = torch.empty(size, dtype=torch.int64, device=device)
            place = slice(filled, filled + len(mine))
            x[place], labels[place] = given["x"][mine], given["labels"][mine]
            seen, filled = seen + len(given["x"]), filled + len(mine)
        elif "rows" in given:
            rows = _local(given["rows"], n).to(device)
            selected = CrossEntropy(Features(x, **scaling), labels, rows, classes)
        elif "models" in given and selected:
            _sums(selected, given["models"].to(device))
        elif selected:
            rows = _local(given["of_rows"], n).to(device)
            if "model" in given:
                collectives.all_reduce_sum(selected.hessian_sum(given["model"].to(device), rows))
            else:
                collectives.all_reduce_sum(selected.coupled_hessian_sum(given["coupled_model"].to(device), rows))


def _sums(over: CrossEntropy, w: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the samples of all ranks."""
    loss, gradient = over.sums(w)
    total = collectives.all_reduce_sum(torch.cat([loss, gradient.flatten()]))
    return total[: len(loss)], total[len(loss) :].view_as(gradient)


def _first(n: int, rank: int) -> int:
    """The first of the rank's samples; those of rank + 1 begin where they end."""
    return rank * n // collectives.world_size()


def _part(rows: Tensor, n: int) -> Tensor:
    """Those of the rows that are in this rank's part of the n samples."""
    rank = collectives.rank()
    return rows[(rows >= _first(n, rank)) & (rows < _first(n, rank + 1))]


def _local(rows: Tensor, n: int) -> Tensor:
    """Those rows by their position in this rank's part."""
    return _part(rows, n) - _first(n, collectives.rank())

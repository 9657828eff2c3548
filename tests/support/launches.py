"""Count the kernels that a training step launches on a GPU, from its operations on the CPU.

An operation counts as one kernel, a list operation (`_foreach_`, fused optimizers) as CUDA's launches of it, a
convolution's backward pass as one for each gradient. Views, allocations and metadata count as none; collectives are
counted separately. The step is the same on both devices, except that CUDA may launch several kernels inside an
operation (batch norm in two or three, a layout change before a convolution), which are not counted.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# From torch's MultiTensorApply.cuh: list entries per launch by the number of lists, blocks per launch, block size.
TENSORS, BLOCKS, BLOCK = (770, 448, 336, 252, 210), 2240, 65536
CLEANED = 110  # norms of tensors that one launch completes (ForeachReduceOp.cu)
CAT = 128  # tensors that one launch concatenates (cuda/Shape.cu)
NOTHING = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh", "alias"),
    *("_unsafe_view", "_reshape_alias", "is_same_size", "_local_scalar_dense", "resize_", "set_", "is_nonzero"),
}


def kernels(function: Any, arguments: Any, result: Any) -> int:
    """Return the number of kernels that the operation launches on CUDA."""
    namespace, _, name = function._schema.name.partition("::")
    if namespace in ("c10d", "prim", "profiler") or name in NOTHING or name.startswith("sym_"):
        return 0
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
        return 0
    if any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns):
        return 0
    if name.startswith(("_foreach_", "_fused_")):
        return _of_lists(name, [a for a in arguments if isinstance(a, list | tuple)], result)
    if name in ("cat", "stack"):
        return -(-len(arguments[0]) // CAT)
    if name == "convolution_backward":
        return sum(map(bool, arguments[-1]))
    return 1


def _of_lists(name: str, given: list[Any], result: Any) -> int:
    lists = [entry for entry in given if entry and isinstance(entry[0], Tensor)]
    if not name.endswith("_") and isinstance(result, list | tuple) and "norm" not in name:
        lists.append(result)
    if name.startswith("_fused_"):  # the lists also contain the step counts
        lists = [entry for entry in lists if entry[0].dim() or entry is lists[0]]
    first = lists[0]
    alike = all(t.dtype == first[0].dtype for entry in lists for t in entry) and all(
        _strides(t) == _strides(f) for entry in lists[1:] for t, f in zip(entry, first, strict=True)
    )
    if not alike and name != "_foreach_copy_":
        return len(first)  # CUDA launches one kernel for each
    launches = _launches(first, min(len(lists), 5))
    return launches + 2 + -(-len(first) // CLEANED) if "norm" in name else launches


def _strides(t: Tensor) -> list[int]:
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


def _launches(tensors: Iterable[Tensor], depth: int) -> int:
    launches = entries = blocks = 0
    for tensor in tensors:
        entries += 1
        blocks += -(-tensor.numel() // BLOCK)
        launches, blocks = launches + blocks // BLOCKS, blocks % BLOCKS
        if entries == TENSORS[depth - 1]:
            launches, entries, blocks = launches + 1, 0, 0
    return launches + (blocks > 0)


class Launches(TorchDispatchMode):
    """Counts the operations in its context, by the name that `part` set last."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {}
        self.bytes: Counter[str] = Counter()  # of the tensors read and written
        self.collectives: Counter[str] = Counter()
        self.name = "other"

    def clear(self) -> None:
        for found in (self.counts, self.bytes, self.collectives):
            found.clear()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        count = kernels(function, arguments, result)
        if count:
            self.counts.setdefault(self.name, Counter())[function._schema.name.partition("::")[2]] += count
            touched = tree_leaves((arguments, keywords, result))
            self.bytes[self.name] += sum(t.numel() * t.element_size() for t in touched if isinstance(t, Tensor))
        elif function._schema.name.startswith("c10d::"):
            self.collectives[self.name] += 1
        return result

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before, self.name = self.name, name
        yield
        self.name = before

    def totals(self) -> dict[str, int]:
        return {name: found.total() for name, found in self.counts.items()}

    def total(self) -> int:
        return sum(self.totals().values())

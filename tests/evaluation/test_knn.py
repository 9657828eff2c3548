import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from simclr_ddp import knn_predict
from simclr_ddp.evaluation import knn
from tests.support.ranks import Ranks

LIGHTLY = Path(__file__).parents[2] / ".peers/lightly/utils/benchmarking/knn.py"
GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "knn.npz"))
CASES = sorted(name.removeprefix("lightly_prediction_") for name in GOLDEN if name.startswith("lightly_prediction_"))


@pytest.mark.parametrize("case", CASES)
def test_equals_lightly_and_solo_learn(case: str) -> None:
    k, temperature = case.removeprefix("k").split("_t")
    bank, bank_labels, query = (GOLDEN[name] for name in ("bank", "bank_labels", "query"))
    ranked = knn_predict(bank, bank_labels, query, k=int(k), temperature=float(temperature))
    assert ranked[:, 0].tolist() == GOLDEN[f"lightly_prediction_{case}"].tolist()
    correct = ranked == torch.from_numpy(GOLDEN["query_labels"])[:, None]
    top = [correct[:, :count].any(dim=1).double().mean().item() for count in (1, 5)]
    for tool in ("lightly", "solo"):
        shown = 2 if int(k) >= 5 else 1  # with k = 1 the two tools fill the other places differently
        assert top[:shown] == pytest.approx(GOLDEN[f"{tool}_top1_top5_{case}"].tolist()[:shown])


@pytest.mark.skipif(not LIGHTLY.exists(), reason="lightly is not installed: make peers")
@pytest.mark.parametrize("k", [1, 20, 200])
def test_equals_lightly_itself(k: int) -> None:
    """All ranked classes, on unequal classes; with k = 1 the classes without votes have another order."""
    spec = importlib.util.spec_from_file_location(
        "lightly_knn", LIGHTLY
    )  # without the trainer that its package imports
    assert spec is not None and spec.loader is not None
    lightly = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lightly)
    generator = torch.Generator().manual_seed(k)
    labels = torch.multinomial(torch.arange(1.0, 9.0), 3000, replacement=True, generator=generator)
    centres = torch.randn(8, 32, generator=generator)
    bank = centres[labels] + 2 * torch.randn(3000, 32, generator=generator)
    query = 2 * torch.randn(500, 32, generator=generator) + centres[:1]
    theirs = lightly.knn_predict(normalize(query), normalize(bank).T, labels, 8, knn_k=k, knn_t=0.1)
    shown = 1 if k == 1 else 8
    voted = (knn_predict(bank, labels, query, k=k) == theirs)[:, :shown]
    assert voted[:, 0].all() and voted.float().mean() > 0.95


def by_definition(bank: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float) -> list[list[int]]:
    """In plain loops."""
    found = []
    for q in query.tolist():
        cosines = [
            sum(a * b for a, b in zip(q, v, strict=True)) / math.hypot(*q) / math.hypot(*v) for v in bank.tolist()
        ]
        order = sorted(range(len(cosines)), key=lambda i: (-cosines[i], i))[:k]
        votes = [0.0] * (int(labels.max()) + 1)
        for i in order:
            votes[int(labels[i])] += math.exp(cosines[i] / temperature)
        found.append(sorted(range(len(votes)), key=lambda c: (-votes[c], c)))
    return found


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    bank, query = torch.randn(60, 6, generator=generator), torch.randn(17, 6, generator=generator)
    return bank, torch.randint(0, 5, (60,), generator=generator), query


@pytest.mark.parametrize("k", [1, 7, 60])
def test_tiles_change_nothing(k: int, data: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels, query = data
    expected = by_definition(bank, labels, query, k, 0.1)
    for tile in (1, 200, 2**24):
        monkeypatch.setitem(knn.TILE, "cpu", tile)
        assert knn_predict(bank, labels, query, k=k).tolist() == expected


def test_leaving_one_out_is_a_bank_without_it(
    data: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, labels, _ = data
    others = [torch.arange(len(bank)) != i for i in range(len(bank))]
    expected = [knn_predict(bank[o], labels[o], bank[i : i + 1], k=9)[0].tolist() for i, o in enumerate(others)]
    for tile in (200, 2**24):
        monkeypatch.setitem(knn.TILE, "cpu", tile)
        assert knn.leave_one_out_predict(bank, labels, k=9).tolist() == expected


def shared(bank: Tensor, labels: Tensor, query: Tensor | None) -> Tensor:
    before, knn.TILE["cpu"] = knn.TILE["cpu"], 200  # three of 60 vectors
    try:
        return knn.shared_predict(bank, labels, query, k=9, temperature=0.1)
    finally:
        knn.TILE["cpu"] = before


def test_any_ranks_find_what_one_finds(data: tuple[Tensor, Tensor, Tensor], ranks: Ranks) -> None:
    bank, labels, query = data
    expected = knn_predict(bank, labels, query, k=9), knn.leave_one_out_predict(bank, labels, k=9)
    for world_size in (1, 2, 4):
        for found in ranks.run(world_size, shared, bank, labels, query):
            assert torch.equal(found, expected[0])
        for found in ranks.run(world_size, shared, bank, labels, None):
            assert torch.equal(found, expected[1])


def test_of_equal_neighbours_the_first_vote() -> None:
    bank, labels = torch.eye(2).repeat_interleave(50, dim=0), torch.arange(100) % 5
    labels[:50] = torch.arange(50) // 10
    ranked = knn_predict(bank, labels, torch.tensor([[2.0, 0.0]]), k=15)
    assert ranked.tolist() == [[0, 1, 2, 3, 4]]  # ten votes for class 0 and five for class 1


def test_a_small_temperature_overflows_nowhere(data: tuple[Tensor, Tensor, Tensor]) -> None:
    bank, labels, query = data
    assert knn_predict(bank, labels, query, k=9, temperature=1e-4)[:, 0].tolist() == [
        row[0] for row in by_definition(bank, labels, query, 1, 1.0)
    ]


def test_mistakes(data: tuple[Tensor, Tensor, Tensor]) -> None:
    bank, labels, query = data
    for arguments, options, message in (
        ((bank, labels, query), {"k": 61}, "k=61: the bank holds 60 vectors; choose k from 1 to 60"),
        ((bank, labels, query), {"k": 0}, "k=0: the bank"),
        ((bank, labels, query), {"k": 1, "temperature": 0}, "temperature=0: must be above 0"),
        ((bank, labels[:9], query), {"k": 1}, "don't fit; give"),
        ((bank, labels - 1, query), {"k": 1}, "bank_labels: must be the numbers of classes"),
        ((bank, labels, query / 0), {"k": 1}, "query: contains values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            knn_predict(*arguments, **options)
    with pytest.raises(ValueError, match="k=60: each of 60 vectors has 59 neighbours"):
        knn.leave_one_out_predict(bank, labels, k=60)

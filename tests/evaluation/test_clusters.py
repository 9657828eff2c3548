import numpy as np
import torch
from torch.nn.functional import normalize

from simclr_ddp.evaluation.clusters import clusters


def directions(sizes: list[int], width: int = 12, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors [n, width] of any length around one direction per size, in random order, and their directions [n]."""
    generator = np.random.default_rng(seed)
    which = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = np.linalg.qr(generator.normal(size=(width, width)))[0][which]
    x = centres + 0.1 * generator.normal(size=centres.shape)
    return torch.from_numpy(x * generator.uniform(0.1, 10, (len(x), 1))), which


def test_separate_directions_are_found_and_numbered_by_size() -> None:
    x, which = directions([20, 70, 40])
    found = clusters(x, 3).numpy()
    assert found.dtype == np.int64
    assert [set(found[which == group]) for group in (1, 2, 0)] == [{0}, {1}, {2}]


def test_every_vector_is_in_the_cluster_of_its_nearest_mean() -> None:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(300, 5)))
    found = clusters(x, 7)
    assert found.unique().tolist() == list(range(7))
    unit = normalize(x.float())
    means = normalize(torch.stack([unit[found == group].sum(0) for group in range(7)]))
    assert torch.equal((unit @ means.T).argmax(1), found)
    assert found.bincount().tolist() == sorted(found.bincount().tolist(), reverse=True)


def test_the_seed_alone_decides() -> None:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(300, 5)))
    assert torch.equal(clusters(x, 7, seed=3), clusters(x, 7, seed=3))
    assert not torch.equal(clusters(x, 7, seed=3), clusters(x, 7, seed=4))


def test_fewer_directions_than_clusters() -> None:
    x = torch.eye(3)[[0, 0, 1, 0, 2, 1]] * torch.arange(1, 7)[:, None]
    assert clusters(x, 10).tolist() == [0, 0, 1, 0, 2, 1]

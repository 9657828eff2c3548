import io

import numpy as np
import pytest
from PIL import Image

from simclr_ddp.plots.maps import Colouring, Map
from simclr_ddp.plots.turning import turning

FRAMES = 10


def test_a_map_turns_once_and_comes_out_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr_ddp.plots.turning.FRAMES", FRAMES)
    points = np.random.default_rng(0).normal(size=(30, 3)) * [3, 1, 1]
    drawn = Map("m", points, "title", [])
    colours = Colouring(np.tile([0.9, 0.1, 0.1, 1], (30, 1)), {}, None, "no labels")
    data = turning(drawn, colours, "subtitle")
    assert turning(drawn, colours, "subtitle") == data and len(data) < 2_000_000
    with Image.open(io.BytesIO(data)) as found:
        assert found.n_frames == FRAMES and found.info["loop"] == 0 and found.info["duration"] == 100
        frames = []
        for i in range(FRAMES):
            found.seek(i)
            frames.append(np.asarray(found.convert("RGB")).astype(int))
    change = [np.abs(frames[i] - frames[(i + 1) % FRAMES]).mean() for i in range(FRAMES)]
    assert min(change) > 0.1, "every frame moves"
    assert change[-1] < 2 * np.mean(change), "from the last frame to the first as well"
    red = (frames[0][..., 0] > 150) & (frames[0][..., 1] < 100)
    assert red.sum() > 300, "points keep their colour"

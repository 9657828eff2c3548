from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from simclr_ddp.figures import LIMIT, save


def noise(side: int) -> Figure:
    figure = Figure(figsize=(9, 6))
    figure.figimage(np.random.default_rng(0).uniform(size=(side * 2 // 3, side, 3)), 10, 10)
    return figure


def test_a_figure_keeps_its_colours_where_it_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.png"
    for side, mode, size in ((100, "RGB", 900), (450, "P", 900), (850, "P", 700)):
        save(noise(side), path)
        assert f"drew {path} ({path.stat().st_size / 1000:,.0f} KB)" in capsys.readouterr().out
        assert path.stat().st_size < LIMIT
        with Image.open(path) as picture:
            assert picture.mode == mode and picture.width <= size
            assert (picture.width == 900) == (side < 500)
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save(noise(400), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from simclr_ddp.plots.png import LIMIT, save


def noise(side: int) -> Figure:
    figure = Figure(figsize=(9, 6))
    figure.figimage(np.random.default_rng(0).uniform(size=(side * 2 // 3, side, 3)), 10, 10)
    return figure


def test_a_figure_keeps_its_colours_where_it_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.png"
    for side, mode, size in ((100, "RGB", 900), (450, "P", 900), (850, "P", 700)):
        save(noise(side), path)
        assert f"plotted {path} ({path.stat().st_size / 1000:,.0f} KB)" in capsys.readouterr().out
        assert path.stat().st_size < LIMIT
        with Image.open(path) as picture:
            assert picture.mode == mode and picture.width <= size
            assert (picture.width == 900) == (side < 500)
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save(noise(400), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_texts_are_drawn_in_fonts_that_have_their_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """DejaVu Sans, the default, lacks the bold A, which another font of matplotlib has, and no font has the private
    character; an unreadable byte of a file's name is shown as one."""
    figure = Figure()
    found, missing = (
        figure.text(0.1, 0.8, "Kot \U0001d400"),
        figure.text(0.1, 0.2, "Кот \U000f0000\udce9", parse_math=False),
    )
    for name in ("a.png", "b.png"):
        save(figure, tmp_path / name)
    assert found.get_text() == "Kot \U0001d400" and len(found.get_fontfamily()) == 2
    assert missing.get_text() == "Кот \\uf0000\\udce9"
    error = capsys.readouterr().err
    assert error.count("warning: no installed font has the characters") == 1 and not recwarn.list


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_files_for_papers_are_drawings_and_the_same_again(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Figure(figsize=(4, 3))
    figure.add_subplot().plot([1, 3, 2])
    for name in ("a", "b"):
        save(figure, tmp_path / f"{name}{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    assert data == (tmp_path / f"b{suffix}").read_bytes()
    assert data.startswith(b"%PDF" if suffix == ".pdf" else b"<?xml") and b"CreationDate" not in data
    assert b"<image" not in data and b"/Subtype /Image" not in data, "lines, not pixels"
    assert f"plotted {tmp_path / f'a{suffix}'}" in capsys.readouterr().out

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_ddp.plots.projector import write_projector


def test_tensorboard_reads_the_files(tmp_path: Path) -> None:
    projector = pytest.importorskip("tensorboard.plugins.projector")
    text_format = pytest.importorskip("google.protobuf.text_format")
    generator = np.random.default_rng(0)
    vectors, pictures = generator.normal(size=(7, 4)), generator.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    write_projector(tmp_path, vectors, pictures, {"class": list("abcdefg"), "number": range(7)})
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), projector.ProjectorConfig())
    (embedding,) = config.embeddings
    np.testing.assert_allclose(np.loadtxt(tmp_path / embedding.tensor_path), vectors, rtol=1e-5)
    rows = [line.split("\t") for line in (tmp_path / embedding.metadata_path).read_text().splitlines()]
    assert rows[0] == ["class", "number"] and rows[1:] == [[letter, str(i)] for i, letter in enumerate("abcdefg")]
    assert list(embedding.sprite.single_image_dim) == [8, 8]
    with Image.open(tmp_path / embedding.sprite.image_path) as sprite:
        assert sprite.size == (24, 24)
        np.testing.assert_array_equal(np.asarray(sprite)[16:, :8], pictures[6])


def test_a_sprite_is_as_large_as_the_projector_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr_ddp.plots.projector.SPRITE", 12)
    pictures = np.full((9, 8, 8, 3), 100, np.uint8)
    write_projector(tmp_path, np.zeros((9, 2)), pictures, {"a": range(9), "b": range(9)})
    with Image.open(tmp_path / "sprite.png") as sprite:
        assert sprite.size == (12, 12) and sprite.getextrema() == ((100, 100),) * 3
    assert (tmp_path / "projector_config.pbtxt").read_text().count("single_image_dim: 4\n") == 2

import numpy as np

from simclr_ddp.plots.spectrum import spectrum


def test_shares_are_drawn_on_logarithmic_axes_without_zeros() -> None:
    figure = spectrum({"h": np.array([6.0, 3, 1, 0, 1e-14]), "z": np.array([1.0, 1])}, "RankMe 2.5")
    figure.canvas.draw()
    (axis,) = figure.axes
    assert axis.get_xscale() == axis.get_yscale() == "log" and figure.get_suptitle() == "RankMe 2.5"
    h, z = axis.lines
    np.testing.assert_allclose(h.get_xydata(), [[1, 0.6], [2, 0.3], [3, 0.1]])
    np.testing.assert_allclose(z.get_xydata(), [[1, 0.5], [2, 0.5]])
    assert h.get_linestyle() != z.get_linestyle() and h.get_color() != z.get_color()
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["h: 3 of 5 directions are in use", "z: 2 of 2 directions are in use"]

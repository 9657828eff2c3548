import numpy as np
import pytest
from matplotlib.colors import to_rgba

from simclr_ddp.plots.strips import OTHER, SAME, strips


@pytest.mark.parametrize("labelled", [True, False])
def test_frames_show_whether_a_neighbour_is_of_the_same_class(labelled: bool) -> None:
    pictures = np.random.default_rng(0).uniform(size=(2, 3, 4, 4, 3))
    cosines = np.array([[0.9, 0.123], [1, -0.5]])
    classes = np.array([[1, 1, 0], [0, 1, 0]]) if labelled else None
    figure = strips(pictures, cosines, classes, ["cat", "$dog$"], "title")
    figure.canvas.draw()
    axes = np.array(figure.axes).reshape(2, 3)
    for row in range(2):
        for column in range(3):
            np.testing.assert_array_equal(axes[row, column].images[0].get_array(), pictures[row, column])
    assert [axis.get_title() for axis in axes[:, 1:].flat] == ["0.90", "0.12", "1.00", "-0.50"]
    assert [axis.get_title() for axis in axes[:, 0]] == (["$dog$", "cat"] if labelled else ["image", "image"])
    frames = [axis.spines["left"] for axis in axes[:, 1:].flat]
    colours = [frame.get_edgecolor() for frame in frames]
    if labelled:
        assert colours == [to_rgba(colour) for colour in (SAME, OTHER, OTHER, SAME)]
        assert frames[0].get_linestyle() != frames[1].get_linestyle(), "also without colours"
    else:
        assert len(set(colours)) == 1 and "same class" not in figure.get_suptitle()

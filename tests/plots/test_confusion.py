import numpy as np
import pytest

from simclr_ddp.plots.confusion import confusion, matrix

LABELS = np.array([0, 0, 0, 0, 1, 1, 3])
PREDICTIONS = np.array([0, 0, 0, 1, 1, 0, 2])
SHARES = [[0.75, 0.25, 0, 0], [0.5, 0.5, 0, 0], [np.nan] * 4, [0, 0, 1, 0]]


def test_shares_of_each_class() -> None:
    np.testing.assert_array_equal(matrix(LABELS, PREDICTIONS, 4), SHARES)


@pytest.mark.parametrize("count", [4, 30, 50])
def test_the_picture_shows_names_and_percentages_where_they_fit(count: int) -> None:
    names = ["$cat$", "a class of a very, very long name", *(f"class {i}" for i in range(2, count))]
    figure = confusion(LABELS, PREDICTIONS, names, "knn, step 9")
    figure.canvas.draw()
    axis = figure.axes[0]
    np.testing.assert_array_equal(np.ma.filled(axis.images[0].get_array(), np.nan)[:4, :4], SHARES)
    assert figure.get_suptitle() == "knn, step 9\n57.1% of 7 images are right"
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert texts == ({(0, 0): "75", (1, 0): "25", (0, 1): "50", (1, 1): "50", (2, 3): "100"} if count == 4 else {})
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert (labels[:2] == ["$cat$", "a class of a very…"]) == (count <= 40)

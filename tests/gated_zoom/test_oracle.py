"""The label oracle: a hand-made case."""

import numpy as np
import pytest

from terrazzo.gated_zoom._oracle import coarse_labels, label_oracle


def test_coarse_labels():
    """The most frequent class of each block; ignored pixels do not count, and blocks at the edge are smaller."""
    labels = np.array([[0, 1, 2, 2, 1], [1, 1, 255, 255, 1], [0, 0, 1, 1, 255]])
    expected = [[1, 1, 2, 2, 1], [1, 1, 2, 2, 1], [0, 0, 1, 1, 0]]
    assert coarse_labels(labels, 2, 3).tolist() == expected


def test_label_oracle():
    """Four tiles of 4 x 4 and a row that no tile has; two tiles have errors, 3 and 1, and the row has 1."""
    labels = np.zeros((9, 8), np.uint8)
    labels[0, 0] = labels[0, 2] = labels[2, 0] = 1
    labels[5, 6] = 1
    labels[8, 0] = 1  # a tie with class 0 in its half block: class 0 wins
    labels[4, 0] = 255
    found = label_oracle([labels], 2, 2, 4, (0, 0.25, 0.5))
    assert found.captured == pytest.approx([0, 3 / 4, 1])
    for confusion, missed in zip(found.confusions, (5, 2, 1)):
        assert confusion.tolist() == [[71 - 5, 0], [missed, 5 - missed]]
    assert found.ious(1) == pytest.approx([100 * 66 / 68, 100 * 3 / 5])

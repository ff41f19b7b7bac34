"""Run lengths of masks: of parts of a picture, and there and back."""

import numpy as np

from terrazzo.tools.data import rle


def test_run_lengths_of_a_part():
    random = np.random.default_rng(0)
    for corner in ((0, 0), (3, 4), (6, 8)):
        part, whole = random.random((5, 4)) > 0.4, np.zeros((11, 12), bool)
        whole[corner[0] : corner[0] + 5, corner[1] : corner[1] + 4] = part
        assert rle.encode(part, (11, 12), corner) == rle.encode(whole)
        assert np.array_equal(rle.decode(rle.encode(whole)), whole)
    for full in (np.ones((3, 2), bool), np.zeros((3, 2), bool)):
        assert np.array_equal(rle.decode(rle.encode(full)), full)

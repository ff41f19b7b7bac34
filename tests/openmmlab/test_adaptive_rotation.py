"""The augmentation that finds and rotates the window with the most texture."""

import numpy as np
import pytest
import torch

from terrazzo.errors import InputError
from terrazzo.openmmlab.adaptive_rotation import AdaptiveRotation, choose_window, texture_scores


def test_scores_by_their_definition():
    """Each pixel has a bit per neighbour that is not darker; the score is 1 minus the norm of the codes' histogram."""
    image = np.random.default_rng(0).normal(size=(8, 12))
    padded, found = np.pad(image, 1, mode="edge"), texture_scores(image, 4)
    assert found.shape == (2, 3)
    for row in range(2):
        for column in range(3):
            histogram = {}
            for y in range(4 * row, 4 * row + 4):
                for x in range(4 * column, 4 * column + 4):
                    code = tuple((padded[y : y + 3, x : x + 3] >= image[y, x]).ravel())
                    histogram[code] = histogram.get(code, 0) + 1 / 16
            assert found[row, column] == pytest.approx(1 - np.linalg.norm(list(histogram.values())))


def test_texture_beats_flatness():
    image = np.zeros((32, 32))
    image[16:, :16] = np.random.default_rng(0).normal(size=(16, 16))
    scores = texture_scores(image, 16)
    assert scores.argmax() == 2  # the first window of the second row: scores are row by row
    assert scores[0, 1] < 0.01 < 0.5 < scores[1, 0]


@pytest.mark.parametrize("seed", range(4))
def test_windows_by_trying_all(seed):
    scores = np.random.default_rng(seed).random((7, 9))
    best = np.unravel_index(scores.argmax(), scores.shape)
    for side in (6, 4, 2):
        windows = {
            (top, left): scores[top : top + side, left : left + side].mean()
            for top in range(8 - side)
            for left in range(10 - side)
            if top <= best[0] < top + side and left <= best[1] < left + side
        }
        place = max(windows, key=windows.get)
        if windows[place] >= scores.mean() or side == 2:
            break
    assert choose_window(scores, (6, 4, 2)) == (*place, side)


def test_a_smaller_window_where_the_large_is_poor():
    scores = np.ones((8, 8))
    scores[:6, :6] = 0
    scores[0, 0] = 1.5
    assert choose_window(scores, (6, 4, 1)) == (0, 0, 1)


def test_only_the_window_turns():
    torch.manual_seed(0)
    image = torch.randn(3, 64, 64) + 5
    turned, window = AdaptiveRotation(8, (32, 16))(image)
    top, left, side = (8 * window).tolist()
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[top : top + side, left : left + side] = True
    assert side in (16, 32)
    assert torch.equal(turned[:, ~inside], image[:, ~inside])
    assert (turned[:, inside] != image[:, inside]).float().mean() > 0.5
    assert not turned[:, top, left].any(), "the corner is filled with 0"
    torch.manual_seed(0)
    torch.randn(3, 64, 64)
    assert torch.equal(AdaptiveRotation(8, (32, 16))(image)[0], turned), "the angle is torch's generator's"


def test_errors():
    with pytest.raises(InputError, match="multiples of patch_size, 16"):
        AdaptiveRotation(16, (96, 40))
    with pytest.raises(InputError, match="64x64 does not hold a window of 96 pixels"):
        AdaptiveRotation(16)(torch.zeros(3, 64, 64))
    with pytest.raises(InputError, match="does not divide into patches of 16"):
        AdaptiveRotation(16)(torch.zeros(3, 100, 96))

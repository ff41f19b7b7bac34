"""Pixels, and checks of windows against them."""

import numpy as np
from PIL import Image

from terrazzo.tools.data.windows import open_windows

GREY = (np.arange(44)[:, None] * 3 + np.arange(60)[None] * 2).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
BEYOND = [(-1, 0, 5, 5), (0, 0, 61, 5), (0, 0, 5, 45), (5, 0, 5, 5), (0, 9, 5, 3), (0, -2, 5, 3)]
"""Windows that are empty, or not inside of 60x44 pixels."""


def saved_turned(path, pixels, turn, **options):
    """Write pixels with Pillow, and how they are to be turned."""
    exif = Image.Exif()
    exif[0x112] = turn
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


def whole(opened):
    return np.asarray(opened.read(0, 0, opened.width, opened.height))


def random_windows(width, height, count=12):
    random = np.random.default_rng(0)
    for _ in range(count):
        (left, right), (top, bottom) = (np.sort(random.choice(size + 1, 2, replace=False)) for size in (width, height))
        yield int(left), int(top), int(right), int(bottom)


def check_windows(path, wanted):
    """Random windows of a file, and the whole file, against its pixels (H, W, 3)."""
    with open_windows(path) as opened:
        assert (opened.width, opened.height) == wanted.shape[1::-1]
        assert np.array_equal(whole(opened), wanted)
        for left, top, right, bottom in random_windows(opened.width, opened.height):
            found = opened.read(left, top, right, bottom)
            assert found.mode == "RGB"
            assert np.array_equal(found, wanted[top:bottom, left:right]), (left, top, right, bottom)

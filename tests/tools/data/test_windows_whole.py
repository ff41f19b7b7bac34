"""Pictures by windows without rasterio: what is held whole in memory."""

import sys

import numpy as np
import pytest
from PIL import Image
from support.picture_windows import BEYOND, COLOUR, check_windows, saved_turned

from terrazzo._pictures import read_picture
from terrazzo.errors import InputError
from terrazzo.tools.data import windows as windows_module
from terrazzo.tools.data.windows import open_windows


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_windows_are_upright(tmp_path, turn, suffix):
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    path = saved_turned(tmp_path / f"x.{suffix}", COLOUR, turn, **options)
    wanted = np.asarray(read_picture(path))
    assert wanted.shape == ((60, 44, 3) if turn >= 5 else (44, 60, 3))
    check_windows(path, wanted)


@pytest.mark.parametrize("window", BEYOND)
def test_windows_beyond_the_picture_are_refused(tmp_path, window):
    path = saved_turned(tmp_path / "x.png", COLOUR, 1)
    with open_windows(path) as opened, pytest.raises(InputError, match=r"is not inside the picture .*, which is 60x44"):
        opened.read(*window)


def test_pictures_that_are_held_whole_are_limited(tmp_path, monkeypatch):
    path = saved_turned(tmp_path / "x.png", COLOUR, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.raises(InputError, match=r"x\.png has 60x44 pixels, more than the limit of 0\.0015 megapixels"):
        open_windows(path)


def test_without_rasterio(tmp_path, monkeypatch):
    """What Pillow can read is held whole; for anything else, the message says what to install."""
    path = saved_turned(tmp_path / "x.tif", COLOUR, 1)
    monkeypatch.setattr(windows_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "terrazzo.tools.data.raster", None)
    check_windows(path, COLOUR)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.raises(
        InputError, match=r"x\.tif has .* pixels.*; or install what reads .* by windows: pip install .*huge"
    ):
        open_windows(path)

"""Writing tiled TIFFs: what blocks brought is what is read, memory holds a band, and no file is half written."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from terrazzo.errors import InputError
from terrazzo.tools.data.windows import open_windows

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed (extra: huge)")

from terrazzo.tools.data.raster import Georeference  # noqa: E402
from terrazzo.tools.data.tiled_tiff import TILE, TiledTiff  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 7, (600, 530)).astype(np.uint8)


def write_blocks(file, pixels, height, width, order=lambda places: places):
    """Feed pixels in blocks of a size."""
    places = [(x, y) for y in range(0, len(pixels), height) for x in range(0, pixels.shape[1], width)]
    for left, top in order(places):
        file.write(left, top, pixels[top : top + height, left : left + width])


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    block=st.tuples(st.integers(1, 400), st.integers(90, 700)),
    kind=st.sampled_from(["labels", "wide", "colours"]),
    seed=st.integers(0, 99),
)
def test_blocks_in_any_order_make_the_picture(tmp_path_factory, size, block, kind, seed):
    path = tmp_path_factory.mktemp("blocks") / "x.tif"
    random = np.random.default_rng(seed)
    dtype, channels = {"labels": ("u1", 1), "wide": ("u2", 1), "colours": ("u1", 3)}[kind]
    pixels = random.integers(0, 256 ** np.dtype(dtype).itemsize, (*size, *([3] if channels == 3 else []))).astype(dtype)
    with TiledTiff(path, size[1], size[0], dtype=dtype, channels=channels) as file:
        write_blocks(file, pixels, *block, order=random.permutation)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), pixels)
    with rasterio.open(path) as source:
        assert source.block_shapes[0] == (TILE, TILE)
        assert source.compression.name == "deflate"


def test_a_palette_keeps_the_values(tmp_path):
    path = tmp_path / "x.tif"
    with TiledTiff(path, 530, 600, palette=[(10 * value, 5, 200) for value in range(6)]) as file:
        write_blocks(file, LABELS, 256, 530)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), LABELS)
    with open_windows(path) as opened:
        found = np.asarray(opened.read(0, 0, 530, 600))
    assert np.array_equal(found[LABELS == 4], [(40, 5, 200)] * (LABELS == 4).sum())
    assert (found[LABELS == 6] == 128).all()  # no colour: grey


def test_lossy_colours(tmp_path):
    path = tmp_path / "x.tif"
    ramp = (np.arange(600)[:, None] / 4 + np.arange(530)[None] / 6).astype(np.uint8)
    pixels = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1)
    with TiledTiff(path, 530, 600, channels=3, lossy=True) as file:
        write_blocks(file, pixels, 200, 200)
    with Image.open(path) as image:
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 6
    assert path.stat().st_size < pixels.nbytes / 10


def test_memory_holds_the_rows_of_tiles_that_were_begun(tmp_path):
    with TiledTiff(tmp_path / "x.tif", 1000, 10 * TILE) as file:
        for top in range(0, 10 * TILE, 320):
            for left in (0, 500):
                file.write(left, top, np.zeros((min(320, 10 * TILE - top), 500), np.uint8))
            assert len(file._rows) <= 1
    assert (np.asarray(Image.open(tmp_path / "x.tif")) == 0).all()


def test_the_place_on_the_earth_is_kept(tmp_path):
    transform = rasterio.transform.from_origin(500_000, 5_400_000, 0.5, 0.25)
    place = Georeference(rasterio.crs.CRS.from_epsg(32632), transform)
    with TiledTiff(tmp_path / "x.tif", 530, 600, palette=[(1, 2, 3)], georeference=place) as file:
        file.write(0, 0, LABELS)
    with rasterio.open(tmp_path / "x.tif") as source:
        assert source.crs.to_epsg() == 32632
        assert source.transform == transform
    with open_windows(tmp_path / "x.tif") as opened:
        assert opened.georeference == place


def test_a_large_file_is_a_bigtiff(tmp_path):
    """The format is chosen when the file is made, by the size before compression: 10 GB here."""
    file = TiledTiff(tmp_path / "x.tif", 100_000, 100_000)
    file.__enter__()
    file.write(0, 0, np.zeros((TILE, 100_000), np.uint8))
    (temporary,) = tmp_path.iterdir()
    assert temporary.read_bytes()[:4] == b"II+\0"
    file.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_no_file(tmp_path):
    def write(error):
        with TiledTiff(tmp_path / "x.tif", 530, 600) as file:
            file.write(0, 0, LABELS[:599])
            if error is not None:
                raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            write(error)
    with pytest.raises(InputError, match=r"x\.tif is not complete: pixels were not written"):
        write(None)
    assert not list(tmp_path.iterdir())


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.tif"
    path.write_text("old")
    with TiledTiff(path, 530, 600) as file:
        file.write(0, 0, LABELS)
        assert path.read_text() == "old"
    assert np.array_equal(np.asarray(Image.open(path)), LABELS)
    assert os.listdir(tmp_path) == ["x.tif"]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from terrazzo.tools.data.tiled_tiff import TiledTiff
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, limits = Path(sys.argv[1]), [int(limit) for limit in sys.argv[2:]]
pixels = np.random.default_rng(0).integers(0, 256, (1000, 1000)).astype(np.uint8)
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with TiledTiff(path, 1000, 1000) as file:
            file.write(0, 0, pixels)
        print("written", path.stat().st_size)
        path.unlink()
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the system has no limit of a file's size")
def test_a_full_disk_is_reported(tmp_path):
    """GDAL writes the last blocks when it closes the file, and it does not report that this failed."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "x.tif")]
    limits = [100_000, 500_000, 1_000_000, 1_003_000, 10_000_000]
    lines = subprocess.run(
        [*command, *map(str, limits)], capture_output=True, text=True, timeout=100
    ).stdout.splitlines()
    assert len(lines) == len(limits)
    for line in lines[:-1]:
        assert line.startswith(f"InputError {tmp_path / 'x.tif'} cannot be written: "), lines
    assert lines[-1].startswith("written "), lines
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), TiledTiff(tmp_path / "file" / "x.tif", 5, 5):
        pass


@pytest.mark.parametrize(
    ("left", "top", "pixels", "words"),
    [
        (0, 0, LABELS.astype(np.int64), r"a block \(600, 530, 1\) of int64 does not fit x\.tif, which has 1 channels"),
        (0, 0, np.zeros((5, 5, 3), np.uint8), r"a block \(5, 5, 3\) of uint8 does not fit"),
        (1, 0, LABELS, r"the block \(1, 0, 531, 600\) reaches beyond x\.tif, which is 530x600"),
        (0, -1, LABELS, r"reaches beyond"),
        (100, 300, LABELS[:10, :10], r"pixels of x\.tif are written twice, in rows from 256 on"),
        (100, 0, LABELS[:10, :10], r"pixels of x\.tif are written twice, in rows from 0 on"),
    ],
)
def test_blocks_that_do_not_fit(tmp_path, left, top, pixels, words):
    with TiledTiff(tmp_path / "x.tif", 530, 600) as file:
        file.write(0, 0, LABELS[:310])
        with pytest.raises(InputError, match=words):
            file.write(left, top, pixels)
        file.write(0, 310, LABELS[310:])
    with Image.open(tmp_path / "x.tif") as image:  # as if the bad block had not come
        assert np.array_equal(np.asarray(image), LABELS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": np.int32}, "1 channels of int32 are not written"),
        ({"channels": 2}, "2 channels of uint8 are not written"),
        ({"dtype": np.uint16, "lossy": True}, "JPEG compression is for uint8"),
        ({"dtype": np.uint16, "palette": [(0, 0, 0)]}, "a palette of 1 colours does not fit 1 channels of uint16"),
        ({"palette": [(0, 0, 0)] * 257}, "a palette of 257 colours"),
        ({"channels": 3, "palette": [(0, 0, 0)]}, "does not fit 3 channels"),
    ],
)
def test_descriptions_that_no_file_has(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        TiledTiff(tmp_path / "x.tif", 5, 5, **options)

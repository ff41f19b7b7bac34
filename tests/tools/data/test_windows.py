"""Pictures by windows through rasterio: every window of every kind of file holds the pixels of the whole picture."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.picture_windows import BEYOND, COLOUR, GREY, check_windows, saved_turned, whole

from terrazzo import _pictures
from terrazzo._pictures import read_picture
from terrazzo.errors import InputError
from terrazzo.tools.data.pictures import FetchedPicture, Picture
from terrazzo.tools.data.sources import find_sources
from terrazzo.tools.data.windows import open_windows

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed (extra: huge)")

pytestmark = pytest.mark.filterwarnings(
    "ignore::rasterio.errors.NotGeoreferencedWarning", "ignore::terrazzo.errors.PictureWarning"
)


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch):
    monkeypatch.setattr(_pictures, "_noted", set())


def written(path, samples, driver="GTiff", colours=None, **options):
    """Write samples (C, H, W) with GDAL."""
    count, height, width = samples.shape
    options = {"width": width, "height": height, "count": count, "dtype": samples.dtype, **options}
    with rasterio.open(path, "w", driver=driver, **options) as file:
        if colours is not None:  # before the samples, or GDAL writes it beside the file
            file.write_colormap(1, colours)
        file.write(samples)
    return path


LAYOUTS = {
    "strips of one row": {"blockysize": 1},
    "strips of 16 rows": {"blockysize": 16},
    "one strip": {"blockysize": 44},
    "tiles": {"tiled": True, "blockxsize": 16, "blockysize": 32},
    "tiles larger than the picture": {"tiled": True, "blockxsize": 128, "blockysize": 128},
}


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    interleave=st.sampled_from(["pixel", "band"]),
    compress=st.sampled_from(["none", "lzw", "deflate", "packbits", "zstd"]),
    bigtiff=st.sampled_from(["yes", "no"]),
    endianness=st.sampled_from(["big", "little"]),
    dtype=st.sampled_from(["u1", "u2"]),
    bands=st.sampled_from([1, 3, 4]),
    data=st.data(),
)
def test_any_window_of_any_layout(
    tmp_path_factory, layout, interleave, compress, bigtiff, endianness, dtype, bands, data
):
    path = tmp_path_factory.mktemp("layouts") / "x.tif"
    samples = np.random.default_rng(bands).integers(0, 256 ** np.dtype(dtype).itemsize, (bands, 44, 60)).astype(dtype)
    options = {"interleave": interleave, "compress": compress, "bigtiff": bigtiff, "endianness": endianness}
    written(path, samples, **options, **LAYOUTS[layout])
    pixels = samples if dtype == "u1" else (samples // 256).astype("u1")
    wanted = np.moveaxis(pixels[:3] if bands > 1 else pixels.repeat(3, 0), 0, -1)
    with open_windows(path) as opened:
        left, top = data.draw(st.integers(0, 59)), data.draw(st.integers(0, 43))
        right, bottom = data.draw(st.integers(left + 1, 60)), data.draw(st.integers(top + 1, 44))
        assert np.array_equal(opened.read(left, top, right, bottom), wanted[top:bottom, left:right])


PALETTE = {index: (index, 255 - index, index // 2, 255) for index in range(256)}
KINDS = {
    "grey": lambda path: written(path, GREY[None]),
    "grey, 0 is white": lambda path: written(path, GREY[None], photometric="miniswhite"),
    "wide grey, 0 is white": lambda path: written(path, GREY[None].astype("u2") * 257, photometric="miniswhite"),
    "1 bit": lambda path: written(path, GREY[None] // 128, nbits=1),
    "1 bit, 0 is white": lambda path: written(path, GREY[None] // 128, nbits=1, photometric="miniswhite"),
    "2 bits": lambda path: written(path, GREY[None] // 64, nbits=2),
    "4 bits, 0 is white": lambda path: written(path, GREY[None] // 16, nbits=4, photometric="miniswhite"),
    "12 bits": lambda path: written(path, GREY[None].astype("u2") * 16, nbits=12),
    "palette": lambda path: written(path, GREY[None], colours=PALETTE),
    "grey and transparency": lambda path: written(path, np.stack([GREY, GREY[::-1]]), alpha="yes"),
    "transparency": lambda path: written(path, COLOUR.transpose(2, 0, 1)[[0, 1, 2, 1]], photometric="rgb", alpha="yes"),
    "CMYK": lambda path: Image.fromarray(COLOUR).convert("CMYK").save(path),
    "floats to 1": lambda path: written(path, (GREY[None] / 255).astype("f4")),
    "floats to 255": lambda path: written(path, GREY[None].astype("f4")),
    "signed": lambda path: written(path, GREY[None].astype("i2")),
    "32 bits": lambda path: written(path, GREY[None].astype("i4") * 257),
}


@pytest.mark.parametrize("kind", KINDS)
def test_windows_show_what_the_whole_picture_shows(tmp_path, kind):
    """The same conversion of samples, whether Pillow reads all of a file or GDAL reads windows."""
    path = tmp_path / "x.tif"
    KINDS[kind](path)
    check_windows(path, np.asarray(read_picture(path)))


def test_jpeg_in_tiff(tmp_path):
    """Pillow and GDAL decode JPEG alike, up to rounding."""
    options = {"compress": "jpeg", "photometric": "ycbcr", "tiled": True, "blockxsize": 16, "blockysize": 16}
    path = written(tmp_path / "x.tif", COLOUR.transpose(2, 0, 1), interleave="pixel", **options)
    with open_windows(path) as opened:
        found = whole(opened)
        check_windows(path, found)
    assert np.abs(found.astype(int) - np.asarray(read_picture(path))).max() <= 3
    assert np.abs(found.astype(int) - COLOUR).mean() < 12


WIDER = {
    "12 bits": ({"nbits": 12}, COLOUR.astype("u2") * 16 + 15),
    "floats": ({}, (COLOUR / 255).astype("f4")),
    "64-bit floats": ({}, COLOUR.astype("f8")),
    "32 bits": ({}, COLOUR.astype("u4") * 257),
}


@pytest.mark.parametrize("kind", WIDER)
def test_wide_colours(tmp_path, kind):
    """Kinds that Pillow cannot read; the rules are those of grey pictures."""
    options, values = WIDER[kind]
    path = written(tmp_path / "x.tif", values.transpose(2, 0, 1), photometric="rgb", **options)
    check_windows(path, COLOUR)


def test_the_range_of_floats_is_that_of_the_whole_picture(tmp_path):
    """A window whose values are all below 1 is dark, because the rest of the picture goes up to 200."""
    values = np.zeros((1, 44, 60), "f4")
    values[0, :22], values[0, 40, 50] = 0.75, 200
    path = written(tmp_path / "x.tif", values, tiled=True, blockxsize=16, blockysize=16)
    with open_windows(path) as opened:
        assert np.asarray(opened.read(0, 0, 60, 20)).max() == 1
        assert np.asarray(opened.read(40, 30, 60, 44)).max() == 200


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (GREY.astype("f4") - 5, "holds floats from -5 to"),
        (np.where(GREY == 9, np.nan, 0).astype("f4"), "holds floats from nan to nan"),
        (GREY.astype("i2") * 100, "holds signed 16-bit integers from 0 to"),
        (GREY.astype("c8"), "holds samples of complex64"),
    ],
)
def test_unknown_ranges_are_refused(tmp_path, values, words):
    path = written(tmp_path / "x.tif", values[None])
    with pytest.raises(InputError, match=rf"x\.tif {words}.*save it with 8"):
        open_windows(path)


@pytest.mark.parametrize("turn", range(1, 9))
def test_windows_are_upright(tmp_path, turn):
    path = saved_turned(tmp_path / "x.tif", COLOUR, turn)
    wanted = np.asarray(read_picture(path))
    assert wanted.shape == ((60, 44, 3) if turn >= 5 else (44, 60, 3))
    check_windows(path, wanted)


def test_an_orientation_in_a_bigtiff(tmp_path):
    path = tmp_path / "x.tif"
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(COLOUR).save(path, exif=exif, big_tiff=True)
    assert path.read_bytes()[:4] == b"II+\0"
    check_windows(path, np.rot90(COLOUR, -1))


@pytest.mark.parametrize("suffix", ["jp2", "j2k"])
@pytest.mark.parametrize("pixels", [COLOUR, GREY, GREY.astype("u2") * 257], ids=["colours", "grey", "wide"])
def test_jpeg_2000(tmp_path, suffix, pixels):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(path, irreversible=False, tile_size=(32, 32))
    check_windows(path, np.asarray(read_picture(path)))


def test_more_bands_than_colours_are_noted(tmp_path, recwarn):
    bands = np.stack([GREY, GREY[::-1], GREY[:, ::-1], GREY // 2, GREY // 3])
    check_windows(written(tmp_path / "x.tif", bands), COLOUR)
    (note,) = [str(warning.message) for warning in recwarn if "bands" in str(warning.message)]
    assert note.startswith("pictures of 5 bands without colours are shown by the first 3; the first is")


def test_named_colours_are_found(tmp_path):
    """Red, green and blue may lie anywhere among the bands."""
    path = written(tmp_path / "x.tif", np.stack([GREY // 2, *COLOUR.transpose(2, 0, 1)[::-1]]))
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [rasterio.enums.ColorInterp[name] for name in ("undefined", "blue", "green", "red")]
    check_windows(path, COLOUR)


def test_georeferences_are_those_of_the_upright_picture(tmp_path):
    transform = rasterio.transform.from_origin(500_000, 5_400_000, 0.5, 0.25)
    path = written(tmp_path / "x.tif", COLOUR.transpose(2, 0, 1), crs="EPSG:32632", transform=transform)
    with open_windows(path) as opened:
        assert opened.georeference.crs.to_epsg() == 32632
        assert opened.georeference.transform == transform
    turned = saved_turned(tmp_path / "turned.tif", COLOUR, 6)
    (tmp_path / "turned.tfw").write_text("0.5\n0\n0\n-0.25\n500000.25\n5399999.875\n")  # centre of the first pixel
    with open_windows(turned) as opened:
        found = opened.georeference.transform
    # Turned to the right, the file's left upper corner is the right upper corner, and so on.
    for upright, stored in (((44, 0), (0, 0)), ((44, 60), (60, 0)), ((0, 0), (0, 44)), ((0, 60), (60, 44))):
        assert np.reshape(found, (3, 3)) @ (*upright, 1) == pytest.approx(np.reshape(transform, (3, 3)) @ (*stored, 1))
    with open_windows(saved_turned(tmp_path / "plain.tif", COLOUR, 1)) as opened:
        assert opened.georeference is None


def test_gdal_keeps_as_many_blocks_as_it_is_told():
    """In bytes; a few bytes would make every window decode its strips again."""
    from rasterio._env import get_gdal_config

    from terrazzo.tools.data.raster import gdal

    with gdal("nothing"):
        assert get_gdal_config("GDAL_CACHEMAX") == 128 * 2**20


@pytest.mark.parametrize("window", BEYOND)
def test_windows_beyond_the_picture_are_refused(tmp_path, window):
    path = saved_turned(tmp_path / "x.tif", COLOUR, 1)
    with open_windows(path) as opened, pytest.raises(InputError, match=r"is not inside the picture .*, which is 60x44"):
        opened.read(*window)


def test_bytes_and_odd_names(tmp_path):
    """A picture from a server, and names that GDAL would take for something else."""
    path = written(tmp_path / "x.tif", COLOUR.transpose(2, 0, 1))
    content = path.read_bytes()
    with FetchedPicture("http://server/x.tif", "x", content).windows() as opened:
        assert np.array_equal(whole(opened), COLOUR)
    with open_windows(io.BytesIO(content)) as opened:
        assert np.array_equal(whole(opened), COLOUR)
    for name in ("a!b.tif", "zip+a.tif", "GTIFF_DIR:2:x.tif", "ü b.tif"):
        (tmp_path / name).write_bytes(content)
        check_windows(tmp_path / name, COLOUR)


def test_a_file_that_names_other_files_is_no_picture(tmp_path):
    """GDAL's virtual format reads further files, and it does not look at suffixes."""
    written(tmp_path / "secret.tif", GREY[None])
    path = tmp_path / "x.tif"
    path.write_text(
        '<VRTDataset rasterXSize="60" rasterYSize="44"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        '<SourceFilename relativeToVRT="1">secret.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>'
    )
    with pytest.raises(InputError, match="is not in a picture format that can be read"):
        open_windows(path)


def test_damaged_files_are_refused_by_name(tmp_path, capfd):
    content = written(
        tmp_path / "x.tif", COLOUR.transpose(2, 0, 1), tiled=True, blockxsize=16, blockysize=16
    ).read_bytes()
    path = tmp_path / "short.tif"
    path.write_bytes(content[:-3000])
    with open_windows(path) as opened:
        assert np.array_equal(opened.read(0, 0, 16, 16), COLOUR[:16, :16])
        with pytest.raises(InputError, match=r"short\.tif is damaged or of a kind that cannot be read: .*TIFF"):
            opened.read(0, 0, 60, 44)
    path.write_bytes(content[:6])
    with pytest.raises(InputError, match=r"short\.tif is damaged or of a kind that cannot be read"):
        open_windows(path)
    path = tmp_path / "short.jp2"
    path.write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n")
    with pytest.raises(InputError, match=r"short\.jp2 is damaged: no JPEG 2000 codestream"):
        open_windows(path)
    for path in (tmp_path / "missing.tif", tmp_path):
        with pytest.raises(InputError, match=f"{path.name} (does not exist|cannot be read)"):
            open_windows(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compress", ["none", "deflate"])
def test_pieces_of_too_many_pixels_are_refused_and_the_size_is_not(tmp_path, monkeypatch, compress):
    """Memory is taken by tiles and strips, so they are limited, and the picture is not."""
    samples = COLOUR.transpose(2, 0, 1)
    tiles = written(tmp_path / "tiles.tif", samples, compress=compress, **LAYOUTS["tiles"])
    strip = written(tmp_path / "strip.tif", samples, compress=compress, blockysize=44)
    jpeg, jpeg_tiles = tmp_path / "whole.jp2", tmp_path / "tiles.jp2"
    Image.fromarray(COLOUR).save(jpeg, irreversible=False)
    Image.fromarray(COLOUR).save(jpeg_tiles, irreversible=False, tile_size=(16, 32))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 32)
    check_windows(tiles, COLOUR)
    check_windows(jpeg_tiles, COLOUR)
    for path in (strip, jpeg):
        with pytest.raises(
            InputError, match=rf"a tile.* of picture .*{path.name} has 60x44 pixels, .* --max-megapixels 1"
        ):
            open_windows(path)


def boxed(kind, content, long=False):
    """A box of JPEG 2000, with a size of 32 or 64 bits."""
    if long:
        return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content
    return struct.pack(">I4s", 8 + len(content), kind) + content


def test_a_forged_size_among_the_metadata_of_jpeg_2000_does_not_count(tmp_path, monkeypatch):
    """The size is that of the first codestream, as for GDAL."""
    path, small = tmp_path / "x.jp2", io.BytesIO()
    Image.fromarray(COLOUR).save(path, irreversible=False)
    Image.fromarray(COLOUR[:8, :8]).save(small, "JPEG2000", irreversible=False, no_jp2=True)
    content = path.read_bytes()
    place = content.index(b"jp2c") - 4
    start, end, codestream, small = content[:place], content[place:], content[place + 8 :], small.getvalue()
    good = [
        start + boxed(b"uuid", small) + end,
        start + boxed(b"free", small, long=True) + end,
        start + boxed(b"jp2c", codestream, long=True),
        start + struct.pack(">I4s", 0, b"jp2c") + codestream,
        start + boxed(b"JP2C", codestream) + boxed(b"jp2c", small),
        start + boxed(b"free", bytes(2**20)) + end,
    ]
    bad = [
        start + struct.pack(">I4sQ", 1, b"free", 2**64 - 16) + small + end,
        start + struct.pack(">I4s", 0, b"free") + small + end,
        start + boxed(b"jp2c", b"nothing" + codestream),
    ]
    for data in good:
        path.write_bytes(data)
        with open_windows(path) as opened:
            assert np.array_equal(whole(opened), COLOUR)
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"x\.jp2 is damaged: no JPEG 2000 codestream begins where it should"):
            open_windows(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 32)
    for data in good:
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"a tile of picture .* has 60x44 pixels"):
            open_windows(path)


def test_sources_by_windows(tmp_path, monkeypatch):
    """Folders are searched for TIFF and JPEG 2000; their size is no matter where they are read by windows."""
    written(tmp_path / "a.tif", COLOUR.transpose(2, 0, 1), **LAYOUTS["tiles"])
    written(tmp_path / "b.TIFF", COLOUR.transpose(2, 0, 1), **LAYOUTS["tiles"])
    Image.fromarray(COLOUR).save(tmp_path / "c.jp2", irreversible=False, tile_size=(16, 32))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"a\.tif has .* more than the limit"):
        find_sources([tmp_path])
    found = find_sources([tmp_path], by_windows=True)
    assert [source.name for source in found] == ["a", "b", "c"]
    for source in found:
        assert isinstance(source, Picture)
        with source.windows() as opened:
            assert np.array_equal(whole(opened), COLOUR)
    (tmp_path / "d.tif").write_bytes(b"II*\0" + struct.pack("<I", 99))
    with pytest.raises(InputError, match=r"d\.tif is damaged"):
        find_sources([Path(tmp_path)], by_windows=True)

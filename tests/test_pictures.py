"""Tests of reading pictures: a scene in every format, depth and orientation."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, Jpeg2KImagePlugin, TiffImagePlugin, WebPImagePlugin

from terrazzo import _pictures, _pixel_limit
from terrazzo._pictures import (
    PictureWarning,
    check_same_turn,
    is_plain,
    orientation,
    pictures_inside,
    read_picture,
    upright_size,
)
from terrazzo._pixel_limit import VARIABLE, allowed_megapixels
from terrazzo.errors import InputError

SIZE = (24, 16)
GREY = (np.arange(16)[:, None] * 8 + np.arange(24)[None] * 5).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
WIDE = GREY.astype(np.uint16) * 257


def upright(pixels, turn):
    """Apply an orientation as EXIF defines it: 5 to 8 swap rows and columns, the others mirror."""
    pixels = pixels.swapaxes(0, 1) if turn >= 5 else pixels
    pixels = pixels[:, ::-1] if turn in (2, 3, 6, 7) else pixels
    return pixels[::-1] if turn in (3, 4, 7, 8) else pixels


def saved(pixels, path, turn=None, **options):
    """Write an array as a picture with an orientation in its EXIF data."""
    if turn is not None:
        exif = Image.Exif()
        exif[0x112] = turn
        options["exif"] = exif
    Image.fromarray(pixels).save(path, **options)
    return path


def png_chunk(path, kind, data, before=b"IEND"):
    """Insert a chunk into a PNG before another chunk."""
    content, chunk = path.read_bytes(), kind + data
    place = content.index(before) - 4
    chunk = struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content[:place] + chunk + content[place:])


def tiff(values, **tags):
    """An uncompressed TIFF with grey samples of any type, as other programs write it."""
    kinds = {"u": 1, "i": 2, "f": 3}
    data = values.astype(values.dtype.newbyteorder("<"))
    entries = {
        256: values.shape[1],
        257: values.shape[0],
        258: values.dtype.itemsize * 8,
        259: 1,
        262: tags.get("photometric", 1),
        273: 8,
        277: 1,
        278: values.shape[0],
        279: data.nbytes,
        339: kinds[values.dtype.kind],
    }
    if tags.get("bits"):
        entries[258] = tags["bits"]
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        data = np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], -1).astype(np.uint8)
        entries[279] = data.nbytes
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    head = b"II*\0" + struct.pack("<I", 8 + data.nbytes)
    return io.BytesIO(head + data.tobytes() + struct.pack("<H", len(entries)) + directory + bytes(4))


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch):
    monkeypatch.setattr(_pictures, "_noted", set())


GREYS = {
    "jpg": lambda: (GREY, {"quality": 100}),
    "png": lambda: (GREY, {}),
    "16.png": lambda: (WIDE, {}),
    "16.tif": lambda: (WIDE, {}),
    "16.lzw.tif": lambda: (WIDE, {"compression": "tiff_lzw"}),
    "big-endian.tif": lambda: (WIDE.astype(">u2"), {}),
    "float.tif": lambda: ((GREY / 255).astype(np.float32), {}),
    "float255.tif": lambda: (GREY.astype(np.float32), {}),
    "int32.tif": lambda: (WIDE.astype(np.int32), {}),
    "int32-255.tif": lambda: (GREY.astype(np.int32), {}),
    "16.pgm": lambda: (WIDE.astype(np.int32), {}),
    "16.jp2": lambda: (WIDE, {"irreversible": False}),
    "bmp": lambda: (GREY, {}),
    "webp": lambda: (GREY, {"lossless": True}),
    "gif": lambda: (GREY, {}),
}


@pytest.mark.filterwarnings("ignore::terrazzo._pictures.PictureWarning")
@pytest.mark.parametrize("name", GREYS)
def test_every_depth_shows_one_scene(tmp_path, name):
    pixels, options = GREYS[name]()
    path = saved(pixels, tmp_path / f"scene.{name}", **options)
    found = np.asarray(read_picture(path)).astype(int)
    assert found.shape == (16, 24, 3)
    assert np.abs(found - GREY[..., None]).max() <= (2 if name == "jpg" else 1)


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    """The type sets the range, not the values; some of Pillow's readers still give 32-bit integers."""
    for suffix, values in (("png", WIDE), ("tif", WIDE), ("pgm", WIDE.astype(np.int32))):
        path = saved(values >> 8, tmp_path / f"dark.{suffix}")
        assert np.asarray(read_picture(path)).max() == 0, suffix


@pytest.mark.filterwarnings("ignore::terrazzo._pictures.PictureWarning")
def test_files_that_pillow_does_not_write():
    """Samples of 12 bits, and wide samples in which 0 is white, are read right."""
    samples = {
        "12 bits": tiff(GREY.astype(np.uint16) << 4, bits=12),
        "0 is white": tiff(65535 - WIDE, photometric=0),
        "floats whose 0 is white": tiff((255 - GREY).astype(np.float32), photometric=0),
    }
    for name, file in samples.items():
        found = np.asarray(read_picture(file, name)).astype(int)
        assert np.abs(found - GREY[..., None]).max() <= 1, name


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_every_mode_of_pillow_becomes_rgb(mode):
    assert _pictures._to_rgb(Image.new(mode, SIZE), "x").mode == "RGB"


def test_wide_colours_and_transparency(tmp_path):
    """Colours of 16 bits keep their high byte; transparency is dropped, also in palettes."""
    clear = Image.fromarray(COLOUR)
    clear.putalpha(Image.fromarray(GREY))
    clear.save(tmp_path / "clear.png")
    assert np.array_equal(read_picture(tmp_path / "clear.png"), COLOUR)
    few = Image.fromarray(COLOUR).quantize(16)
    few.save(tmp_path / "few.png", transparency=3)
    assert np.array_equal(read_picture(tmp_path / "few.png"), few.convert("RGB"))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in COLOUR.astype(np.uint16) * 257)
    path = saved(COLOUR, tmp_path / "wide.png")
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">IIBBBBB", 24, 16, 16, 2, 0, 0, 0)
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)))
    with path.open("ab") as file:
        for kind, data in ((b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    assert np.array_equal(read_picture(path), COLOUR)


def test_animations_show_their_first_picture(tmp_path):
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    for suffix in ("gif", "webp", "png", "tif"):
        path = tmp_path / f"frames.{suffix}"
        frames[0].save(
            path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {})
        )
        assert np.abs(np.asarray(read_picture(path)).astype(int) - COLOUR).mean() < 20, suffix


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (-GREY.astype(np.float32), "floats"),
        (GREY.astype(np.float32) * 2, "floats"),
        (GREY.astype(np.float32) / 150, "floats"),  # slightly above 1: in neither range
        (np.where(GREY > 100, np.nan, GREY / 255).astype(np.float32), "floats"),
        (np.where(GREY > 100, np.inf, GREY / 255).astype(np.float32), "floats"),
        (WIDE.astype(np.int32) * 2, "signed 32-bit integers"),
        (WIDE.astype(np.uint32) * 40000, "32-bit integers"),
        (-GREY.astype(np.int32), "signed 32-bit integers"),
        ((WIDE // 4).astype(np.int16), "signed 16-bit integers"),
    ],
    ids=[
        "negative",
        "beyond 255",
        "beyond 1",
        "nan",
        "infinite",
        "17 bits",
        "32 bits",
        "negative integers",
        "signed 16",
    ],
)
def test_an_unknown_range_is_refused(tmp_path, values, kind):
    path = tmp_path / "scan.tif"
    path.write_bytes(tiff(values).getvalue())
    with pytest.raises(InputError, match=rf"scan\.tif holds {kind} from .*save it with 8 bits"):
        read_picture(path)


def test_what_is_made_of_floats_is_said_once(tmp_path):
    paths = [saved((GREY / 255).astype(np.float32), tmp_path / f"{number}.tif") for number in range(3)]
    with pytest.warns(PictureWarning, match=r"floats from 0 to 1 are scaled by 255; the first is .*0\.tif") as told:
        assert len([read_picture(path) for path in paths]) == 3
    assert len(told) == 1


FORMATS = {
    "jpg": {"quality": 100, "subsampling": 0},
    "png": {},
    "webp": {"lossless": True},
    "tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
}


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_of_every_format_is_turned_upright(tmp_path, turn):
    wanted = upright(COLOUR, turn).astype(int)
    for suffix, options in FORMATS.items():
        path = saved(COLOUR, tmp_path / f"turned.{suffix}", turn, **options)
        found = np.asarray(read_picture(path))
        assert found.shape == wanted.shape, suffix
        assert np.abs(found - wanted).max() <= (6 if suffix == "jpg" else 0), suffix
        assert orientation(path) == turn
        assert upright_size(path) == wanted.shape[1::-1]
        with path.open("rb") as file:
            assert orientation(file) == turn
    for suffix in ("png", "tif"):
        for pixels in (GREY, WIDE):
            path = saved(pixels, tmp_path / f"grey.{suffix}", turn)
            assert np.array_equal(np.asarray(read_picture(path))[..., 0], upright(GREY, turn)), suffix


def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    path = saved(COLOUR, tmp_path / "late.png")
    png_chunk(path, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    assert (orientation(path), upright_size(path)) == (6, (16, 24))
    assert np.array_equal(read_picture(path), upright(COLOUR, 6))
    assert np.array_equal(read_picture(path, upright=False), COLOUR)


def test_an_orientation_in_xmp_counts(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path = saved(COLOUR, tmp_path / "xmp.png")
    png_chunk(path, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp, before=b"IDAT")
    assert orientation(path) == 6
    assert read_picture(path).size == (16, 24)


@pytest.mark.parametrize("turn", [0, 9, 65535])
def test_orientations_without_meaning_are_none(tmp_path, turn):
    path = saved(COLOUR, tmp_path / "turned.png", turn)
    assert orientation(path) == 1
    assert np.array_equal(read_picture(path), COLOUR)


def test_exif_data_that_cannot_be_read_are_none(tmp_path):
    path = saved(COLOUR, tmp_path / "broken.png", exif=b"Exif\0\0garbage")
    assert orientation(path) == 1
    assert np.array_equal(read_picture(path), COLOUR)


def test_orientations_are_read_without_the_pixels(tmp_path, monkeypatch):
    path = saved(COLOUR, tmp_path / "plain.png")
    png_chunk(path, b"tEXt", b"Software\0any", before=b"IDAT")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("the pixels were decoded"))
    assert (orientation(path), upright_size(path)) == (1, SIZE)


def test_a_label_map_must_be_turned_as_its_picture(tmp_path):
    turned, plain = saved(COLOUR, tmp_path / "turned.jpg", 6), saved(GREY, tmp_path / "labels.png")
    check_same_turn(turned, saved(GREY, tmp_path / "turned.png", 6))
    check_same_turn(plain, plain)
    for pair in ((turned, plain), (plain, turned)):
        with pytest.raises(InputError, match=r"orientation [16], .* has [16], .*save both upright"):
            check_same_turn(*pair)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [100, 200, 383])  # Pillow refuses beyond twice its limit, and warns below
def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch, limit):
    path = saved(COLOUR, tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for function in (read_picture, orientation, upright_size):
        with pytest.raises(InputError, match=r"large\.png has (384|24x16) pixels, .* --max-megapixels 1 of"):
            function(path)
    with allowed_megapixels(384e-6):
        assert read_picture(path).size == SIZE
    assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_picture(path).size == SIZE


def png_of(width, height):
    """A PNG of a few bytes that claims a size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def claimed(width, height, suffix):
    """A small file of a format that claims a size."""
    if suffix == "png":
        return png_of(width, height)
    file = io.BytesIO()
    Image.new("RGB", SIZE).save(file, {"jpg": "JPEG", "webp": "WEBP", "tif": "TIFF", "jp2": "JPEG2000"}[suffix])
    content, order = file.getvalue(), "<" if suffix == "tif" else ">"
    if suffix == "webp":  # an extended header (VP8X) holds the size less 1 in 24 bits
        size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        content = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + size + content[12:]
        return content[:4] + struct.pack("<I", len(content) - 8) + content[8:]
    if suffix == "jpg":
        return content.replace(struct.pack(">HH", *SIZE[::-1]), struct.pack(">HH", height, width))
    if suffix == "jp2":
        content = content.replace(struct.pack(">II", *SIZE[::-1]), struct.pack(">II", height, width))
        return content.replace(struct.pack(">II", *SIZE), struct.pack(">II", width, height))
    for tag, old, new in ((256, SIZE[0], width), (257, SIZE[1], height)):
        for kind, letter in ((3, "H2x"), (4, "I")):
            entry = struct.pack(f"{order}HHI{letter}", tag, kind, 1, old)
            content = content.replace(entry, struct.pack(f"{order}HHII", tag, 4, 1, new))
    return content


LOADING = (
    Image.Image,
    ImageFile.ImageFile,
    Jpeg2KImagePlugin.Jpeg2KImageFile,
    TiffImagePlugin.TiffImageFile,
    WebPImagePlugin.WebPImageFile,
)
"""The classes of Pillow with a `load` that decodes these formats."""


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "jp2"])
def test_a_small_file_that_claims_too_many_pixels_is_refused_and_not_decoded(tmp_path, monkeypatch, suffix):
    side = {"jpg": 65000, "webp": 16384}.get(suffix, 100_000)  # what the format can claim, and more for WebP
    path = tmp_path / f"claims.{suffix}"
    path.write_bytes(claimed(side, side, suffix))
    loaded = []
    for kind in LOADING:
        monkeypatch.setattr(kind, "load", lambda image: loaded.append(image))
    for function in (read_picture, orientation, upright_size):
        with pytest.raises(
            InputError, match=r"claims\.\w+ has [\dx]+ pixels, more than the limit of 89\.48 megapixels"
        ):
            function(path)
    assert not is_plain(io.BytesIO(path.read_bytes()))
    assert not loaded


def test_the_environment_sets_the_limit_of_pixels():
    code = "from PIL import Image; import terrazzo._pictures; print(Image.MAX_IMAGE_PIXELS)"
    answers = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, VARIABLE: text}, capture_output=True, text=True, timeout=60
        )
        for text in ("200.5", "many")
    ]
    assert answers[0].stdout.strip() == "200500000"
    assert "InputError: TERRAZZO_MAX_MEGAPIXELS is 'many'; set it to a number" in answers[1].stderr


@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf", "1e-9", "many"])
def test_limits_of_pixels_that_are_refused(monkeypatch, text):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(InputError, match=f"is '{text}'; set it to a number of megapixels"):
        _pixel_limit._from_environment()
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_unreadable_pictures_are_refused_by_name(tmp_path):
    whole = saved(COLOUR, tmp_path / "whole.jpg").read_bytes()
    contents = {"empty.jpg": b"", "text.jpg": b"text", "short.jpg": whole[:-2], "shorter.jpg": whole[: len(whole) // 2]}
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is (empty|not in|damaged)"):
            read_picture(path)
    path = tmp_path / "channels.tif"
    path.write_bytes(tiff(GREY.astype(np.float64)).getvalue())
    with pytest.raises(InputError, match=r"channels\.tif is damaged, or a TIFF with samples that cannot be read"):
        read_picture(path)
    for path in (tmp_path / "missing.jpg", tmp_path):
        for function in (read_picture, orientation, upright_size):
            with pytest.raises(InputError, match=f"{path.name} (does not exist|cannot be read)"):
                function(path)


def test_hidden_pictures_are_left_out(tmp_path):
    """Data folders also hold what systems and editors put there; a dot above the folder itself hides nothing."""
    folder = tmp_path / ".cache" / "pictures"
    for name in ("b.jpg", "sub/a.PNG", "._b.jpg", ".ipynb_checkpoints/b-checkpoint.jpg", "sub/.x/c.png", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert pictures_inside(folder) == [folder / "b.jpg", folder / "sub" / "a.PNG"]

"""Reading pictures: one way for training, testing, inference, export and calibration, so that all see the same.

A picture is 8-bit RGB and upright. Other files are converted by the range of their type:

- 16-bit samples lose their low byte, as Pillow and OpenCV do with colours of 16 bits.
- Floats from 0 to 1 are scaled by 255, floats up to 255 are taken as they are; a note says so. 32-bit integers up to
  255 are taken as they are, and up to 65535 they are divided by 256. Other values are refused: the file does not say
  what their range is.
- Transparency is dropped, palettes and colour spaces are converted, and an animation shows its first picture.
- The EXIF orientation is applied; a block of EXIF data that cannot be read is ignored.

A picture that claims too many pixels is refused before memory is taken for them; see `_pixel_limit.py`.
"""

import contextlib
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from terrazzo._pixel_limit import check_pixels, too_large
from terrazzo.errors import InputError, first_line
from terrazzo.errors import PictureWarning as PictureWarning

P = TypeVar("P")

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The lower-case suffixes of pictures, for searching a folder."""

_BITS, _WIDTH, _HEIGHT, _PHOTOMETRIC, _FORMAT = 258, 256, 257, 262, 339
"""Tags of TIFF: bits per sample, the stored size, what 0 means, and the type of the samples."""
_WHITE_IS_ZERO, _SIGNED = 0, (2,)
_noted: set[str] = set()
"""The notes about pictures that this process has already given."""


def read_picture(file: str | Path | BinaryIO, name: str | Path | None = None, upright: bool = True) -> Image.Image:
    """Read a picture in RGB with 8 bits per channel.

    Args:
        file: a path, or a file open for reading bytes.
        name: what messages call the picture; None for the path.
        upright: whether to turn the picture as its EXIF orientation says; a TIFF is always turned.

    Raises:
        InputError: the file is missing, empty, cut short, not a picture that Pillow can read, or has an unknown range.
    """
    name = name or file
    try:
        with opened(file, name) as image:
            image.load()
            return to_rgb(image, name, upright)
    except InputError:
        raise
    except Exception as error:  # decoders fail in every way on bytes that are not theirs
        raise refusal(file, name, error) from error


def to_rgb(image: Image.Image, name: object, upright: bool = True) -> Image.Image:
    """A picture of Pillow in RGB with 8 bits per channel; as `read_picture`. The given picture may be turned, too."""
    if upright and _tagged(image) != 1:
        ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image, name)


def orientation(file: str | Path | BinaryIO) -> int:
    """The EXIF orientation of a picture, 1 (upright) to 8, from its headers; 1 if it has none.

    Raises:
        InputError: the file is missing, empty or no picture.
    """
    return _facts(file)[0]


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) with an EXIF orientation, 1 to 8, turned upright."""
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def upright_size(file: str | Path | BinaryIO) -> tuple[int, int]:
    """Width and height of a picture after it is turned upright, from its headers.

    Raises:
        InputError: the file is missing, empty or no picture.
    """
    turn, (width, height) = _facts(file)
    return (height, width) if turn >= 5 else (width, height)


def is_picture(path: str | Path) -> bool:
    """Whether a path ends as pictures do; see `SUFFIXES`."""
    return Path(path).suffix.lower() in SUFFIXES


def is_hidden(path: str | Path, folder: str | Path) -> bool:
    """Whether a name below a folder begins with a dot, such as `._photo.jpg` or `.ipynb_checkpoints/photo.jpg`."""
    return any(part.startswith(".") for part in Path(path).relative_to(folder).parts)


def pictures_inside(folder: str | Path) -> list[Path]:
    """The pictures anywhere in a data folder, sorted, without hidden files and folders.

    Raises:
        InputError: the folder does not exist, or holds no pictures.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"data folder '{folder}' {what}; unpack the data there, or set data_root")
    found = sorted(path for path in folder.rglob("*") if is_picture(path) and not is_hidden(path, folder))
    if not found:
        raise InputError(f"data folder '{folder}' holds no pictures; put pictures there, or set data_root")
    return found


def spread(pictures: Sequence[P], count: int) -> list[P]:
    """At most `count` of the pictures, evenly spread: neighbours in a folder are often alike."""
    count = min(count, len(pictures))
    return [pictures[i * len(pictures) // count] for i in range(count)]


def check_claim(file: BinaryIO, name: object) -> None:
    """Make sure that a file does not claim more pixels than are allowed, before another decoder than Pillow reads it.

    Raises:
        InputError: it does.
    """
    try:
        with opened(file, name):
            pass
    except InputError:
        raise
    except Exception:  # a damaged file, or a format that Pillow does not know: the other decoder will say
        return


def is_plain(file: BinaryIO) -> bool:
    """Whether bytes begin as an upright JPEG or PNG of 8 bits in grey or RGB, which every decoder reads alike."""
    try:
        with opened(file) as image:
            still = image.format in ("JPEG", "PNG") and not getattr(image, "is_animated", False)
            return still and image.mode in ("L", "RGB") and _turn(image) == 1
    except Exception:  # as in `read_picture`, which says what is wrong
        return False


def check_same_turn(picture: str | Path, label_map: str | Path) -> None:
    """Make sure that a picture and its label map have the same EXIF orientation, so that both turn alike.

    Raises:
        InputError: they do not, or either is not a picture.
    """
    turn, label_turn = orientation(picture), orientation(label_map)
    if turn != label_turn:
        raise InputError(
            f"picture {picture} has EXIF orientation {turn}, but its label map {label_map} has {label_turn}, so that "
            "only one of them would be turned; save both upright (1)"
        )


@contextlib.contextmanager
def opened(file: str | Path | BinaryIO, name: object = None) -> Iterator[Image.Image]:
    """Pillow's picture of an open file, not decoded yet. By a path, Pillow mixes up width and height of turned TIFFs.

    Raises:
        InputError: the picture has more pixels than are allowed.
        Exception: what Pillow raises for a file that is no picture; see `refusal`.
    """
    name = name or file
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(read_from_start(file))
        try:
            image = stack.enter_context(Image.open(stream))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise too_large(f"picture {name}", error) from error
        check_pixels(f"picture {name}", *image.size)
        yield image


def _facts(file: str | Path | BinaryIO) -> tuple[int, tuple[int, int]]:
    """The orientation, and the stored width and height."""
    try:
        with opened(file) as image:
            if image.format == "TIFF":  # some versions of Pillow give the size of the turned picture
                return _tagged(image), (image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT])
            return _turn(image), image.size
    except InputError:
        raise
    except Exception as error:  # as in `read_picture`
        raise refusal(file, file, error) from error


def _turn(image: Image.Image) -> int:
    """As `_tagged`, but without decoding a PNG; Pillow decodes it to find EXIF data after the pixels."""
    return 1 if image.format == "PNG" and not _png_has_metadata(image.fp) else _tagged(image)


def _tagged(image: Image.Image) -> int:
    """The orientation that an open picture still has to be turned by; 1 if its EXIF data make no sense."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, struct.error, KeyError, TypeError):
        return 1
    return value if value in range(1, 9) else 1


def _png_has_metadata(file: BinaryIO) -> bool:
    """Whether any chunk of a PNG can hold an orientation: EXIF data, or text with EXIF or XMP data in it."""
    place = file.tell()
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return True
            start = file.read(min(size, 17)) if kind in (b"iTXt", b"tEXt", b"zTXt") else b""
            if start.startswith((b"Raw profile type", b"XML:com.adobe.xmp")):
                return True
            file.seek(size + 4 - len(start), os.SEEK_CUR)  # the rest of the chunk, and its checksum
        return False
    finally:
        file.seek(place)


def _to_rgb(image: Image.Image, name: object) -> Image.Image:
    if image.mode == "La":  # grey with premultiplied transparency; Pillow converts it to RGB only in this way
        image = image.convert("LA")
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image.convert("RGB")
    tags = image.tag_v2 if image.format == "TIFF" else {}
    pixels = _to_8_bits(image, tags, name)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts these only up to 8 bits
        pixels = 255 - pixels
    return Image.fromarray(pixels).convert("RGB")


def _to_8_bits(image: Image.Image, tags: dict, name: object) -> np.ndarray:
    """Grey samples wider than 8 bits as uint8, (H, W)."""
    values = np.asarray(image)
    if image.mode.startswith("I;") or image.format in ("PNG", "PPM"):
        return (values >> tags.get(_BITS, (16,))[0] - 8).astype(np.uint8)
    if image.mode == "F":
        what = "floats"
    else:
        what = f"{'signed ' if tags.get(_FORMAT) == _SIGNED else ''}{tags.get(_BITS, (32,))[0]}-bit integers"
    return conversion_by_range(what, values.min(), values.max(), name)(values)


def conversion_by_range(what: str, lowest: float, highest: float, name: object) -> Callable[[np.ndarray], np.ndarray]:
    """How samples become uint8 if their type does not fix the range, but the values of the whole picture do.

    Args:
        what: "floats", or the integers' kind as messages call it, such as "32-bit integers".
        lowest, highest: of all samples; NaN if any sample is.
        name: what messages call the picture.

    Raises:
        InputError: the values leave the range unknown.
    """
    floats = what == "floats"
    if floats and lowest >= 0 and highest <= 1:
        note(f"{what} from 0 to 1 are scaled by 255", name)
        return lambda values: np.rint(values * 255).astype(np.uint8)
    # Floats slightly above 1 are more likely a sharpened picture from 0 to 1 than an almost black picture.
    if lowest >= 0 and (2 if floats else 0) <= highest <= 255:
        note(f"{what} from 0 to 255 are taken as they are", name)
        return lambda values: np.rint(values).astype(np.uint8)
    if what.endswith("32-bit integers") and lowest >= 0 and highest <= 65535:
        note(f"{what} from 0 to 65535 are divided by 256", name)
        return lambda values: (values >> 8).astype(np.uint8)
    raise InputError(
        f"picture {name} holds {what} from {lowest:g} to {highest:g}; nothing says which values are black and "
        "white, so save it with 8 bits or with 16 bits without a sign"
    )


def note(what: str, name: object) -> None:
    """Warn once for each kind of picture, and not for each picture of a data set."""
    if what not in _noted:
        _noted.add(what)
        warnings.warn(f"pictures of {what}; the first is {name}", PictureWarning, stacklevel=2)


def refusal(file: str | Path | BinaryIO, name: object, error: Exception) -> InputError:
    """What to raise for a picture that could not be read."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"picture {name} does not exist")
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(f"picture {name} cannot be read: {error.strerror}")
    if isinstance(error, UnidentifiedImageError):
        head = read_head(file)
        if head in (b"II*\0", b"MM\0*"):
            return InputError(
                f"picture {name} is damaged, or a TIFF with samples that cannot be read (such as floats with several "
                "channels or 64 bits); save it with 8 or 16 bits per channel"
            )
        what = "is not in a picture format that can be read" if head else "is empty"
        return InputError(f"picture {name} {what}; use one of {', '.join(SUFFIXES)}")
    return InputError(f"picture {name} is damaged or cut short: {first_line(error)}")


def read_head(file: str | Path | BinaryIO, count: int = 4) -> bytes:
    """The first bytes, from which the format is known."""
    with read_from_start(file) as stream:
        return stream.read(count)


@contextlib.contextmanager
def read_from_start(file: str | Path | BinaryIO) -> Iterator[BinaryIO]:
    """A path opened for reading bytes, or a file that is open already, at its start."""
    if isinstance(file, (str, Path)):
        with open(file, "rb") as stream:
            yield stream
    else:
        file.seek(0)
        yield file

"""How many pixels a picture may claim to have, so that a few bytes cannot ask for terabytes ("decompression bombs").

The limit is Pillow's, `PIL.Image.MAX_IMAGE_PIXELS`; None allows everything. Pillow itself only warns up to twice the
limit, and terrazzo refuses. The environment variable TERRAZZO_MAX_MEGAPIXELS sets the limit for a process and all that
it starts, such as the workers of a data loader.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator

from PIL import Image

from terrazzo.errors import InputError

VARIABLE = "TERRAZZO_MAX_MEGAPIXELS"


def check_pixels(what: str, width: int, height: int) -> None:
    """Make sure that a header claims no more pixels than are allowed; call it before memory is taken for them.

    Args:
        what: what messages call the thing.
        width, height: its size in pixels.

    Raises:
        InputError: it claims more.
    """
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise _refusal(f"{what} has {width}x{height} pixels", width * height)


def too_large(what: str, error: Exception) -> InputError:
    """What to raise for Pillow's own refusal, which tells the number of pixels only in its text."""
    count = re.search(r"\d+", str(error))
    pixels = int(count[0]) if count else 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return _refusal(f"{what} has {pixels} pixels", pixels)


@contextlib.contextmanager
def allowed_megapixels(count: float) -> Iterator[None]:
    """Allow pictures of up to `count` megapixels, within the block and in this process."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, round(count * 1e6)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _refusal(claim: str, pixels: int) -> InputError:
    limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    return InputError(
        f"{claim}, more than the limit of {limit:.4g} megapixels; if you trust the file, raise the limit: "
        f"--max-megapixels {math.ceil(pixels / 1e6)} of `terrazzo infer`, or the environment variable {VARIABLE}"
    )


def _from_environment() -> None:
    text = os.environ.get(VARIABLE)
    if not text:
        return
    try:
        pixels = round(float(text) * 1e6)
    except (ValueError, OverflowError):
        pixels = 0
    if pixels <= 0:
        raise InputError(f"{VARIABLE} is {text!r}; set it to a number of megapixels, such as 400")
    Image.MAX_IMAGE_PIXELS = pixels


_from_environment()

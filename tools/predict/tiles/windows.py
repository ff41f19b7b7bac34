"""How tiles read a picture: by windows, so that pictures larger than memory work."""

from typing import Protocol

from PIL import Image


class Windows(Protocol):
    """A picture that is read in parts.

    Attributes:
        width, height: its size in pixels.
    """

    width: int
    height: int

    def read(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        """The pixels of a window in RGB; the right column and the bottom row are not included."""
        ...


class Loaded:
    """A picture of Pillow in memory."""

    def __init__(self, image: Image.Image):
        self.image = image
        self.width, self.height = image.size

    def read(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        """As in `Windows`."""
        return self.image.crop((left, top, right, bottom))

"""What a path image is made of, in pixels: the published settings, by size."""

import math
from dataclasses import dataclass, replace

from terrazzo.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """The settings of path images. Lengths are in pixels.

    Attributes:
        size: height and width.
        length, thickness: of a paddle, the dash that contours are made of.
        margin: half of the gap between paddles of a contour; paddles of different contours are at least twice as far
            apart.
        seed_distance: between the first tips of the two long contours.
        contour: paddles of each of the two long contours.
        continuity: how straight contours are: a turn has the density cos(continuity * turn)², so 1 allows 90 degrees.
        distractor, distractors: paddles of a short contour, and how many of these are tried.
        radius: of a disc.
        padding: no paddle's axis comes nearer to the border.
        contrast: brightness of a fully covered pixel; above 1 it is clipped.
        single_paddles: also fill free places with single paddles.
    """

    size: int
    length: float
    thickness: float
    margin: float
    seed_distance: float
    contour: int
    continuity: float
    distractor: int
    distractors: int
    radius: float
    padding: float
    contrast: float
    single_paddles: bool = False

    def __post_init__(self):
        if self.contour < 2:
            raise InputError(f"a contour of {self.contour} paddles has no way to follow; take at least 2")
        if self.clearance <= self.length / 2:
            raise InputError(
                f"paddles of length {self.length} need a margin above {self.length / 4}, got {self.margin}"
            )

    @property
    def reach(self) -> float:
        """The radius of a paddle's mask, a capsule around its axis."""
        return self.thickness / 2 + self.margin

    @property
    def clearance(self) -> float:
        """The least distance between axes of paddles whose masks do not meet."""
        return 2 * self.reach

    @property
    def turn(self) -> float:
        """The largest turn between two paddles, in radians."""
        return math.pi / (2 * self.continuity)


# Settings of the images of Long Range Arena (arXiv 2011.04006), which the program of arXiv 1805.08315 made;
# 64 pixels have no published figures. An image has one of the recipes of its size: at 128 pixels margins differ.
_PUBLISHED = {
    32: (Recipe(32, 2, 0.5, 1, 7, 14, 1.0, 4, 5, 1.5, 1, 1.5),),
    64: (Recipe(64, 5, 1.0, 1, 12, 14, 1.8, 4, 5, 2.5, 1, 0.8),),
    128: tuple(Recipe(128, 5, 1.5, margin, 20, 14, 1.8, 4, 8, 3.0, 1, 0.9) for margin in (2, 3)),
    256: (Recipe(256, 5, 2.0, 3, 27, 14, 1.8, 4, 7, 5.0, 22, 1.0),),
}
SIZES = tuple(_PUBLISHED)
"""The sizes of images with a label."""
DENSE_SIZES = (64, 128, 256, 512, 1024)
"""The sizes of the dense form."""


def recipes(size: int, contour: int | None = None, single_paddles: bool = False) -> tuple[Recipe, ...]:
    """The published settings of a size; each image has one of them.

    Args:
        size: one of `SIZES`.
        contour: paddles of a long contour; None for 14, the hard set.
        single_paddles: also fill free places with single paddles.

    Raises:
        InputError: no settings are known for this size.
    """
    _check(size, SIZES, "path images")
    changes = {"single_paddles": single_paddles} | ({} if contour is None else {"contour": contour})
    return tuple(replace(found, **changes) for found in _PUBLISHED[size])


def dense_recipes(size: int, contour: int | None = None) -> tuple[Recipe, ...]:
    """The settings of the dense form: from 128 pixels on paddles stay the same and contours grow with the map.

    Twice the side has twice the paddles in a contour, so that the way between the discs grows.

    Args:
        size: one of `DENSE_SIZES`.
        contour: paddles of a long contour; None for 14 up to 128 pixels, 28 at 256 and so on.

    Raises:
        InputError: no settings are known for this size.
    """
    _check(size, DENSE_SIZES, "dense path images")
    *_, base = _PUBLISHED[min(size, 128)]
    factor = size // base.size
    contour = base.contour * factor if contour is None else contour
    return (replace(base, size=size, contour=contour, distractors=base.distractors * factor**2),)


def _check(size: int, sizes: tuple[int, ...], what: str) -> None:
    if size not in sizes:
        raise InputError(f"{what} have {', '.join(map(str, sizes))} pixels a side, got {size}")

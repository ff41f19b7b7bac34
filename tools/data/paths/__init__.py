"""Path images, made up: two long dashed contours among short ones, and two discs at their tips.

Are both discs on one contour (Pathfinder, Linsley et al., arXiv 1805.08315; Path-X of Long Range Arena, arXiv
2011.04006)? Which pixels are on the contour of the discs (the dense form)? To know it, a model must follow a contour
from disc to disc.

A `recipe.Recipe` has the published settings of a size; `growth` grows contours of paddles; `image.make` puts an image
together from a seed and its number; `folders` keeps images on disk. The geometry is that of the published program, but
paddles are exact segments here and not pixels, so images are alike in their statistics and not in their bits.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from terrazzo.errors import InputError
from terrazzo.tools.data.paths.image import VERSION as VERSION
from terrazzo.tools.data.paths.image import PathImage as PathImage
from terrazzo.tools.data.paths.image import make
from terrazzo.tools.data.paths.recipe import DENSE_SIZES as DENSE_SIZES
from terrazzo.tools.data.paths.recipe import SIZES as SIZES
from terrazzo.tools.data.paths.recipe import Recipe, dense_recipes, recipes
from terrazzo.tools.processes import pool

_CHUNK = 8
"""Images that a process makes before it hands them over."""


def paths(
    size: int,
    n: int,
    contour: int | None = None,
    seed: int = 0,
    *,
    split: int = 0,
    dense: bool = False,
    single_paddles: bool = False,
    workers: int = 1,
) -> Iterator[PathImage]:
    """Make path images; image i depends on settings, seed, split and i alone, whatever `n` and `workers` are.

    Args:
        size: height and width in pixels, one of `SIZES`, or of `DENSE_SIZES` for the dense form.
        n: number of images.
        contour: paddles of a long contour: 6 is Pathfinder's easy set, 9 intermediate, 14 hard. None for 14, and in
            the dense form for more of them on larger maps.
        seed: from 0 on.
        split: number of a split; splits of the same seed share no image.
        dense: the dense form: both discs are always on one contour (label 1).
        single_paddles: fill free places with single paddles, as the published program can; not in the dense form.
        workers: processes that make images.

    Returns:
        The images, in order, as they are made.

    Raises:
        InputError: a size without settings, or a number out of its range.
    """
    for name, value, least in (("n", n, 0), ("seed", seed, 0), ("split", split, 0), ("workers", workers, 1)):
        if value < least or value >= 2**63:
            raise InputError(f"{name} must be at least {least}, and less than 2**63, got {value}")
    if dense and single_paddles:
        raise InputError("the dense form has no single paddles")
    found = dense_recipes(size, contour) if dense else recipes(size, contour, single_paddles)
    return _made(found, seed, split, n, 1 if dense else None, workers)


def _made(
    recipes: Sequence[Recipe], seed: int, split: int, n: int, label: int | None, workers: int
) -> Iterator[PathImage]:
    one = partial(_numbered, recipes, seed, split, label)
    if workers == 1:
        yield from map(one, range(n))
        return
    with pool(workers) as processes:
        yield from processes.map(one, range(n), chunksize=_CHUNK)


def _numbered(recipes: Sequence[Recipe], seed: int, split: int, label: int | None, index: int) -> PathImage:
    return make(recipes, seed, index, split, label)

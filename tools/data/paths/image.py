"""One path image: its contours, its discs, and what is known about every pixel."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from terrazzo.errors import InputError
from terrazzo.tools.data.paths import segments
from terrazzo.tools.data.paths.growth import grow
from terrazzo.tools.data.paths.recipe import Recipe

VERSION = 1
"""Changes whenever the same seed gives other images."""

_ATTEMPTS = (32, 128, 512)
"""Attempts at a long contour that grow side by side; more of them if none of these succeeds."""
_SHORT_ATTEMPTS = (4, 28)
_RESTARTS = 200
_SINGLES = 64
_FREE = 0.01


@dataclass(frozen=True)
class PathImage:
    """A path image and everything that is known about it. Contours are numbered from 1; 1 and 2 are the long ones.

    Attributes:
        image: (H, W) uint8.
        label: 1 if both discs are on one contour, 0 if they are on two.
        instances: (H, W) uint16, the contour of every pixel, 0 for the background.
        marked: the long contour, 1 or 2, whose first tip has a disc; with the label 1 it is the one with both.
        discs: (2, 2), x and y of the discs' centres: a first tip, then a last tip.
        paddles: (4, P), the axes of all paddles: x and y of the near end and of the far end.
        owners: (P,), the contour of each paddle.
        distractors: how many of the short contours found room.
        recipe: the settings.
    """

    image: np.ndarray
    label: int
    instances: np.ndarray
    marked: int
    discs: np.ndarray
    paddles: np.ndarray
    owners: np.ndarray
    distractors: int
    recipe: Recipe

    @property
    def path(self) -> np.ndarray:
        """(H, W) bool, the pixels of the marked contour."""
        return self.instances == self.marked

    @property
    def classes(self) -> np.ndarray:
        """(H, W) uint8, the dense target: 0 background, 1 the marked contour, 2 other contours."""
        return np.where(self.path, 1, np.where(self.instances > 0, 2, 0)).astype(np.uint8)


def make(recipes: Sequence[Recipe], seed: int, index: int, split: int = 0, label: int | None = None) -> PathImage:
    """The image with a number: it depends on nothing but the arguments.

    Args:
        recipes: the image has one of these settings.
        seed: from 0 on.
        index: number of the image in its split.
        split: number of the split; splits share no image.
        label: 0 or 1; None for either with the same probability.

    Raises:
        InputError: the long contours do not fit into the image.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, split], counter=[0, 0, 0, index]))
    recipe = recipes[random.integers(len(recipes))]
    drawn = int(random.integers(2))
    label = drawn if label is None else label
    contours = [*_long_contours(random, recipe)]
    short = list(_short_contours(random, recipe, np.concatenate(contours, 1)))
    contours += short
    if recipe.single_paddles:
        contours += _single_paddles(random, recipe, contours)
    # Both long contours are as likely to be marked: the second grew around the first, and must not be told apart.
    marked = int(random.integers(2))
    discs = np.stack([contours[marked][:2, 0], contours[marked if label else 1 - marked][2:, -1]])
    paddles = np.concatenate(contours, 1)
    owners = np.repeat(np.arange(1, len(contours) + 1), [contour.shape[1] for contour in contours])
    image, instances = _drawn(recipe, paddles, owners, discs)
    return PathImage(image, label, instances, marked + 1, discs, paddles, owners, len(short), recipe)


def _long_contours(random: np.random.Generator, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Two contours (4, n) whose first tips are `seed_distance` apart, the first tip of one far from the border."""
    low = min(2 * recipe.seed_distance, (recipe.size - 1) / 2)

    def inside(count: int) -> np.ndarray:
        return random.uniform(low, recipe.size - 1 - low, (2, count))

    def beside(tip: np.ndarray, count: int) -> np.ndarray:
        angles = random.uniform(-math.pi, math.pi, count)
        return tip + recipe.seed_distance * np.array([np.cos(angles), np.sin(angles)])

    for _ in range(_RESTARTS):
        first = _grown(random, recipe, recipe.contour, inside, np.empty((4, 0)))
        if first is None:
            continue
        second = _grown(random, recipe, recipe.contour, partial(beside, first[:2, :1]), first)
        if second is not None:
            return first, second
    raise InputError(
        f"two contours of {recipe.contour} paddles do not fit into {recipe.size} pixels after {_RESTARTS} tries: take "
        "fewer paddles"
    )


def _grown(
    random: np.random.Generator,
    recipe: Recipe,
    paddles: int,
    starts: Callable[[int], np.ndarray],
    obstacles: np.ndarray,
    attempts: Sequence[int] = _ATTEMPTS,
) -> np.ndarray | None:
    """A contour of some paddles from one of the starts (2, K) that `starts(K)` draws."""
    for count in attempts:
        found = grow(random, recipe, paddles, starts(count), obstacles)
        if found is not None:
            return found
    return None


def _short_contours(random: np.random.Generator, recipe: Recipe, obstacles: np.ndarray) -> Iterator[np.ndarray]:
    """Contours (4, m) that distract, as many as find room."""

    def anywhere(count: int) -> np.ndarray:
        return random.uniform(recipe.padding, recipe.size - 1 - recipe.padding, (2, count))

    for _ in range(recipe.distractors):
        found = _grown(random, recipe, recipe.distractor, anywhere, obstacles, _SHORT_ATTEMPTS)
        if found is not None:
            obstacles = np.concatenate([obstacles, found], 1)
            yield found


def _single_paddles(
    random: np.random.Generator, recipe: Recipe, contours: Sequence[np.ndarray]
) -> Iterator[np.ndarray]:
    """Single paddles (4, 1), up to the number of the published program, or until one percent of the area is free."""
    margin, obstacles = recipe.margin, np.concatenate(contours, 1)
    room = int(150 * 123.5 / (7.5 + 13 * margin + 4 * margin**2)) - obstacles.shape[1]
    for _ in range(room):
        starts = random.uniform(recipe.padding, recipe.size - 1 - recipe.padding, (2, _SINGLES))
        distances = segments.to_points(obstacles[:, None], *starts[:, :, None]).min(1)
        if (distances >= recipe.reach**2).mean() < _FREE:
            return
        found = grow(random, recipe, 1, starts[:, distances >= recipe.clearance**2], obstacles)
        if found is not None:
            obstacles = np.concatenate([obstacles, found], 1)
            yield found


def _drawn(recipe: Recipe, paddles: np.ndarray, owners: np.ndarray, discs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image (H, W) uint8 and the contours of its pixels (H, W) uint16. Centres of pixels have whole coordinates."""
    size, half = recipe.size, recipe.thickness / 2
    light, instances = np.zeros((size, size)), np.zeros((size, size), np.uint16)
    reach = math.ceil(recipe.length + half + 1)
    window = np.arange(-reach, reach + 1)
    middle = np.round((paddles[:2] + paddles[2:]) / 2).astype(int)
    columns, rows = (
        middle[axis, :, None, None] + window.reshape(shape) for axis, shape in ((0, (1, -1)), (1, (-1, 1)))
    )
    distance = np.sqrt(segments.to_points(paddles[:, :, None, None], columns, rows))
    columns, rows, owners = np.broadcast_arrays(columns, rows, owners[:, None, None])
    # The part of a pixel that lies inside: exact for a straight line along the pixels' axes.
    cover = np.minimum(distance + 0.5, half) - np.maximum(distance - 0.5, -half)
    seen = (cover > 0) & (np.minimum(rows, columns) >= 0) & (np.maximum(rows, columns) < size)
    np.maximum.at(light, (rows[seen], columns[seen]), recipe.contrast * np.minimum(cover[seen], 1))
    # A line thinner than a pixel has no pixel whose centre is inside everywhere.
    own = seen & (distance <= max(half, 0.5))
    instances[rows[own], columns[own]] = owners[own]
    y, x = np.ogrid[:size, :size]
    for disc in discs:
        light = np.maximum(light, np.clip(recipe.radius + 0.5 - np.hypot(x - disc[0], y - disc[1]), 0, 1))
    return np.round(255 * np.minimum(light, 1)).astype(np.uint8), instances

"""Contours of paddles that keep clear of each other, grown many at a time.

Most attempts at a long contour end at a border or at other paddles. Attempts are independent, so many grow side by side
as arrays. The first of their order that succeeds is taken, whichever was ready first: to take the quickest would prefer
contours that few draws made.
"""

import math

import numpy as np

from terrazzo.tools.data.paths import segments
from terrazzo.tools.data.paths.recipe import Recipe

TRIES = 10
"""Draws of a paddle before an attempt is given up."""
_HALF = np.linspace(-math.pi / 2, math.pi / 2, 512)
_CUMULATED = 0.5 + (_HALF + np.sin(2 * _HALF) / 2) / math.pi


def turns(random: np.random.Generator, continuity: float, count: int) -> np.ndarray:
    """Angles (count,) in radians with the density cos(continuity * angle)², drawn by its cumulated form."""
    return np.interp(random.random(count), _CUMULATED, _HALF) / continuity


def grow(
    random: np.random.Generator, recipe: Recipe, count: int, starts: np.ndarray, obstacles: np.ndarray
) -> np.ndarray | None:
    """A contour of `count` paddles (4, count), each from its near end to its far end, or None if all attempts fail.

    A gap between two paddles is the margin along the first, then the margin along the second.

    Args:
        random: source of randomness.
        recipe: the settings.
        count: paddles.
        starts: (2, K), x and y of the first tip of each attempt.
        obstacles: (4, M), paddles to keep clear of.
    """
    attempts = starts.shape[1]
    paddles = np.zeros((4, attempts, count))
    grown, tries = np.zeros(attempts, int), np.zeros(attempts, int)
    tips, angles, gaps = starts.astype(float), np.zeros(attempts), np.zeros((2, attempts))
    low, high = recipe.padding, recipe.size - 1 - recipe.padding
    alive, best = np.arange(attempts), None
    while len(alive):
        first = grown[alive] == 0
        angle = angles[alive] + turns(random, recipe.continuity, len(alive))
        angle = np.where(first, random.uniform(-math.pi, math.pi, len(alive)), angle)
        ahead = np.array([np.cos(angle), np.sin(angle)])
        start = tips[:, alive] + gaps[:, alive] + np.where(first, 0, recipe.margin * ahead)
        made = np.concatenate([start, start + recipe.length * ahead])
        fits = (made.min(0) >= low) & (made.max(0) <= high)
        fits[fits] = _clear(made[:, fits], alive[fits], paddles, grown, obstacles, recipe.clearance**2)
        chosen = alive[fits]
        paddles[:, chosen, grown[chosen]] = made[:, fits]
        tips[:, chosen], angles[chosen], gaps[:, chosen] = made[2:, fits], angle[fits], recipe.margin * ahead[:, fits]
        grown[chosen] += 1
        tries[chosen] = 0
        tries[alive[~fits]] += 1
        done = alive[grown[alive] == count]
        if len(done):
            best = done[0]
            alive = alive[alive < best]  # later attempts cannot be the first
        alive = alive[tries[alive] < TRIES]
    return None if best is None else paddles[:, best]


def _clear(
    made: np.ndarray, which: np.ndarray, paddles: np.ndarray, grown: np.ndarray, obstacles: np.ndarray, limit: float
) -> np.ndarray:
    """Which new paddles (4, A) of the attempts `which` keep clear of obstacles and of their own earlier paddles."""
    clear = np.ones(len(which), bool)
    if len(which) and obstacles.shape[1]:
        clear = (segments.between(made[:, :, None], obstacles[:, None]) >= limit).all(1)
    most = int(grown[which].max(initial=0)) - 1  # the paddle before is a neighbour, and no obstacle
    if most > 0:
        there = np.arange(most) < grown[which, None] - 1
        own = np.where(there, paddles[:, which, :most], _FAR)
        clear &= (segments.between(made[:, :, None], own) >= limit).all(1)
    return clear


_FAR = np.array([-1e6, -1e6, -1e6, 1 - 1e6])[:, None, None]

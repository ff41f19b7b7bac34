"""How many tokens a reducer removes or keeps: a number for all blocks or for each, and a searched schedule."""

from collections.abc import Callable, Sequence

from terrazzo.backbones._checks import number, numbers
from terrazzo.errors import InputError

DEIT_SMALL = (
    (197, 197),
    (192, 180),
    (168, 156),
    (143, 127),
    (121, 109),
    (105, 98),
    (92, 80),
    (74, 66),
    (62, 52),
    (45, 37),
    (33, 31),
    (3, 3),
)
"""Tokens of 197 that the blocks of DeiT-S leave after dropping and after merging, at 2.3 G multiply-adds (authors)."""

SMALLEST = 1e-4  # part of the tokens; at least one patch stays


def for_blocks(
    name: str,
    value: float | Sequence[float],
    blocks: Sequence[int],
    valid: Callable[[float], bool],
    what: str,
    spread: Callable[[float, int], float] = lambda value, place: value,
) -> tuple[float, ...]:
    """A number for each block.

    Args:
        name: The option's name, for errors.
        value: A number for each block, or a number that `spread` gives to all blocks.
        blocks: The blocks that reduce.
        valid: Whether a number may be given.
        what: What numbers may be given, for errors.
        spread: Maps a single number and a block's place in `blocks` to the block's number.

    Raises:
        InputError: The numbers do not fit the blocks, or one of them is not valid.
    """
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    given = numbers(name, value) if listed else (number(name, value),)
    if listed and len(given) != len(blocks):
        raise InputError(f"{name} must be a number, or hold one for each of {len(blocks)} blocks, got {value}")
    if not all(map(valid, given)):
        raise InputError(f"{name} must be {what}, got {value}")
    return given if listed else tuple(spread(given[0], place) for place in range(len(blocks)))


def powers(value: float, place: int) -> float:
    """rho, rho^2, rho^3, ...: what is left after each stage if each keeps the part rho."""
    return value ** (place + 1)


def schedule(count: int, rate: float = 1.0) -> tuple[tuple[float, float], ...]:
    """DEIT_SMALL for another number of blocks, as parts of the tokens; between its blocks by straight lines.

    Args:
        rate: what is removed is multiplied by this number.
    """
    found = []
    for block in range(count):
        at = block * (len(DEIT_SMALL) - 1) / max(count - 1, 1)
        below = min(int(at), len(DEIT_SMALL) - 2)
        both = zip(DEIT_SMALL[below], DEIT_SMALL[below + 1])
        parts = ((one + (other - one) * (at - below)) / DEIT_SMALL[0][0] for one, other in both)
        found.append(tuple(max(SMALLEST, 1 - rate * (1 - part)) for part in parts))
    return tuple(found)

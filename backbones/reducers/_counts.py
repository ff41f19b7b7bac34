"""How many tokens a reducer removes or keeps: one number for all blocks, or a number for each block."""

from collections.abc import Callable, Sequence

from terrazzo.backbones._checks import number, numbers
from terrazzo.errors import InputError


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

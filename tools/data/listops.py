"""ListOps, made up: nested lists of digits under minimum, maximum, median and sum modulo ten; the answer is a digit.

Source: arXiv 1804.06028, with the sizes of Long Range Arena (arXiv 2011.04006): depth up to 10, up to 10 arguments,
more than 500 and fewer than 2000 tokens. Brackets that only group, which Long Range Arena's readers drop, are not made.
"""

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from terrazzo.errors import InputError

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
END = "]"
TOKENS = (*map(str, range(10)), *OPERATORS, END)
"""The vocabulary; in arrays a token is its position here plus 1, and 0 is padding."""

_IDS = {token: number for number, token in enumerate(TOKENS, 1)}
_NAMES = tuple(OPERATORS)
_DEPTH, _ARGUMENTS, _OPERATOR = 10, 10, 0.25


class _TooLongError(Exception):
    """A list has reached the limit of tokens."""


def listops(
    n: int, seed: int = 0, split: int = 0, shortest: int = 500, longest: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """Make expressions; number i depends on the seed, the split and the lengths alone.

    Args:
        n: number of expressions.
        seed: from 0 on.
        split: number of a split; splits share no random numbers.
        shortest, longest: lengths of expressions lie between them.

    Returns:
        Tokens (n, longest) uint8, padded with 0 at the end, and answers (n,).

    Raises:
        InputError: no length lies between the bounds, or they are too far up for ten levels.
    """
    if not 0 <= shortest < longest - 1 or shortest > 5000:
        raise InputError(f"lengths must lie between 0 to 5000 and more than that, got {shortest} and {longest}")
    tokens, answers = np.zeros((n, longest), np.uint8), np.zeros(n, np.int64)
    for index in range(n):
        random = np.random.Generator(np.random.Philox(key=[seed, split], counter=[0, 0, 0, index]))
        expression, answers[index] = _expression(random, shortest, longest)
        tokens[index, : len(expression)] = expression
    return tokens, answers


def _expression(random: np.random.Generator, shortest: int, longest: int) -> tuple[list[int], int]:
    """The first expression of a suitable length. All begin with an operator: a digit alone is always too short."""
    while True:
        tokens: list[int] = []
        try:
            answer = _list(random, tokens, 1, longest)
        except _TooLongError:
            continue
        if shortest < len(tokens) < longest:
            return tokens, answer


def _list(random: np.random.Generator, tokens: list[int], depth: int, longest: int) -> int:
    """Append a list to tokens, and return its value."""
    name = _NAMES[random.integers(len(_NAMES))]
    tokens.append(_IDS[name])
    values = []
    for _ in range(random.integers(2, _ARGUMENTS + 1)):
        if depth < _DEPTH and random.random() < _OPERATOR:
            values.append(_list(random, tokens, depth + 1, longest))
        else:
            values.append(int(random.integers(10)))
            tokens.append(_IDS[str(values[-1])])
    tokens.append(_IDS[END])
    if len(tokens) >= longest:
        raise _TooLongError
    return OPERATORS[name](values)

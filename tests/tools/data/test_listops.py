"""ListOps: every answer is that of its text, by another way of reading it."""

import numpy as np
import pytest

from terrazzo.errors import InputError
from terrazzo.tools.data.listops import TOKENS, listops


def answer(words):
    """By a stack, as a reader of the text would."""
    stack = []
    for word in words:
        if word != "]":
            stack.append(word if word.startswith("[") else int(word))
            continue
        values = []
        while not isinstance(stack[-1], str):
            values.append(stack.pop())
        kind = stack.pop()
        found = {"[MIN": np.min, "[MAX": np.max, "[MED": np.median, "[SM": np.sum}[kind](values)
        stack.append(int(found) % 10)
    (value,) = stack
    return value


def test_answers_and_lengths():
    tokens, answers = listops(12, seed=1)
    assert tokens.shape == (12, 2000)
    for row, wanted in zip(tokens, answers):
        words = [TOKENS[number - 1] for number in row[row > 0]]
        assert 500 < len(words) < 2000
        assert not row[len(words) :].any()
        assert answer(words) == wanted
    used = {TOKENS[number - 1] for number in np.unique(tokens) if number}
    assert used == set(TOKENS)
    assert len(set(answers)) > 3


def test_an_expression_depends_on_its_number_alone():
    tokens, answers = listops(4, shortest=10, longest=100)
    again, same = listops(2, shortest=10, longest=100)
    assert np.array_equal(tokens[:2], again)
    assert np.array_equal(answers[:2], same)
    assert not np.array_equal(listops(4, split=1, shortest=10, longest=100)[0], tokens)
    with pytest.raises(InputError, match="lengths must lie"):
        listops(1, shortest=10, longest=11)

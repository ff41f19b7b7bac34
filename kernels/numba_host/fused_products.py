"""Products of matrices for CPU kernels, whose sums stay in vector registers."""

from collections.abc import Callable

from numba.extending import register_jitable

from terrazzo.kernels.numba_host.fused_constants import WIDE
from terrazzo.kernels.numba_host.fused_vectors import (
    add_all,
    add_multiples_apart,
    load,
    load_all,
    load_all_wide,
    load_wide,
    store_all,
    zeros,
    zeros_wide,
)

_inline = register_jitable(forceinline=True)

# Rows of a product whose sums are in registers at once.
BLOCK = 8


def _rows_of(count: int, wide: bool, row_step: Callable, between: int, fresh: bool) -> Callable:
    read, read_all, none = (load_wide, load_all_wide, zeros_wide) if wide else (load, load_all, zeros)

    @_inline
    def added(found, sums, at, step):
        return add_all(found, read_all(sums, at, step, count))

    @_inline
    def alone(found, sums, at, step):
        return found

    result = alone if fresh else added

    @_inline
    def rows_of(sums, at, step, factors, factor_step, numbers, number_at, number_step, terms):
        found = none(sums, count)
        for t in range(terms):
            factor = read(factors, t * factor_step)
            found = add_multiples_apart(found, factor, numbers, number_at + t * between, row_step(number_step))
        store_all(sums, at, step, result(found, sums, at, step))

    return rows_of


def _columns_of(wide: bool, *how) -> Callable:
    block, one, row_step = _rows_of(BLOCK, wide, *how), _rows_of(1, wide, *how), how[0]

    @_inline
    def columns_of(sums, at, step, rows, factors, factor_step, numbers, number_step, terms):
        whole = rows // BLOCK * BLOCK
        for r in range(0, whole, BLOCK):
            number_at = r * row_step(number_step)
            block(sums, at + r * step, step, factors, factor_step, numbers, number_at, number_step, terms)
        for r in range(whole, rows):
            number_at = r * row_step(number_step)
            one(sums, at + r * step, step, factors, factor_step, numbers, number_at, number_step, terms)

    return columns_of


def multiplier(between: int, number_step: int | None = None, fresh: bool = False) -> Callable:
    """A function for kernels that adds a product to `sums`, or with `fresh` writes it there.

    With a constant `number_step` it is twice as fast: otherwise the processor waits for the addresses of the numbers.

    Args:
        between: places between the numbers of two terms.
        number_step: places between the numbers of two rows. None: an argument of the function says so.
    """
    row_step = _inline((lambda given: given) if number_step is None else (lambda given: number_step))
    wide_columns, narrow_columns = (_columns_of(wide, row_step, between, fresh) for wide in (True, False))

    @register_jitable
    def multiply(sums, step, rows, width, factors, factor_step, numbers, terms, number_step=0):
        """Add a product to `sums`, rows of `width` numbers that are `step` apart; `width` is a multiple of LANES.

        Args:
            factors: `terms` rows of `width` numbers, `factor_step` apart.
            numbers: the number of row r and term t is at r * number_step + t * between.
        """
        for c in range(0, width, WIDE):
            own = factors[c:]
            if width - c >= WIDE:
                wide_columns(sums, c, step, rows, own, factor_step, numbers, number_step, terms)
            else:
                narrow_columns(sums, c, step, rows, own, factor_step, numbers, number_step, terms)

    return multiply

"""How a call of a Numba kernel is divided among threads: by its sizes alone, so the same call gives the same bits."""

from collections.abc import Callable

from terrazzo.kernels.numba_host import threads

# A call on fewer numbers is not divided: waking a thread takes longer. A larger call has this many parts.
_ALONE = 1 << 18
PARTS = 8


def is_small(work: int) -> bool:
    """Whether a call that reads and writes about `work` numbers is not divided."""
    return work < _ALONE


def divided(kernel: Callable[[int, int], object], count: int, work: int) -> list:
    """Call `kernel(begin, end)` for parts of `count`, and return what the calls return.

    Args:
        kernel: must not depend on how `count` is divided.
        work: roughly how many numbers are read and written.
    """
    parts = 1 if is_small(work) else min(count, PARTS)
    found = [None] * parts

    def part(i: int) -> None:
        found[i] = kernel(count * i // parts, count * (i + 1) // parts)

    threads.run(part, parts)
    return found

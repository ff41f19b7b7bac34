"""One call of a kernel on several Python threads: compiled kernels do not hold the interpreter's lock.

Numba's own threading layers are not used. They end the process after a fork (DataLoader workers), or when two Python
threads call a kernel at once.
"""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch


def run(kernel: Callable[[int], None], count: int) -> None:
    """Call `kernel(i)` for each i below `count`, on at most as many threads as `torch.get_num_threads()`.

    The calls must not depend on each other. Their results do not depend on the number of threads.
    """
    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        for i in range(count):
            kernel(i)
        return
    numbers = itertools.count()  # `next` is atomic

    def work() -> None:
        while (i := next(numbers)) < count:
            kernel(i)

    others = [_pool(os.getpid()).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        wait(others)  # nobody writes to the call's tensors any more
    for other in others:
        other.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process. A forked process has none of its parent's."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="terrazzo")

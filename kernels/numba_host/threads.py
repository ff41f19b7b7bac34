"""One call of a kernel on several threads: compiled kernels do not hold the interpreter's lock.

The threads are PyTorch's where they can be reached, and Python threads elsewhere. Numba's own threading layers are not
used. They end the process after a fork (DataLoader workers), or when two Python threads call a kernel at once.
"""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from terrazzo.kernels.numba_host import openmp


def run(kernel: Callable[[int], None], count: int) -> None:
    """Call `kernel(i)` for each i below `count`, on at most as many threads as `torch.get_num_threads()`.

    The calls must not depend on each other. Their results do not depend on the number of threads. If a call raises an
    exception, it is raised here, when no thread writes to the call's tensors any more.
    """
    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        for i in range(count):
            kernel(i)
        return
    numbers, failures = itertools.count(), []  # `next` is atomic

    def work() -> None:
        try:
            while (i := next(numbers)) < count:
                kernel(i)
        except BaseException as failure:
            failures.append(failure)

    if not openmp.run(work, threads):
        others = [_pool(os.getpid()).submit(work) for _ in range(threads - 1)]
        work()
        wait(others)
    if failures:
        raise failures[0]


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The Python threads of a process. A forked process has none of its parent's."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="terrazzo")

"""Pools of processes that may be started beside PyTorch."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def pool(workers: int, prepare: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """Processes that are forked from a server, which has imported PyTorch and timm once for all of them.

    A process that is forked from this one would inherit PyTorch's threads half-way; a server has no threads.

    Args:
        workers: number of processes.
        prepare: what each process does first.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["torch", "timm"])
    return ProcessPoolExecutor(max_workers=workers, mp_context=context, initializer=prepare)

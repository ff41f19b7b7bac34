"""Processes that may be started beside PyTorch.

They are forked from a server, which has imported PyTorch and timm once for all of them. A process that is forked from
this one would inherit PyTorch's threads half-way; a server has no threads.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any


class ProcessEnded(Exception):
    """A process that ended without an answer.

    Attributes:
        code: its exit code; the negative number of the signal that ended it.
    """

    def __init__(self, code: int):
        named = {-number: f"signal {int(number)} ({number.name})" for number in signal.Signals}
        super().__init__(f"the process ended with {named.get(code, f'exit code {code}')}")
        self.code = code


def context() -> BaseContext:
    """The way to start processes."""
    methods = multiprocessing.get_all_start_methods()
    found = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if found.get_start_method() == "forkserver":
        found.set_forkserver_preload(["torch", "timm"])
    return found


def pool(workers: int, prepare: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """A pool of processes.

    Args:
        workers: number of processes.
        prepare: what each process does first.
    """
    return ProcessPoolExecutor(max_workers=workers, mp_context=context(), initializer=prepare)


def alone(function: Callable, *arguments: Any) -> Any:
    """The answer of a function that runs in a process of its own.

    Raises:
        ProcessEnded: the process ended without an answer.
    """
    start = context()
    receiver, sender = start.Pipe(duplex=False)
    process = start.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()  # so that the other end is the last, and its end is seen here
    try:
        return receiver.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise ProcessEnded(process.exitcode) from None
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        receiver.close()


def _answer(sender: Connection, function: Callable, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(function(*arguments))


def _end_with_parent() -> None:
    """An interrupt may come while the process starts, when nobody knows yet that it must be ended."""
    multiprocessing.parent_process().join()
    os._exit(1)

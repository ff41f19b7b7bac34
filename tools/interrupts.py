"""Ctrl-C and SIGTERM: a command ends at once, with its worker processes, in one line and with the usual exit code."""

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises, so that all that cleans up after Ctrl-C does so after it, too."""


class Interrupted(BaseException):
    """A command that Ctrl-C or SIGTERM ended.

    Args:
        cause: what was raised in the command.

    Attributes:
        exit_code: 128 and the number of the signal, as shells count: 130 or 143.
    """

    def __init__(self, cause: KeyboardInterrupt):
        terminated = isinstance(cause, Terminated)
        super().__init__("terminated" if terminated else "interrupted")
        self.exit_code = 128 + (signal.SIGTERM if terminated else signal.SIGINT)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """While it lasts, SIGTERM raises `Terminated`."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # where no signal can be caught
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_children() -> None:
    """Kills the worker processes: they hold nothing, and PyTorch would wait five seconds for each that is busy."""
    if threading.current_thread() is threading.main_thread():
        # Neither a second Ctrl-C nor PyTorch's watch over its workers gets in the way.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(1)

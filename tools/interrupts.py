"""Ctrl-C and SIGTERM: a command ends at once, with its worker processes, in one line and with the usual exit code."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
GRACE_S = 1.2
"""How long a command may take to clean up; Python waits for long operations, such as a backward pass, to end."""


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises, so that everything that cleans up after Ctrl-C also cleans up after SIGTERM."""


class Interrupted(BaseException):
    """A command that Ctrl-C or SIGTERM ended.

    Args:
        cause: what was raised in the command.

    Attributes:
        exit_code: 128 and the number of the signal, as shells count: 130 or 143.
    """

    def __init__(self, cause: KeyboardInterrupt):
        number = signal.SIGTERM if isinstance(cause, Terminated) else signal.SIGINT
        super().__init__(SIGNALS[number])
        self.exit_code = 128 + number


class LeaveAtOnce(SystemExit):
    """An exit after an interrupt: the interpreter skips its clean-up, which takes seconds."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside this context, SIGTERM raises `Terminated`."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # other threads cannot catch signals
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    os.register_at_fork(after_in_child=_forget)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _forget() -> None:
    """Lets a forked process die of its pool's SIGTERM without telling this process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(command: Callable[[], None]) -> None:
    """Runs the command of a process; the process ends soon after a signal, whatever it is doing."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    try:
        command()
    except LeaveAtOnce as leave:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(leave.code)


def _watch(reading: int) -> None:
    """Ends the process when it has not ended itself in time after a signal."""
    while (number := os.read(reading, 1)[0]) not in SIGNALS:
        pass
    time.sleep(GRACE_S)
    for child in multiprocessing.active_children():
        child.kill()
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os.write(2, f"{SIGNALS[number]}\n".encode())
    os._exit(128 + number)


def end_children() -> None:
    """Kills the worker processes: they hold no data, and PyTorch would wait five seconds for each busy worker."""
    if threading.current_thread() is threading.main_thread():
        # Neither a second Ctrl-C nor PyTorch's watch over its workers may interfere.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(1)

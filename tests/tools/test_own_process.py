"""A function in a process of its own."""

import subprocess
import sys

ORPHAN = """
import multiprocessing, os, signal, time
from terrazzo.tools import processes

def end_parent():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(100)

processes.context = lambda: multiprocessing.get_context("fork")
processes.alone(end_parent)
"""


def test_a_process_ends_with_its_parent():
    """It holds the standard output, whose end is waited for here."""
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr

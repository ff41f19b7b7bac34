"""Ctrl-C and SIGTERM end a training at once, with its worker processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from terrazzo.tools.interrupts import Interrupted, Terminated

OPTIONS = (
    *("model.backbone.name=resnet10t", "model.backbone.out_indices=(1, 2, 3, 4)", "crop_size=(64, 64)"),
    *("train_dataloader.batch_size=2", "train_dataloader.num_workers=4", "default_hooks.logger.interval=1"),
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),
    ],
)
def test_a_training_ends_at_once(floors, tmp_path, number, code, word):
    work = tmp_path / "work"
    command = [sys.executable, "-m", "terrazzo", "train", "fpn_dinat-mini_floors", "--data-root", str(floors)]
    command += ["--work-dir", str(work), *OPTIONS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def listen():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets background jobs, maybe these tests, ignore Ctrl-C

    with subprocess.Popen(command, start_new_session=True, preexec_fn=listen, **pipes) as process:
        for line in process.stdout:
            if "Iter(train)" in line:
                break
        begin = time.monotonic()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal sends the signal to the workers, too
        else:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - begin < 2
    assert process.returncode == code
    assert stderr == f"{word}\n"
    time.sleep(0.2)  # until the system has removed the workers
    with pytest.raises(ProcessLookupError):  # no process of the session is left
        os.killpg(process.pid, 0)
    assert not list(work.glob("*.pth"))


def test_exit_codes():
    assert (Interrupted(KeyboardInterrupt()).exit_code, str(Interrupted(KeyboardInterrupt()))) == (130, "interrupted")
    assert (Interrupted(Terminated()).exit_code, str(Interrupted(Terminated()))) == (143, "terminated")

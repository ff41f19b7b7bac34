"""A training on a terminal: a bar, a line for each validation, and the whole log in the file alone."""

import io
import logging
import os
import pty
import subprocess
import sys
import types

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from terrazzo.tools.training import progress

CONFIG = "fpn_dinat-mini_floors"
TINY = (
    *("model.backbone.name=resnet10t", "model.backbone.out_indices=(1, 2, 3, 4)"),
    *("train_dataloader.batch_size=2", "model.data_preprocessor.size=(64, 64)", "default_hooks.logger.interval=1"),
)


def test_outside_a_terminal_nothing_changes(monkeypatch):
    with progress.shown() as hooks:
        assert hooks == []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert progress.on_terminal()
    monkeypatch.setenv("RANK", "1")
    assert not progress.on_terminal()


def test_the_bar_says_loss_and_metrics():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    bar = Progress(
        TextColumn("{task.completed}/{task.total} {task.fields[facts]}"), console=console, auto_refresh=False
    )
    history = types.SimpleNamespace(mean=lambda window: 0.25)
    runner = types.SimpleNamespace(
        max_iters=8,
        iter=3,
        val_dataloader=[1, 2],
        message_hub=types.SimpleNamespace(log_scalars={"train/loss": history}),
        logger=logging.Logger("run"),
    )
    with progress.shown(bar) as (hook, warnings):
        warnings.before_run(runner)
        hook.before_train(runner)
        hook.after_train_iter(runner, 0)
        assert bar.tasks[0].completed == 4, "a resumed run goes on where it was"
        bar.refresh()
        hook.before_val(runner)
        hook.after_val_iter(runner, 0)
        assert [task.completed for task in bar.tasks] == [4, 1]
        hook.after_val_epoch(runner, {"mIoU": 12.3456, "text": "no number"})
        assert len(bar.tasks) == 1
        runner.logger.info("a line of the log")
        runner.logger.warning("something [odd]")
    said = text.getvalue()
    for words in ("4/8 loss 0.25", "iteration 3: mIoU 12.35", "something [odd]"):
        assert words in said
    assert "a line of the log" not in said


@pytest.mark.slow
def test_a_training_in_a_terminal(floors, tmp_path):
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "terrazzo", "train", CONFIG, "--data-root", str(floors), "--max-iters", "2"]
    command += ["--work-dir", str(tmp_path), *TINY]
    said = b""
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        try:
            while part := os.read(leader, 1 << 16):
                said += part
        except OSError:  # the process has ended
            pass
    text = said.decode()
    assert process.returncode == 0, text
    assert "2/2" in text
    assert "iteration 2: aAcc" in text
    assert "Iter(train)" not in text
    assert "trained 2 iterations" in text
    (log,) = tmp_path.glob("*/*.log")
    assert "Iter(train)" in log.read_text()

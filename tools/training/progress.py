"""A training on a terminal: a bar with loss and time left instead of hundreds of lines; the log file has every line."""

import contextlib
import logging
import numbers
import os
import sys
from collections.abc import Iterator

from mmengine.hooks import Hook
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from terrazzo.tools import mm
from terrazzo.tools.training.comparison import line

_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""What launchers call the number of a process: torchrun, slurm, mpi."""

_WINDOW = 20
"""Iterations over which the shown loss is averaged."""


def on_terminal() -> bool:
    """Whether this process has a terminal to draw a bar on, and is the first process of its run."""
    return sys.stderr.isatty() and all(os.environ.get(name, "0") == "0" for name in _RANKS)


class TrainingBar(Hook):
    """Shows iterations, loss, images per second and the time left, and a line for each validation."""

    priority = "VERY_LOW"  # after the hooks that set what it shows

    def __init__(self, bar: Progress):
        self.bar = bar
        self.training = bar.add_task("training", total=None, facts="")
        self.validating: TaskID | None = None

    def before_train(self, runner) -> None:
        """Starts where a resumed run goes on."""
        self.bar.reset(self.training, total=runner.max_iters, completed=runner.iter)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Shows the new figures."""
        scalars, facts = runner.message_hub.log_scalars, []
        for key, form in (("train/loss", "loss {:.4g}"), ("train/images_per_second", "{:.3g} images/s")):
            if key in scalars:
                facts.append(form.format(scalars[key].mean(_WINDOW)))
        self.bar.update(self.training, completed=runner.iter + 1, facts=", ".join(facts))

    def before_val(self, runner) -> None:
        """Shows a second bar."""
        self.validating = self.bar.add_task("validating", total=len(runner.val_dataloader), facts="")

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Counts a batch."""
        self.bar.update(self.validating, completed=batch_idx + 1)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        """Prints the metrics above the bar."""
        self.bar.remove_task(self.validating)
        found = {key: float(value) for key, value in (metrics or {}).items() if isinstance(value, numbers.Real)}
        self.bar.console.print(f"iteration {runner.iter}: {line(found) or 'no metrics'}", highlight=False, markup=False)


class _AboveTheBar(logging.Handler):
    """Prints warnings and errors of mmengine's logger above the bar."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record."""
        self.console.print(record.getMessage(), highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def shown(bar: Progress | None = None) -> Iterator[list[Hook]]:
    """Give the hooks that show a training; in this context a runner is built and trains.

    On a terminal it is a `TrainingBar`, and what mmengine prints goes to the log file alone. Elsewhere nothing changes.

    Args:
        bar: the bar, for tests; None makes one if there is a terminal.
    """
    if bar is None and not on_terminal():
        yield []
        return
    bar = bar or Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=False,
    )
    # mmengine's logger keeps the standard output that it finds when it is made.
    silence = mm.quiet() if sys.stdout.isatty() else contextlib.nullcontext()
    with silence, bar:
        yield [TrainingBar(bar), _Warnings(bar.console)]


class _Warnings(Hook):
    """Lets the runner's logger print warnings above the bar."""

    def __init__(self, console: Console):
        self.console = console

    def before_run(self, runner) -> None:
        """Adds the handler."""
        runner.logger.addHandler(_AboveTheBar(self.console))

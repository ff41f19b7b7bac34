"""What the verbs print with: rich on a terminal, plain text in a pipe or a file."""

import contextlib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def stdout() -> Console:
    """A console on standard output that prints text as it is: no markup, no guessed highlights, no folded lines."""
    return Console(highlight=False, emoji=False, markup=False, soft_wrap=True)


def print_table(
    rows: Iterable[Sequence[object]], columns: Sequence[str] | None = None, right: Sequence[int] = ()
) -> None:
    """Print rows, aligned; outside a terminal as plain text with a line for each row, never folded.

    Args:
        rows: one sequence of cells per row; None is an empty cell.
        columns: header texts; None for no header.
        right: positions of the columns to align on the right.
    """
    console = stdout()
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        for line in _plain(([list(columns)] if columns else []) + cells, right):
            click.echo(line)
        return
    columns = list(columns or [""] * len(cells[0]))
    widths = [max([0, *(len(row[position]) for row in cells)]) for position in range(len(columns))]
    gap = 3
    narrow = sum(max(len(name), width) + gap for name, width in zip(columns, widths)) > console.width
    if narrow:  # headers break between words before any cell is folded
        columns = [
            textwrap.fill(name, max(1, width), break_long_words=False, break_on_hyphens=False)
            for name, width in zip(columns, widths)
        ]
    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns), pad_edge=False, collapse_padding=narrow)
    for position, name in enumerate(columns):
        table.add_column(name, justify="right" if position in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console.print(table, soft_wrap=False)


def _plain(cells: list[list[str]], right: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if position in right else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def progress(what: str, total: int | None = None) -> Progress:
    """A progress bar on standard error that vanishes when done; nothing at all outside a terminal.

    Args:
        what: a word or two beside the bar.
        total: number of steps, for `advance`; None for work of unknown length.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        redirect_stdout=False,  # what is silenced stays silent
        transient=True,
        disable=not console.is_terminal,
    )
    bar.add_task(what, total=total)
    return bar


@contextlib.contextmanager
def steps(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; the value is to be called after each step."""
    with progress(what, total) as bar:
        yield lambda: bar.advance(bar.task_ids[0])


def human(count: int | float) -> str:
    """A count with a metric suffix and three or four digits: 11.69 M."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.2f} {suffix}"
    return str(count)

"""`terrazzo demo`: all steps in minutes, offline: make data, train, evaluate, draw, export, check."""

from pathlib import Path

import click

from terrazzo.tools.console import print_table
from terrazzo.tools.options import UserPath
from terrazzo.tools.training.demo import TIMES_BETTER, run_demo

EXIT_TOO_WEAK = 1


@click.command()
@click.option("--out", type=UserPath(), default=Path("demo"), show_default=True, metavar="DIR")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of data and training.")
def command(out: Path, seed: int) -> int:
    """Train a DiNAT segmentor on made-up terrazzo floors, evaluate it, draw what it sees, and export it.

    A run replaces what an earlier run left in its folder. The exit code is 1 if the segmentor is not clearly better
    than a constant prediction of the most common class, or if the exported file does not compute the same.
    """
    outcome = run_demo(out, seed)
    print_table([(step, f"{seconds:.1f} s") for step, seconds in outcome.seconds.items()], ("step", "time"), right=(1,))
    rows = [
        ("mIoU", f"{outcome.miou:.1f} %"),
        ("mIoU of a constant prediction", f"{outcome.constant_miou:.1f} %"),
        ("ONNX Runtime against PyTorch", f"relative error {outcome.parity:.1e}"),
        *((what, str(path)) for what, path in outcome.files.items()),
    ]
    print_table(rows, ("result", ""))
    if outcome.passed:
        return 0
    reason = (
        f"mIoU {outcome.miou:.1f} % is below {TIMES_BETTER:g} times the mIoU of a constant prediction"
        if outcome.exported
        else "the exported file does not compute what PyTorch does"
    )
    click.echo(f"error: {reason}", err=True)
    return EXIT_TOO_WEAK

"""`terrazzo paths`: made-up path images, whose contours a model must follow."""

from pathlib import Path

import click

from terrazzo.tools.files import folder_written_whole
from terrazzo.tools.options import UserPath


@click.command()
@click.argument("out", metavar="DIR", type=UserPath())
@click.option("--size", type=int, default=128, show_default=True, help="Height and width in pixels.")
@click.option(
    "--form",
    type=click.Choice(["dense", "pairs"]),
    default="dense",
    show_default=True,
    help="dense: label maps of the path between the discs; pairs: are both discs on one contour?",
)
@click.option("--train", type=click.IntRange(min=1), default=2000, show_default=True, help="Images to train on.")
@click.option("--val", type=click.IntRange(min=1), default=200, show_default=True, help="Images to evaluate on.")
@click.option(
    "--contour",
    type=click.IntRange(min=2),
    help="Paddles of a long contour [default: 14; in the dense form more of them from 256 pixels on].",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the images.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that make images.")
def command(
    out: Path, size: int, form: str, train: int, val: int, contour: int | None, seed: int, workers: int
) -> None:
    """Write path images into DIR, a new or empty folder: dashed contours, and two discs at the tips of long ones.

    The same seed gives the same files, whatever --workers is. The packaged configs fpn_dinat-mini_paths-128 and
    fpn_dinat-mini_paths-512 read data/paths-128 and data/paths-512.
    """
    from terrazzo.tools.console import steps
    from terrazzo.tools.data.paths.folders import Asked, write_paths

    dense = form == "dense"
    asked = Asked(size, dense, {"train": train, "val" if dense else "test": val}, contour, seed)
    with folder_written_whole(out) as temporary, steps("paths", train + val) as done:
        write_paths(temporary, asked, workers, done)
    click.echo(f"wrote {train} images to train on and {val} to evaluate on: {out}")

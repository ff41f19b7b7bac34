"""`terrazzo floors`: made-up data to try the commands on."""

from pathlib import Path

import click

from terrazzo.tools.files import folder_written_whole
from terrazzo.tools.options import UserPath


@click.command()
@click.argument("out", metavar="DIR", type=UserPath())
@click.option("--train", type=click.IntRange(min=1), default=240, show_default=True, help="Floors to train on.")
@click.option("--val", type=click.IntRange(min=1), default=40, show_default=True, help="Floors to evaluate on.")
@click.option(
    "--size", type=click.IntRange(min=32), default=128, show_default=True, help="Height and width of a floor in pixels."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the floors.")
def command(out: Path, train: int, val: int, size: int, seed: int) -> None:
    """Write made-up pictures of terrazzo floors into DIR, a new or empty folder, with exact labels of four kinds.

    The folder has label maps (labels/), boxes and masks in COCO's format (annotations/) and a folder of chips for each
    kind of stone (chips/). The packaged config fpn_dinat-mini_floors reads data/floors.
    """
    from terrazzo.tools.data.floors import write_floors

    with folder_written_whole(out) as temporary:
        write_floors(temporary, train, val, size, seed)
    click.echo(f"wrote {train} floors to train on and {val} to evaluate on: {out}")

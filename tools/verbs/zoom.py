"""`terrazzo zoom`: what a second look could gain on a data set, without a model."""

from pathlib import Path

import click

from terrazzo.tools.console import print_table, progress
from terrazzo.tools.files import check_output_file
from terrazzo.tools.options import UserPath, config_options

SHARES = (0, 0.1, 0.2, 0.3, 0.5)


@click.group()
def command() -> None:
    """Say what a gated zoom could gain. `terrazzo test --zoom` says what it gains with a model."""


@command.command("oracle")
@click.argument("config")
@config_options
@click.option("--split", type=click.Choice(("train", "val", "test")), default="test", show_default=True)
@click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="Take every N-th picture.")
@click.option("--tile", type=click.IntRange(min=1), default=48, show_default=True, help="Side of a tile in pixels.")
@click.option(
    "--factor",
    "factors",
    type=click.IntRange(min=2),
    multiple=True,
    default=(4, 8, 16),
    show_default=True,
    help="How many times coarser the coarse labels are; may be given several times.",
)
@click.option("--out", type=UserPath(), metavar="FILE", help="Write the figures as CSV too.")
def oracle(
    config: str,
    overrides: dict,
    data_root: Path | None,
    split: str,
    every: int,
    tile: int,
    factors: tuple[int, ...],
    out: Path | None,
) -> None:
    """Replace the worst tiles of coarse labels by the truth, and print the IoU.

    The coarse labels are the most frequent class of each FACTOR x FACTOR pixels of the label maps of CONFIG's data. No
    model takes part: the tiles with the most wrong pixels are chosen, and the fine pass is taken as perfect. Pixels at
    the bottom and at the right that fill no whole tile stay coarse. For instances, everything is foreground or
    background, and the IoU is that of the foreground.
    """
    from terrazzo.gated_zoom._oracle import label_oracle
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools import mm, results
    from terrazzo.tools.data.checks import check_data
    from terrazzo.tools.zoom.labels import label_maps
    from terrazzo.tools.zoom.oracle import rows_of

    cfg = load_config(config, data_root, overrides)
    check_data(cfg, (split,))
    if out is not None:
        check_output_file(out)
    with mm.quiet():
        maps, names = label_maps(cfg, split, every)
        labels = list(maps)
    rows = []
    with progress("oracle", len(factors)) as bar:
        for factor in factors:
            rows += rows_of(label_oracle(labels, len(names), factor, tile, SHARES), names, len(labels), tile)
            bar.advance(bar.task_ids[0])
    kinds = dict.fromkeys(row.metric for row in rows)
    table = [
        (f"{metric}, 1/{factor}", *(f"{r.value:.1f}" for r in rows if (r.metric, r.factor) == (metric, factor)))
        for metric in kinds
        for factor in factors
    ]
    heads = ("coarse", *(f"{share:.0%} of tiles" for share in SHARES[1:]))
    print_table(table, (f"{len(labels)} pictures, tiles of {tile}", *heads), right=range(1, len(heads) + 1))
    if out is not None:
        results.write(out, rows, type(rows[0]))

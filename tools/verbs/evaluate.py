"""`terrazzo test`: the metrics of a checkpoint on its config's test data."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from terrazzo._files import written_whole
from terrazzo.tools.console import print_table
from terrazzo.tools.files import check_output_file
from terrazzo.tools.options import UserPath, config_options
from terrazzo.tools.training.evaluation import evaluate, without_nan
from terrazzo.tools.zoom.options import ZoomOptions, zoom_options

if TYPE_CHECKING:
    from mmengine.config import Config


@click.command()
@click.argument("config")
@click.argument("checkpoint", type=UserPath())
@config_options
@click.option("--out", type=UserPath(), metavar="FILE", help="Write the metrics as JSON too.")
@zoom_options
@click.option(
    "--sweep",
    type=UserPath(),
    metavar="PNG",
    help="Draw the metric of a zoom over its megapixels for a fixed list of budgets (--budget and --zoom-score are not "
    "used), and write a CSV too.",
)
def command(
    config: str,
    checkpoint: Path,
    overrides: dict,
    data_root: Path | None,
    out: Path | None,
    zoom: ZoomOptions | None,
    sweep: Path | None,
) -> None:
    """Evaluate CHECKPOINT on the test data of CONFIG and print its metrics.

    With --zoom, also megapixels per picture (coarse and fine passes with halos), the share of pictures that the gate
    spares a fine pass, and milliseconds per picture. --sweep evaluates many budgets, and compares the choice of tiles
    with random tiles and with an oracle.
    """
    if sweep is not None and zoom is None:
        raise click.UsageError("--sweep is for a zoom; give its scale, too, such as --zoom 4")
    if sweep is not None and out is not None:
        raise click.UsageError("--sweep writes its own table: leave --out out")
    if sweep is not None and sweep.suffix.lower() != ".png":
        raise click.UsageError(f"--sweep writes a PNG picture, so its file must end with .png, got {sweep}")
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools.data.checks import check_data

    cfg = load_config(config, data_root, overrides)
    check_data(cfg, ("test",))
    if out is not None:
        check_output_file(out)
    if sweep is not None and zoom is not None:
        _sweep(cfg, checkpoint, zoom, sweep)
        return
    meters: list[Any] = []
    metrics, notes = evaluate(
        cfg, checkpoint, None if zoom is None else lambda model: meters.append(_zoomed(model, zoom))
    )
    for meter in meters:
        metrics |= meter.record()
    if metrics:
        print_table(((name, _cell(value)) for name, value in metrics.items()), ("metric", "value"), right=(1,))
    for note in notes:
        click.echo(note)
    if out is not None:
        record = {"config": config, "checkpoint": str(checkpoint), **without_nan(metrics)}
        with written_whole(out) as temporary:
            temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def _zoomed(model: Any, zoom: ZoomOptions) -> Any:
    """Make a model zoom; a meter of its costs."""
    from terrazzo.tools.zoom.meter import Meter

    made = zoom.make(model)
    made.install()
    return Meter(made)


def _sweep(cfg: "Config", checkpoint: Path, zoom: ZoomOptions, place: Path) -> None:
    """Write the curve of a zoom as a picture and as a table, and print the table."""
    from terrazzo.tools import results
    from terrazzo.tools.zoom.curve import draw
    from terrazzo.tools.zoom.sweep import Point, sweep

    table = place.with_suffix(".csv")
    for path in (place, table):
        check_output_file(path)
    points = sweep(cfg, checkpoint, zoom)
    cells = [(p.score, f"{p.budget:.0%}", f"{p.megapixels:.4g}", f"{p.value:.4g}") for p in points]
    print_table(cells, ("tiles by", "budget", "megapixels", points[0].metric), right=(1, 2, 3))
    with written_whole(place) as temporary:
        draw(points, temporary)
    results.write(table, points, Point)
    click.echo(f"written to {place} and {table}")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

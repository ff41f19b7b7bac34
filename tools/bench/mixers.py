"""`terrazzo bench mixers`: what a trained plain ViT gains and loses by other mixers, at several sizes."""

from collections.abc import Sequence
from pathlib import Path

import click
from timm.data import resolve_model_data_config

from terrazzo._files import written_whole
from terrazzo.backbones._hosts import check_host
from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench.mechanisms import METRICS, MechanismBench, table
from terrazzo.tools.console import print_table, progress
from terrazzo.tools.data.pictures import find_pictures
from terrazzo.tools.files import check_output_file, check_plot
from terrazzo.tools.mechanisms import calibrate_option, chosen, mechanism_options, of_mixer, without_parameters
from terrazzo.tools.options import POSITIVE, UserPath, device_option, weights_options
from terrazzo.tools.targets import load_timm_model, pick_device

SIZES = ((336, 448), (672, 896), (1008, 1344), (1792, 1792))


@click.command()
@click.argument("model")
@weights_options
@click.option(
    "--pictures",
    "places",
    type=UserPath(),
    multiple=True,
    required=True,
    metavar="PLACE",
    help="Pictures, or folders of pictures, to compare maps on; repeatable.",
)
@click.option(
    "--count", type=click.IntRange(min=1), default=4, show_default=True, help="Use at most this many of the pictures."
)
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(min=1),
    nargs=2,
    multiple=True,
    default=SIZES,
    show_default=True,
    metavar="H W",
    help="Size of the images, cut from the middle of the pictures; repeatable.",
)
@mechanism_options
@calibrate_option
@device_option
@click.option(
    "--seconds",
    type=POSITIVE,
    default=2.0,
    show_default=True,
    help="Time for each model and size; there are at least three turns.",
)
@click.option("--out", type=UserPath(), metavar="FILE.csv", help="Write the rows as CSV, after every size.")
@click.option("--picture", type=UserPath(), metavar="FILE.png", help="Draw the cosine over the gain in time.")
def command(
    model: str,
    checkpoint: Path | None,
    pretrained: bool,
    places: tuple[Path, ...],
    count: int,
    sizes: Sequence[tuple[int, int]],
    names: tuple[str, ...],
    settings: tuple[str, ...],
    reducers: tuple[str, ...],
    calibrated: int,
    device: str | None,
    seconds: float,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Give MODEL, a plain timm ViT, other mixers, and measure each beside the dense model, in turns.

    Without --mixer and --reduce, these are all mixers that add no parameters. For each size: the time of the whole
    model and of its attention modules, peak memory, the part of the pairs of queries and keys that a mixer selects, the
    part of the dense softmax weights that is on these pairs, and the mean cosine of the last map to the dense model's.
    Pictures for --calibrate are not measured.
    """
    mechanisms = chosen(names, settings, reducers)
    where = pick_device(device)
    if out is not None:
        check_output_file(out)
    if picture is not None:
        check_plot(picture)
        from terrazzo.tools.bench import pareto
    dense = load_timm_model(model, checkpoint, pretrained, size=sizes[0], any_record=True).to(where)
    check_host(dense, "converted")
    mechanisms = mechanisms or [of_mixer(name) for name in without_parameters(dense)]
    if not mechanisms:
        raise InputError("every mixer has parameters of its own; name the mixers to measure with --mixer NAME")
    found = find_pictures(places)
    if len(found) <= calibrated:
        raise InputError(
            f"--calibrate {calibrated} leaves no picture to measure, since --pictures has {len(found)}: give more "
            "pictures, or calibrate on fewer"
        )
    count = min(count, len(found) - calibrated)
    images, others = ([x.read() for x in part] for part in (found[:count], found[count : count + calibrated]))
    bench = MechanismBench(dense, mechanisms, resolve_model_data_config(dense), where, seconds, others)
    for size in sizes:
        bench.check(size)
    if checkpoint is None and not pretrained:
        click.echo(f"note: {model} has random weights, and their maps drift differently; see --pretrained", err=True)
    about = results.about(where, "timm")
    rows: list[results.Row] = []
    reasons: dict[str, str] = {}
    with progress("mixers", len(sizes) * bench.steps(len(images))) as bar:
        for size in sizes:
            bar.update(bar.task_ids[0], description=f"{size[0]}x{size[1]}")
            found, wanting = bench.measure(images, size, lambda: bar.advance(bar.task_ids[0]))
            shape = f"1x3x{size[0]}x{size[1]}"
            rows += [
                results.Row("mixers", model, shape, "float32", name, metric, METRICS[metric], *figures, *about)
                for (name, metric), figures in found.items()
            ]
            reasons |= {f"{name} at {size[0]}x{size[1]}": reason for name, reason in wanting.items()}
            if out is not None:
                results.write(out, rows)
    head, lines = table(rows)
    print_table(lines, head, right=tuple(range(2, len(head))))
    click.echo(f"{about[0]}; {about[1]}; median times, measured in turns")
    for what, reason in reasons.items():
        click.echo(f"not run: {what}: {reason}")
    if picture is not None:
        with written_whole(picture) as temporary:
            pareto.draw(rows, temporary)
        click.echo(f"wrote {picture}")
    if out is not None:
        click.echo(f"wrote {out}")

"""`terrazzo bench tiled`: time and memory of a huge image by parts of its rows, beside the whole image."""

import gc
from functools import partial
from pathlib import Path

import click
import timm
import torch

from terrazzo import spatial
from terrazzo.tools import results
from terrazzo.tools.bench.families import requested
from terrazzo.tools.console import print_table, progress
from terrazzo.tools.files import check_output_file
from terrazzo.tools.inspect.memory import PeakMemory
from terrazzo.tools.inspect.timing import HostTimer, reason_of
from terrazzo.tools.models import options_for
from terrazzo.tools.options import UserPath, device_option
from terrazzo.tools.targets import pick_device

WHAT, WHOLE = "huge image", "whole"
TIME, PEAK, DIFFERENCE = "forward", "peak memory", "largest difference"
HEAD = ("model", "image", "form", "s", "peak, MB", "largest difference")


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--size", nargs=2, type=click.IntRange(min=1), default=(1536, 2048), show_default=True, metavar="H W", help="Image."
)
@click.option("--rows", type=click.IntRange(min=1), default=1024, show_default=True, help="Rows of a part.")
@click.option(
    "--whole/--no-whole",
    default=True,
    show_default=True,
    help="Also run the whole image at once, and compare. Without it, the image may be larger than memory allows.",
)
@device_option
@click.option("--out", type=UserPath(), metavar="FILE.csv", help="Write the rows as CSV, after every model.")
def command(
    models: tuple[str, ...], size: tuple[int, int], rows: int, whole: bool, device: str | None, out: Path | None
) -> None:
    """Run the features of each MODEL on a huge image by parts (terrazzo.spatial.tiled), beside the whole image.

    Without MODEL, these are a small model of every family, and Swin, ConvNeXt and DeiT. Weights and the image are
    random. Each form runs once, after a small image that loads what is loaded once. Memory is what the pass takes at
    its peak above the model and the image, the features included. The difference is that of the features, as a part of
    their largest value.
    """
    models = requested(models)
    where = pick_device(device)
    if out is not None:
        check_output_file(out)
    about = results.about(where, "timm")
    found: list[results.Row] = []
    reasons: dict[str, str] = {}
    with progress("huge images", len(models)) as bar:
        for name in models:
            bar.update(bar.task_ids[0], description=name)
            try:
                figures = _measured(name, size, rows, whole, where)
            except Exception as error:  # whatever goes wrong, other models are measured
                reasons[name], figures = reason_of(error), {}
                gc.collect()
            shape = f"1x3x{size[0]}x{size[1]}"
            for form, values in figures.items():
                for metric, unit in ((TIME, "s"), (PEAK, "MB"), (DIFFERENCE, "1")):
                    if metric in values:
                        value = (values[metric],) * 3
                        found.append(results.Row(WHAT, name, shape, "float32", form, metric, unit, *value, *about))
            if out is not None:
                results.write(out, found)
            bar.advance(bar.task_ids[0])
    head, lines = table(found)
    print_table(lines, head, right=(3, 4, 5))
    click.echo(f"{about[0]}; {about[1]}; one pass each")
    for name, reason in reasons.items():
        click.echo(f"not run: {name}: {reason}")
    if out is not None and found:
        click.echo(f"wrote {out}")


def table(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head, and a line for each model, image and form."""
    forms = dict.fromkeys((row.variant, row.shape, row.backend) for row in rows)
    values = {(row.variant, row.shape, row.backend, row.metric): row.p50 for row in rows}

    def shown(form: tuple[str, str, str], metric: str, pattern: str) -> str:
        return format(values[(*form, metric)], pattern) if (*form, metric) in values else ""

    return HEAD, [
        (
            *(form[0], form[1].removeprefix("1x3x"), form[2]),
            *(shown(form, TIME, ".1f"), shown(form, PEAK, ".0f"), shown(form, DIFFERENCE, ".1e")),
        )
        for form in forms
    ]


@torch.no_grad()
def _measured(
    name: str, size: tuple[int, int], rows: int, whole: bool, device: torch.device
) -> dict[str, dict[str, float]]:
    """The figures of each form, by metric."""
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, **options_for(name, size)).eval().to(device)
    layout = getattr(model, "output_fmt", None)  # timm says it, and the sizes of an oblong image may not
    over_parts = spatial.tiled(model, rows=rows, layout=getattr(layout, "value", None))
    forms = ({WHOLE: model} if whole else {}) | {f"parts of {rows} rows": over_parts}
    small = torch.rand(1, 3, 2 * rows, 2 * over_parts.stride, device=device)
    for run in forms.values():
        run(small)  # libraries are loaded and kernels compiled
    image = torch.rand(1, 3, *size, device=device)
    figures, maps = {}, {}

    def once(form: str) -> None:
        maps[form] = forms[form](image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for form in forms:
        with PeakMemory(device) as peak:
            figures[form] = {TIME: HostTimer()(partial(once, form))}
        if peak.bytes is not None:
            figures[form][PEAK] = peak.bytes / 1e6
        if whole and form != WHOLE:
            pairs = zip(maps[form], maps[WHOLE], strict=True)
            figures[form][DIFFERENCE] = max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)
    return figures

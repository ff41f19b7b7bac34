"""`terrazzo probe field`: which pixels a position of a map depends on, as a picture and as numbers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.data import resolve_model_data_config
from torch import nn

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench.families import requested
from terrazzo.tools.console import print_table, progress
from terrazzo.tools.data.pictures import Picture, find_pictures, to_tensor
from terrazzo.tools.files import check_folder
from terrazzo.tools.inspect.timing import reason_of
from terrazzo.tools.options import UserPath, device_option
from terrazzo.tools.predict.draw import panels
from terrazzo.tools.probe.receptive import SHARES, Field, receptive_field, table
from terrazzo.tools.targets import load_timm_model, pick_device

WHAT = "receptive field"
_RADIUS = "radius of {:.0%}"
_WIDTH = 320
_DECADES = 6
"""The picture's scale: black is 10^-6 of the largest energy."""


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--checkpoint", type=UserPath(), metavar="FILE", help="Weights of MODEL, beside random weights.")
@click.option("--pretrained", is_flag=True, help="Download the published weights of MODEL, beside random weights.")
@click.option(
    "--size",
    type=click.IntRange(min=1),
    nargs=2,
    default=(448, 448),
    show_default=True,
    metavar="H W",
    help="Size of the images.",
)
@click.option("--level", type=int, default=-1, show_default=True, help="Which map, counted from 0; -1 is the last.")
@click.option(
    "--pictures",
    "places",
    type=UserPath(),
    multiple=True,
    metavar="PLACE",
    help="Pictures, or folders of pictures; repeatable [default: noise].",
)
@click.option("--count", type=click.IntRange(min=1), default=8, show_default=True, help="Number of images.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, noise and channels' signs.")
@device_option
@click.option("--out", type=UserPath(), metavar="DIR", help="Write field.csv and field.png.")
def command(
    models: tuple[str, ...],
    checkpoint: Path | None,
    pretrained: bool,
    size: tuple[int, int],
    level: int,
    places: tuple[Path, ...],
    count: int,
    seed: int,
    device: str | None,
    out: Path | None,
) -> None:
    """Measure the effective receptive field of a map's middle position, for each MODEL of timm or of the zoo.

    It is the squared gradient of the position with respect to the image. The numbers are radii, in pixels, of the discs
    that hold 50, 90 and 99 % of it; the picture shows these discs as circles, and its brightness is logarithmic.
    Without MODEL, these are a small model of every family, and Swin, ConvNeXt and DeiT. Training changes the field: do
    not compare numbers of random weights with numbers of trained weights.
    """
    where = pick_device(device)
    if (checkpoint or pretrained) and len(models) != 1:
        raise InputError("weights are for one MODEL: name it, or leave --checkpoint and --pretrained out")
    models = requested(models)
    if out is not None:
        check_folder(out)
    pictures = find_pictures(places)[:count] if places else []
    fields: dict[str, Field] = {}
    reasons: dict[str, str] = {}
    forms = [(name, None, False) for name in models]
    if checkpoint or pretrained:
        forms.append((models[0], checkpoint, pretrained))
    with progress("receptive fields", len(forms) * (len(pictures) or count)) as bar:
        for name, weights, published in forms:
            title = name if len(forms) == len(models) else f"{name}, {_said(weights, published)}"
            bar.update(bar.task_ids[0], description=title)
            torch.manual_seed(seed)
            try:
                model = load_timm_model(name, weights, published, size=size, any_record=True).eval().to(where)
                model.requires_grad_(False)
                images = _images(model, pictures, count, size, seed, where)
                fields[title] = receptive_field(model, images, level, seed, lambda: bar.advance(bar.task_ids[0]))
            except Exception as error:  # the other models are measured all the same
                if len(models) == 1:
                    raise
                reasons[title] = str(error) if isinstance(error, InputError) else reason_of(error)
    if not fields:
        raise InputError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    head, lines = table({name: field.radii() for name, field in fields.items()})
    print_table(lines, head, right=tuple(range(1, len(head))))
    about = results.about(where, "timm")
    on = f"{len(pictures)} pictures" if pictures else f"{count} images of noise"
    click.echo(f"{size[0]}x{size[1]}, level {level}, {on}; {about[1]}")
    for name, reason in reasons.items():
        click.echo(f"not run: {name}: {reason}")
    if out is not None:
        shape = f"{len(pictures) or count}x3x{size[0]}x{size[1]}"
        rows = [
            results.Row(
                WHAT, name, shape, "float32", f"level {level}", _RADIUS.format(share), "px", *(radius,) * 3, *about
            )
            for name, field in fields.items()
            for share, radius in field.radii().items()
        ]
        results.write(out / "field.csv", rows)
        with written_whole(out / "field.png") as temporary:
            draw(fields).save(temporary)
        click.echo(f"wrote {out / 'field.csv'} and {out / 'field.png'}")


def _said(checkpoint: Path | None, pretrained: bool) -> str:
    if pretrained:
        return "published weights"
    return "random weights" if checkpoint is None else checkpoint.name


def _images(
    model: nn.Module, pictures: list[Picture], count: int, size: tuple[int, int], seed: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Prepared pictures, or noise of mean 0 and variance 1."""
    if not pictures:
        noise = torch.Generator().manual_seed(seed)
        return (torch.randn(1, 3, *size, generator=noise).to(device) for _ in range(count))
    config = resolve_model_data_config(model)
    return (to_tensor(picture.read(), size, config["mean"], config["std"]).to(device) for picture in pictures)


def radii_of(rows: Sequence[results.Row]) -> dict[str, dict[float, float]]:
    """The radii that the command wrote as rows, by model and share."""
    shares = {_RADIUS.format(share): share for share in SHARES}
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        found.setdefault(row.variant, {})[shares[row.metric]] = row.p50
    return found


def draw(fields: Mapping[str, Field]) -> Image.Image:
    """All fields on one page, with the circles of the radii."""
    from matplotlib import colormaps

    pictures = []
    for field in fields.values():
        scale = np.log10(np.maximum(field.energy / field.energy.max(), 10.0**-_DECADES)) / _DECADES + 1
        pixels = (255 * colormaps["inferno"](scale)[:, :, :3]).round().astype(np.uint8)
        ratio = _WIDTH / pixels.shape[1]
        height = round(pixels.shape[0] * ratio)
        picture = Image.fromarray(pixels).resize((_WIDTH, height), Image.Resampling.BOX)
        pen = ImageDraw.Draw(picture)
        y, x = (ratio * part for part in field.middle)
        for radius in field.radii().values():
            reach = ratio * radius
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=(120, 220, 255))
        pictures.append(picture)
    return panels(pictures, list(fields))

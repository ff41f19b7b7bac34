"""`terrazzo probe segmentation`: how well a linear probe on a frozen model's last map labels pixels."""

from pathlib import Path

import click
import torch
from timm.data import resolve_model_data_config

from terrazzo._files import written_whole
from terrazzo.tools import results
from terrazzo.tools.console import print_table
from terrazzo.tools.data.labelled import read_labelled
from terrazzo.tools.files import check_folder
from terrazzo.tools.mechanisms import calibrate_option, chosen, mechanism_options
from terrazzo.tools.options import UserPath, device_option, weights_options
from terrazzo.tools.probe.linear import Recipe, Scores
from terrazzo.tools.probe.outcomes import draw, rows_of, table
from terrazzo.tools.probe.pixels import FITS, PixelProbing
from terrazzo.tools.targets import load_timm_model, pick_device


@click.command()
@click.argument("model")
@weights_options
@click.option(
    "--data-root",
    type=UserPath(),
    required=True,
    metavar="DIR",
    help="images/{train,val}, labels/{train,val}, and classes.json if classes have names.",
)
@click.option(
    "--size", type=click.IntRange(min=1), nargs=2, required=True, metavar="H W", help="Size of the model's images."
)
@mechanism_options
@calibrate_option
@click.option(
    "--fit",
    "fits",
    type=click.Choice([*FITS, "both"]),
    default="dense",
    show_default=True,
    help="Train the probe on the dense model's maps, as a user does who changes a model later, or on the mechanism's.",
)
@click.option("--steps", type=click.IntRange(min=1), default=Recipe.steps, show_default=True, help="Steps of training.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the probe's weights and of the batches.")
@device_option
@click.option(
    "--out", type=UserPath(), metavar="DIR", help="Write segmentation.csv and segmentation.png, anew after each result."
)
def command(
    model: str,
    checkpoint: Path | None,
    pretrained: bool,
    data_root: Path,
    size: tuple[int, int],
    names: tuple[str, ...],
    settings: tuple[str, ...],
    reducers: tuple[str, ...],
    calibrated: int,
    fits: str,
    steps: int,
    seed: int,
    device: str | None,
    out: Path | None,
) -> None:
    """Train BatchNorm and a 1x1 convolution on the last map of the frozen MODEL, a timm model, and evaluate on val.

    With --mixer and --reduce, also evaluate the changed models. Pictures are resized to --size, predictions are
    compared in the label maps' own sizes.
    """
    mechanisms = chosen(names, settings, reducers)
    where = pick_device(device)
    if out is not None:
        check_folder(out)
    Scores(2, 255)  # before any work: torchmetrics may be missing
    torch.manual_seed(seed)  # of random weights
    whole = load_timm_model(model, checkpoint, pretrained, size=size, any_record=True).to(where)
    models = {mechanism: mechanism.on(whole) for mechanism in mechanisms}
    data = read_labelled(data_root)
    probing = PixelProbing(data, size, resolve_model_data_config(whole), Recipe(steps=steps, seed=seed), where)
    probing.check(whole, models)
    if checkpoint is None and not pretrained:
        click.echo(f"note: {model} has random weights; give weights with --checkpoint FILE or --pretrained", err=True)
    if calibrated:
        for name in probing.calibrate(models, calibrated):
            click.echo(f"{name}: calibrated on {min(calibrated, len(data.train.pictures))} training pictures", err=True)
    about = results.about(where, "timm", "torchmetrics")
    what = f"segmentation probe, {data_root.resolve().name}, {steps} steps"
    shape = f"{len(data.train.pictures)}+{len(data.val.pictures)}x3x{size[0]}x{size[1]}"
    outcomes = []
    for outcome in probing.run(whole, models, tuple(FITS) if fits == "both" else (fits,)):
        outcomes.append(outcome)
        if out is not None:  # now, because a run with many mechanisms takes hours, and the next one may fail
            results.write(out / "segmentation.csv", rows_of(what, model, shape, outcomes, about))
            with written_whole(out / "segmentation.png") as temporary:
                draw(data, outcomes).save(temporary)
    head, lines = table(outcomes)
    print_table(lines, head, right=tuple(range(1, len(head))))
    counts = f"{len(data.train.pictures)} pictures to train on, {len(data.val.pictures)} to validate on"
    click.echo(f"{data_root.resolve().name}, {counts}, {steps} steps; {about[0]}; {about[1]}")
    if out is not None:
        click.echo(f"wrote {out / 'segmentation.csv'} and {out / 'segmentation.png'}")

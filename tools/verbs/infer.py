"""`terrazzo infer`: pictures in, drawings and JSON out."""

import json
from collections.abc import Sequence
from pathlib import Path

import click
from PIL import Image

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.tools.console import print_table, progress
from terrazzo.tools.data.pictures import Picture, find_pictures
from terrazzo.tools.files import check_folder
from terrazzo.tools.mechanisms import Mechanism, change_options, refuse_changes
from terrazzo.tools.options import UserPath
from terrazzo.tools.targets import is_config, load_timm_model, pick_device


@click.command()
@click.argument("model_or_config")
@click.argument("images", nargs=-1, required=True, type=UserPath(), metavar="IMAGE...")
@click.option("--checkpoint", type=UserPath(), metavar="FILE", help="Weights; a config needs them.")
@click.option("--pretrained", is_flag=True, help="Download the published weights of a timm model.")
@change_options
@click.option("--num-classes", type=click.IntRange(min=1), help="Classes of a timm model's checkpoint.")
@click.option(
    "--out",
    type=UserPath(),
    default=Path("predictions"),
    show_default=True,
    metavar="DIR",
    help="Results.",
)
@click.option(
    "--min-score", type=click.FloatRange(0, 1), default=0.3, show_default=True, help="Weakest detection kept."
)
@click.option(
    "--runtime",
    type=click.Choice(("torch", "onnx", "openvino", "pt2", "aoti")),
    default="torch",
    show_default=True,
    help="Who runs it.",
)
@click.option(
    "--show-tokens", is_flag=True, help="Draw which patches MCTF or AS-ViT merged or dropped, block by block."
)
@click.option("--device", help="cpu, cuda, cuda:1, mps [default: a GPU if there is one].")
def command(
    model_or_config: str,
    images: tuple[Path, ...],
    checkpoint: Path | None,
    pretrained: bool,
    num_classes: int | None,
    changes: Sequence[Mechanism],
    out: Path,
    min_score: float,
    runtime: str,
    show_tokens: bool,
    device: str | None,
) -> None:
    """Run a classifier, segmentor or detector on each IMAGE (a file or a folder of files).

    MODEL_OR_CONFIG is a timm model name, or an OpenMMLab config by path or packaged name. If --runtime is not torch, it
    is a file that `terrazzo export` wrote in that format. For each picture the command writes NAME.overlay.jpg (the
    result drawn) and NAME.json; for a segmentor also NAME.labels.png (a class index for each pixel), for a panoptic
    segmentor also NAME.segments.png (the number of a segment for each pixel; the JSON has its class), and with
    --show-tokens also NAME.tokens.jpg.
    """
    if runtime != "torch" and show_tokens:
        raise InputError("an exported file does not say what it does with tokens: leave --runtime or --show-tokens out")
    if runtime != "torch" and (checkpoint or pretrained or num_classes or changes or device):
        raise InputError("an exported file holds its weights and runs on the CPU: leave the other options out")
    chosen = pick_device(device)
    pictures = find_pictures(images)
    check_folder(out)
    if runtime == "torch":
        predictor = _predictor(model_or_config, checkpoint, pretrained, num_classes, changes, min_score, chosen)
    else:
        from terrazzo.tools.predict.files import file_predictor

        predictor = file_predictor(runtime, Path(model_or_config), min_score)
    watch = None
    if show_tokens:
        from terrazzo.tools.predict.tokens import TokenWatch

        watch = TokenWatch(predictor)
    rows = []
    with progress("predicting", len(pictures)) as bar:
        for picture in pictures:
            image = picture.read()
            prediction = predictor(image)
            record = {"picture": str(picture.path), "width": image.width, "height": image.height, **prediction.record}
            _write(out, picture, record, prediction, watch.draw() if watch else None)
            rows.append((picture.path.name, _summary(record)))
            bar.advance(bar.task_ids[0])
    print_table(rows, ("picture", "result"))
    click.echo(f"written to {out}")


def _predictor(name, checkpoint, pretrained, num_classes, changes, min_score, device):
    if not is_config(name):
        from terrazzo.tools.predict.classifiers import timm_predictor

        if checkpoint is None and not pretrained:
            click.echo(
                f"note: {name} has random weights; give weights with --checkpoint FILE or --pretrained", err=True
            )
        return timm_predictor(load_timm_model(name, checkpoint, pretrained, num_classes, changes=changes), device)
    refuse_changes(name, changes)
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools import mm
    from terrazzo.tools.predict.openmmlab import config_predictor

    cfg = load_config(name)
    if pretrained or num_classes is not None:
        raise InputError("--pretrained and --num-classes are for timm models; a config takes only --checkpoint FILE")
    if checkpoint is None:
        raise InputError(f"the config {name} needs weights; name a file that its training wrote with --checkpoint FILE")
    with mm.quiet():
        return config_predictor(cfg, checkpoint, device, min_score)


def _write(out: Path, picture: Picture, record: dict, prediction, tokens: Image.Image | None) -> None:
    for kind, drawing in (("overlay", prediction.drawing), ("tokens", tokens)):
        if drawing is not None:
            with written_whole(out / f"{picture.name}.{kind}.jpg") as temporary:
                drawing.save(temporary, quality=92)
    for kind, pixels in (("labels", prediction.labels), ("segments", prediction.segments)):
        if pixels is not None:
            with written_whole(out / f"{picture.name}.{kind}.png") as temporary:
                Image.fromarray(pixels).save(temporary)
    # The JSON comes last: if it exists, the other files exist.
    with written_whole(out / f"{picture.name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def _summary(record: dict) -> str:
    if record["task"] == "classification":
        return ", ".join(f"{entry['label']} {entry['score']:.1%}" for entry in record["top"][:2])
    if record["task"] == "segmentation":
        return ", ".join(f"{name} {share:.0%}" for name, share in list(record["shares"].items())[:4])
    counts: dict[str, int] = {}
    for found in record["segments" if record["task"] == "panoptic" else "things"]:
        counts[found["label"]] = counts.get(found["label"], 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing found"

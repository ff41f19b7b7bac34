"""`terrazzo infer`: pictures and videos in, drawings and JSON out."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from terrazzo.errors import InputError
from terrazzo.tools.console import print_table, progress
from terrazzo.tools.files import check_folder
from terrazzo.tools.mechanisms import Mechanism, change_options
from terrazzo.tools.options import Overlap, UserPath, UserPlace, max_megapixels_option
from terrazzo.tools.zoom.options import ZoomOptions, zoom_options

if TYPE_CHECKING:
    from rich.progress import Progress

    from terrazzo.tools.data.clips import Clip
    from terrazzo.tools.data.pictures import Picture
    from terrazzo.tools.predict.predictor import Predictor
    from terrazzo.tools.predict.tokens import TokenWatch

RUNTIMES = ("torch", "onnx", "openvino", "pt2", "aoti")


@click.command()
@click.argument("model_or_config")
@click.argument("places", nargs=-1, required=True, type=UserPlace(), metavar="IMAGE...")
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
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures or tiles per run.")
@click.option(
    "--tile", type=click.IntRange(min=1), metavar="N", help="Cut pictures into tiles of N x N pixels, not resized."
)
@click.option(
    "--overlap",
    type=Overlap(),
    metavar="auto|blend|N",
    help="How tiles overlap: auto (the whole picture's result), blend, or a number of pixels [default: auto; exported "
    "files and restorers: blend; detectors: N / 4].",
)
@click.option(
    "--degrade", is_flag=True, help="Make pictures worse as a restorer's test data, and compare what it restores."
)
@click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="Take every N-th frame.")
@click.option("--max-frames", type=click.IntRange(min=1), help="Frames of a video, at most [default: all].")
@max_megapixels_option
@click.option("--runtime", type=click.Choice(RUNTIMES), default="torch", show_default=True, help="Who runs it.")
@click.option(
    "--show-tokens", is_flag=True, help="Draw which patches MCTF or AS-ViT merged or dropped, block by block."
)
@click.option(
    "--spatial", type=click.IntRange(min=2), metavar="R", help="Let R processes share the rows of each picture."
)
@click.option("--device", help="cpu, cuda, cuda:1, mps [default: a GPU if there is one].")
@zoom_options
def command(
    model_or_config: str,
    places: tuple[str, ...],
    checkpoint: Path | None,
    pretrained: bool,
    num_classes: int | None,
    changes: Sequence[Mechanism],
    out: Path,
    min_score: float,
    batch: int,
    tile: int | None,
    overlap: int | str | None,
    degrade: bool,
    every: int,
    max_frames: int | None,
    runtime: str,
    show_tokens: bool,
    spatial: int | None,
    device: str | None,
    zoom: ZoomOptions | None,
) -> None:
    """Run a classifier, segmentor, detector or restorer on each IMAGE.

    An IMAGE is a picture, a video, a folder of pictures and videos (its subfolders, too), the address of a picture or
    stream (http://, rtsp://), or the number of a camera, such as 0. Videos need OpenCV. Ctrl-C ends a stream, and its
    results are kept.

    MODEL_OR_CONFIG is a timm model name, or an OpenMMLab config by path or packaged name. If --runtime is not torch, it
    is a file that `terrazzo export` wrote in that format. For each picture the command writes NAME.overlay.jpg (the
    result drawn) and NAME.json; for a segmentor also NAME.labels.png (a class index for each pixel), for a panoptic
    segmentor also NAME.segments.png (the number of a segment for each pixel; the JSON has its class), for a restorer
    also NAME.restored.png (the restored picture), and with --show-tokens also NAME.tokens.jpg. For each video it writes
    NAME.overlay.mp4 and NAME.jsonl: a line of JSON for each frame; for a restorer also NAME.restored.mkv (lossless).

    With --degrade, a restorer's pictures are made worse first. The drawing shows a picture before, after and the truth,
    and the JSON has PSNR and SSIM of both. The random numbers of noise, rain and haze depend on the file's name
    without its folder, and the worse picture is cut to 8 bits: the figures are near the figures of `terrazzo test`, not
    the same.

    With --tile, pictures keep their own resolution, and run through the model in tiles, --batch of them at a time.
    """
    if show_tokens and tile:
        raise InputError("--show-tokens draws whole pictures: leave --tile out")
    if spatial and (runtime != "torch" or show_tokens or tile):
        raise InputError(
            "--spatial is for segmentors of OpenMMLab configs: leave --runtime, --show-tokens and --tile out"
        )
    if zoom and (tile or spatial):
        raise InputError("--zoom has tiles of its own: leave --tile and --spatial out")
    if runtime != "torch" and show_tokens:
        raise InputError("an exported file does not say what it does with tokens: leave --runtime or --show-tokens out")
    if runtime != "torch" and (checkpoint or pretrained or num_classes or changes or device or zoom):
        raise InputError("an exported file holds its weights and runs on the CPU: leave the other options out")
    if show_tokens and batch > 1:
        raise InputError("--show-tokens draws one picture at a time: leave --batch out")
    from terrazzo.tools.data.pictures import Picture
    from terrazzo.tools.data.sources import find_sources
    from terrazzo.tools.predict.predictor import Predictor
    from terrazzo.tools.targets import pick_device

    pick_device(device)
    sources = find_sources(places, apart=out, by_windows=tile is not None)
    pictures = [source for source in sources if isinstance(source, Picture)]
    clips = [source for source in sources if not isinstance(source, Picture)]
    if show_tokens and clips:
        raise InputError(f"--show-tokens is for pictures, and {clips[0].place} is a video; leave one of them out")
    if degrade and clips:
        raise InputError(f"--degrade is for pictures, and {clips[0].place} is a video; leave one of them out")
    check_folder(out)
    predictor = Predictor(
        model_or_config,
        checkpoint,
        device=device,
        min_score=min_score,
        pretrained=pretrained,
        num_classes=num_classes,
        runtime=runtime,
        changes=changes,
        tile=tile,
        overlap=overlap,
        degrade=degrade,
    )
    if predictor.tiles is not None and predictor.tiles.note:
        click.echo(f"note: {predictor.tiles.note}", err=True)
    if spatial is not None:
        from terrazzo.tools.predict.ranks import share

        share(predictor, spatial, model_or_config, checkpoint)
    if zoom is not None:
        zoom.make(getattr(predictor.engine, "model", None)).install()
    if predictor.random:
        click.echo(
            f"note: {model_or_config} has random weights; give weights with --checkpoint FILE or --pretrained", err=True
        )
    watch = None
    if show_tokens:
        from terrazzo.tools.predict.tokens import TokenWatch

        watch = TokenWatch(predictor.engine)
    rows = []
    with progress("predicting", len(pictures)) as bar:
        for picture, record in _records(predictor, pictures, out, batch, watch, _tile_progress(bar)):
            rows.append((Path(picture.path).name, _summary(record)))
            bar.advance(bar.task_ids[0])
    for clip in clips:
        rows.append((Path(str(clip.place)).name, _run_clip(predictor, clip, out, batch, every, max_frames)))
    print_table(rows, ("picture", "result"))
    click.echo(f"written to {out}")


def _records(
    predictor: "Predictor",
    pictures: Sequence["Picture"],
    out: Path,
    batch: int,
    watch: "TokenWatch | None",
    report: Callable[[int, int], None],
) -> Iterator[tuple["Picture", dict]]:
    """Predict pictures and write their files; each picture with its record."""
    from terrazzo.tools.predict.output import write_prediction
    from terrazzo.tools.predict.tiles.output import write_tiled

    if predictor.tiles is not None and predictor.degrader is None:
        for picture in pictures:
            yield picture, write_tiled(out, picture, predictor.tiles, batch, report)
        return
    for picture, prediction in zip(pictures, predictor.stream(pictures, batch)):
        write_prediction(out, picture.name, prediction, watch.draw() if watch else None)
        yield picture, prediction.record


def _run_clip(predictor: "Predictor", clip: "Clip", out: Path, batch: int, every: int, max_frames: int | None) -> str:
    """Predict every frame of a clip, and say how it went."""
    from terrazzo.tools.predict.output import ClipOutput
    from terrazzo.tools.predict.predictor import Seen

    frames = itertools.islice(clip.frames(), 0, None if max_frames is None else max_frames * every, every)
    seen = (
        Seen(frame.image, {"picture": str(clip.place), "frame": frame.number, "seconds": round(frame.seconds, 3)})
        for frame in frames
    )
    total = None if clip.count is None else -(-clip.count // every)
    total = max_frames if total is None else min(total, max_frames or total)
    with ClipOutput(out, clip.name, clip.rate / every, clip.live) as output, progress(clip.name, total) as bar:
        for prediction in predictor.stream(seen, batch):
            output.add(prediction)
            bar.advance(bar.task_ids[0])
    if total is not None and not clip.live and output.count < total:
        click.echo(f"note: {clip.place} promises {total} frames, and {output.count} could be read", err=True)
    return f"{output.count} frames"


def _tile_progress(bar: "Progress") -> Callable[[int, int], None]:
    """Shows the tiles of a picture on a second line of a bar."""
    tasks: list[Any] = []

    def report(done: int, total: int) -> None:
        if not tasks:
            tasks.append(bar.add_task("tiles", total=total))
        bar.update(tasks[0], completed=done, total=total)

    return report


def _summary(record: dict) -> str:
    """What was found, in a few words."""
    apart = record.get("tiles", {}).get("disagreement", {})
    words = _result(record)
    if "values" in apart:
        words += f"; where tiles overlap, values differ by {apart['values']:.2f} of 255"
    elif apart:
        words += (
            f"; where tiles overlap, {apart['labels']:.1%} of the labels differ, "
            f"and probabilities by {apart['probabilities']:.4f}"
        )
    return words


def _psnr(value: float | None) -> str:
    return "infinite (exact)" if value is None else f"{value:.2f} dB"


def _result(record: dict) -> str:
    if record["task"] == "classification":
        return ", ".join(f"{entry['label']} {entry['score']:.1%}" for entry in record["top"][:2])
    if record["task"] == "segmentation":
        return ", ".join(f"{name} {share:.0%}" for name, share in list(record["shares"].items())[:4])
    if record["task"] == "restoration":
        words = f"restored to {record['restored']['width']}x{record['restored']['height']}"
        if "before" not in record:
            return words
        before, after = (_psnr(record[key]["psnr_y"]) for key in ("before", "after"))
        return f"{words}; PSNR on Y {before} before, {after} after"
    counts: dict[str, int] = {}
    for found in record["segments" if record["task"] == "panoptic" else "things"]:
        counts[found["label"]] = counts.get(found["label"], 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing found"

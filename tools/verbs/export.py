"""`terrazzo export`: a classifier, segmentor, detector or restorer as one checked file."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from terrazzo.errors import InputError
from terrazzo.kernels.selective_scan import without_loops
from terrazzo.tools.data.pictures import Picture
from terrazzo.tools.export.run import EXIT_PARITY, check_precision, checked, form_of, without_engine
from terrazzo.tools.export.suffixes import SUFFIXES, check_suffix, format_for
from terrazzo.tools.export.targets import coarsest_stride, exportable_of, floor, photo
from terrazzo.tools.export.tensorrt.plan import ranges, why_no_engine
from terrazzo.tools.files import check_output_file
from terrazzo.tools.mechanisms import Mechanism, change_options
from terrazzo.tools.options import UserPath, config_options


@click.command()
@click.argument("model_or_config")
@click.argument("checkpoint", type=UserPath(), required=False)
@click.option("--checkpoint", "weights", type=UserPath(), metavar="FILE", help="The same as CHECKPOINT.")
@click.option("--pretrained", is_flag=True, help="Download the published weights of a timm model.")
@change_options
@click.option("--num-classes", type=click.IntRange(min=1), help="Classes of a timm model's checkpoint.")
@click.option("--format", "form", type=click.Choice(list(SUFFIXES)), help="[default: by FILE's suffix, or onnx]")
@click.option("--size", type=int, nargs=2, metavar="H W", help="Image size [default: the model's own].")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per run.")
@click.option(
    "--dynamic", type=click.Choice(("batch", "hw")), multiple=True, help="Leave batch, or height and width, open."
)
@click.option(
    "--features", is_flag=True, help="Export a timm model's feature maps, an output for each, instead of its logits."
)
@click.option("--no-loops", is_flag=True, help="Unroll scans, for runtimes without Scan and Loop; one size.")
@click.option("--opset", type=int, help="ONNX operator set [default: PyTorch's choice].")
@click.option("--image", type=UserPath(), metavar="FILE", help="Compare on this picture instead of a drawn picture.")
@click.option("--fp16", "precision", flag_value="fp16", help="Half precision, for all layers that tolerate it.")
@click.option("--int8", "precision", flag_value="int8", help="INT8, for all layers that tolerate it.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Points of the config's metric, of 100, that --fp16 and --int8 may cost [default: 0.5, or 0.1 dB].",
)
@click.option(
    "--pictures",
    type=UserPath(),
    metavar="DIR",
    help="Pictures for --fp16 and --int8 [default: the config's training data].",
)
@config_options
@click.option("--out", type=UserPath(), metavar="FILE", help="[default: exports/NAME_HxW and the format's suffix]")
def command(
    model_or_config: str,
    checkpoint: Path | None,
    weights: Path | None,
    pretrained: bool,
    changes: Sequence[Mechanism],
    num_classes: int | None,
    form: str | None,
    size: tuple[int, int] | None,
    batch: int,
    dynamic: tuple[str, ...],
    features: bool,
    no_loops: bool,
    opset: int | None,
    image: Path | None,
    precision: str | None,
    tolerance: float | None,
    pictures: Path | None,
    overrides: dict,
    data_root: Path | None,
    out: Path | None,
) -> int:
    """Export a model of timm or of an OpenMMLab config (classifier, segmentor, detector, restorer), pixels to results.

    CHECKPOINT is a file of weights. A config needs it; without it, a timm model has random or --pretrained weights.

    The input is float RGB in 0..255, (batch, 3, H, W); normalisation is in the graph. The outputs are `logits` and, for
    a segmentor, `labels`, both at the input's size; for a detector, `boxes`, `scores`, `labels` and `masks` as its
    config keeps them, non-maximum suppression included; for a restorer, `restored`, RGB in 0..255; for --features,
    `stride4` and so on.

    The format pt2 is a torch.export program; aoti compiles this program to machine code, which needs a C++ compiler.

    The file's results (from ONNX Runtime, OpenVINO in float32, or PyTorch) are compared with PyTorch's results, and a
    detector's results with mmdet's own code. If they differ too much, the exit code is 1 and the file keeps the suffix
    .failed. The format tensorrt is an engine for this machine's GPU, compared and timed. Without a GPU or the package
    tensorrt it is an ONNX file: every node is looked up in TensorRT's documented operators, and the command to build
    the engine elsewhere is printed. The suffix of FILE is .engine or .onnx accordingly.

    --fp16 and --int8 write an ONNX file in lower precision. With a config's test data (--data-root), as many layers
    stay in float32 as the metric requires; a table beside the file has both figures and each layer's error. Restored
    pictures are also compared with float32's, on pictures that set no ranges.
    """
    if out is not None:
        check_output_file(out)
    form = form or format_for(out)
    if opset is not None and form in ("pt2", "aoti"):
        raise InputError(f"--opset is for ONNX; {form} files have no opset: leave it out")
    if no_loops and "hw" in dynamic:
        raise InputError("--no-loops unrolls a scan of known length: leave --dynamic hw out")
    if no_loops:
        click.get_current_context().with_resource(without_loops())
    for option, value in (("--tolerance", tolerance), ("--pictures", pictures)):
        if precision is None and value:
            raise InputError(f"{option} is for --fp16 and --int8: give one of them, or leave {option} out")
    lacking = why_no_engine() if form == "tensorrt" else None
    writer = form_of(form, opset, lacking)
    suffix = writer.suffixes[0]
    if precision is not None:
        check_precision(precision, form, batch, dynamic)
    if out is not None:
        check_suffix(out, form)
        out = check_output_file(out.with_suffix(suffix))  # TensorRT's file is an engine or a graph
    picture = None if image is None else Picture(image, image.name).read()
    if checkpoint is not None and weights is not None:
        raise InputError("CHECKPOINT and --checkpoint name the same thing; give one of them")
    ready = exportable_of(
        model_or_config,
        checkpoint or weights,
        pretrained,
        num_classes,
        size,
        features,
        data_root,
        overrides,
        changes,
        any_size="hw" in dynamic,
    )
    if ready.single and (batch > 1 or dynamic):
        raise InputError(
            f"{ready.source} is a detector: one image per run, of one size; leave --batch and --dynamic out"
        )
    height, width = ready.size
    stride = 1 if ready.task == "restoration" else coarsest_stride(ready.module)  # restorers reflect small pictures
    if min(ready.size) < stride:
        raise InputError(f"the image size is {height}x{width}; {ready.source} takes {stride}x{stride} and larger")
    # pt2 and aoti share a suffix, and so do float32 and the lower precisions.
    kind = "aoti" if form == "aoti" else precision
    ending = f"_{kind}{suffix}" if kind else suffix
    out = out or Path("exports") / f"{Path(ready.source).stem}_{height}x{width}{ending}"
    seen = ("floor", floor(ready.size, batch)) if picture is None else (image.name, photo(picture, ready.size, batch))
    shapes = ranges(["image"], [(batch, 3, *ready.size)], dynamic)
    if precision is None:
        if not checked(writer, ready, batch, dynamic, seen, out).passed:
            return EXIT_PARITY
        if form == "tensorrt" and lacking is None:
            click.echo(writer.speed())
    else:
        from terrazzo.tools.export.precision import lowering as lowered_export

        samples, metric, held_out = lowered_export.evidence(ready, precision, pictures)
        if tolerance is None:
            tolerance = 0.1 if ready.task == "restoration" else 0.5
        points = lowered_export.measure(metric)
        graph = out.with_suffix(".onnx")
        with tempfile.TemporaryDirectory(prefix="terrazzo-float32-") as folder:
            plain = form_of("onnx", opset, None)
            report = checked(plain, ready, batch, dynamic, seen, Path(folder) / graph.name, kept=False)
            if not report.passed:
                return EXIT_PARITY
            result = lowered_export.lower_file(
                report.path, precision, graph, samples, points, tolerance, ready.source, held_out
            )
            if not lowered_export.tell(result):
                return EXIT_PARITY
            if form == "tensorrt" and lacking is None:
                from terrazzo.tools.export.precision.engine import lowered_engine

                good = lowered_engine(result, report.path, out, shapes, samples, metric, tolerance)
                return 0 if good else EXIT_PARITY
    return without_engine(out, lacking, shapes) if lacking is not None else 0

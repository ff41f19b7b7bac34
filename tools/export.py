"""`terrazzo export`: a classifier, segmentor or detector as one checked file."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from torch import Tensor, nn

from terrazzo._version import __version__
from terrazzo.errors import InputError
from terrazzo.tools.checked_export import Form, Report, checked_export
from terrazzo.tools.console import print_table
from terrazzo.tools.exportable import RawClassifier, RawFeatures, RawSegmentor
from terrazzo.tools.files import check_output_file
from terrazzo.tools.floors import FloorMaker
from terrazzo.tools.options import config_options
from terrazzo.tools.parity import Parity
from terrazzo.tools.pictures import Picture, find_pictures
from terrazzo.tools.predict_file import file_predictor
from terrazzo.tools.targets import is_config, load_timm_model
from terrazzo.tools.trace import image_size

if TYPE_CHECKING:  # it needs onnx, and not every export does
    from terrazzo.tools.lowered_export import LoweredFile

# By format, what runs the file here.
RUNTIMES = {
    "onnx": "ONNX Runtime",
    "tensorrt": "ONNX Runtime",
    "openvino": "OpenVINO",
    "pt2": "the exported program",
    "aoti": "the compiled program",
}
EXIT_PARITY = 1
# Pictures that layers are compared on and ranges set by, at most.
CALIBRATION = 64


@dataclass(frozen=True)
class Exportable:
    """A model that is ready for export.

    Attributes:
        module: takes (B, 3, H, W), float RGB in 0..255; has `output_names`, and `reference` where its results are
            compared with those of other code than its own.
        size: H, W.
        classes: class names, or None.
        source: what the user named.
        task: classification, features, segmentation, detection or panoptic.
        preparation: what else `terrazzo infer --runtime` must know, JSON-ready: how pictures are cropped, colours.
        single: whether it takes one image a run only.
        config: the config that it is of, or None.
    """

    module: nn.Module
    size: tuple[int, int]
    classes: list[str] | None
    source: str
    task: str
    preparation: dict[str, Any] = field(default_factory=dict)
    single: bool = False
    config: Any = None


@click.command()
@click.argument("model_or_config")
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--pretrained", is_flag=True, help="Download the published weights of a timm model.")
@click.option("--num-classes", type=click.IntRange(min=1), help="Classes of a timm model's checkpoint.")
@click.option(
    "--format", "form", type=click.Choice(tuple(RUNTIMES)), default="onnx", show_default=True, help="File format."
)
@click.option("--size", type=int, nargs=2, metavar="H W", help="Image size [default: the model's own].")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images a run.")
@click.option(
    "--dynamic", type=click.Choice(("batch", "hw")), multiple=True, help="Leave batch, or height and width, open."
)
@click.option("--features", is_flag=True, help="A timm model's feature maps, an output for each, not its logits.")
@click.option("--opset", type=click.IntRange(min=18), help="ONNX operator set [default: PyTorch's choice].")
@click.option("--image", type=click.Path(path_type=Path), metavar="FILE", help="Compare on it, not on a drawn one.")
@click.option("--fp16", "precision", flag_value="fp16", help="Half precision, where the model bears it.")
@click.option("--int8", "precision", flag_value="int8", help="INT8, where the model bears it.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Points of the config's metric, of 100, that --fp16 and --int8 may cost.",
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Pictures for --fp16 and --int8 [default: the config's training data].",
)
@config_options
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: exports/NAME_HxW and the format's suffix]"
)
def command(
    model_or_config: str,
    checkpoint: Path | None,
    pretrained: bool,
    num_classes: int | None,
    form: str,
    size: tuple[int, int] | None,
    batch: int,
    dynamic: tuple[str, ...],
    features: bool,
    opset: int | None,
    image: Path | None,
    precision: str | None,
    tolerance: float,
    pictures: Path | None,
    overrides: dict,
    data_root: Path | None,
    out: Path | None,
) -> int:
    """Export a timm classifier, or the segmentor or detector of an OpenMMLab config, from raw pixels to results.

    CHECKPOINT is a file of weights; a config needs it, a timm model without it has random weights or --pretrained ones.

    The input is float RGB in 0..255, (batch, 3, H, W); normalisation is in the graph. The outputs are `logits` and, for
    a segmentor, `labels`, both at the input's size; for a detector, `boxes`, `scores`, `labels` and `masks` as its
    config keeps them, non-maximum suppression included; for --features, `stride4` and so on.

    The format pt2 is a torch.export program; aoti compiles that to machine code, where there is a C++ compiler.

    The file's results (by ONNX Runtime, OpenVINO in float32, or PyTorch) are compared with PyTorch's, a detector's with
    those of mmdet's own code: where they differ by too much, the exit code is 1 and the file keeps the suffix .failed.
    The format tensorrt is an ONNX file of which every node is looked up in TensorRT's documented operators; the engine
    is built by the printed command, on a machine with the GPU.

    --fp16 and --int8 write an ONNX file in lower precision: with a config's test data at hand (--data-root), as many
    layers stay in float32 as its metric asks for; a table of both figures and of each layer's error lies beside it.
    """
    if opset is not None and form in ("pt2", "aoti"):
        raise InputError(f"--opset is of ONNX; {form} files have none: leave it out")
    writer = _form(form, opset)
    suffix = writer.suffixes[0]
    if out is not None:
        check_output_file(out)
    picture = None if image is None else Picture(image, image.name).read()
    ready = _exportable(model_or_config, checkpoint, pretrained, num_classes, size, features, data_root, overrides)
    if ready.single and (batch > 1 or dynamic):
        raise InputError(f"{ready.source} is a detector: one image a run, of one size; leave --batch and --dynamic out")
    height, width = ready.size
    kind = "aoti" if form == "aoti" else precision  # pt2 has the suffix of aoti, and float32 that of the others
    ending = f"_{kind}{suffix}" if kind else suffix
    out = out or Path("exports") / f"{Path(ready.source).stem}_{height}x{width}{ending}"
    seen = ("floor", floor(ready.size, batch)) if picture is None else (image.name, photo(picture, ready.size, batch))
    if precision is None:
        report = _checked(writer, form, ready, batch, dynamic, seen, out)
    else:
        from terrazzo.tools.lowered_export import check_request, lower_file

        check_request(precision, form, batch, dynamic)
        samples, points = _evidence(ready, precision, pictures)
        with tempfile.TemporaryDirectory(prefix="terrazzo-float32-") as folder:
            report = _checked(writer, form, ready, batch, dynamic, seen, Path(folder) / out.name, kept=False)
            if report.passed:
                result = lower_file(report.path, precision, out, samples, points, tolerance, ready.source)
        if report.passed and not _lowered(result):
            return EXIT_PARITY
    if not report.passed:
        return EXIT_PARITY
    return _tensorrt(out) if form == "tensorrt" else 0


def _checked(
    writer: Form,
    form: str,
    ready: Exportable,
    batch: int,
    dynamic: tuple[str, ...],
    seen: tuple[str, Tensor],
    out: Path,
    kept: bool = True,
) -> Report:
    """Export, compare and say what came out of it; a file that is not `kept` is but a step to another."""
    height, width = ready.size
    report = checked_export(
        writer,
        ready.module,
        noise(ready.size, batch),
        out,
        checks=dict([seen]),
        reference=getattr(ready.module, "reference", None),
        output_names=ready.module.output_names,
        dynamic=dynamic,
        metadata=metadata(ready),
    )
    rows = [
        (parity.output, parity.source.replace("example", "noise"), parity, _verdict(parity))
        for parity in report.parities
    ]
    print_table(rows, ("output", "input", f"{RUNTIMES[form]} against PyTorch", "check"))
    sides = "HxW" if "hw" in dynamic else f"{height}x{width}"
    shape = f"{'B' if 'batch' in dynamic else batch}x3x{sides}"
    volume = f"{report.volume / 2**20:.1f} MiB"
    place = report.path if kept else "float32"
    click.echo(f"{'written' if kept else 'checked'}: {place} ({report.version}, {volume}; input: RGB 0..255, {shape})")
    if not report.passed:
        click.echo(
            f"error: {RUNTIMES[form]} and PyTorch disagree{'; the file keeps the suffix .failed' * kept}", err=True
        )
        if report.divergence is not None:
            click.echo(f"       {report.divergence}", err=True)
    elif not report.compared:
        click.echo(
            "warning: the model found nothing on any input, so its boxes were compared with nothing; name a picture "
            "that has something in it with --image FILE",
            err=True,
        )
    return report


def _evidence(
    ready: Exportable, precision: str, pictures: Path | None
) -> tuple[list[tuple[Tensor, ...]], Callable[[Path], dict[str, float]] | None]:
    """Inputs to compare layers and set ranges by, and what measures a file; the latter is None without a config."""
    measure = None
    if ready.config is not None:
        from terrazzo.tools.data_checks import check_data
        from terrazzo.tools.file_metric import FileMetric, training_pictures

        check_data(ready.config, ("test",) if pictures else ("train", "test"))
        metric = FileMetric(ready.config)

        def measure(path: Path) -> dict[str, float]:
            return metric(file_predictor("onnx", path))

    if pictures is not None:
        found = find_pictures([pictures])[:CALIBRATION]
    elif ready.config is not None:
        found = [Picture(path, path.name) for path in training_pictures(ready.config, CALIBRATION)]
    elif precision == "int8":
        raise InputError("--int8 sets its ranges by pictures: name a folder of them with --pictures DIR")
    else:
        return [(floor(ready.size, 1),), (noise(ready.size, 1),)], measure
    return [(photo(picture.read(), ready.size, 1),) for picture in found], measure


def _lowered(result: "LoweredFile") -> bool:
    """Say what lower precision costs; whether that is little enough."""
    lowered, name = result.lowered, result.lowered.precision
    if result.before:
        rows = [
            (metric, f"{value:.2f}", f"{result.after[metric]:.2f}", f"{result.after[metric] - value:+.2f}")
            for metric, value in result.before.items()
        ]
        print_table(rows, ("points", "float32", name, "change"), right=(1, 2, 3))
    else:
        click.echo("no test data decides: name a config with its data, for classification alone says little")
    worst = sorted(lowered.errors.items(), key=lambda item: item[1], reverse=True)[:5]
    print_table([(layer, f"{error:.1e}") for layer, error in worst], ("most changed layers", "error"), right=(1,))
    click.echo(f"the outputs change by {result.error:.1e}; {len(lowered.kept)} of {result.layers} layers in float32")
    for layer in lowered.kept:
        click.echo(f"  float32: {layer}")
    volume = f"{lowered.model.ByteSize() / 2**20:.1f} MiB"
    click.echo(f"written: {result.path} ({name}, {volume}) and {result.table.name}, the table of all layers")
    if not lowered.passed:
        click.echo(f"error: {name} costs {lowered.loss:.3g}, too much; the file keeps the suffix .failed", err=True)
    return lowered.passed


def _form(name: str, opset: int | None) -> Form:
    """The format of that name; each needs a package of its own."""
    if name == "pt2":
        from terrazzo.tools.pt2_export import ProgramForm

        return ProgramForm()
    if name == "aoti":
        from terrazzo.tools.aoti_export import CompiledForm

        return CompiledForm()
    if name == "openvino":
        from terrazzo.tools.openvino_export import OpenVinoForm

        return OpenVinoForm(opset)
    from terrazzo.tools.onnx_export import OnnxForm

    return OnnxForm(opset)


def _tensorrt(path: Path) -> int:
    """Say what in an ONNX file TensorRT does not document, or else how to build the engine."""
    import onnx

    from terrazzo.tools.tensorrt_operators import VERSION, problems

    found = problems(onnx.load(path))
    for problem in found:
        click.echo(f"TensorRT {VERSION} does not support {problem}", err=True)
    if found:
        click.echo(f"error: {len(found)} nodes are beyond TensorRT's documented operators", err=True)
        return EXIT_PARITY
    click.echo(f"every node is among the documented operators of TensorRT {VERSION}; no engine was built")
    click.echo(f"on the machine with the GPU: trtexec --onnx={path.name} --saveEngine={path.stem}.engine")
    return 0


def noise(size: tuple[int, int], batch: int) -> Tensor:
    """Random pixels (batch, 3, H, W) in 0..255, always the same."""
    return 255 * torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def floor(size: tuple[int, int], batch: int) -> Tensor:
    """Pictures (batch, 3, H, W) in 0..255 that look like something, always the same."""
    maker = FloorMaker(seed=0)
    return torch.cat([photo(Image.fromarray(maker.make().image), size, 1) for _ in range(batch)])


def photo(picture: Image.Image, size: tuple[int, int], batch: int) -> Tensor:
    """A picture in RGB, stretched to a size and as often as the batch is large: (batch, 3, H, W) in 0..255."""
    pixels = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).repeat(batch, 1, 1, 1)


def metadata(ready: Exportable) -> dict[str, str]:
    """What the file says about itself."""
    facts = {
        "producer": f"terrazzo {__version__}",
        "model": ready.source,
        "input": "float32 RGB pixels in 0..255, batch x 3 x height x width; normalisation is in the graph",
        "outputs": ", ".join(ready.module.output_names),
        "task": ready.task,
        "preparation": json.dumps(ready.preparation),
    }
    if "boxes" in ready.module.output_names:
        facts["boxes"] = "x1, y1, x2, y2 in pixels of the input"
    if ready.classes:
        facts["classes"] = json.dumps(ready.classes)
    return facts


def segmentor_for_export(cfg, checkpoint: str | Path, size: tuple[int, int]) -> Exportable:
    """The model of a segmentation config, ready for export.

    Args:
        cfg: what `terrazzo.openmmlab.config.load_config` gave.
        checkpoint: a file that a training of this config wrote.
        size: H, W.
    """
    from terrazzo.tools import mm

    with mm.quiet():
        model, facts = mm.build_model(cfg, checkpoint)
    colours = {"palette": facts["palette"]}
    return Exportable(
        RawSegmentor(model).eval(), size, facts["classes"], Path(cfg.filename).stem, "segmentation", colours, config=cfg
    )


def detector_for_export(cfg, checkpoint: str | Path, size: tuple[int, int]) -> Exportable:
    """The model of a detection or panoptic config, ready for export.

    Args:
        cfg: what `terrazzo.openmmlab.config.load_config` gave.
        checkpoint: a file that a training of this config wrote.
        size: H, W.
    """
    from terrazzo.tools import mm
    from terrazzo.tools.detectors import RawDetector

    with mm.quiet():
        model, facts = mm.build_model(cfg, checkpoint)
    module = RawDetector(model, size).eval()
    preparation = {"palette": facts["palette"]}
    if "segments" in module.output_names:
        preparation["things"] = model.panoptic_fusion_head.num_things_classes
    name, task = Path(cfg.filename).stem, mm.task_of(cfg)
    return Exportable(module, size, facts["classes"], name, task, preparation, single=True, config=cfg)


def _cropping(data: Mapping[str, Any]) -> dict[str, Any]:
    """How timm resizes and crops a picture for a classifier."""
    return {key: data[key] for key in ("crop_pct", "crop_mode", "interpolation") if key in data}


def _verdict(parity: Parity) -> str:
    if not parity.passed:
        return "FAILED"
    return "passed" if parity.compared else "-"


def _exportable(
    name: str,
    checkpoint: Path | None,
    pretrained: bool,
    num_classes: int | None,
    size: tuple[int, int] | None,
    features: bool,
    data_root: Path | None,
    overrides: dict,
) -> Exportable:
    if size is not None:
        image_size(size)
    if not is_config(name):
        if data_root is not None or overrides:
            raise InputError(f"{name} is a timm model; --data-root and --cfg-options are for configs")
        from terrazzo.tools.predict import timm_class_names

        model = load_timm_model(name, checkpoint, pretrained, num_classes)
        data = resolve_model_data_config(model)
        size = size or tuple(data["input_size"][1:])
        module = (RawFeatures if features else RawClassifier)(model, data["mean"], data["std"]).eval()
        task = "features" if features else "classification"
        return Exportable(module, size, timm_class_names(model), name, task, _cropping(data))
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools import mm

    cfg = load_config(name, data_root, overrides)
    if features:
        raise InputError("--features is for timm models; what a config says has a head")
    if pretrained or num_classes is not None:
        raise InputError("--pretrained and --num-classes are for timm models; a config takes a CHECKPOINT alone")
    if checkpoint is None:
        raise InputError(f"the config {name} needs weights; name a file that its training wrote as CHECKPOINT")
    task = mm.task_of(cfg)
    if task in ("detection", "panoptic"):
        if size is None:
            raise InputError(f"{name} takes pictures of any size, and a file is for one; give it with --size H W")
        return detector_for_export(cfg, checkpoint, image_size(size))
    if task == "segmentation":
        size = size or (cfg.model.get("data_preprocessor") or {}).get("size")
        if size is None:
            raise InputError(f"{name} does not say a size; give one with --size H W")
        return segmentor_for_export(cfg, checkpoint, image_size(size))
    with mm.quiet():
        model, facts = mm.build_model(cfg, checkpoint)
    transform = mm.test_dataset(cfg).transform
    given = transform.get("input_size", 224)
    size = size or (image_size(given) if isinstance(given, int) else tuple(given)[-2:])
    mean, std = transform.get("mean", IMAGENET_DEFAULT_MEAN), transform.get("std", IMAGENET_DEFAULT_STD)
    module = RawClassifier(model.backbone, mean, std)
    name = Path(cfg.filename).stem
    return Exportable(module.eval(), size, facts["classes"], name, "classification", _cropping(transform), config=cfg)

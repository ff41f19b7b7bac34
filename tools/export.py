"""`terrazzo export`: a classifier or segmentor as one checked ONNX file."""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from torch import Tensor, nn

from terrazzo._version import __version__
from terrazzo.errors import InputError
from terrazzo.tools.console import print_table
from terrazzo.tools.exportable import RawClassifier, RawSegmentor
from terrazzo.tools.files import check_output_file
from terrazzo.tools.floors import FloorMaker
from terrazzo.tools.measure import image_size
from terrazzo.tools.targets import is_config, load_timm_model

FORMATS = ("onnx", "tensorrt", "openvino", "pt2")
EXIT_PARITY = 1


@dataclass(frozen=True)
class Exportable:
    """A model that is ready for export.

    Attributes:
        module: takes (B, 3, H, W), float RGB in 0..255; has `output_names`.
        size: H, W.
        classes: class names, or None.
        source: what the user named.
    """

    module: nn.Module
    size: tuple[int, int]
    classes: list[str] | None
    source: str


@click.command()
@click.argument("model_or_config")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Weights; a config needs them.")
@click.option("--pretrained", is_flag=True, help="Download the published weights of a timm model.")
@click.option("--num-classes", type=click.IntRange(min=1), help="Classes of a timm model's checkpoint.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="onnx", show_default=True, help="File format.")
@click.option("--size", type=int, nargs=2, metavar="H W", help="Image size [default: the model's own].")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images a run.")
@click.option("--dynamic-batch", is_flag=True, help="Leave the batch size open.")
@click.option("--opset", type=click.IntRange(min=18), help="ONNX operator set [default: PyTorch's choice].")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: exports/NAME_HxW.onnx]")
def command(
    model_or_config: str,
    checkpoint: Path | None,
    pretrained: bool,
    num_classes: int | None,
    form: str,
    size: tuple[int, int] | None,
    batch: int,
    dynamic_batch: bool,
    opset: int | None,
    out: Path | None,
) -> int:
    """Export a timm classifier or the segmentor of an OpenMMLab config, from raw pixels to results in one graph.

    The input is float RGB in 0..255, (batch, 3, H, W); normalisation is in the graph. The outputs are `logits` and, for
    a segmentor, `labels`, both at the input's size. ONNX Runtime's results are compared with PyTorch's: where they
    differ by too much, the exit code is 1 and the file keeps the suffix .failed.
    """
    if form != "onnx":
        raise InputError(f"--format {form} is not available in this version; only onnx is: leave --format out")
    from terrazzo.tools.onnx_export import export_onnx

    if out is not None:
        check_output_file(out)
    ready = _exportable(model_or_config, checkpoint, pretrained, num_classes, size)
    height, width = ready.size
    out = out or Path("exports") / f"{Path(ready.source).stem}_{height}x{width}.onnx"
    report = export_onnx(
        ready.module,
        noise(ready.size, batch),
        out,
        checks={"floor": floor(ready.size, batch)},
        output_names=ready.module.output_names,
        dynamic_batch=dynamic_batch,
        opset=opset,
        metadata=metadata(ready),
    )
    rows = [
        (parity.output, parity.source.replace("example", "noise"), parity, "passed" if parity.passed else "FAILED")
        for parity in report.parities
    ]
    print_table(rows, ("output", "input", "ONNX Runtime against PyTorch", "check"))
    shape = f"{'any' if dynamic_batch else batch}x3x{height}x{width}"
    volume = f"{report.path.stat().st_size / 2**20:.1f} MiB"
    click.echo(f"written: {report.path} (opset {report.opset}, {volume}; input: RGB 0..255, {shape})")
    if not report.passed:
        click.echo("error: ONNX Runtime and PyTorch disagree; the file keeps the suffix .failed", err=True)
        return EXIT_PARITY
    return 0


def noise(size: tuple[int, int], batch: int) -> Tensor:
    """Random pixels (batch, 3, H, W) in 0..255, always the same."""
    return 255 * torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def floor(size: tuple[int, int], batch: int) -> Tensor:
    """Pictures (batch, 3, H, W) in 0..255 that look like something, always the same."""
    maker = FloorMaker(seed=0)
    pictures = [Image.fromarray(maker.make().image).resize(size[::-1], Image.Resampling.BICUBIC) for _ in range(batch)]
    pixels = np.stack([np.asarray(picture, np.float32) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def metadata(ready: Exportable) -> dict[str, str]:
    """What the file says about itself."""
    facts = {
        "producer": f"terrazzo {__version__}",
        "model": ready.source,
        "input": "float32 RGB pixels in 0..255, batch x 3 x height x width; normalisation is in the graph",
        "outputs": ", ".join(ready.module.output_names),
    }
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
    return Exportable(RawSegmentor(model, size).eval(), size, facts["classes"], Path(cfg.filename).stem)


def _exportable(
    name: str, checkpoint: Path | None, pretrained: bool, num_classes: int | None, size: tuple[int, int] | None
) -> Exportable:
    if size is not None:
        image_size(size)
    if not is_config(name):
        from terrazzo.tools.predict import timm_class_names

        model = load_timm_model(name, checkpoint, pretrained, num_classes)
        data = resolve_model_data_config(model)
        size = size or tuple(data["input_size"][1:])
        module = RawClassifier(model, data["mean"], data["std"]).eval()
        return Exportable(module, size, timm_class_names(model), name)
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools import mm

    cfg = load_config(name)
    if pretrained or num_classes is not None:
        raise InputError("--pretrained and --num-classes are for timm models; a config takes --checkpoint FILE alone")
    if checkpoint is None:
        raise InputError(f"the config {name} needs weights; name a file that its training wrote with --checkpoint FILE")
    task = mm.task_of(cfg)
    if task in ("detection", "panoptic"):
        raise InputError(f"{name} is a detector, and those cannot be exported yet; classifiers and segmentors can")
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
    return Exportable(module.eval(), size, facts["classes"], Path(cfg.filename).stem)

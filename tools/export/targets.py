"""The model that a user wants to export, made ready: from raw pixels to results, with inputs to compare on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from torch import Tensor, nn

from terrazzo._version import __version__
from terrazzo.backbones._hosts import record_of
from terrazzo.backbones._reparameterize import reparameterize
from terrazzo.checkpoints.records import metadata_of
from terrazzo.errors import InputError
from terrazzo.tools.data.floors import FloorMaker
from terrazzo.tools.export.exportable import RawClassifier, RawFeatures, RawRestorer, RawSegmentor
from terrazzo.tools.inspect.trace import image_size
from terrazzo.tools.mechanisms import Mechanism, refuse_changes
from terrazzo.tools.models import pretrained_cfg
from terrazzo.tools.targets import is_config, load_timm_model


@dataclass(frozen=True)
class Exportable:
    """A model that is ready for export, in its form for inference (`terrazzo.reparameterize`).

    Attributes:
        module: takes (B, 3, H, W), float RGB in 0..255; has `output_names`, and `reference` if its results are compared
            with the results of other code.
        size: H, W.
        classes: class names, or None.
        source: the name that the user gave.
        task: classification, features, segmentation, detection, panoptic or restoration.
        preparation: what else `terrazzo infer --runtime` must know, JSON-ready: how pictures are cropped, colours.
        single: whether it takes only one image per run.
        config: its config, or None.
    """

    module: nn.Module
    size: tuple[int, int]
    classes: list[str] | None
    source: str
    task: str
    preparation: dict[str, Any] = field(default_factory=dict)
    single: bool = False
    config: Any = None

    def __post_init__(self):
        reparameterize(self.module)


def noise(size: tuple[int, int], batch: int) -> Tensor:
    """Random pixels (batch, 3, H, W) in 0..255, always the same."""
    return 255 * torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def floor(size: tuple[int, int], batch: int) -> Tensor:
    """Pictures (batch, 3, H, W) in 0..255 that look like something, always the same."""
    maker = FloorMaker(seed=0)
    return torch.cat([photo(Image.fromarray(maker.make().image), size, 1) for _ in range(batch)])


def photo(picture: Image.Image, size: tuple[int, int], batch: int) -> Tensor:
    """A picture in RGB, stretched to a size and repeated over the batch: (batch, 3, H, W) in 0..255."""
    pixels = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).repeat(batch, 1, 1, 1)


def coarsest_stride(module: nn.Module) -> int:
    """The largest stride of a model's feature maps, which is its smallest image; 1 if no part has a stride."""
    strides = [1]
    for part in module.modules():
        info = getattr(part, "feature_info", ())
        strides += [entry["reduction"] for entry in getattr(info, "info", info)]
    return max(strides)


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
    return facts | metadata_of(record_of(ready.module))


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
    from terrazzo.tools.export.detectors import RawDetector

    with mm.quiet():
        model, facts = mm.build_model(cfg, checkpoint)
    module = RawDetector(model, size).eval()
    preparation = {"palette": facts["palette"]}
    if "segments" in module.output_names:
        preparation["things"] = model.panoptic_fusion_head.num_things_classes
    name, task = Path(cfg.filename).stem, mm.task_of(cfg)
    return Exportable(module, size, facts["classes"], name, task, preparation, single=True, config=cfg)


def restorer_for_export(
    model: nn.Module,
    name: str,
    size: tuple[int, int] | None,
    features: bool = False,
    degradation: Mapping[str, Any] | None = None,
    config: Any = None,
) -> Exportable:
    """A restorer or a restoration network, ready for export.

    Args:
        model: as in `RawRestorer`.
        name: what it is called.
        size: H, W of degraded pictures.
        features: whether the user asks for feature maps, which it does not have.
        degradation: what it was trained against, as settings; None for bicubic reduction if it enlarges.
        config: its config, or None.

    Raises:
        InputError: there is no size, or feature maps are asked for.
    """
    if features:
        raise InputError(f"{name} restores pictures and gives no feature maps: leave --features out")
    if size is None:
        raise InputError(
            f"{name} takes pictures of any size, and a file is traced with one size; give it with --size H W"
        )
    if degradation is None and model.upscale > 1:
        degradation = {"type": "Bicubic", "scale": model.upscale}
    preparation = {"scale": model.upscale, "degradation": None if degradation is None else dict(degradation)}
    return Exportable(
        RawRestorer(model).eval(), image_size(size), None, name, "restoration", preparation, config=config
    )


def _cropping(data: Mapping[str, Any]) -> dict[str, Any]:
    """How timm resizes and crops a picture for a classifier."""
    return {key: data[key] for key in ("crop_pct", "crop_mode", "interpolation") if key in data}


def exportable_of(
    name: str,
    checkpoint: Path | None,
    pretrained: bool,
    num_classes: int | None,
    size: tuple[int, int] | None,
    features: bool,
    data_root: Path | None,
    overrides: dict,
    changes: Sequence[Mechanism] = (),
    any_size: bool = False,
) -> Exportable:
    if size is not None:
        image_size(size)
    if not is_config(name):
        if data_root is not None or overrides:
            raise InputError(f"{name} is a timm model; --data-root and --cfg-options are for configs")
        from terrazzo.tools.predict.classifiers import timm_class_names

        own = size is None or tuple(size) == pretrained_cfg(name).input_size[1:]
        needed = "any" if any_size else None if own else size
        model = load_timm_model(name, checkpoint, pretrained, num_classes, needed, changes)
        if isinstance(getattr(model, "upscale", None), int):
            return restorer_for_export(model, name, size, features)
        data = resolve_model_data_config(model)
        size = size or tuple(data["input_size"][1:])
        module = (RawFeatures if features else RawClassifier)(model, data["mean"], data["std"]).eval()
        task = "features" if features else "classification"
        return Exportable(module, size, timm_class_names(model), name, task, _cropping(data))
    refuse_changes(name, changes)
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools import mm

    cfg = load_config(name, data_root, overrides)
    if features:
        raise InputError("--features is for timm models; a config's model has a head")
    if pretrained or num_classes is not None:
        raise InputError("--pretrained and --num-classes are for timm models; a config takes only a CHECKPOINT")
    if checkpoint is None:
        raise InputError(f"the config {name} needs weights; name a file that its training wrote as CHECKPOINT")
    task = mm.task_of(cfg)
    if task in ("detection", "panoptic"):
        if size is None:
            raise InputError(f"{name} takes pictures of any size, and a file is for one size; give it with --size H W")
        return detector_for_export(cfg, checkpoint, image_size(size))
    if task == "restoration":
        with mm.quiet():
            restorer, _ = mm.build_model(cfg, checkpoint)
        degradation = mm.test_dataset(cfg).get("degradation")
        return restorer_for_export(restorer, Path(cfg.filename).stem, size, degradation=degradation, config=cfg)
    if task == "segmentation":
        size = size or (cfg.model.get("data_preprocessor") or {}).get("size")
        if size is None:
            raise InputError(f"{name} does not say a size; give it with --size H W")
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

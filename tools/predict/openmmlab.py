"""What a model of an OpenMMLab config says about one picture: through the config's own test pipeline."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn.functional import pad

from terrazzo.errors import InputError
from terrazzo.tools import mm
from terrazzo.tools.data.pictures import to_bgr
from terrazzo.tools.predict.classifiers import ClassPredictor, Engine
from terrazzo.tools.predict.draw import Colour, palette
from terrazzo.tools.predict.prediction import (
    Prediction,
    Things,
    box_prediction,
    by_shape,
    class_names,
    label_prediction,
    panoptic_prediction,
)
from terrazzo.tools.predict.restorers import RestorePredictor


def config_predictor(
    cfg: Config, checkpoint: str | Path, device: torch.device, min_score: float = 0.3, resize: bool = True
) -> Engine:
    """The predictor of a config's classifier, segmentor, detector or restorer.

    Args:
        cfg: what `terrazzo.openmmlab.config.load_config` gave.
        checkpoint: a file that a training of this config wrote.
        device: where to compute.
        min_score: detections below this score are left out.
        resize: whether the config's test pipeline resizes pictures; else they keep their own resolution.

    Raises:
        InputError: the checkpoint does not fit, or the config does not say how a picture is prepared.
    """
    model, facts = mm.build_model(cfg, checkpoint)
    model = model.to(device)
    task = mm.task_of(cfg)
    dataset = mm.test_dataset(cfg)
    if task == "classification":
        transform = create_transform(**{key: value for key, value in dataset.transform.items() if key != "_scope_"})
        return ClassPredictor(model.backbone, transform, facts["classes"], device)
    if task == "restoration":
        stride = 1 if model.neck is None else model.neck.stride
        return RestorePredictor(model, device, dataset.get("degradation"), stride)
    prepare = _Prepare(dataset.pipeline, resize)
    if task == "segmentation":
        return SegmentPredictor(model, prepare, facts["classes"], facts["palette"])
    if task == "panoptic":
        return PanopticPredictor(model, prepare, facts["classes"], facts["palette"])
    return BoxPredictor(model, prepare, facts["classes"], facts["palette"], min_score)


_READ = {"color_type": ("color",), "imdecode_backend": ("cv2", "pillow", "turbojpeg", None)}
"""The modes of mmcv's loader that read like `terrazzo._pictures`; the first is the default."""


def _kind(step: dict) -> str:
    """The name of a pipeline's step: a type with or without its package, or the class."""
    kind = step["type"]
    return kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]


def _sizes(step: dict) -> bool:
    """Whether a pipeline's step changes a picture's resolution, or pads it to a fixed size."""
    return "Resize" in _kind(step) or (_kind(step) == "Pad" and step.get("size") is not None)


class _Prepare:
    """A config's test pipeline, for a picture in memory without annotations.

    Args:
        pipeline: the steps.
        resize: whether to keep the steps that change a picture's resolution, or pad it to a fixed size.

    Raises:
        InputError: the pipeline does not read pictures in colour and upright.
    """

    def __init__(self, pipeline: Sequence[dict], resize: bool = True):
        loading = {_kind(step): step for step in pipeline if _kind(step).startswith("Load")}
        reading = loading.get("LoadImageFromFile", {})
        asked = [f"{key}={reading[key]!r}" for key, known in _READ.items() if reading.get(key, known[0]) not in known]
        asked += [kind for kind in loading if "Image" in kind and not kind.startswith("LoadImageFrom")]
        if asked:
            raise InputError(
                f"the config's test pipeline reads pictures with {', '.join(asked)}, but infer reads them upright "
                "and in colour: its model would see other pictures; train a model with the plain LoadImageFromFile"
            )
        self.to_float32 = any(step.get("to_float32") for step in loading.values())
        kept = [step for step in pipeline if _kind(step) not in loading and (resize or not _sizes(step))]
        self.steps = Compose(kept)

    def __call__(self, image: Image.Image) -> dict:
        """A sample; `pseudo_collate` makes a batch of samples for a model's `test_step`."""
        pixels = to_bgr(image)
        shape = pixels.shape[:2]
        pixels = pixels.astype(np.float32) if self.to_float32 else pixels
        facts = {"img_path": "", "img_id": 0, "img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)}
        return self.steps({"img": pixels, **facts})


class _SampleEngine:
    """Runs a model of OpenMMLab on pictures; pictures that are equally large after their preparation run together."""

    model: nn.Module
    prepare: _Prepare

    def predict(self, images: Sequence[Image.Image]) -> list[Prediction]:
        inputs = [(image, self.prepare(image)) for image in images]
        return by_shape(inputs, lambda item: tuple(item[1]["inputs"].shape), self._together)

    @torch.inference_mode()
    def _together(self, inputs: list[tuple[Image.Image, dict]]) -> list[Prediction]:
        samples = self.model.test_step(pseudo_collate([data for _, data in inputs]))
        return [self.prediction(image, sample) for (image, _), sample in zip(inputs, samples)]

    def prediction(self, image: Image.Image, sample) -> Prediction:
        """What a sample of the model's results says about a picture."""
        raise NotImplementedError


class SegmentPredictor(_SampleEngine):
    """Gives every pixel a class.

    Args:
        model: an mmseg segmentor.
        prepare: from a picture to a batch.
        names: class names; None for numbers.
        colours: class colours; None for our own.
    """

    def __init__(
        self, model: nn.Module, prepare: _Prepare, names: list[str] | None, colours: Sequence[Sequence[int]] | None
    ):
        self.model, self.prepare = model, prepare
        self.names = class_names(names, max(model.num_classes, 2))
        self.colours = palette(len(self.names), colours)

    def prediction(self, image: Image.Image, sample) -> Prediction:
        return label_prediction(image, sample.pred_sem_seg.data[0].cpu().numpy(), self.names, self.colours)

    def inputs(self, images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Pictures as the model takes them, (B, 3, h, w); zeros make smaller pictures as large as `size`, (h, w).

        Raises:
            InputError: the config's pipeline changes the size of pictures by other steps than resizing.
        """
        found = []
        for image in images:
            data = self.prepare(image)
            if tuple(data["inputs"].shape[-2:]) != (image.height, image.width):
                raise InputError("the config's test pipeline crops or pads pictures, so it cannot prepare tiles")
            # The preprocessor may pad on the right and below: only the tile itself is kept.
            pixels = self.model.data_preprocessor(pseudo_collate([data]), False)["inputs"]
            pixels = pixels[:, :, : image.height, : image.width]
            found.append(pad(pixels, (0, size[1] - image.width, 0, size[0] - image.height)))
        return torch.cat(found)

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits (B, classes, h, w) for every pixel of the inputs (B, 3, h, w), without the config's sliding window."""
        size = tuple(inputs.shape[2:])
        facts = {**dict.fromkeys(("ori_shape", "img_shape", "pad_shape"), size), "padding_size": [0] * 4}
        return self.model.encode_decode(inputs.to(self.device), [facts] * len(inputs))

    def labels(self, logits: Tensor) -> Tensor:
        """Class indices (B, h, w), as mmseg takes them from logits (B, classes, h, w)."""
        if logits.shape[1] > 1:
            return logits.argmax(1)
        return (logits[:, 0].sigmoid() > self.model.decode_head.threshold).long()

    def classes(self) -> tuple[list[str], list[Colour]]:
        return self.names, self.colours

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class PanopticPredictor(_SampleEngine):
    """Divides a picture into segments: each thing is a segment, and so is all stuff of a class.

    Args:
        model: an mmdet panoptic segmentor.
        prepare: from a picture to a batch.
        names: class names; None for numbers.
        colours: class colours; None for our own.
    """

    def __init__(
        self, model: nn.Module, prepare: _Prepare, names: list[str] | None, colours: Sequence[Sequence[int]] | None
    ):
        self.model, self.prepare, self.things = model, prepare, model.panoptic_fusion_head.num_things_classes
        self.names = class_names(names, model.panoptic_fusion_head.num_classes)
        self.colours = palette(len(self.names), colours)

    def prediction(self, image: Image.Image, sample) -> Prediction:
        from mmdet.evaluation import INSTANCE_OFFSET

        values = sample.pred_panoptic_seg.sem_seg[0].cpu().numpy()  # class + INSTANCE_OFFSET * number of the thing
        return panoptic_prediction(image, values, INSTANCE_OFFSET, self.things, self.names, self.colours)


class BoxPredictor(_SampleEngine):
    """Finds things: boxes, and masks where the model gives them.

    Args:
        model: an mmdet detector.
        prepare: from a picture to a batch.
        names: class names; None for numbers.
        colours: class colours; None for our own.
        min_score: detections below this score are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        prepare: _Prepare,
        names: list[str] | None,
        colours: Sequence[Sequence[int]] | None,
        min_score: float,
    ):
        self.model, self.prepare, self.names, self.min_score = model, prepare, names or [], min_score
        self.colours = palette(max(len(self.names), 1), colours)

    def prediction(self, image: Image.Image, sample) -> Prediction:
        return box_prediction(image, self._kept(sample), self.names, self.colours, self.min_score)

    @torch.inference_mode()
    def things(self, images: Sequence[Image.Image]) -> list[Things]:
        """What is in each picture; all pictures have one size."""
        samples = self.model.test_step(pseudo_collate([self.prepare(image) for image in images]))
        return [self._kept(sample) for sample in samples]

    def classes(self) -> tuple[Sequence[str], list[Colour]]:
        return self.names, self.colours

    def _kept(self, sample) -> Things:
        found = sample.pred_instances.cpu()
        found = found[found.scores.argsort(descending=True, stable=True)]  # Mask2Former gives them in any order
        found = found[found.scores >= self.min_score]
        masks = torch.as_tensor(found.masks).bool() if "masks" in found else None
        return Things(found.bboxes, found.labels, found.scores, masks)

    @property
    def iou_threshold(self) -> float:
        """Two boxes of a class that overlap more are one thing: as in the model's own suppression, or 0.5."""
        settings = self.model.test_cfg or {}
        nms = (settings.get("rcnn") or settings).get("nms") or {}
        return float(nms.get("iou_threshold", 0.5))

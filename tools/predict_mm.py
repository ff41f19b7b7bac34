"""What a model of an OpenMMLab config says about one picture: through the config's own test pipeline."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from PIL import Image
from timm.data import create_transform
from torch import nn

from terrazzo.tools import mm, rle
from terrazzo.tools.draw import box_overlay, label_overlay, palette
from terrazzo.tools.pictures import to_bgr
from terrazzo.tools.predict import ClassPredictor, Prediction, Predictor

_LEGEND_ENTRIES = 16


def config_predictor(cfg: Config, checkpoint: str | Path, device: torch.device, min_score: float = 0.3) -> Predictor:
    """The predictor of a config's classifier, segmentor or detector.

    Args:
        cfg: what `terrazzo.openmmlab.config.load_config` gave.
        checkpoint: a file that a training of this config wrote.
        device: where to compute.
        min_score: detections below this score are left out.

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
    prepare = _Prepare(dataset.pipeline)
    if task == "segmentation":
        return SegmentPredictor(model, prepare, facts["classes"], facts["palette"])
    if task == "panoptic":
        return PanopticPredictor(model, prepare, facts["classes"], facts["palette"])
    return BoxPredictor(model, prepare, facts["classes"], facts["palette"], min_score)


class _Prepare:
    """A config's test pipeline, fed with a picture from memory and without annotations."""

    def __init__(self, pipeline: Sequence[dict]):
        loading = next((step for step in pipeline if "LoadImage" in str(step["type"])), {})
        self.to_float32 = bool(loading.get("to_float32"))
        self.steps = Compose([step for step in pipeline if not str(step["type"]).rsplit(".", 1)[-1].startswith("Load")])

    def __call__(self, image: Image.Image) -> dict:
        """A batch of one, for a model's `test_step`."""
        pixels = to_bgr(image)
        shape = pixels.shape[:2]
        pixels = pixels.astype(np.float32) if self.to_float32 else pixels
        data = self.steps({"img": pixels, "img_path": "", "img_id": 0, "img_shape": shape, "ori_shape": shape})
        return pseudo_collate([data])


class SegmentPredictor:
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
        self.names = _class_names(names, max(model.num_classes, 2))
        self.colours = palette(len(self.names), colours)

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Prediction:
        sample = self.model.test_step(self.prepare(image))[0]
        labels = sample.pred_sem_seg.data[0].cpu().numpy()
        shares = _shares(labels, self.names)
        drawing = label_overlay(image, labels, self.names, self.colours, _legend(shares))
        record = {"task": "segmentation", "classes": self.names, "shares": shares}
        return Prediction(record, drawing, labels.astype(np.uint8 if len(self.names) <= 256 else np.uint16))


class PanopticPredictor:
    """Divides a picture into segments: each thing is one, and so is all stuff of a class.

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
        self.names = _class_names(names, model.panoptic_fusion_head.num_classes)
        self.colours = palette(len(self.names), colours)

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Prediction:
        from mmdet.evaluation import INSTANCE_OFFSET

        sample = self.model.test_step(self.prepare(image))[0]
        values = sample.pred_panoptic_seg.sem_seg[0].cpu().numpy()  # class + INSTANCE_OFFSET * number of the thing
        labels = np.minimum(values % INSTANCE_OFFSET, len(self.names))  # beyond the classes: no segment
        found, counts = np.unique(values[labels < len(self.names)], return_counts=True)
        segments, records = np.zeros(values.shape, np.uint16), []
        for number, place in enumerate(np.argsort(-counts, kind="stable"), 1):
            segments[values == found[place]] = number
            index = int(found[place] % INSTANCE_OFFSET)
            share = round(float(counts[place] / values.size), 6)
            thing = index < self.things
            records.append({"id": number, "label": self.names[index], "index": index, "thing": thing, "share": share})
        shares = _shares(labels, self.names)
        drawing = label_overlay(image, labels, self.names, self.colours, _legend(shares), segments)
        record = {"task": "panoptic", "classes": self.names, "shares": shares, "segments": records}
        return Prediction(record, drawing, segments=segments)


class BoxPredictor:
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

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Prediction:
        found = self.model.test_step(self.prepare(image))[0].pred_instances.cpu()
        found = found[found.scores.argsort(descending=True, stable=True)]  # Mask2Former gives them in any order
        found = found[found.scores >= self.min_score]
        boxes, labels, scores = found.bboxes.numpy(), found.labels.tolist(), found.scores.tolist()
        masks = found.masks.numpy().astype(bool) if "masks" in found else None
        things = []
        for index, (box, label, score) in enumerate(zip(boxes, labels, scores)):
            thing = {"label": self._name(label), "index": label, "score": round(score, 6)}
            thing["box"] = [round(float(value), 2) for value in box]
            if masks is not None:
                thing["mask"] = rle.encode(masks[index])
            things.append(thing)
        texts = [f"{thing['label']} {thing['score']:.2f}" for thing in things]
        colours = [self.colours[label % len(self.colours)] for label in labels]
        drawing = box_overlay(image, boxes, texts, colours, masks)
        return Prediction({"task": "detection", "min_score": self.min_score, "things": things}, drawing)

    def _name(self, index: int) -> str:
        return self.names[index] if index < len(self.names) else f"class {index}"


def _class_names(names: list[str] | None, count: int) -> list[str]:
    """The given names, if there are enough, else numbers."""
    return names if names and len(names) >= count else [f"class {index}" for index in range(count)]


def _shares(labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """The part of the picture that each class in it fills, largest first; indices beyond the names count for none."""
    counts = np.bincount(labels.ravel(), minlength=len(names))[: len(names)]
    order = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
    return {names[index]: round(float(counts[index] / labels.size), 6) for index in order}


def _legend(shares: dict[str, float]) -> dict[str, float]:
    return dict(list(shares.items())[:_LEGEND_ENTRIES])

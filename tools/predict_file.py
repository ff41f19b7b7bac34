"""What an exported file says about one picture: the same records and drawings as from PyTorch, without the model.

A file is for images of one size (or of any, where it was exported so): a classifier's picture is resized and cropped as
timm does for the model; any other is stretched to that size, and what was found is brought back to its own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.nn.functional import interpolate

from terrazzo.errors import InputError
from terrazzo.tools.draw import palette
from terrazzo.tools.prediction import (
    Prediction,
    box_prediction,
    class_names,
    class_prediction,
    label_prediction,
    panoptic_prediction,
)

# mmdet's INSTANCE_OFFSET, which panoptic segments count things by.
INSTANCE_OFFSET = 1000


def file_predictor(runtime: str, path: Path, min_score: float = 0.3) -> Callable[[Image.Image], Prediction]:
    """The predictor of a file that `terrazzo export` wrote.

    Args:
        runtime: "onnx" or "openvino".
        path: the file.
        min_score: detections below this score are left out.

    Raises:
        InputError: the runtime cannot read the file, or it does not say what it is.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; name a file that `terrazzo export` wrote")
    if runtime == "onnx":
        from terrazzo.tools.onnx_export import OnnxForm as Form
    else:
        from terrazzo.tools.openvino_export import OpenVinoForm as Form
    run, facts, size = Form().open(path)
    if "task" not in facts or "preparation" not in facts:
        raise InputError(f"{path} does not say what it is: name a file that `terrazzo export` wrote")
    kind = _PREDICTORS.get(facts["task"])
    if kind is None:
        raise InputError(f"{path} gives {facts['outputs']}, of which there is nothing to draw; export it with a head")
    return kind(run, facts, size, min_score)


class _Predictor:
    """Runs a file on a picture.

    Args:
        run: the file as a function of (1, 3, H, W), float RGB in 0..255.
        facts: what it says about itself.
        size: H, W that it takes; None for any.
        min_score: detections below this score are left out.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor]],
        facts: Mapping[str, str],
        size: tuple[int, int] | None,
        min_score: float,
    ):
        self.run, self.size, self.min_score = run, size, min_score
        self.names = json.loads(facts.get("classes", "null"))
        self.preparation = json.loads(facts["preparation"])
        self.outputs = facts["outputs"].split(", ")

    def colours(self, count: int) -> list[tuple[int, int, int]]:
        return palette(count, self.preparation.get("palette"))

    def found(self, image: Image.Image) -> dict[str, Tensor]:
        """The outputs by name, for a picture that is stretched to what the file takes."""
        height, width = self.size or (image.height, image.width)
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), np.float32).copy()).permute(2, 0, 1)[None]
        if (height, width) != (image.height, image.width):
            pixels = interpolate(pixels, (height, width), mode="bilinear", antialias=True)
        return dict(zip(self.outputs, self.run(pixels), strict=True))


class _Classes(_Predictor):
    def __call__(self, image: Image.Image) -> Prediction:
        size = self.size or (224, 224)
        # The graph normalises: here pixels only get the size.
        crop = create_transform((3, *size), mean=(0, 0, 0), std=(1, 1, 1), **self.preparation)
        logits = self.run(255 * crop(image.convert("RGB"))[None])[0][0]
        return class_prediction(image, logits.softmax(0).numpy(), self.names)


class _Labels(_Predictor):
    def __call__(self, image: Image.Image) -> Prediction:
        found = self.found(image)
        logits, size = found["logits"], (image.height, image.width)
        if logits.shape[1] == 1 or logits.shape[2:] == size:
            labels = interpolate(found["labels"][:, None].float(), size, mode="nearest")[0, 0].long()
        else:
            labels = interpolate(logits, size, mode="bilinear")[0].argmax(0)
        names = class_names(self.names, max(logits.shape[1], 2))
        return label_prediction(image, labels.numpy(), names, self.colours(len(names)))


class _Segments(_Predictor):
    def __call__(self, image: Image.Image) -> Prediction:
        segments = self.found(image)["segments"]
        values = interpolate(segments[None, None].double(), (image.height, image.width), mode="nearest")[0, 0]
        arguments = (values.long().numpy(), INSTANCE_OFFSET, self.preparation["things"], self.names or [])
        return panoptic_prediction(image, *arguments, self.colours(len(self.names or [1])))


class _Boxes(_Predictor):
    def __call__(self, image: Image.Image) -> Prediction:
        found = self.found(image)
        order = found["scores"].argsort(descending=True, stable=True)
        order = order[found["scores"][order] >= self.min_score]
        boxes, labels, scores = (found[name][order] for name in ("boxes", "labels", "scores"))
        height, width = self.size or (image.height, image.width)
        ratios = torch.tensor([image.width / width, image.height / height])
        masks = None
        if "masks" in found:
            picked = found["masks"][order].float()[None]
            size = (image.height, image.width)
            masks = interpolate(picked, size, mode="bilinear")[0].numpy() > 0.5 if len(order) else np.zeros((0, *size))
        names = self.names or []
        arrays = ((boxes * ratios.repeat(2)).numpy(), labels.tolist(), scores.tolist(), masks)
        return box_prediction(image, *arrays, names, self.colours(max(len(names), 1)), self.min_score)


_PREDICTORS = {"classification": _Classes, "segmentation": _Labels, "panoptic": _Segments, "detection": _Boxes}

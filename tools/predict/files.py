"""What an exported file says about one picture: the same records and drawings as from PyTorch, without the model.

A file is for images of one size, or of any size if it was exported that way. A classifier's picture is resized and
cropped as timm does for the model. A restorer's picture keeps its size. Any other picture is stretched to the file's
size, and the results are scaled back to the picture's size.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.nn.functional import interpolate

from terrazzo.degradations.pixels import to_pixels
from terrazzo.errors import InputError
from terrazzo.tools.predict.draw import palette
from terrazzo.tools.predict.prediction import (
    Prediction,
    Things,
    box_prediction,
    class_names,
    class_prediction,
    label_prediction,
    panoptic_prediction,
)
from terrazzo.tools.predict.restorers import Restoring
from terrazzo.tools.runtimes import open_file

# mmdet's INSTANCE_OFFSET: panoptic segments number things with it.
INSTANCE_OFFSET = 1000


def file_predictor(runtime: str, path: Path, min_score: float = 0.3) -> "FilePredictor":
    """The predictor of a file that `terrazzo export` wrote.

    Args:
        runtime: "onnx", "openvino", "pt2" or "aoti".
        path: the file.
        min_score: detections below this score are left out.

    Raises:
        InputError: the runtime cannot read the file, or it does not say what it is.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; name a file that `terrazzo export` wrote")
    run, facts, size = open_file(runtime, path)
    if "task" not in facts or "preparation" not in facts:
        raise InputError(f"{path} does not say what it is: name a file that `terrazzo export` wrote")
    return predictor(run, facts, size, min_score)


def predictor(
    run: Callable[..., Sequence[Tensor]],
    facts: Mapping[str, str],
    size: tuple[int, int] | None,
    min_score: float = 0.3,
) -> "FilePredictor":
    """The predictor of an opened file or engine; as `FilePredictor`.

    Raises:
        InputError: the file predicts nothing, for example because it gives feature maps.
    """
    kind = _PREDICTORS.get(facts["task"])
    if kind is None:
        raise InputError(f"the file gives {facts['outputs']}, which cannot be drawn; export it with a head")
    return kind(run, facts, size, min_score)


class FilePredictor:
    """Runs a file on pictures.

    Args:
        run: the file as a function of (1, 3, H, W), float RGB in 0..255.
        facts: what it says about itself.
        size: the H, W that it takes; None for any size.
        min_score: detections below this score are left out of predictions.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor]],
        facts: Mapping[str, str],
        size: tuple[int, int] | None,
        min_score: float,
    ):
        self.run, self.size, self.min_score = run, size, min_score
        self.task = facts["task"]
        self.names = json.loads(facts.get("classes", "null"))
        self.preparation = json.loads(facts["preparation"])
        self.outputs = facts["outputs"].split(", ")

    def results(self, image: Image.Image) -> dict[str, Tensor]:
        """What the file finds in a picture, in the picture's own pixels.

        Returns:
            For a classifier `scores` (classes); for a segmentor `labels` (H, W); for a panoptic segmentor `segments`
            (H, W); for a restorer `restored` (3, s H, s W) in 0..1; for a detector `boxes` (N, 4: x1, y1, x2, y2),
            `labels` and `scores` (N), highest first, and perhaps `masks` (N, H, W).
        """
        raise NotImplementedError

    def predict(self, images: Sequence[Image.Image]) -> list[Prediction]:
        """What the file finds in each picture; a file takes one picture at a time."""
        return [self.prediction(image) for image in images]

    def prediction(self, image: Image.Image) -> Prediction:
        """What the file finds, as a record and drawn on the picture."""
        raise NotImplementedError

    def prepared(self, image: Image.Image) -> Tensor:
        """A picture as the file takes it: (1, 3, H, W), float RGB in 0..255; by default it is stretched to the size."""
        height, width = self.size or (image.height, image.width)
        pixels = _pixels(image)
        if (height, width) != (image.height, image.width):
            pixels = interpolate(pixels, (height, width), mode="bilinear", antialias=True)
        return pixels

    def found(self, image: Image.Image) -> dict[str, Tensor]:
        """The file's outputs by name."""
        return dict(zip(self.outputs, self.run(self.prepared(image)), strict=True))

    def colours(self, count: int) -> list[tuple[int, int, int]]:
        return palette(count, self.preparation.get("palette"))


def _pixels(image: Image.Image) -> Tensor:
    """(1, 3, H, W), float RGB in 0..255."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32).copy()).permute(2, 0, 1)[None]


def _padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in its own resolution, padded on the right and below to `size` (H, W) with its edge pixels."""
    down, right = size[0] - image.height, size[1] - image.width
    return Image.fromarray(np.pad(np.asarray(image.convert("RGB")), ((0, down), (0, right), (0, 0)), mode="edge"))


class _Classes(FilePredictor):
    def prepared(self, image: Image.Image) -> Tensor:
        size = self.size or (224, 224)
        # The graph normalises: here pixels are only resized.
        crop = create_transform((3, *size), mean=(0, 0, 0), std=(1, 1, 1), **self.preparation)
        return 255 * crop(image.convert("RGB"))[None]

    def results(self, image: Image.Image) -> dict[str, Tensor]:
        return {"scores": self.found(image)["logits"][0].softmax(0)}

    def prediction(self, image: Image.Image) -> Prediction:
        return class_prediction(image, self.results(image)["scores"].numpy(), self.names)


class _Labels(FilePredictor):
    count = 0  # classes, known after the first tile

    def results(self, image: Image.Image) -> dict[str, Tensor]:
        return {"labels": self._labels(image, self.found(image))}

    def prediction(self, image: Image.Image) -> Prediction:
        found = self.found(image)
        names = class_names(self.names, max(found["logits"].shape[1], 2))
        return label_prediction(image, self._labels(image, found).numpy(), names, self.colours(len(names)))

    @staticmethod
    def _labels(image: Image.Image, found: Mapping[str, Tensor]) -> Tensor:
        logits, size = found["logits"], (image.height, image.width)
        if logits.shape[1] == 1 or logits.shape[2:] == size:
            return interpolate(found["labels"][:, None].float(), size, mode="nearest")[0, 0].long()
        return interpolate(logits, size, mode="bilinear")[0].argmax(0)

    def inputs(self, images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Pictures in their own resolution (B, 3, H, W); smaller pictures are padded with their edge pixels."""
        return torch.cat([_pixels(_padded(image, self.size or size)) for image in images])

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of the inputs, one after another.

        Raises:
            InputError: the file has one logit for each pixel, and keeps its threshold to itself.
        """
        named = [dict(zip(self.outputs, self.run(one[None]), strict=True)) for one in inputs]
        logits = torch.cat([found["logits"] for found in named])
        self.count = logits.shape[1]
        if self.count == 1:
            raise InputError("the file gives one logit for each pixel and does not say its threshold: leave --tile out")
        return logits

    def labels(self, logits: Tensor) -> Tensor:
        return logits.argmax(1)

    def classes(self) -> tuple[list[str], list[tuple[int, int, int]]]:
        names = class_names(self.names, self.count)
        return names, self.colours(len(names))


class _Segments(FilePredictor):
    def results(self, image: Image.Image) -> dict[str, Tensor]:
        segments = self.found(image)["segments"][None, None].double()
        return {"segments": interpolate(segments, (image.height, image.width), mode="nearest")[0, 0].long()}

    def prediction(self, image: Image.Image) -> Prediction:
        segments = self.results(image)["segments"].numpy()
        arguments = (segments, INSTANCE_OFFSET, self.preparation["things"], self.names or [])
        return panoptic_prediction(image, *arguments, self.colours(len(self.names or [1])))


class _Boxes(FilePredictor):
    def results(self, image: Image.Image, min_score: float = 0.0) -> dict[str, Tensor]:
        found = self.found(image)
        order = found["scores"].argsort(descending=True, stable=True)
        order = order[found["scores"][order] >= min_score]
        height, width = self.size or (image.height, image.width)
        ratios = torch.tensor([image.width / width, image.height / height])
        results = {name: found[name][order] for name in ("boxes", "labels", "scores")}
        results["boxes"] = results["boxes"] * ratios.repeat(2)
        if "masks" in found:
            size = (image.height, image.width)
            # a few at a time: four hundred masks of a large picture would not fit in memory as floats
            parts = found["masks"][order].split(32) if len(order) else ()
            grown = [interpolate(part[None].float(), size, mode="bilinear")[0] > 0.5 for part in parts]
            results["masks"] = torch.cat([torch.zeros(0, *size, dtype=torch.bool), *grown])
        return results

    def prediction(self, image: Image.Image) -> Prediction:
        found = self.results(image, self.min_score)
        things = Things(found["boxes"], found["labels"], found["scores"], found.get("masks"))
        return box_prediction(image, things, *self.classes(), self.min_score)

    iou_threshold = 0.5
    """Two boxes of a class that overlap more are one thing; a file does not say what its model takes."""

    def things(self, images: Sequence[Image.Image]) -> list[Things]:
        """What is in each picture, one after another, in its own resolution: smaller pictures are padded."""
        return [self._unstretched(image) for image in images]

    def _unstretched(self, image: Image.Image) -> Things:
        found = self.results(_padded(image, self.size or (image.height, image.width)), self.min_score)
        ends = torch.tensor([image.width, image.height])
        inside = (found["boxes"][:, :2] < ends).all(1)  # other boxes lie in the padding
        boxes = found["boxes"][inside].minimum(ends.repeat(2))
        masks = found["masks"][inside, : image.height, : image.width] if "masks" in found else None
        return Things(boxes, found["labels"][inside], found["scores"][inside], masks)

    def classes(self) -> tuple[list[str], list[tuple[int, int, int]]]:
        names = self.names or []
        return names, self.colours(max(len(names), 1))


class _Restored(Restoring, FilePredictor):
    def __init__(self, *arguments: Any):
        FilePredictor.__init__(self, *arguments)
        self.scale, self.degradation = self.preparation["scale"], self.preparation["degradation"]

    def restored(self, inputs: Tensor) -> Tensor:
        """Pictures (B, 3, s H, s W) in 0..1, one after another."""
        return torch.cat([self.run(255 * one[None])[0] for one in inputs]) / 255

    def results(self, image: Image.Image) -> dict[str, Tensor]:
        (prediction,) = self.predict([image])
        return {"restored": to_pixels(prediction.restored)}


_PREDICTORS = {
    "classification": _Classes,
    "segmentation": _Labels,
    "panoptic": _Segments,
    "detection": _Boxes,
    "restoration": _Restored,
}

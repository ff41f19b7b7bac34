"""Predictions of classifiers, and the form that all predictors share."""

from collections.abc import Callable, Sequence
from typing import Protocol

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn

from terrazzo.tools.predict.prediction import Prediction, by_shape, class_prediction


class Engine(Protocol):
    """What every kind of model is for `predictor.Predictor`."""

    def predict(self, images: Sequence[Image.Image]) -> list[Prediction]:
        """The predictions of pictures in RGB; they run together where the model can."""
        ...


class ClassPredictor:
    """Names the five likeliest classes of a picture.

    Args:
        model: from normalised (B, 3, H, W) to logits (B, classes).
        transform: from a picture to the model's input, without the batch dimension.
        names: class names; None for numbers.
        device: where to compute.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Callable[[Image.Image], Tensor],
        names: Sequence[str] | None,
        device: torch.device,
    ):
        self.model, self.transform, self.names, self.device = model.to(device).eval(), transform, names, device

    def predict(self, images: Sequence[Image.Image]) -> list[Prediction]:
        inputs = [(image, self.transform(image)) for image in images]
        return by_shape(inputs, lambda item: item[1].shape, self._together)

    @torch.inference_mode()
    def _together(self, inputs: list[tuple[Image.Image, Tensor]]) -> list[Prediction]:
        logits = self.model(torch.stack([pixels for _, pixels in inputs]).to(self.device)).float()
        scores = logits.softmax(1).cpu().numpy()
        return [class_prediction(image, own, self.names) for (image, _), own in zip(inputs, scores)]


def timm_predictor(model: nn.Module, device: torch.device) -> ClassPredictor:
    """The predictor of a timm classifier, with the preparation and class names that timm knows for it."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return ClassPredictor(model, transform, timm_class_names(model), device)


def timm_class_names(model: nn.Module) -> list[str] | None:
    """The class names of a timm classifier: from its weights, or ImageNet's for 1000 classes; None if not known."""
    given = model.pretrained_cfg.get("label_names")
    if given:
        return list(given)
    subset = timm.data.infer_imagenet_subset(model)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(model.num_classes)]

"""Predictions of classifiers, and the form that all predictors share."""

from collections.abc import Callable, Sequence

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn

from terrazzo.tools.predict.prediction import Prediction, class_prediction

Predictor = Callable[[Image.Image], Prediction]


class ClassPredictor:
    """Names the five likeliest classes of a picture.

    Args:
        model: from a normalised (1, 3, H, W) to logits (1, classes).
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

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Prediction:
        logits = self.model(self.transform(image)[None].to(self.device))[0].float()
        return class_prediction(image, logits.softmax(0).cpu().numpy(), self.names)


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

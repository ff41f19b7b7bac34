"""How far a changed ViT's features are from the unchanged model's, on pictures; and the passes to be timed."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from terrazzo.tools.data.floors import FloorMaker
from terrazzo.tools.data.pictures import find_pictures, to_tensor
from terrazzo.tools.inspect.maps import last_map, map_cosine

POOLED, MAP = "cosine of the vector", "cosine of the map"
DRIFT, AGREEMENT = "drift of the vector", "agreement"
_FLOORS = 16  # pictures that are drawn if the user names none


def inputs(model: nn.Module, places: Sequence[Path], size: tuple[int, int] | None = None) -> torch.Tensor:
    """Pictures as the model takes them, (B, 3, H, W).

    Args:
        places: pictures or folders of pictures; drawn pictures if there are none.
        size: (H, W), cut from the middle of the pictures; None for timm's transform of the model.
    """
    config = resolve_model_data_config(model)
    if places:
        pictures = [picture.read() for picture in find_pictures(places)]
    else:
        maker = FloorMaker(0, max(size or config["input_size"][1:]))
        pictures = [Image.fromarray(maker.make().image) for _ in range(_FLOORS)]
    if size is not None:
        return torch.cat([to_tensor(picture, size, config["mean"], config["std"], crop=True) for picture in pictures])
    transform = create_transform(**config, is_training=False)
    return torch.stack([transform(picture) for picture in pictures])


class Seen(NamedTuple):
    """What a model makes of one image: the vector that it classifies (C,), its best class, its last map."""

    vector: torch.Tensor
    best: int | None
    map: torch.Tensor


@torch.inference_mode()
def seen(model: nn.Module, images: torch.Tensor) -> list[Seen]:
    """What a model makes of images (B, 3, H, W), computed one by one.

    Reducers may keep more tokens where a map is needed, so the vector comes from a pass without maps.
    """
    found = []
    for image in images.split(1):
        features = model.forward_features(image)
        best = model.forward_head(features).argmax().item() if model.num_classes else None
        vector = model.forward_head(features, pre_logits=True).squeeze(0)
        found.append(Seen(vector, best, last_map(model, image)))
    return found


def drift(whole: Sequence[Seen], reduced: Sequence[Seen]) -> dict[str, float]:
    """Means over the images.

    The cosine and the relative distance of vectors, the cosine of the positions of maps, and the part of the images
    with the same best class, if there are classes.
    """
    found: dict[str, list[float]] = {}
    for one, other in zip(whole, reduced):
        figures = {
            POOLED: F.cosine_similarity(one.vector, other.vector, dim=0).item(),
            DRIFT: ((other.vector - one.vector).norm() / one.vector.norm()).item(),
            MAP: map_cosine(one.map, other.map),
        }
        if one.best is not None:
            figures[AGREEMENT] = float(one.best == other.best)
        for metric, value in figures.items():
            found.setdefault(metric, []).append(value)
    return {metric: sum(values) / len(values) for metric, values in found.items()}


def passes(models: Mapping[str, nn.Module], images: torch.Tensor, batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """For each model a pass over `batch` of the images (N, 3, H, W), which repeat if there are fewer; run once each."""
    many = torch.cat([images] * -(-batch // len(images)))[:batch]
    calls = {name: partial(_infer, model, many) for name, model in models.items()}
    for call in calls.values():
        call()
    return calls


@torch.inference_mode()
def _infer(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images)

"""The last feature map of any timm model, and how near two of them are."""

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.errors import InputError, first_line


@torch.inference_mode()
def last_map(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w): the model's last map, normalised by its last norm if the model has one.

    Raises:
        InputError: the model gives no maps, or cannot take images of this size.
    """
    base = getattr(model, "_model_args", {}).get("base")  # of a ViT that terrazzo changed
    name = base or model.pretrained_cfg.get("architecture", type(model).__name__)
    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"{name} gives no maps: timm has no forward_intermediates for it")
    size = tuple(images.shape[2:])
    try:
        return model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[-1]
    except InputError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"{name} cannot take {size[0]}x{size[1]} images: {first_line(error)}") from error


def map_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean cosine over the positions of two maps (B, C, h, w)."""
    return F.cosine_similarity(one.float(), other.float()).mean().item()

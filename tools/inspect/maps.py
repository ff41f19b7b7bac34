"""The last feature map of any timm model, and how near two of them are."""

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._hosts import KEPT
from terrazzo.errors import InputError, first_line


def maps_at(
    model: nn.Module, images: torch.Tensor, indices: int | list[int] | None = None, norm: bool = False
) -> list[torch.Tensor]:
    """Maps (B, C, h, w) of a model.

    Args:
        model: of timm.
        images: (B, 3, H, W).
        indices: as in timm's `forward_intermediates`: which maps, how many of the last ones, or None for all.
        norm: whether the model's last norm is applied.

    Raises:
        InputError: the model gives no maps, has no such map, or cannot take images of this size.
    """
    cfg = model.pretrained_cfg
    name = cfg.get(KEPT, {}).get("base") or cfg.get("architecture", type(model).__name__)
    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"{name} gives no maps: timm has no forward_intermediates for it")
    size = tuple(images.shape[2:])
    try:
        return model.forward_intermediates(images, indices=indices, norm=norm, intermediates_only=True)
    except InputError:
        raise
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        levels = f" for the maps {indices}" if isinstance(indices, list) else ""
        raise InputError(f"{name} cannot take {size[0]}x{size[1]} images{levels}: {first_line(error)}") from error


@torch.inference_mode()
def last_map(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w): the model's last map, normalised by its last norm if the model has one. See `maps_at`."""
    return maps_at(model, images, 1, norm=True)[-1]


def map_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean cosine over the positions of two maps (B, C, h, w)."""
    return F.cosine_similarity(one.float(), other.float()).mean().item()

"""mmengine's containers and batch norm, and what models of OpenMMLab share: modes, and losses over a rank's pixels."""

from typing import Any

from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._norms import batch_norm
from terrazzo.spatial._operators import own
from terrazzo.spatial._part import Part


def as_tensors(part: Part, model: nn.Module, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
    """A model's `forward(images)`, which gives its head's maps. Its other modes need the whole image."""
    if mode != "tensor":
        raise InputError(
            f"across ranks {type(model).__name__} gives its head's maps, as model(images), and has no mode '{mode}'"
        )
    return own(model, inputs, data_samples, mode)


def refused_loss(part: Part, module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """A loss of OpenMMLab, which is a mean over a rank's pixels."""
    raise InputError(
        f"{part.at} is a mean over the pixels of one rank: compute the loss from the maps, as a sum over own pixels "
        "divided by the count of all ranks' pixels (docs/spatial.md)"
    )


_OWN = ("Sequential", "ModuleList", "ModuleDict", "BaseDataPreprocessor", "ImgDataPreprocessor")
ENTRIES = {**dict.fromkeys(_OWN, OWN), "_BatchNormXd": Entry(batch_norm)}

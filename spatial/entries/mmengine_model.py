"""mmengine's containers and batch norm, and the refusal of losses that models of OpenMMLab share."""

from typing import Any

from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._norms import batch_norm
from terrazzo.spatial._part import Part


def no_loss(part: Part, module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """A loss of OpenMMLab that is not done across ranks."""
    raise InputError(
        f"{part.at} is a {type(module).__name__} of one rank's pixels, and not a share of the loss of all pixels: "
        "compute the loss from the maps, as a sum over own pixels divided by the count of all ranks' pixels, or train "
        "a segmentor with mmsegmentation's CrossEntropyLoss (docs/spatial.md)"
    )


_OWN = ("Sequential", "ModuleList", "ModuleDict", "BaseDataPreprocessor", "ImgDataPreprocessor")
ENTRIES = {**dict.fromkeys(_OWN, OWN), "_BatchNormXd": Entry(batch_norm)}

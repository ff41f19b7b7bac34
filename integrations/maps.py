"""Maps of any timm model with `features_only`, and what a detector must know about them."""

from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn

from terrazzo.backbones._names import check_name
from terrazzo.errors import InputError


class Maps(nn.Module):
    """A timm model that returns feature maps B C H W, finest first.

    Attributes:
        channels: Channels of each map.
        strides: Stride of each map.
    """

    def __init__(self, name: str, pretrained: bool = False, out_indices: Sequence[int] | None = None, **kwargs: Any):
        """Args:
        name: A model of terrazzo or timm.
        out_indices: The stages whose maps are returned; None for the model's default.
        **kwargs: Arguments of the model.

        Raises:
            InputError: There is no such model, or its strides do not double from map to map.
        """
        super().__init__()
        check_name(name)
        if out_indices is not None:
            kwargs["out_indices"] = tuple(out_indices)
        self.body = timm.create_model(name, pretrained=pretrained, features_only=True, **kwargs)
        self.channels: list[int] = list(self.body.feature_info.channels())
        self.strides: list[int] = list(self.body.feature_info.reduction())
        if any(coarse != 2 * fine for fine, coarse in zip(self.strides, self.strides[1:])):
            raise InputError(
                f"the maps of {name} have strides {self.strides}, but each must be twice the stride before: "
                "choose other out_indices; a plain model of terrazzo takes pyramid=True"
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.body(x)

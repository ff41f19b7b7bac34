"""What every restoration network shares: any size of pictures, strict loading, checkpointing."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from terrazzo.backbones._checks import check_image
from terrazzo.backbones._weights import load_strictly
from terrazzo.restoration._reflection import lengthened


class RestorationModel(nn.Module):
    """A network from pictures (B, C, H, W) to pictures (B, C, upscale H, upscale W), both about in [0, 1].

    A subclass implements `restore`. `forward` makes its input large enough: it reflects pixels beyond the right and the
    bottom border, and cuts their result off again.

    Attributes:
        tasks: What the authors train it for, in words of `terrazzo.degradations`; `terrazzo list` prints them.
        upscale: Factor of both sides, a whole number.
        in_chans: Channels of pictures.
        multiple: Sides that `restore` takes are multiples of this number.
        grad_checkpointing: Whether the backward pass computes blocks again, and keeps no activations.
        num_classes: 0, which timm asks for when it loads weights.
    """

    tasks: tuple[str, ...] = ()
    multiple = 1
    num_classes = 0

    def __init__(self, upscale: int = 1, in_chans: int = 3):
        super().__init__()
        self.upscale, self.in_chans = upscale, in_chans
        self.grad_checkpointing = False

    def least_side(self) -> int:
        """The shortest side that `restore` takes."""
        return self.multiple

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """As `forward`, for sides that are multiples of `multiple`, at least `least_side()`."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Restore pictures (B, in_chans, H, W) of any size.

        Raises:
            InputError: `x` is not a batch of pictures.
        """
        check_image(x, self.in_chans)
        height, width = x.shape[2:]
        for axis in (2, 3):
            x = lengthened(x, axis, self.multiple, self.least_side())
        out = self.restore(x)
        return out[:, :, : self.upscale * height, : self.upscale * width]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Like PyTorch's. If strict, it also takes official checkpoints, and names with a prefix: see `load_strictly`.

        Raises:
            WeightsError: the weights do not fit.
        """
        load = partial(super().load_state_dict, strict=strict, assign=assign)
        return load_strictly(self, state_dict, load) if strict else load(state_dict)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, as timm's optimizers ask for them."""
        return set()

"""The shift of a temporal interlacing network (Shao et al., 2020): groups of channels move along time."""

import torch
from torch import Tensor


def tin_shift_forward(input: Tensor, shift: Tensor, output: Tensor) -> None:
    """Fills `output` with the input moved to later frames, 0 where nothing moves in.

    Args:
        input: batch, frames, channels, pixels.
        shift: batch x groups, whole frames; one for each group of neighbouring channels.
        output: as `input`, filled in place.
    """
    frames, channels = input.shape[1:3]
    shift = shift.long().repeat_interleave(channels // shift.shape[1], dim=1)  # batch channels
    source = torch.arange(frames, device=input.device)[:, None] - shift[:, None]  # batch frames channels
    inside = (source >= 0) & (source < frames)
    moved = input.gather(1, source.clamp(0, frames - 1)[..., None].expand_as(input))
    output.copy_(torch.where(inside[..., None], moved, 0))


def tin_shift_backward(grad_output: Tensor, shift: Tensor, grad_input: Tensor) -> None:
    """Fills `grad_input` with `grad_output` moved as the forward moves its input.

    The true derivative moves it the other way. mmcv's compiled operator does not: its tests fix the numbers, and
    published models were trained with it, so this operator does the same.
    """
    tin_shift_forward(grad_output, shift, grad_input)

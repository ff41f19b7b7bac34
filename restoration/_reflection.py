"""Pictures that are made larger by reflection, for networks that take multiples of a number only."""

import torch

from terrazzo.kernels.dispatch.exporting import is_exporting, is_open


def lengthened(x: torch.Tensor, axis: int, multiple: int, least: int = 1) -> torch.Tensor:
    """Reflect an axis at its end, the border pixel once, again and again if it is short.

    By indices, because PyTorch's reflection pads by less than the side, and exporters fix its amount. Sides that an
    exporter leaves open are not compared: the file would take only the sides with the result of the example.

    Args:
        axis: Which axis.
        multiple: The new length is a multiple of this number, or `least`.
        least: The shortest new length.
    """
    length = x.shape[axis]
    wanted = (length + multiple - 1) // multiple * multiple if multiple > 1 else length
    if is_exporting() and is_open(length):
        wanted = torch.sym_max(wanted, least)
    elif (wanted := max(wanted, least)) == length:
        return x
    places = torch.arange(wanted, device=x.device)
    period = places.new_full((), 2 * length - 2).clamp(min=1)  # exporters take the remainder of tensors alone
    places = torch.remainder(places, period)
    return x.index_select(axis, torch.minimum(places, period - places))

"""Active rotating filters (Zhou et al., 2017, section 3.1): every rotation of a filter, by a table of positions."""

from torch import Tensor


def active_rotated_filter_forward(input: Tensor, indices: Tensor, output: Tensor) -> None:
    """Fills `output` with the rotated filters.

    Args:
        input: filters, planes, orientations, H, W.
        indices: orientations, H, W, rotations; where a rotation puts each entry of a plane, counted from 1.
        output: filters * rotations, planes * orientations, H, W; filled in place.
    """
    places, entries = _places(indices, input)
    rotated = entries.new_zeros(places.shape).scatter_(3, places, entries.expand_as(places))
    output.copy_(rotated.reshape(output.shape))


def active_rotated_filter_backward(grad_out: Tensor, indices: Tensor, grad_in: Tensor) -> None:
    """Fills `grad_in` with the gradient of `active_rotated_filter_forward` with respect to its input."""
    places, _ = _places(indices, grad_in)
    gradient = grad_out.reshape(places.shape).gather(3, places).sum(1, keepdim=True)
    grad_in.copy_(gradient.reshape(grad_in.shape))


def _places(indices: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (filters rotations planes entries) and the entries of the filters, with one rotation."""
    entries = filters.flatten(2)[:, None]
    places = indices.flatten(0, 2).T.long() - 1  # rotations entries
    return places[None, :, None].expand(len(filters), -1, filters.shape[1], -1), entries

"""Point-wise spatial attention (Zhao et al., 2018, section 3.2): relative attention maps made absolute."""

import torch
from torch import Tensor

COLLECT, DISTRIBUTE = 0, 1


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Fills `output` with the attention between all pairs of pixels, 0 where a mask does not reach.

    Args:
        input: batch, h_mask x w_mask, rows, columns; each pixel's attention to the pixels around it.
        output: batch, pixels, rows, columns; for 0 (collect) each pixel's attention along the second axis, for 1
            (distribute) along the last two. Filled in place.
        psa_type: 0 collect, 1 distribute.
        num_: the batch's size.
        h_feature: rows of the map.
        w_feature: columns of the map.
        h_mask: rows of a mask.
        w_mask: columns of a mask.
        half_h_mask: the mask's row of the pixel itself.
        half_w_mask: the mask's column of the pixel itself.
    """
    masks = input.unflatten(1, (h_mask, w_mask))
    # For a pixel in row h, the pixel in row r is in row r - h + half of its mask.
    down, across = torch.arange(h_feature, device=input.device), torch.arange(w_feature, device=input.device)
    rows = down[:, None] - down + half_h_mask
    columns = across[:, None] - across + half_w_mask
    attention = _pick(masks, rows, columns).flatten(3).flatten(1, 2)  # batch, seen pixels, seeing pixels
    output.copy_((attention if psa_type == COLLECT else attention.mT).reshape(output.shape))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Fills `grad_input` with the gradient of `psamask_forward` by its input; arguments as there."""
    attention = grad_output.flatten(2)
    attention = attention if psa_type == COLLECT else attention.mT
    attention = attention.unflatten(2, (h_feature, w_feature)).unflatten(1, (h_feature, w_feature))
    device = grad_output.device
    rows = torch.arange(h_mask, device=device)[:, None] + torch.arange(h_feature, device=device) - half_h_mask
    columns = torch.arange(w_mask, device=device)[:, None] + torch.arange(w_feature, device=device) - half_w_mask
    grad_input.copy_(_pick(attention, rows, columns).flatten(1, 2))


def _pick(source: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Element (b, i, j, h, w) is source[b, rows[i, h], columns[j, w], h, w], or 0 where that is outside."""
    inside_rows = (rows >= 0) & (rows < source.shape[1])
    inside_columns = (columns >= 0) & (columns < source.shape[2])
    picked = source[
        :,
        rows.clamp(0, source.shape[1] - 1)[:, None, :, None],
        columns.clamp(0, source.shape[2] - 1)[:, None, :],
        torch.arange(source.shape[3], device=source.device)[:, None],
        torch.arange(source.shape[4], device=source.device),
    ]
    return torch.where(inside_rows[:, None, :, None] & inside_columns[:, None, :], picked, 0)

"""The two halves of a convolution at chosen pixels only: windows as columns, and results put back."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Fills `col` with the window of each chosen pixel, 0 off the map.

    Args:
        im: 1 C H W.
        mask_h_idx: rows of the N pixels.
        mask_w_idx: columns of the N pixels.
        col: C x kernel_h x kernel_w, N, filled in place.
        kernel_h: rows of a window.
        kernel_w: columns of a window.
        pad_h: rows from a window's first to its pixel.
        pad_w: columns from a window's first to its pixel.
    """
    # The far edges are padded by the whole window, so that no window can reach past the padding.
    padded = F.pad(im[0], (pad_w, kernel_w - 1, pad_h, kernel_h - 1))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows, columns].flatten(0, 2))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Puts the column of each chosen pixel in its place.

    Args:
        col: channels x N.
        mask_h_idx: rows of the N pixels.
        mask_w_idx: columns of the N pixels.
        im: 1, channels, height, width; written at the pixels.
        height: height of `im`.
        width: width of `im`.
        channels: channels of `im`.
    """
    im[0][:, mask_h_idx, mask_w_idx] = col.to(im.dtype)

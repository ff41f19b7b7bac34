"""Neighborhood attention by its definition: gather every query's neighbors, then softmax. Slow, but authoritative.

Source: Neighborhood Attention Transformer (arXiv 2204.07143, section 3.1) and Dilated Neighborhood Attention
Transformer (arXiv 2209.15001, section 3), with the window arithmetic of their released operators.
"""

import torch


def axis_neighbors(
    length: int, kernel: int, dilation: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The neighbors of every position along one axis.

    Position i is member p = i div dilation of residue class r = i mod dilation, which has n members. Its window is the
    `kernel` members from clamp(p - kernel div 2, 0, n - kernel): shifted inward at a border, never padded.

    Returns:
        neighbors: (length, kernel) positions.
        offsets: (length, kernel) indices into the bias table, key minus query in members, plus kernel - 1.
    """
    position = torch.arange(length, device=device)
    residue = position % dilation
    member = position // dilation
    members = (length - residue + dilation - 1) // dilation
    start = torch.minimum((member - kernel // 2).clamp(min=0), members - kernel)
    neighbor = start[:, None] + torch.arange(kernel, device=device)
    return neighbor * dilation + residue[:, None], neighbor - member[:, None] + kernel - 1


def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """Neighborhood attention on a map, by gathering.

    Args:
        query, key, value: (B, H, W, heads, head_dim), any floating dtype.
        rpb: (heads, 2 * kernel_h - 1, 2 * kernel_w - 1) or None; added unscaled, at key minus query.
        kernel_size, dilation: per axis; the map must hold kernel * dilation positions per axis.
        scale: factor of the product of query and key.

    Returns:
        (B, H, W, heads, head_dim). Memory: kernel_h * kernel_w times key and value.
    """
    height, width = query.shape[1:3]
    rows, row_offsets = axis_neighbors(height, kernel_size[0], dilation[0], query.device)
    columns, column_offsets = axis_neighbors(width, kernel_size[1], dilation[1], query.device)
    key = key[:, rows][:, :, :, columns]  # B H K W K heads D
    value = value[:, rows][:, :, :, columns]
    score = torch.einsum("bywhd,byiwjhd->bywhij", query * scale, key)
    if rpb is not None:
        bias = rpb.to(score.dtype)[:, row_offsets[:, None, :, None], column_offsets[None, :, None, :]]
        score = score + bias.permute(1, 2, 0, 3, 4)  # heads H W K K -> H W heads K K
    weight = score.flatten(-2).softmax(-1).view_as(score)
    return torch.einsum("bywhij,byiwjhd->bywhd", weight, value)

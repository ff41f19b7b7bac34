"""The order of the corners of overlaps of rotated boxes, from which `mmcv.ops` computes differentiable areas."""

import torch
from torch import Tensor

CORNERS = 8
"""The first vertices are the corners of the two boxes; no overlap has more corners than they have together."""


def diff_iou_rotated_sort_vertices_forward(vertices: Tensor, mask: Tensor, num_valid: Tensor) -> Tensor:
    """Orders the corners of overlaps around their middle.

    Args:
        vertices: B x N x 24 x 2, relative to the middle of the valid vertices: the corners of both boxes, then 16
            crossings of their sides.
        mask: B x N x 24, which vertices are corners of the overlap.
        num_valid: B x N, how many are.

    Returns:
        B x N x 9 int32: the indices of the corners in order, then the first again, then an invalid crossing, which the
        caller holds at zero, so that it adds no area. Overlaps with fewer than three corners have only that index.
    """
    angle = torch.atan2(vertices[..., 1], vertices[..., 0]).masked_fill(~mask, torch.inf)
    angle, order = angle.sort(dim=-1, stable=True)
    nearest = vertices.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, 2))
    # Equal boxes have each corner twice. Rounding puts equal points in any order, which changes no area, but there is
    # no room for more than eight.
    same = torch.zeros_like(mask)
    same[..., 1:] = torch.isclose(nearest[..., 1:, :], nearest[..., :-1, :], rtol=0.0, atol=1e-6).all(-1)
    valid = mask.gather(2, order) & ~(same & (num_valid > CORNERS).unsqueeze(-1))
    order = order.gather(2, torch.argsort((~valid).to(torch.uint8), dim=-1, stable=True))
    count = valid.sum(-1, keepdim=True).clamp(max=CORNERS)
    place = torch.arange(CORNERS + 1, device=vertices.device)
    crossings = mask[..., CORNERS:]
    unused = CORNERS + crossings.to(torch.uint8).argmin(-1, keepdim=True)
    index = torch.where(place < count, order[..., : CORNERS + 1], torch.where(place == count, order[..., :1], unused))
    return torch.where(count < 3, unused, index).to(torch.int32)

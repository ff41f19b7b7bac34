"""Feature refinement (Yang et al., R3Det, 2021, section 3.2): adds to each pixel the features at its refined box."""

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import computable, gradients
from terrazzo.openmmlab.ops._pixels import bag_sums, bilinear, pixel_rows


def rotated_feature_align_forward(
    features: Tensor, best_bboxes: Tensor, output: Tensor, spatial_scale: float, points: int
) -> None:
    """Fills `output` with the features plus the sum of bilinear samples at each pixel's box.

    Args:
        features: B C H W.
        best_bboxes: B H W 5, as centre y and x, width, height in image pixels, angle in radians.
        output: B C H W, filled in place.
        spatial_scale: map pixels per image pixel.
        points: 1 samples the centre, 5 the corners as well.
    """
    output.copy_(_align(computable(features), computable(best_bboxes), spatial_scale, points))


def rotated_feature_align_backward(
    top_grad: Tensor, best_bboxes: Tensor, bottom_grad: Tensor, spatial_scale: float, points: int
) -> None:
    """Fills `bottom_grad` with the gradient of `rotated_feature_align_forward` with respect to its features."""
    (gradient,) = gradients(
        lambda features: _align(features, computable(best_bboxes), spatial_scale, points),
        (torch.zeros_like(computable(bottom_grad)),),  # linear: its gradient is the same at every input
        top_grad,
    )
    bottom_grad.copy_(gradient)


def _align(features: Tensor, boxes: Tensor, spatial_scale: float, points: int) -> Tensor:
    batch, _, height, width = features.shape
    y, x, box_width, box_height, angle = boxes.flatten(0, 2).unbind(1)
    y, x = (y * spatial_scale)[:, None], (x * spatial_scale)[:, None]
    if points > 1:
        half_width, half_height = box_width * spatial_scale / 2, box_height * spatial_scale / 2
        cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
        right = half_width[:, None] * half_width.new_tensor([0, 1, -1, -1, 1])
        down = half_height[:, None] * half_height.new_tensor([0, 1, 1, -1, -1])
        y, x = y + right * sine + down * cosine, x + right * cosine - down * sine
    image = torch.arange(batch, device=boxes.device).repeat_interleave(height * width)[:, None].expand_as(y)
    pixels, weights = bilinear(image, y, x, height, width)  # B*H*W points 4
    counts = torch.full_like(image[:, 0], 4 * points)
    sums = bag_sums(pixel_rows(features), pixels.flatten(), weights.flatten(), counts)
    return features + sums.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)

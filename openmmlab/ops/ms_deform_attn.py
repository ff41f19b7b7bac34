"""Multi-scale deformable attention (Zhu et al., 2021, equation 3), which mmcv calls on CUDA.

On the CPU mmcv calls its own PyTorch form. It is used here, too, so that both devices run the same code.
"""

from functools import partial

from torch import Tensor

from terrazzo.openmmlab.ops._numerics import at_least_single, gradients


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The weighted sum of bilinear samples, 0 off the map.

    Args:
        value: batch, pixels of all levels in sequence, heads, channels.
        value_spatial_shapes: levels x 2, rows and columns of each.
        value_level_start_index: not used; it follows from the shapes.
        sampling_locations: batch, queries, heads, levels, points, 2; (x, y), 0 to 1 from edge to edge of a map.
        attention_weights: batch, queries, heads, levels, points.
        im2col_step: not used; the whole batch is computed at once.

    Returns:
        Batch, queries, heads x channels, in the precision of `value`.
    """
    tensors = at_least_single(value, sampling_locations, attention_weights)
    return _attend(*tensors, shapes=value_spatial_shapes.tolist()).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Fills the three gradients; arguments as in the forward."""
    *tensors, gradient = at_least_single(value, sampling_locations, attention_weights, grad_output)
    found = gradients(partial(_attend, shapes=value_spatial_shapes.tolist()), tensors, gradient)
    for target, source in zip((grad_value, grad_sampling_loc, grad_attn_weight), found):
        target.copy_(source)


def _attend(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[list[int]]) -> Tensor:
    """The attention in mmcv's PyTorch form; arguments as in the forward."""
    # Imported late: mmcv.ops imports this package's operators first.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

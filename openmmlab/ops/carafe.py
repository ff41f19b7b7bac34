"""CARAFE (Wang et al., 2019, equation 3): upsampling in which each new pixel weights its source's neighbourhood."""

from functools import partial
from itertools import product

import torch.nn.functional as F
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import at_least_single, gradients


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fills `output` with the upsampled features, and `rfeatures` with the features, for mmcv's backward pass.

    Args:
        features: B C H W.
        masks: B, groups x kernel taps, H x scale, W x scale; the weights.
        rfeatures: as `features`, filled in place.
        routput: scratch, not used.
        rmasks: scratch, not used.
        output: B, C, H x scale, W x scale, filled in place.
        kernel_size: side of the neighbourhood, odd.
        group_size: groups of channels; each group has its own weights.
        scale_factor: new pixels per pixel and axis.
    """
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fills `bottom_grad` and `mask_grad`, the gradients by features and weights; four scratch tensors are not used."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Fills `output` with the upsampled features; arguments as in `carafe_forward`."""
    output.copy_(_reassemble(*at_least_single(features, masks), kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fills `bottom_grad` and `mask_grad`, the gradients by features and weights; arguments as in the forward."""
    gradient, *tensors = at_least_single(top_grad, features, masks)
    sizes = dict(kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor)
    found = gradients(partial(_reassemble, **sizes), tensors, gradient)
    for target, source in zip((bottom_grad, mask_grad), found):
        target.copy_(source)


def _reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """The upsampled features; arguments as in `carafe_forward`."""
    height, width = features.shape[2:]
    padded = F.pad(features, (kernel_size // 2,) * 4).unflatten(1, (group_size, -1))
    weights = masks.unflatten(3, (width, scale_factor)).unflatten(2, (height, scale_factor))
    weights = weights.unflatten(1, (group_size, -1))  # B groups taps H scale W scale
    total = 0
    # One tap at a time: all taps at once would copy the features kernel_size^2 times.
    for tap, (row, column) in enumerate(product(range(kernel_size), repeat=2)):
        window = padded[..., row : row + height, column : column + width]  # B groups channels H W
        total = total + weights[:, :, tap, None] * window[..., :, None, :, None]
    return total.flatten(5, 6).flatten(3, 4).flatten(1, 2)

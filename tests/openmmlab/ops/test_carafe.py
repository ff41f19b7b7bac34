"""CARAFE, compared with its definition."""

from itertools import product

import pytest
import torch

import terrazzo.openmmlab  # noqa: F401

KERNEL, GROUPS, SCALE = 3, 2, 2


def arguments():
    torch.manual_seed(0)
    features = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    masks = torch.randn(2, KERNEL**2 * GROUPS, 6, 8, dtype=torch.float64, requires_grad=True)
    return features, masks


def plain_carafe(features, masks):
    batch, channels, height, width = features.shape
    result = features.new_zeros(batch, channels, height * SCALE, width * SCALE)
    for b, c, y, x in product(range(batch), range(channels), range(height * SCALE), range(width * SCALE)):
        group = c // (channels // GROUPS)
        for i, j in product(range(KERNEL), repeat=2):
            row, column = y // SCALE + i - KERNEL // 2, x // SCALE + j - KERNEL // 2
            if 0 <= row < height and 0 <= column < width:
                weight = masks[b, (group * KERNEL + i) * KERNEL + j, y, x]
                result[b, c, y, x] += weight * features[b, c, row, column]
    return result


@pytest.mark.parametrize("name", ["carafe", "carafe_naive"])
def test_values(name):
    import mmcv.ops

    features, masks = (tensor.detach() for tensor in arguments())
    operator = getattr(mmcv.ops, name)
    expected = plain_carafe(features, masks)
    torch.testing.assert_close(operator(features, masks, KERNEL, GROUPS, SCALE), expected)
    turned = [tensor.mT.contiguous().mT for tensor in (features, masks)]
    torch.testing.assert_close(operator(*turned, KERNEL, GROUPS, SCALE), expected)
    for dtype in (torch.float16, torch.bfloat16):  # autocast leaves the softmax over the masks in float32
        result = operator(features.to(dtype), masks.float(), KERNEL, GROUPS, SCALE)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=0.02, atol=0.1)


@pytest.mark.long
def test_gradients():
    from mmcv import _ext
    from mmcv.ops import carafe

    features, masks = arguments()
    assert torch.autograd.gradcheck(lambda *tensors: carafe(*tensors, KERNEL, GROUPS, SCALE), (features, masks))
    # On a CPU, mmcv refuses the naive form's backward pass, so the test calls the operator directly.
    result = carafe(features, masks, KERNEL, GROUPS, SCALE)
    upstream = torch.randn_like(result)
    expected = torch.autograd.grad(result, (features, masks), upstream)
    found = torch.zeros_like(features), torch.zeros_like(masks)
    _ext.carafe_naive_backward(
        upstream, features, masks, *found, kernel_size=KERNEL, group_size=GROUPS, scale_factor=SCALE
    )
    torch.testing.assert_close(found, expected)

"""Deformable and point-wise spatial attention, compared with slow definitions."""

import math
from itertools import product

import pytest
import torch

import terrazzo.openmmlab  # noqa: F401

SHAPES = torch.tensor([(4, 3), (2, 5)])
STARTS = torch.tensor([0, 12])


def deformable_arguments(dtype=torch.float64):
    """Value, locations (some lie outside the maps) and weights: 2 heads of 3 channels, 4 queries, 2 points."""
    torch.manual_seed(0)
    value = torch.randn(2, 22, 2, 3, dtype=dtype)
    locations = torch.rand(2, 4, 2, 2, 2, 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(2, 4, 2, 2, 2, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


def plain_deformable_attention(value, locations, weights):
    batch, queries, heads, levels, points = weights.shape
    result = value.new_zeros(batch, queries, heads, value.shape[3])
    for b, q, h, level, p in product(*(range(size) for size in (batch, queries, heads, levels, points))):
        height, width = SHAPES[level].tolist()
        start = int(STARTS[level])
        maps = value[b, start : start + height * width, h].view(height, width, -1)
        x, y = (locations[b, q, h, level, p].detach() * torch.tensor([width, height]) - 0.5).tolist()
        for row, column in product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                result[b, q, h] += weights[b, q, h, level, p] * share * maps[row, column]
    return result.flatten(2)


def test_deformable_attention():
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    value, locations, weights = deformable_arguments()
    result = MultiScaleDeformableAttnFunction.apply(value, SHAPES, STARTS, locations, weights, 64)
    torch.testing.assert_close(result, plain_deformable_attention(value, locations, weights))


def test_gradients_of_deformable_attention():
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    value, locations, weights = (tensor[:1].detach().requires_grad_() for tensor in deformable_arguments())
    assert torch.autograd.gradcheck(
        lambda *tensors: MultiScaleDeformableAttnFunction.apply(tensors[0], SHAPES, STARTS, *tensors[1:], 64),
        (value, locations, weights),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_deformable_attention_in_half_precision(dtype):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    value, locations, weights = deformable_arguments()
    expected = MultiScaleDeformableAttnFunction.apply(value, SHAPES, STARTS, locations, weights, 64)
    half = value.detach().to(dtype).requires_grad_()
    result = MultiScaleDeformableAttnFunction.apply(half, SHAPES, STARTS, locations, weights, 64)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=0.1, atol=0.1)
    result.float().sum().backward()
    assert half.grad.dtype == dtype
    assert weights.grad.dtype == torch.float64


@pytest.mark.parametrize("mask", [(7, 5), (3, 3), (4, 2)])
@pytest.mark.parametrize("kind", ["collect", "distribute"])
def test_psa_mask(kind, mask):
    from mmcv.ops import PSAMask

    torch.manual_seed(0)
    height, width = 4, 3
    masks = torch.randn(2, mask[0] * mask[1], height, width, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, height * width, height, width, dtype=torch.float64)
    for b, y, x in product(range(2), range(height), range(width)):
        for row, column in product(range(height), range(width)):
            i, j = row - y + (mask[0] - 1) // 2, column - x + (mask[1] - 1) // 2
            if 0 <= i < mask[0] and 0 <= j < mask[1]:
                seen = masks[b, i * mask[1] + j, y, x].detach()
                if kind == "collect":
                    expected[b, row * width + column, y, x] = seen
                else:
                    expected[b, y * width + x, row, column] = seen
    layer = PSAMask(kind, mask)
    assert torch.equal(layer(masks), expected)
    assert torch.autograd.gradcheck(layer, masks)
    turned = masks.detach().mT.contiguous().mT
    assert torch.equal(layer(turned), expected)
    assert layer(masks.half()).dtype == torch.float16

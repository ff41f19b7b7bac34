"""Deformable convolutions, compared with plain convolutions, shifts, and a slow definition."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import terrazzo.openmmlab  # noqa: F401


def sample(maps, y, x):
    """The bilinear sample of maps (C H W) at a position that may lie outside; all three arguments have gradients."""
    total = maps.new_zeros(len(maps))
    top, left = math.floor(y.detach()), math.floor(x.detach())
    for row, column in product((top, top + 1), (left, left + 1)):
        if 0 <= row < maps.shape[1] and 0 <= column < maps.shape[2]:
            total = total + (1 - (y - row).abs()) * (1 - (x - column).abs()) * maps[:, row, column]
    return total


def plain_deform_conv(images, offset, mask, weight, stride, padding, dilation, groups, deform_groups):
    """Deformable convolution by its definition; stride, padding and dilation are (down, across)."""
    batch, channels, _, _ = images.shape
    filters, _, rows, columns = weight.shape
    offset = offset.unflatten(1, (deform_groups, rows, columns, 2))
    mask = mask.unflatten(1, (deform_groups, rows, columns))
    height, width = offset.shape[-2:]
    result = []
    for b, i, j in product(range(batch), range(height), range(width)):
        taps = []
        for row, column in product(range(rows), range(columns)):
            parts = []
            for group, maps in enumerate(images[b].chunk(deform_groups)):
                y = i * stride[0] - padding[0] + row * dilation[0] + offset[b, group, row, column, 0, i, j]
                x = j * stride[1] - padding[1] + column * dilation[1] + offset[b, group, row, column, 1, i, j]
                parts.append(sample(maps, y, x) * mask[b, group, row, column, i, j])
            taps.append(torch.cat(parts))
        window = torch.stack(taps, 1).unflatten(0, (groups, channels // groups)).flatten(1)
        kernels = weight.unflatten(0, (groups, filters // groups)).flatten(2)
        result.append(torch.einsum("gfk,gk->gf", kernels, window).flatten())
    return torch.stack(result, 1).unflatten(1, (batch, height, width)).transpose(0, 1)


STRIDE, PADDING, DILATION, GROUPS, DEFORM_GROUPS = (1, 2), (2, 1), (2, 1), 2, 2


def random_arguments():
    """Input, offset, mask and weight for the settings above, with a kernel of 2 x 3; all sizes are unequal."""
    torch.manual_seed(0)
    shapes = (2, 4, 4, 5), (2, 2 * 6 * 2, 6, 3), (2, 2 * 6, 6, 3), (6, 2, 2, 3)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("modulated", [False, True])
def test_values_and_gradients(modulated):
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    images, offset, mask, weight = random_arguments()
    settings = (STRIDE, PADDING, DILATION, GROUPS, DEFORM_GROUPS)
    if modulated:
        inputs = (images, offset, mask, weight)
        result = modulated_deform_conv2d(images, offset, mask, weight, None, *settings)
        expected = plain_deform_conv(images, offset, mask, weight, *settings)
    else:
        inputs = (images, offset, weight)
        result = deform_conv2d(images, offset, weight, *settings)
        expected = plain_deform_conv(images, offset, torch.ones_like(mask), weight, *settings)
    torch.testing.assert_close(result, expected)
    upstream = torch.randn_like(result)
    found = torch.autograd.grad(result, inputs, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_offsets_of_zero_make_a_convolution(dtype):
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    torch.manual_seed(0)
    images, weight, bias = torch.randn(2, 4, 9, 7), torch.randn(6, 2, 3, 3), torch.randn(6)
    settings = dict(stride=2, padding=2, dilation=2, groups=2)
    expected = F.conv2d(images, weight, **settings)
    zeros = torch.zeros(2, 18, *expected.shape[2:], dtype=dtype)
    result = deform_conv2d(images, zeros, weight, 2, 2, 2, 2)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02 if dtype != torch.bfloat16 else 0.1)
    halves = zeros[:, :9] + 0.5
    result = modulated_deform_conv2d(images, zeros, halves, weight, bias, 2, 2, 2, 2)
    expected = expected / 2 + bias[:, None, None]
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02 if dtype != torch.bfloat16 else 0.1)


def test_offsets_are_down_then_across_and_may_leave_the_map():
    from mmcv.ops import deform_conv2d

    images = torch.arange(20.0).view(1, 1, 4, 5)
    offset = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 4, 5)
    result = deform_conv2d(images, offset, torch.ones(1, 1, 1, 1))
    expected = torch.zeros(4, 5)
    expected[:3, 2:] = images[0, 0, 1:, :3]
    assert torch.equal(result[0, 0], expected)


def test_gradient_of_the_weight_alone_and_twice():
    from mmcv.ops import deform_conv2d

    images, offset, _, weight = (tensor.detach() for tensor in random_arguments())
    weight.requires_grad_()
    settings = (STRIDE, PADDING, DILATION, GROUPS, DEFORM_GROUPS)
    (alone,) = torch.autograd.grad(deform_conv2d(images, offset, weight, *settings).square().sum(), weight)
    images.requires_grad_()
    loss = deform_conv2d(images, offset, weight, *settings).square().sum()
    for factor in (1, 3):  # in the second call, scratch memory still holds values of the first
        both = torch.autograd.grad(factor * loss, (images, weight), retain_graph=True)
        torch.testing.assert_close(both[1], factor * alone)


def test_slope_by_the_offset_is_zero_where_taps_lie_on_the_padding():
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    images, weight = torch.rand(1, 1, 3, 3) + 1, torch.ones(1, 1, 1, 1)
    offset = torch.zeros(1, 2, 5, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(deform_conv2d(images, offset, weight, 1, 1).sum(), offset)
    mask = torch.ones(1, 1, 5, 5)
    (modulated,) = torch.autograd.grad(modulated_deform_conv2d(images, offset, mask, weight, None, 1, 1).sum(), offset)
    for found in (gradient, modulated):
        assert found[:, :, 1:4, 1:4].abs().min() > 0
        outside = found.clone()
        outside[:, :, 1:4, 1:4] = 0
        assert not outside.any()


def test_offset_that_is_not_a_number_samples_nothing():
    from mmcv.ops import deform_conv2d

    images, weight = torch.ones(1, 1, 4, 4, requires_grad=True), torch.ones(1, 1, 3, 3, requires_grad=True)
    offset = torch.zeros(1, 18, 4, 4)
    offset[0, 8, 1, 1] = math.nan
    offset[0, 9, 2, 2] = math.inf
    offset[0, 9, 2, 1] = -1e30
    result = deform_conv2d(images, offset.requires_grad_(), weight, 1, 1)
    assert result[0, 0, 1:3, 1:3].tolist() == [[8, 9], [8, 8]]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(result.sum(), (images, offset, weight)))


def test_memory_of_any_layout():
    from mmcv.ops import modulated_deform_conv2d

    tensors = random_arguments()
    turned = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in tensors]
    assert not any(tensor.is_contiguous() for tensor in turned)
    results = []
    for inputs in (tensors, turned):
        result = modulated_deform_conv2d(*inputs, None, STRIDE, PADDING, DILATION, GROUPS, DEFORM_GROUPS)
        results.append((result, *torch.autograd.grad(result.mT.square().sum(), inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
def test_automatic_mixed_precision(name):
    import mmcv.ops

    torch.manual_seed(0)
    layer = getattr(mmcv.ops, name)(4, 6, 3, padding=1)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    images = torch.randn(2, 4, 8, 8)
    expected = layer(images)
    expected.square().sum().backward()
    gradients = {key: value.grad for key, value in layer.named_parameters()}
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(images)
    result.float().square().sum().backward()
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0.1, atol=0.1)
    for key, value in layer.named_parameters():
        assert value.grad.dtype == torch.float32
        error = (value.grad - gradients[key]).norm() / gradients[key].norm()
        assert error < 0.1, key


def test_offsets_of_a_larger_map_are_read_from_their_start():
    """DyHead uses a level's offsets for the next, smaller level; mmcv reads the first numbers of each image."""
    from mmcv.ops import modulated_deform_conv2d

    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64)
    large = [torch.rand(2, taps, 8, 9, dtype=torch.float64, requires_grad=True) for taps in (18, 9)]
    small = [
        part.detach().flatten(1)[:, : taps * 20].reshape(2, taps, 4, 5).requires_grad_()
        for part, taps in zip(large, (18, 9))
    ]
    found = modulated_deform_conv2d(images, *large, weight, None, 1, 1)
    expected = modulated_deform_conv2d(images, *small, weight, None, 1, 1)
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.square().sum().backward()
    for ours, theirs, taps in zip(large, small, (18, 9)):
        torch.testing.assert_close(ours.grad.flatten(1)[:, : taps * 20], theirs.grad.flatten(1))
        assert not ours.grad.flatten(1)[:, taps * 20 :].any()

"""The smaller operators, compared with slow definitions, mmcv's CPU forms and PyTorch's layers."""

import importlib
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import terrazzo.openmmlab  # noqa: F401
from terrazzo.errors import InputError

SINGLE = dict(rtol=1e-5, atol=1e-5)  # for results that mmcv's forms always compute in float32


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kernel", [1, 3, (3, 5)])
@pytest.mark.filterwarnings("ignore:.*addmm is deprecated")
def test_masked_conv(kernel):
    from mmcv.ops import MaskedConv2d

    torch.manual_seed(0)
    padding = tuple(size // 2 for size in kernel) if isinstance(kernel, tuple) else kernel // 2
    layer = MaskedConv2d(3, 4, kernel, padding=padding)
    images, mask = torch.randn(1, 3, 6, 7), torch.rand(1, 6, 7) > 0.6
    mask[0, 0, 0] = mask[0, -1, -1] = True
    with torch.no_grad():
        torch.testing.assert_close(layer(images, mask), layer(images) * mask)
        turned = images.mT.contiguous().mT
        torch.testing.assert_close(layer(turned, mask), layer(images) * mask)
        assert not layer(images, torch.zeros_like(mask)).any()


def test_masked_windows_reach_beyond_the_padding():
    from mmcv import _ext

    images = torch.arange(1.0, 13).view(1, 1, 3, 4)
    columns = torch.zeros(9, 2)
    places = torch.tensor([0, 2]), torch.tensor([0, 3])
    _ext.masked_im2col_forward(images, *places, columns, kernel_h=3, kernel_w=3, pad_h=0, pad_w=0)
    assert columns.T.tolist() == [[1, 2, 3, 5, 6, 7, 9, 10, 11], [12, 0, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tin_shift(dtype):
    from mmcv.ops import tin_shift

    torch.manual_seed(0)
    frames = torch.randn(2, 4, 6, 5).to(dtype).requires_grad_()
    shift = torch.tensor([[1, 0, -2], [-1, 5, 2]], dtype=torch.int32)

    def moved(tensor):
        result = torch.zeros_like(tensor)
        for b, t, c in product(range(2), range(4), range(6)):
            target = t + int(shift[b, c // 2])
            if 0 <= target < 4:
                result[b, target, c] = tensor[b, t, c]
        return result

    result = tin_shift(frames, shift)
    assert torch.equal(result, moved(frames.detach()))
    upstream = torch.randn_like(result)
    # mmcv's gradient shifts in the same direction again, which is not the derivative.
    assert torch.equal(torch.autograd.grad(result, frames, upstream)[0], moved(upstream))


def test_fused_bias_leakyrelu():
    from mmcv import _ext
    from mmcv.ops.fused_bias_leakyrelu import FusedBiasLeakyReLUFunction

    torch.manual_seed(0)
    for images in (double(2, 3, 4, 5), double(2, 3)):
        bias = double(3)
        expected = 1.5 * F.leaky_relu(images + bias.view(3, *[1] * (images.dim() - 2)), 0.2)
        torch.testing.assert_close(FusedBiasLeakyReLUFunction.apply(images, bias, 0.2, 1.5), expected)
    images = double(2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda *x: FusedBiasLeakyReLUFunction.apply(*x, 0.2, 1.5), (images, bias))
    assert torch.autograd.gradgradcheck(lambda x: FusedBiasLeakyReLUFunction.apply(x, bias.detach(), 0.2, 1.5), images)
    with pytest.raises(InputError, match="act=1"):
        _ext.fused_bias_leakyrelu(images, bias, images, act=1, grad=0, alpha=0.2, scale=1)


def plain_resampling(image, taps, up, down, padding, flip, gain):
    """The definition on a plane; up and down are (across, down), padding is left, right, top, bottom."""
    left, right, top, bottom = padding
    height, width = image.shape[0] * up[1] + top + bottom, image.shape[1] * up[0] + left + right
    spread = image.new_zeros(height, width)
    for y, x in product(range(image.shape[0]), range(image.shape[1])):
        row, column = y * up[1] + top, x * up[0] + left
        if 0 <= row < height and 0 <= column < width:
            spread[row, column] = image[y, x]
    rows, columns = taps.shape
    taps = taps if flip else taps.flip(0, 1)
    result = [
        [gain * (spread[y : y + rows, x : x + columns] * taps).sum() for x in range(0, width - columns + 1, down[0])]
        for y in range(0, height - rows + 1, down[1])
    ]
    return torch.tensor(result, dtype=image.dtype)


@pytest.mark.parametrize("up", [(1, 1), (2, 3)])
@pytest.mark.parametrize("down", [(1, 1), (3, 2)])
@pytest.mark.parametrize("padding", [(2, 1, 0, 3), (-1, 2, 3, -2)])
@pytest.mark.parametrize("flip", [False, True])
def test_upfirdn2d(up, down, padding, flip):
    from mmcv import _ext

    torch.manual_seed(0)
    images, taps = double(2, 2, 5, 4).detach(), torch.randn(2, 3, dtype=torch.float64)
    result = _ext.upfirdn2d(images, taps, *up, *down, *padding, flip, 1.5)
    expected = plain_resampling(images[1, 0], taps, up, down, padding, flip, 1.5)
    torch.testing.assert_close(result[1, 0], expected)
    half = _ext.upfirdn2d(images.half(), taps.float(), *up, *down, *padding, flip, 1.5)
    assert half.dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = _ext.upfirdn2d(images.float(), taps.float(), *up, *down, *padding, flip, 1.5)
    torch.testing.assert_close(single, result.float())
    torch.testing.assert_close(half.double(), result, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("shape", [(3, 2), (4,)])
@pytest.mark.filterwarnings("ignore:Since aten")
def test_gradients_of_upfirdn2d(shape):
    module = importlib.import_module("mmcv.ops.upfirdn2d")
    torch.manual_seed(0)
    taps = torch.randn(shape)
    settings = dict(up=2, down=(1, 3), padding=(2, 1, 3, 2), gain=2)
    operator = module._upfirdn2d_cuda(**settings)  # the part of mmcv that calls the compiled module, not its CPU form
    images = double(1, 2, 4, 3)
    expected = module._upfirdn2d_ref(images, taps, **settings)
    torch.testing.assert_close(operator.apply(images, taps), expected, **SINGLE)
    assert torch.autograd.gradcheck(lambda x: operator.apply(x, taps), images)
    assert torch.autograd.gradgradcheck(lambda x: operator.apply(x, taps), images)


ACTIVATIONS = ["linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_bias_act(name, clamp):
    module = importlib.import_module("mmcv.ops.bias_act")
    torch.manual_seed(0)
    images, bias = double(2, 3, 2, 2), double(3)
    operator = module._bias_act_cuda(act=name, clamp=clamp)
    expected = module._bias_act_ref(images, bias, act=name, clamp=clamp)
    result = operator.apply(images, bias)
    torch.testing.assert_close(result, expected)
    if name == "linear" and clamp is not None:
        return  # mmcv does not pass the values that the clamp's gradient needs
    assert torch.autograd.gradcheck(operator.apply, (images, bias))
    assert torch.autograd.gradgradcheck(operator.apply, (images, bias))


def test_bias_act_on_another_axis_and_in_half_precision():
    module = importlib.import_module("mmcv.ops.bias_act")
    torch.manual_seed(0)
    images, bias = torch.randn(2, 3, 4).half(), torch.randn(4).half()
    result = module._bias_act_cuda(dim=2, act="swish").apply(images, bias)
    assert result.dtype == torch.float16
    expected = module._bias_act_ref(images.float(), bias.float(), dim=2, act="swish")
    torch.testing.assert_close(result.float(), expected, rtol=2e-3, atol=2e-3)


LRELU = dict(up=2, down=3, padding=(3, 2, 4, 1), gain=1.3, slope=0.1)


@pytest.mark.parametrize("shapes", [((3, 4), (2, 3)), ((4,), (3,))])
@pytest.mark.parametrize("clamp", [None, 0.6])
@pytest.mark.filterwarnings("ignore:Since aten")
@pytest.mark.filterwarnings("ignore:filtered_lrelu called")  # mmcv takes its generic path in float64
def test_filtered_lrelu(shapes, clamp):
    from mmcv import _ext

    module = importlib.import_module("mmcv.ops.filtered_lrelu")
    torch.manual_seed(0)
    taps = [torch.randn(shape) for shape in shapes]
    images, bias = double(1, 2, 6, 5), double(2)
    operator = module._filtered_lrelu_cuda(**LRELU, clamp=clamp)

    def apply(images, bias):
        return operator.apply(images, *taps, bias, None, 0, 0)

    result = apply(images, bias)
    expected = module._filtered_lrelu_ref(images, *taps, bias, **LRELU, clamp=clamp)
    torch.testing.assert_close(result, expected)
    upstream = torch.randn_like(result)
    found = torch.autograd.grad(result, (images, bias), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (images, bias), upstream), **SINGLE)
    assert torch.autograd.gradgradcheck(apply, (images, bias))
    # In float32, mmcv calls a single operator.
    limit = math.inf if clamp is None else clamp
    whole, signs, code = _ext.filtered_lrelu(
        images.detach().float(), *taps, bias.detach().float(), torch.empty(0), 2, 3, 3, 2, 4, 1, 0, 0, 1.3, 0.1, limit,
        False, True,
    )  # fmt: skip
    assert code == 0
    assert set(signs.unique().tolist()) == ({0, 1} if clamp is None else {0, 1, 2})
    torch.testing.assert_close(whole, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sync_bn_of_two_processes_is_batch_norm_of_both_their_batches(dtype):
    from mmcv import _ext

    torch.manual_seed(0)
    images, upstream = torch.randn(2, 4, 3, 10).to(dtype) * 2 + 1, torch.randn(2, 4, 3, 10).to(dtype)
    layer = torch.nn.BatchNorm1d(3, momentum=0.3)
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.uniform_(layer.bias)
    whole = images.flatten(0, 1).float().requires_grad_()
    expected = layer(whole)
    expected.backward(upstream.flatten(0, 1).float())

    def mean_over_processes(function, *arguments):
        """Replace mmcv's all_reduce; the arguments have an entry for each process."""
        totals = []
        for process in range(2):
            totals.append([torch.zeros(3), torch.zeros(3)][: 2 if function is _ext.sync_bn_backward_param else 1])
            function(*(argument[process] for argument in arguments), *totals[-1])
        return [(first + second) / 2 for first, second in zip(*totals)]

    (mean,) = mean_over_processes(_ext.sync_bn_forward_mean, images)
    (var,) = mean_over_processes(_ext.sync_bn_forward_var, images, [mean, mean])
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    norm, std, output = torch.zeros(2, 4, 3, 10), torch.zeros(3), torch.zeros_like(images)
    for process in range(2):
        statistics = (running_mean, running_var) if process == 0 else (None, None)
        _ext.sync_bn_forward_output(
            images[process], mean, var, layer.weight.detach(), layer.bias.detach(), *statistics,
            norm[process], std, output[process], eps=layer.eps, momentum=torch.tensor(0.3), group_size=2,
        )  # fmt: skip
    exact = dict(rtol=1e-5, atol=1e-5)
    close = exact if dtype == torch.float32 else dict(rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(output.flatten(0, 1).float(), expected.detach(), **close)
    torch.testing.assert_close(running_mean, layer.running_mean, **exact)
    torch.testing.assert_close(running_var, layer.running_var, **exact)
    grad_weight, grad_bias = mean_over_processes(_ext.sync_bn_backward_param, upstream, norm)
    torch.testing.assert_close(2 * grad_weight, layer.weight.grad, **exact)
    torch.testing.assert_close(2 * grad_bias, layer.bias.grad, **exact)
    grad_input = torch.zeros_like(images)
    for process in range(2):
        _ext.sync_bn_backward_data(
            upstream[process], layer.weight.detach(), grad_weight, grad_bias, norm[process], std, grad_input[process]
        )
    torch.testing.assert_close(grad_input.flatten(0, 1).float(), whole.grad, **close)


def test_sync_bn_layer(tmp_path):
    from mmcv.ops import SyncBatchNorm

    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        layer, plain = SyncBatchNorm(3), torch.nn.BatchNorm2d(3)
    finally:
        torch.distributed.destroy_process_group()
    torch.nn.init.ones_(layer.weight)
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    results = []
    for module in (layer, plain):
        inputs = images.clone().requires_grad_()
        output = module(inputs)
        output.pow(3).sum().backward()
        gradients = inputs.grad, module.weight.grad, module.bias.grad
        results.append((output, *gradients, module.running_mean, module.running_var))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        dict(kernel_size=1, max_displacement=2, stride=1, padding=0, dilation=1, dilation_patch=2),
        dict(kernel_size=3, max_displacement=1, stride=2, padding=1, dilation=2, dilation_patch=1),
    ],
)
def test_correlation(settings):
    from mmcv.ops import Correlation

    torch.manual_seed(0)
    first, second = double(2, 2, 6, 7), double(2, 2, 6, 7)
    layer = Correlation(**settings)
    result = layer(first, second)
    expected = torch.zeros_like(result)
    reach = settings["max_displacement"]
    for b, p, q, y, x in product(*(range(size) for size in result.shape)):
        for i, j in product(range(settings["kernel_size"]), repeat=2):
            row, column = (
                place * settings["stride"] - settings["padding"] + tap * settings["dilation"]
                for place, tap in ((y, i), (x, j))
            )
            other_row, other_column = (
                place + (step - reach) * settings["dilation_patch"] for place, step in ((row, p), (column, q))
            )
            if all(0 <= place < 6 for place in (row, other_row)) and all(
                0 <= place < 7 for place in (column, other_column)
            ):
                expected[b, p, q, y, x] += first[b, :, row, column] @ second[b, :, other_row, other_column]
    torch.testing.assert_close(result, expected.detach())
    upstream = torch.randn_like(result)
    found = torch.autograd.grad(result, (first, second), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (first, second), upstream))
    assert layer(first.half(), second.half()).dtype == torch.float16

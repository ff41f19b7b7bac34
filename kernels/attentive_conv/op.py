"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from terrazzo.kernels import backend as _backend
from terrazzo.kernels import opaque, triton_host
from terrazzo.kernels.attentive_conv import fused, portable, reference
from terrazzo.kernels.autocast import without_autocast
from terrazzo.kernels.call import Call
from terrazzo.kernels.exporting import is_exporting


def _asked(x: torch.Tensor, value: torch.Tensor, mixing: torch.Tensor) -> tuple[torch.device, torch.dtype, int]:
    """What a choice depends on: the device, the wider of the dtypes, the taps of a kernel."""
    return value.device, torch.promote_types(x.dtype, value.dtype), mixing.shape[0]


def _refusals(device: torch.device, dtype: torch.dtype, taps: int) -> tuple[dict[str, str], dict[str, str]]:
    return triton_host.refusals(device, dtype, fused.misfit(taps))


def choose(backend: str, device: torch.device, dtype: torch.dtype, taps: int) -> _backend.Choice:
    """The backend of a call on such tensors, and why."""
    return _backend.choose("attentive_conv", backend, *_refusals(device, dtype, taps), opaque=("fused", "portable"))


def _chosen(backend: str, device: torch.device, dtype: torch.dtype, taps: int) -> str:
    return choose(backend, device, dtype, taps).name


# Dynamo takes the choice at its value when tracing, as that of neighborhood attention.
_chosen._dynamo_marked_constant = True


def _fake(x, value, weight, bias, mixing, mixing_bias, inhibition, backend):
    shape = (value.shape[0], mixing.shape[0], value.shape[1])
    path = (x.new_empty(shape, dtype=portable.path_dtype(x)) for _ in range(3))
    return _empty_map(value, value.dtype), *path


@opaque.op("terrazzo::attentive_conv", _fake)
def _forward(
    x: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mixing: torch.Tensor,
    mixing_bias: torch.Tensor,
    inhibition: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, channels last, and (B, taps, C) each: the bins' means, these projected, the kernels."""
    form = fused if backend == "fused" else portable
    with without_autocast(value):  # it would round the means and the kernels
        return form.forward(x, value, weight, bias, mixing, mixing_bias, inhibition)


def _empty_map(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, C, H, W), channels last."""
    batch, channels, height, width = like.shape
    return like.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def _fake_gradients(grad, value, pooled, projected, kernels, weight, mixing, mixing_bias, inhibition, x_dtype, backend):
    like = (weight, weight[0], mixing, mixing_bias, inhibition)
    return _empty_map(value, x_dtype), _empty_map(value, value.dtype), *(x.new_empty(x.shape) for x in like)


@opaque.op("terrazzo::attentive_conv_backward", _fake_gradients)
def _backward(
    grad: torch.Tensor,
    value: torch.Tensor,
    pooled: torch.Tensor,
    projected: torch.Tensor,
    kernels: torch.Tensor,
    weight: torch.Tensor,
    mixing: torch.Tensor,
    mixing_bias: torch.Tensor,
    inhibition: torch.Tensor,
    x_dtype: torch.dtype,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    form = fused if backend == "fused" else portable
    with without_autocast(value):
        grad_x, grad_value, *others = form.backward(
            grad, value, pooled, projected, kernels, weight, mixing, mixing_bias, inhibition, x_dtype
        )
    like = (weight, weight, mixing, mixing, inhibition)
    return grad_x, grad_value, *(x.to(own.dtype).contiguous() for x, own in zip(others, like))


def _setup_context(ctx, inputs, output):
    x, value, weight, _, mixing, mixing_bias, inhibition, ctx.backend = inputs
    _, pooled, projected, kernels = output
    ctx.mark_non_differentiable(pooled, projected, kernels)
    ctx.x_dtype = x.dtype  # x itself is not kept
    ctx.save_for_backward(value, pooled, projected, kernels, weight, mixing, mixing_bias, inhibition)


def _autograd(ctx, grad, *_):
    return *_backward(grad, *ctx.saved_tensors, ctx.x_dtype, ctx.backend), None


opaque.register_gradient(_forward, _autograd, _setup_context)


@register_flop_formula(torch.ops.terrazzo.attentive_conv)
def _flops(x, value, weight, bias, mixing, mixing_bias, inhibition, backend, *args, out_shape=None, **kwargs) -> int:
    """The convolution, the projection of the bins and their mixing; means and activations are not counted."""
    batch, channels, height, width = value
    taps = mixing[0]
    return 2 * batch * channels * taps * (height * width + channels + taps)


@register_flop_formula(torch.ops.terrazzo.attentive_conv_backward)
def _backward_flops(
    grad, value, pooled, projected, kernels, weight, mixing, mixing_bias, inhibition, *args, **kwargs
) -> int:
    """Twice the forward pass: of each product, the gradients of both factors."""
    return 2 * _flops(value, value, weight, None, mixing, mixing_bias, inhibition, None)


def describe(device: torch.device, x, value, weight, bias, mixing, mixing_bias, inhibition, backend) -> Call:
    """What `terrazzo explain` says of a call of the op: see `terrazzo.kernels.call`."""
    refusals, discouraged = _refusals(device, *_asked(x, value, mixing)[1:])
    return Call(
        shape=dict(zip("BCHW", value.shape)),
        parameters={"kernel": str(math.isqrt(mixing.shape[0]))},
        refusals=refusals,
        discouraged=discouraged,
    )


def attend(x, value, weight, bias, mixing, mixing_bias, inhibition, backend) -> torch.Tensor:
    """Attentive convolution, arguments checked."""
    arguments = (x, value, weight, bias, mixing, mixing_bias, inhibition)
    if is_exporting():  # an exported graph holds standard operations only
        return portable.traced(*arguments)
    backend = _chosen(backend, *_asked(x, value, mixing))
    if backend == "reference":
        return reference.attentive_conv(*arguments)
    return _forward(*arguments, backend)[0]

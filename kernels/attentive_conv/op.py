"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

import math

import torch

from terrazzo.kernels.attentive_conv import exported, fused, fused_cpu, portable, reference
from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.dispatch.fused import Forms
from terrazzo.kernels.dispatch.operator import EXPORTED, Call, Needs, Operator


def _needs(x, value, weight, bias, mixing, *_) -> Needs:
    return Needs(value.device, torch.promote_types(x.dtype, value.dtype), fused.misfit(mixing.shape[0]))


def _describe(x, value, weight, bias, mixing, mixing_bias, inhibition, backend) -> Call:
    return Call(dict(zip("BCHW", value.shape)), {"kernel": str(math.isqrt(mixing.shape[0]))})


OPERATOR = Operator("attentive_conv", ("fused", "portable"), _needs, _describe, cpu=True)
_FORMS = Forms(fused, fused_cpu, portable)


def _fake(x, value, weight, bias, mixing, mixing_bias, inhibition, backend):
    shape = (value.shape[0], mixing.shape[0], value.shape[1])
    path = (x.new_empty(shape, dtype=accumulator(x)) for _ in range(3))
    return _empty_map(value, value.dtype), *path


def _flops(x, value, weight, bias, mixing, mixing_bias, inhibition, backend, *args, out_shape=None, **kwargs) -> int:
    """The convolution, the projection of the bins and their mixing; means and activations are not counted."""
    batch, channels, height, width = value
    taps = mixing[0]
    return 2 * batch * channels * taps * (height * width + channels + taps)


@OPERATOR.op(fake=_fake, flops=_flops)
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
    """The output, channels last, and three tensors (B, taps, C): the bins' means, their projection, the kernels."""
    form = _FORMS.of(value.device, backend)
    with without_autocast(value):  # autocast would round the means and the kernels
        return form.forward(x, value, weight, bias, mixing, mixing_bias, inhibition)


def _empty_map(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty (B, C, H, W), channels last."""
    batch, channels, height, width = like.shape
    return like.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def _fake_gradients(grad, value, pooled, projected, kernels, weight, mixing, mixing_bias, inhibition, x_dtype, backend):
    like = (weight, weight[0], mixing, mixing_bias, inhibition)
    return _empty_map(value, x_dtype), _empty_map(value, value.dtype), *(x.new_empty(x.shape) for x in like)


def _backward_flops(
    grad, value, pooled, projected, kernels, weight, mixing, mixing_bias, inhibition, *args, **kwargs
) -> int:
    """Twice the forward pass: both factors of each product have gradients."""
    return 2 * _flops(value, value, weight, None, mixing, mixing_bias, inhibition, None)


@OPERATOR.op("backward", fake=_fake_gradients, flops=_backward_flops)
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
    form = _FORMS.of(value.device, backend)
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


def run(x, value, weight, bias, mixing, mixing_bias, inhibition, backend) -> torch.Tensor:
    """Run attentive convolution; arguments are checked."""
    arguments = (x, value, weight, bias, mixing, mixing_bias, inhibition)
    form = OPERATOR.choose(backend, *arguments)
    if form == EXPORTED:
        return exported.forward(*arguments)
    if form == "reference":
        return reference.attentive_conv(*arguments)
    return _forward(*arguments, form)[0]

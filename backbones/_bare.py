"""When a model may use a layer's weights without calling the layer: only if this changes nothing for anybody.

Adapters, quantized layers, sharded parameters and hooks all act when a layer is called. So layers are called. Only an
unmodified PyTorch layer, with nothing attached, may be computed together with others, or in part.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as _everywhere
from torch.utils.module_tracker import ModuleTracker

from terrazzo.kernels.dispatch.exporting import is_exporting

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor)


def is_bare(*layers: nn.Module) -> bool:
    """Whether calling these layers does nothing but compute with their weights."""
    return not _all_are_watched() and all(_is_bare(layer) for layer in layers)


def _is_bare(layer: nn.Module) -> bool:
    if type(layer) not in _KINDS:  # an adapter around a layer, and a quantized, parametrized or sharded layer
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    weights = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
    return "forward" not in layer.__dict__ and all(type(weight) in _TENSORS for weight in weights)


def _all_are_watched() -> bool:
    """Whether a global module hook is set, other than PyTorch's tracker of the running module (for FLOP counts)."""
    hooks = (
        *_everywhere._global_forward_hooks.values(),
        *_everywhere._global_forward_pre_hooks.values(),
        *_everywhere._global_backward_hooks.values(),
        *_everywhere._global_backward_pre_hooks.values(),
    )
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def rows_of(linear: nn.Module, x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some output channels of a linear layer, (..., C) to (..., rows); a bare layer computes only these rows."""
    if not is_bare(linear):
        return linear(x)[..., rows]
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def on_sequences(x: torch.Tensor, *convs: nn.Conv1d) -> torch.Tensor:
    """Equal depthwise convolutions, each of an equal part of the channels: (B, L, C) to (B, L', C).

    Bare layers are computed as one convolution of a channels_last image with one row, without copying the input.
    """
    if not is_bare(*convs):
        return torch.cat(
            [conv(part).transpose(1, 2) for conv, part in zip(convs, x.transpose(1, 2).chunk(len(convs), 1))], -1
        )
    weight = torch.cat([conv.weight for conv in convs]).unsqueeze(2)
    bias = None if convs[0].bias is None else torch.cat([conv.bias for conv in convs])
    x = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight, bias, padding=(0, *convs[0].padding), groups=x.shape[2])
    return x.squeeze(2).transpose(1, 2)


def on_few_positions(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A 3x3 convolution of stride 2 on (B, H, W, C), padded by one; with another stride just the convolution.

    At each call PyTorch copies the weights to an order of its own, which takes longer than the convolution if the
    weights are larger than its input. There, on a CPU and without gradients, a bare layer is a matrix product.
    """
    height, width = ((length + 1) // 2 for length in x.shape[1:3])
    eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_exporting())
    if not (eager and x.device.type == "cpu" and is_bare(conv) and _is_large(conv, len(x) * height * width)):
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    windows = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 2).unfold(2, 3, 2)  # B H/2 W/2 C 3 3
    weight = conv.weight
    if weight.is_contiguous(memory_format=torch.channels_last):
        windows, weight = windows.permute(0, 1, 2, 4, 5, 3), weight.permute(0, 2, 3, 1)
    return F.linear(windows.flatten(3), weight.flatten(1), conv.bias)


def _is_large(conv: nn.Conv2d, positions: int) -> bool:
    """Whether a layer of stride 2 has larger weights than its input; in a stage that keeps its size it has stride 1."""
    return conv.stride == (2, 2) and conv.out_channels > positions


def step_sizes(linear: nn.Module, x: torch.Tensor, times: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear layer's output, and a bias (D,) to add to it; their sum contains the layer's bias `times` times.

    A bare layer's bias is not added here, so that a scan can add it in float32.
    """
    if is_bare(linear):
        return F.linear(x, linear.weight), times * linear.bias
    delta = times * linear(x / times)
    return delta, delta.new_zeros(delta.shape[-1])

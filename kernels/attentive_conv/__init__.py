"""Attentive convolution: depthwise convolution with kernels that are computed from the map, for each sample."""

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.attentive_conv import op
from terrazzo.kernels.dispatch import arguments

__all__ = ["attentive_conv"]

_SIDES = (3, 5, 7, 9)


def _check(x, value, weight, bias, mixing, mixing_bias, inhibition) -> None:
    """Raise `InputError` for arguments that the definition does not allow."""
    given = {"x": x, "value": value, "weight": weight, "bias": bias, "mixing": mixing, "mixing_bias": mixing_bias}
    arguments.check_tensors({**given, "inhibition": inhibition})
    if x.dim() != 4 or x.shape != value.shape:
        raise InputError(f"x and value must have one shape (B, C, H, W), got {tuple(x.shape)} and {tuple(value.shape)}")
    # Not while tracing: the comparison would add a guard that an open size is not 0.
    if not torch.compiler.is_compiling() and arguments.any_empty(*value.shape[1:]):
        raise InputError(f"x and value must have at least one channel and one position, got {tuple(value.shape)}")
    channels, taps = value.shape[1], mixing.shape[0] if mixing.dim() else 0
    if not any(taps == side * side for side in _SIDES):  # no square root: the number may be symbolic
        raise InputError(f"mixing must have a row for each tap of a kernel (9, 25, 49 or 81), got {taps}")
    for name, found, wanted in (
        ("weight", weight, (channels, channels)),
        ("bias", bias, (channels,)),
        ("mixing", mixing, (taps, taps)),
        ("mixing_bias", mixing_bias, (taps,)),
        ("inhibition", inhibition, (channels,)),
    ):
        if tuple(found.shape) != wanted:
            raise InputError(f"{name} must have shape {wanted}, got {tuple(found.shape)}")


def attentive_conv(
    x: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mixing: torch.Tensor,
    mixing_bias: torch.Tensor,
    inhibition: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """Depthwise convolution of `value` with kernels that are computed from `x`, for each sample and channel.

    `x` is projected and averaged over bins, one bin for each tap of a kernel. Bins are intervals of the map flattened
    row by row: horizontal bands with borders that depend on both sides of the map. GELU and a linear map, which all
    channels share, turn the bins of a channel into its kernel. Lateral inhibition then subtracts sigmoid(inhibition)
    times the kernel's mean. Outside the map the value is zero.

    Args:
        x, value: (B, C, H, W), any strides, B may be 0; fastest with channels last, the layout of the result.
        weight, bias: (C, C) and (C,), the projection of `x`.
        mixing, mixing_bias: (K * K, K * K) and (K * K,), the linear map; kernel K is 3, 5, 7 or 9, its taps in rows.
        inhibition: (C,), a logit.
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.

    Returns:
        A tensor like `value`. The means and kernels are computed in float32 at least, under autocast too.

    Raises:
        InputError: A shape or dtype that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.

    Source: Attentive Convolution, arXiv 2510.20092, without the projections of the value and of the result.
    """
    _check(x, value, weight, bias, mixing, mixing_bias, inhibition)
    return op.run(x, value, weight, bias, mixing, mixing_bias, inhibition, backend)

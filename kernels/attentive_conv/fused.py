"""Attentive convolution in Triton: which calls can run, how a call is cut into blocks, and the launches.

The kernels are in fused_pool.py, fused_generate.py and fused_convolve.py, which import triton; this file does so at the
first launch. Every launch is decided by shapes and types alone, and nothing is summed by atomics, so the same call
gives the same bits. PyTorch computes the projection of the bins, `taps` rows for each image.
"""

import torch

from terrazzo.kernels.attentive_conv import portable
from terrazzo.kernels.triton_host.machine import is_amd, on_device

_KERNEL = 3
_TAPS = _KERNEL * _KERNEL
_BLOCK_T = 16
# Positions of a program: _TILE x _TILE in the convolution, _BLOCK_L at a time in fused_pool.py; see README.md.
_TILE = 8
_BLOCK_L = 32
# The most positions that one program averages.
_SPLIT = 512


def misfit(taps: int) -> str | None:
    return None if taps == _TAPS else f"computes kernels of {_TAPS} taps ({_KERNEL} x {_KERNEL}), not of {taps}"


def block_c(channels: int) -> int:
    """Channels of a program: 64, or 32 if this leaves fewer lanes idle."""
    return 32 if 0 < channels % 64 <= 32 else 64


def warps(channels: int, amd: bool = False) -> int:
    """Warps of every kernel: 16 numbers of a tile for each thread, so that no GPU spills registers (README.md)."""
    return block_c(channels) // (16 if amd else 8)


def _sequence(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) as a contiguous (B, H, W, C): a view of a channels-last map, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def _cuts(shape: torch.Size) -> tuple[int, int, dict[str, int]]:
    """Tiles down and across a map (B, H, W, C), and the constants that its kernels are compiled with."""
    _, height, width, channels = shape
    constants = dict(CHANNELS=channels, BLOCK_C=block_c(channels), num_warps=warps(channels, is_amd()))
    return -(-height // _TILE), -(-width // _TILE), constants


def _blocks_c(constants: dict[str, int]) -> int:
    return -(-constants["CHANNELS"] // constants["BLOCK_C"])


def _pool(x: torch.Tensor) -> torch.Tensor:
    from terrazzo.kernels.attentive_conv import fused_pool

    batch, height, width, channels = x.shape
    _, _, constants = _cuts(x.shape)
    length = height * width
    splits = max(1, -(-length // (_TAPS * _SPLIT)))
    partial = x.new_empty(batch, _TAPS, splits, channels, dtype=torch.float32)
    grid = (batch * _TAPS * splits, _blocks_c(constants))
    fused_pool.pool[grid](x, partial, length, splits, TAPS=_TAPS, BLOCK_L=_BLOCK_L, **constants)
    return partial[:, :, 0] if splits == 1 else partial.sum(2)


def forward(
    x: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mixing: torch.Tensor,
    mixing_bias: torch.Tensor,
    inhibition: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attentive convolution; arguments and results as in `portable.forward`."""
    from terrazzo.kernels.attentive_conv import fused_convolve, fused_generate

    x, value = _sequence(x), _sequence(value)
    mixing, mixing_bias, inhibition = (part.contiguous() for part in (mixing, mixing_bias, inhibition))
    tiles_h, tiles_w, constants = _cuts(value.shape)
    with on_device(value.device):
        pooled = _pool(x)
        projected = portable.project(pooled, weight, bias)
        kernels = torch.empty_like(projected)
        batch, blocks = len(value), _blocks_c(constants)
        fused_generate.generate[batch, blocks](
            projected, mixing, mixing_bias, inhibition, kernels, TAPS=_TAPS, BLOCK_T=_BLOCK_T, **constants
        )
        out = torch.empty_like(value)
        fused_convolve.convolve[batch * tiles_h * tiles_w, blocks](
            value,
            kernels,
            out,
            *value.shape[1:3],
            tiles_h,
            tiles_w,
            KERNEL=_KERNEL,
            TILE=_TILE,
            **constants,
        )
    return out.permute(0, 3, 1, 2), pooled, projected, kernels


def backward(
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
) -> tuple[torch.Tensor, ...]:
    """Gradients; arguments and results as in `portable.backward`."""
    from terrazzo.kernels.attentive_conv import fused_convolve, fused_generate, fused_pool

    grad, value = _sequence(grad), _sequence(value)
    mixing, mixing_bias, inhibition = (part.contiguous() for part in (mixing, mixing_bias, inhibition))
    tiles_h, tiles_w, constants = _cuts(value.shape)
    batch, height, width, channels = value.shape
    tiles, blocks = tiles_h * tiles_w, _blocks_c(constants)
    with on_device(value.device):
        grad_value = torch.empty_like(value)
        partial = kernels.new_empty(batch, tiles, _TAPS, channels)
        fused_convolve.convolve_backward[batch * tiles, blocks](
            grad,
            value,
            kernels,
            grad_value,
            partial,
            height,
            width,
            tiles_h,
            tiles_w,
            KERNEL=_KERNEL,
            TILE=_TILE,
            **constants,
        )
        grad_projected = torch.empty_like(projected)
        partial_mixing = kernels.new_empty(batch * blocks, _TAPS, _TAPS + 1)
        partial_inhibition = kernels.new_empty(batch, channels)
        fused_generate.generate_backward[batch, blocks](
            projected,
            mixing,
            mixing_bias,
            inhibition,
            partial[:, 0] if tiles == 1 else partial.sum(1),
            grad_projected,
            partial_mixing,
            partial_inhibition,
            TAPS=_TAPS,
            BLOCK_T=_BLOCK_T,
            **constants,
        )
        grad_mixing = partial_mixing.sum(0)
        grad_pooled, grad_weight, grad_bias = portable.projection_gradients(grad_projected, pooled, weight)
        grad_x = torch.empty_like(value, dtype=x_dtype)
        length = height * width
        blocks_l = -(-length // _BLOCK_L)
        fused_pool.spread[batch * blocks_l, blocks](
            grad_pooled, grad_x, length, blocks_l, TAPS=_TAPS, BLOCK_L=_BLOCK_L, **constants
        )
    maps = (grad_x.permute(0, 3, 1, 2), grad_value.permute(0, 3, 1, 2))
    return *maps, grad_weight, grad_bias, grad_mixing[:, :_TAPS], grad_mixing[:, _TAPS], partial_inhibition.sum(0)

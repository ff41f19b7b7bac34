"""Grouped linear layers in Triton: how a call is cut into blocks, and the launches.

The kernels are in fused_kernels.py, which imports triton; this file does so at the first launch. Every launch is
decided by shapes and types alone, and nothing is added up by atomics, so the same call gives the same bits. Only the
device knows the sizes of the groups.
"""

from dataclasses import dataclass

import torch

from terrazzo.kernels.triton_host.machine import block_of, interpreted, on_device, precision


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut into blocks and compiled: rows, channels out and channels in per block, warps, stages."""

    rows: int
    outs: int
    ins: int
    warps: int
    stages: int

    def constants(self, kernel, groups: int, dtype: torch.dtype) -> dict[str, object]:
        """The constants that a kernel is compiled with."""
        return dict(
            BLOCK_E=block_of(groups),
            BLOCK_N=self.rows,
            BLOCK_O=self.outs,
            BLOCK_I=self.ins,
            PRECISION=precision(dtype),
            INTERPRETED=interpreted(kernel),
            num_warps=self.warps,
            num_stages=self.stages,
        )


def blocks(kernel: str, itemsize: int) -> Blocks:
    """The blocks of one kernel ("rows", "weights"): a rule, not an autotuner.

    Found by compiling for compute capabilities 8.0, 9.0 and 10.0 and for gfx942 (README.md), not by timing.
    """
    if itemsize == 2:
        return Blocks(64, 64, 64, 4, 3) if kernel == "rows" else Blocks(64, 64, 64, 4, 2)
    return Blocks(32, 32, 32, 4, 2)


def tiles(rows: int, groups: int, size: int) -> int:
    """An upper bound of the number of blocks of `size` rows: each group may end with a block that is not full.

    Programs past the last block do nothing.
    """
    return rows // size + min(groups, rows)


def _rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    """The product of each row with the matrix of its group, (groups, out, in) of any strides."""
    from terrazzo.kernels.grouped_linear import fused_kernels

    groups, channels_out, channels_in = weight.shape
    out = x.new_empty(x.shape[0], channels_out)
    if out.numel() == 0:
        return out
    cut = blocks("rows", x.dtype.itemsize)
    grid = (tiles(x.shape[0], groups, cut.rows) * -(-channels_out // cut.outs),)
    with on_device(x.device):
        fused_kernels.rows[grid](
            x,
            weight,
            x if bias is None else bias.contiguous(),
            offsets,
            out,
            groups,
            channels_out,
            channels_in,
            *x.stride(),
            *weight.stride(),
            HAS_BIAS=bias is not None,
            **cut.constants(fused_kernels.rows, groups, x.dtype),
        )
    return out


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    """Grouped linear layers; arguments as in `terrazzo.kernels.grouped_linear`."""
    return _rows(x, weight, bias, offsets.contiguous())


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to x, weight and bias (whether or not there is one). Deterministic."""
    from terrazzo.kernels.grouped_linear import fused_kernels

    offsets = offsets.contiguous()
    grad_x = _rows(grad, weight.transpose(1, 2), None, offsets)
    groups, channels_out, channels_in = weight.shape
    grad_weight, grad_bias = weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])
    cut = blocks("weights", x.dtype.itemsize)
    grid = (groups * -(-channels_out // cut.outs) * -(-channels_in // cut.ins),)
    constants = cut.constants(fused_kernels.weights, groups, x.dtype)
    del constants["BLOCK_E"]
    with on_device(x.device):
        fused_kernels.weights[grid](
            grad,
            x,
            offsets,
            grad_weight,
            grad_bias,
            channels_out,
            channels_in,
            *grad.stride(),
            *x.stride(),
            **constants,
        )
    return grad_x, grad_weight, grad_bias

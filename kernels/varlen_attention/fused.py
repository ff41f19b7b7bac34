"""Attention within sequences in Triton: which calls can run, how a call is cut into blocks, and the launches.

The kernels are in fused_kernels.py, which imports triton; this file does so at the first launch. Every launch is
decided by shapes and types alone, and nothing is added up by atomics, so the same call gives the same bits. Only the
device knows the lengths of the sequences.
"""

import math
from dataclasses import dataclass

import torch

from terrazzo.kernels.triton_host.blocks import Blocks
from terrazzo.kernels.triton_host.machine import on_device


def blocks(kernel: str, head_dim: int, itemsize: int) -> Blocks:
    """The blocks of one kernel ("forward", "queries", "keys"): a rule, not an autotuner.

    Found by compiling for compute capabilities 8.0, 9.0 and 10.0 and for gfx942 (README.md), not by timing.
    """
    if itemsize == 2:
        if head_dim <= 64:
            return Blocks(64, 64, 4, 2)
        return {"forward": Blocks(64, 64, 8, 2), "queries": Blocks(64, 32, 4, 2), "keys": Blocks(32, 64, 4, 2)}[kernel]
    if kernel == "forward":
        return Blocks(32, 32, 4 if head_dim <= 64 else 8, 2)
    return Blocks(32 if head_dim <= (64 if kernel == "queries" else 32) else 16, 32, 4, 2)


@dataclass(frozen=True)
class _Call:
    """What all launches of one call share: its tensors as the kernels take them, its sizes, strides and constants."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.key, self.value, self.cu_seqlens

    def cut(self, kernel: str) -> tuple[tuple[int], tuple, dict[str, object]]:
        """The grid of a kernel, its numbers, and its constants."""
        from terrazzo.kernels.varlen_attention import fused_kernels

        _, heads, head_dim = self.query.shape
        found = blocks(kernel, head_dim, self.query.dtype.itemsize)
        tiles = -(-self.max_seqlen // (found.keys if kernel == "keys" else found.queries))
        strides = (stride for x in self.tensors[:3] for stride in x.stride()[:2])
        constants = found.constants(fused_kernels.forward, head_dim, self.query.dtype)
        grid = ((len(self.cu_seqlens) - 1) * heads * tiles,)
        return grid, (1 / math.sqrt(head_dim), heads, tiles, *strides), constants


def _call(query, key, value, cu_seqlens, max_seqlen: int) -> _Call:
    """Prepare a call; tensors whose vectors are not contiguous are copied."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return _Call(query, key, value, cu_seqlens.contiguous(), max_seqlen)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within sequences; arguments as in `terrazzo.kernels.varlen_attention`.

    Returns:
        out: (tokens, heads, D), contiguous.
        lse: (tokens, heads) float32, the logarithm of the sum of each row's exponentials, for `backward`.
    """
    from terrazzo.kernels.varlen_attention import fused_kernels

    call = _call(query, key, value, cu_seqlens, max_seqlen)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    grid, numbers, constants = call.cut("forward")
    with on_device(query.device):
        fused_kernels.forward[grid](*call.tensors, out, lse, *numbers, **constants)
    return out, lse


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward` with respect to query, key and value, given its outputs. Deterministic."""
    from terrazzo.kernels.varlen_attention import fused_kernels

    call = _call(query, key, value, cu_seqlens, max_seqlen)
    grads = tuple(torch.empty_like(out) for _ in range(3))
    if grad.numel() == 0:
        return grads
    grad, delta = grad.contiguous(), torch.empty_like(lse)
    with on_device(query.device):
        grid, numbers, constants = call.cut("queries")
        fused_kernels.backward_queries[grid](*call.tensors, out, lse, grad, delta, grads[0], *numbers, **constants)
        grid, numbers, constants = call.cut("keys")
        fused_kernels.backward_keys[grid](*call.tensors, lse, grad, delta, *grads[1:], *numbers, **constants)
    return grads

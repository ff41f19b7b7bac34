"""Strip attention in Triton: which calls can run, how a call is cut into blocks, and the launches.

The kernels are in fused_kernels.py, which imports triton; this file does so at the first launch. Every launch is
decided by shapes and types alone, never by timing, so the same call gives the same bits.
"""

from dataclasses import dataclass

import torch

from terrazzo.kernels.triton_host.blocks import Blocks
from terrazzo.kernels.triton_host.machine import on_device

# The number of programs that fill a large GPU a few times over. With fewer blocks of keys, the queries are split.
_PROGRAMS = 512
_LEAST_ROWS = 256


def blocks(kernel: str, itemsize: int) -> Blocks:
    """The blocks of one kernel ("forward", "queries", "keys"): a rule, not an autotuner.

    Found by compiling for compute capabilities 8.0, 9.0 and 10.0 and for gfx942 (README.md), not by timing.
    """
    if itemsize == 2:
        return Blocks(32, 64, 4, 2) if kernel == "keys" else Blocks(64, 32, 4, 2)
    return Blocks(32 if kernel == "forward" else 16, 32, 4, 2)


def splits(programs: int, queries: int) -> tuple[int, int]:
    """The number of parts into which the queries of a block of keys are cut, and the queries of a part.

    Args:
        programs: the number of blocks of keys of all images and heads.
    """
    count = max(1, min(_PROGRAMS // programs, queries // _LEAST_ROWS))
    rows = -(-queries // count)
    rows = -(-rows // 32) * 32  # whole blocks of queries
    return -(-queries // rows), rows


@dataclass(frozen=True)
class _Call:
    """What all launches of one call share: its tensors as the kernels take them, its sizes, strides and constants."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Query, key, value, and the smallest and largest key of each image and head."""
        return self.query, self.key, self.value, *torch.aminmax(self.key, dim=1)

    @property
    def strides(self) -> tuple[int, ...]:
        return *self.query.stride(), *self.key.stride(), *self.value.stride()[:3]

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Queries, keys, heads."""
        return self.query.shape[1], *self.value.shape[1:3]

    @property
    def items(self) -> int:
        """The number of heads of all images."""
        return self.query.shape[0] * self.query.shape[2]

    def cut(self, kernel: str) -> tuple[Blocks, dict[str, object]]:
        from terrazzo.kernels.strip_attention import fused_kernels

        head_dim, dtype = self.value.shape[3], self.value.dtype
        found = blocks(kernel, dtype.itemsize)
        return found, found.constants(fused_kernels.forward, head_dim, dtype)


def _call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> _Call:
    """Prepare a call: queries and keys of any strides are read in place; values are copied if not contiguous."""
    return _Call(query, key, value if value.stride(-1) == 1 else value.contiguous())


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Strip attention.

    Args:
        query, key: (B, N, heads) and (B, L, heads).
        value: (B, L, heads, D).

    Returns:
        out: (B, N, heads, D), contiguous.
        sums: (B, heads, N) float32, for `backward`: the sum of the exponentials of each row, with query * key minus the
            row's maximum as exponents.
    """
    from terrazzo.kernels.strip_attention import fused_kernels

    call = _call(query, key, value)
    queries, _, heads = call.lengths
    out = torch.empty(*query.shape, value.shape[3], dtype=value.dtype, device=value.device)
    sums = torch.empty(query.shape[0], heads, queries, dtype=torch.float32, device=value.device)
    if out.numel() == 0:
        return out, sums
    cut, constants = call.cut("forward")
    parts = -(-queries // cut.queries)
    with on_device(value.device):
        fused_kernels.forward[(call.items * parts,)](
            *call.tensors, out, sums, *call.lengths, parts, *call.strides, **constants
        )
    return out, sums


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward` with respect to query, key and value, given its `sums`. Deterministic."""
    from terrazzo.kernels.strip_attention import fused_kernels

    call = _call(query, key, value)
    queries, keys, _ = call.lengths
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    if grad.numel() == 0:
        return grads[0], grads[1].zero_(), grads[2].zero_()
    tensors, grad = call.tensors, grad.contiguous()
    delta = torch.empty_like(sums)
    with on_device(value.device):
        cut, constants = call.cut("queries")
        parts = -(-queries // cut.queries)
        fused_kernels.backward_queries[(call.items * parts,)](
            *tensors, sums, grad, delta, grads[0], *call.lengths, parts, *call.strides, **constants
        )
        cut, constants = call.cut("keys")
        parts = -(-keys // cut.keys)
        count, rows = splits(call.items * parts, queries)
        # If the queries are split, the programs' sums are added up afterwards, in float32.
        partial = [
            x.unsqueeze(0) if count == 1 else torch.empty(count, *x.shape, dtype=torch.float32, device=x.device)
            for x in grads[1:]
        ]
        fused_kernels.backward_keys[(call.items * parts * count,)](
            *tensors,
            sums,
            grad,
            delta,
            *partial,
            *call.lengths,
            parts,
            query.shape[0],
            count,
            rows,
            *call.strides,
            **constants,
        )
    if count > 1:
        grads[1:] = [found.sum(0).to(x.dtype) for found, x in zip(partial, grads[1:])]
    return tuple(grads)

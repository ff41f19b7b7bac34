"""Attention by a plan in Triton: which calls can run, how a call is cut into blocks, and the launches.

The kernels are in fused_kernels.py, which imports triton; this file does so at the first launch. Every launch is
decided by shapes and types alone, the host never waits for the device, and nothing is added up by atomics, so the same
call gives the same bits.
"""

from dataclasses import dataclass

import torch

from terrazzo.kernels.triton_host.blocks import Blocks
from terrazzo.kernels.triton_host.machine import block_of, on_device


def blocks(kernel: str, head_dim: int, itemsize: int, query_tile: int, key_tile: int) -> Blocks:
    """The blocks of one kernel ("forward", "queries", "keys"): a rule, not an autotuner.

    Found by compiling for compute capabilities 8.0, 9.0 and 10.0 and for gfx942 (README.md), not by timing.
    """
    if itemsize == 4:
        found = Blocks(16, 32, 8 if head_dim > 64 and kernel != "queries" else 4, 2)
    elif head_dim > 64:
        found = Blocks(32, 32, 4, 2)
    elif kernel == "forward" and head_dim <= 32:
        found = Blocks(64, 32, 4, 2)
    else:
        found = Blocks(32 if kernel == "keys" and head_dim > 32 else 64, 64, 4, 2)
    # A program has queries of one tile. In the backward pass of keys, it has keys of one block.
    queries = min(found.queries, block_of(query_tile))
    keys = min(found.keys, block_of(key_tile)) if kernel == "keys" else found.keys
    return Blocks(queries, keys, found.warps, found.stages)


@dataclass(frozen=True)
class _Call:
    """What all launches of one call share: its tensors as the kernels take them, its sizes, strides and constants.

    Attributes:
        index: (lists, L) int32, or None; `list_strides` are the steps between lists of neighbouring images, heads and
            tiles.
        length: (lists,) int32, the place after the last entry of each list.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    index: torch.Tensor | None
    length: torch.Tensor | None
    list_strides: tuple[int, int, int]
    query_tile: int
    key_tile: int
    scale: float

    @property
    def tiles(self) -> int:
        return -(-self.query.shape[2] // self.query_tile)

    @property
    def strides(self) -> tuple[int, ...]:
        bias = (0, 0) if self.bias is None else _steps(self.bias)[:2]
        return *(stride for x in (self.query, self.key, self.value) for stride in x.stride()[:3]), *bias

    def cut(self, kernel: str) -> tuple[Blocks, dict[str, object]]:
        from terrazzo.kernels.block_sparse_attention import fused_kernels

        head_dim, width = self.query.shape[-1], self.value.shape[-1]
        tile = self.key.shape[2] if self.index is None else self.key_tile
        found = blocks(kernel, max(head_dim, width), self.query.dtype.itemsize, self.query_tile, tile)
        constants = dict(
            found.constants(fused_kernels.forward, head_dim, self.query.dtype),
            VALUE_DIM=width,
            BLOCK_V=block_of(width),
            KEY_TILE=self.key_tile if self.index is not None else 1,
            LISTED=self.index is not None,
            BIASED=self.bias is not None,
        )
        return found, constants

    def of_queries(self, kernel: str) -> tuple[tuple[int], tuple, dict[str, object]]:
        """The grid, the numbers and the constants of a kernel whose programs have queries."""
        found, constants = self.cut(kernel)
        parts = -(-self.query_tile // found.queries)
        batch, heads, queries, _ = self.query.shape
        entries = 0 if self.index is None else self.index.shape[-1]
        numbers = (self.scale, heads, queries, self.key.shape[2], self.tiles, self.query_tile, entries, parts)
        return (batch * heads * self.tiles * parts,), (*numbers, *self.strides, *self.list_strides), constants

    def of_keys(self) -> tuple[tuple[int], tuple, dict[str, object]]:
        """The grid, the numbers and the constants of the kernel whose programs have keys."""
        found, constants = self.cut("keys")
        batch, heads, queries, _ = self.query.shape
        keys = self.key.shape[2]
        tile = keys if self.index is None else self.key_tile
        count, parts = -(-keys // tile), -(-tile // found.keys)
        numbers = (self.scale, heads, queries, keys, count, self.query_tile, parts)
        return (batch * heads * count * parts,), (*numbers, *self.strides), constants

    def transposed(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """For each block of keys of all images and heads, the tiles that list it, in their order.

        Returns:
            The tiles, block after block, and where each block's begin; int32.
        """
        if self.index is None:
            return None, None
        batch, heads = self.query.shape[:2]
        count = -(-self.key.shape[2] // self.key_tile)
        lists = torch.arange(batch * heads * self.tiles, device=self.index.device)
        head = lists // self.tiles
        own = (head // heads) * self.list_strides[0] + (head % heads) * self.list_strides[1]
        entry = self.index[own + (lists % self.tiles) * self.list_strides[2]]  # lists L
        real = (entry >= 0) & (entry < count)
        block = torch.where(real, entry + (head * count).unsqueeze(1), batch * heads * count)
        block, order = block.flatten().sort(stable=True)
        first = torch.searchsorted(block, torch.arange(batch * heads * count + 1, device=block.device))
        return (order // self.index.shape[-1] % self.tiles).int(), first.int()


def _steps(x: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor, 0 along axes of length 1, which broadcast."""
    return tuple(0 if size == 1 else step for size, step in zip(x.shape, x.stride()))


def _call(query, key, value, index, bias, query_tile: int, key_tile: int, scale: float) -> _Call:
    """Prepare a call; tensors whose vectors are not contiguous are copied."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    bias = None if bias is None else bias.contiguous()
    length, list_strides = None, (0, 0, 0)
    if index is None:
        query_tile = query.shape[2]
    else:
        index = index.contiguous()
        entries = index.shape[-1]
        list_strides = tuple(step // entries for step in _steps(index)[:3])
        place = torch.arange(1, entries + 1, device=index.device, dtype=torch.int32)
        length = torch.where(index >= 0, place, 0).amax(-1).flatten()
        index = index.view(-1, entries)
    return _Call(query, key, value, bias, index, length, list_strides, query_tile, key_tile, scale)


def _places(index: torch.Tensor, key: torch.Tensor, key_tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of one list for all queries: their numbers (B, H, K), and whether they are real."""
    within = torch.arange(key_tile, device=index.device)
    place = (index[:, :, 0, :, None].long() * key_tile + within).flatten(2).expand(*key.shape[:2], -1)
    real = (place >= 0) & (place < key.shape[2])
    return place.clamp(0, key.shape[2] - 1), real


def _gathered(key, value, index, bias, key_tile: int):
    """Keys, values and bias in the order of one list for all queries; places without a key have the bias -inf."""
    place, real = _places(index, key, key_tile)
    key, value = (x.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])) for x in (key, value))
    zero = torch.zeros((), dtype=torch.float32, device=key.device)
    found = zero if bias is None else bias.expand(*key.shape[:2], -1).gather(2, place)
    return key, value, torch.where(real, found, -torch.inf)


def _restored(grads: list[torch.Tensor], key: torch.Tensor, index: torch.Tensor, key_tile: int) -> list[torch.Tensor]:
    """Gradients in the order of one list, (B, H, K, ...), added up at their keys in a fixed order."""
    batch, heads, keys = key.shape[:3]
    place, real = _places(index, key, key_tile)
    head = torch.arange(batch * heads, device=key.device).view(batch, heads, 1)
    # Places without a key go past the end. `index_put_` sorts by place on a GPU, and so needs no atomics.
    place = torch.where(real, place + head * keys, batch * heads * keys).flatten()
    found = []
    for grad in grads:
        total = grad.new_zeros(batch * heads * keys + 1, *grad.shape[3:], dtype=torch.float32)
        total.index_put_((place,), grad.flatten(0, 2).float(), accumulate=True)
        found.append(total[:-1].view(batch, heads, keys, *grad.shape[3:]).to(grad.dtype))
    return found


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    query_tile: int,
    key_tile: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one segment; arguments and results as in `portable.forward`."""
    from terrazzo.kernels.block_sparse_attention import fused_kernels

    if index is not None and index.shape[2] == 1:
        key, value, bias = _gathered(key, value, index, bias, key_tile)
        index = None
    call = _call(query, key, value, index, bias, query_tile, key_tile, scale)
    out = torch.empty(*query.shape[:3], value.shape[-1], dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    grid, numbers, constants = call.of_queries("forward")
    tensors = (call.query, call.key, call.value, call.bias, call.index, call.length)
    with on_device(query.device):
        fused_kernels.forward[grid](*tensors, out, lse, *numbers, **constants)
    return out, lse


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_tile: int,
    key_tile: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients with respect to query, key, value and bias; as in `portable.backward`. Deterministic."""
    from terrazzo.kernels.block_sparse_attention import fused_kernels

    own_key, own_bias, one_list = key, bias, None
    if index is not None and index.shape[2] == 1:
        key, value, bias = _gathered(key, value, index, bias, key_tile)
        index, one_list = None, index
    call = _call(query, key, value, index, bias, query_tile, key_tile, scale)
    grad, grad_lse, delta = grad.contiguous(), grad_lse.contiguous(), torch.empty_like(lse)
    # A row without keys: its weights are exp(-inf - inf) = 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    grad_bias = None
    if bias is not None:
        grad_bias = torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    tensors = (call.query, call.key, call.value, call.bias)
    with on_device(query.device):
        grid, numbers, constants = call.of_queries("queries")
        fused_kernels.backward_queries[grid](
            *tensors, call.index, call.length, out, lse, grad, grad_lse, delta, grad_query, *numbers, **constants
        )
        grid, numbers, constants = call.of_keys()
        fused_kernels.backward_keys[grid](
            *tensors, *call.transposed(), lse, grad, delta, grad_key, grad_value, grad_bias, *numbers, **constants
        )
    if one_list is not None:
        grads = [grad_key, grad_value, grad_bias]
        grad_key, grad_value, grad_bias = _restored(grads, own_key, one_list, key_tile)
    if own_bias is not None:
        grad_bias = grad_bias.sum_to_size(own_bias.shape).to(own_bias.dtype)
    return grad_query, grad_key, grad_value, None if own_bias is None else grad_bias

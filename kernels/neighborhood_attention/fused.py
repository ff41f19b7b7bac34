"""Neighborhood attention in Triton: which calls can run, how a call is cut into blocks, and the launches.

The kernels are in fused_forward.py and fused_backward.py, which import triton; this file does so at the first launch.
Every launch is decided by shapes and types alone, never by timing, so the same call gives the same bits.
"""

import functools
import math
from dataclasses import dataclass

import torch

from terrazzo.kernels.triton_host.machine import Limit, block_of, interpreted, is_amd, on_device, precision

HEAD_DIM = Limit(8, 128, "needs a head_dim from 8 to 128")
# The largest class (in positions) that is one block of dense attention.
_CLASS = 64
# The largest kernel whose bias gradient is summed by bias row in registers, 2 kernel - 1 rows.
_KERNEL_WITH_BIAS_GRADIENT = 16
# The most programs, and bytes, for partial sums of the bias' gradient.
_PROGRAMS = 2048
_PARTIAL_BYTES = 64 << 20


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut and compiled: a program's tile, the block that it reads at a time, warps, stages."""

    tile_h: int
    tile_w: int
    rows: int
    columns: int
    warps: int
    stages: int

    def chunks(self, kernel: int) -> int:
        """Chunks of `columns` that hold the keys of a tile."""
        return -(-(self.tile_w + kernel - 1) // self.columns)

    def before(self, kernel: int) -> int:
        """Columns between the first key that a query of a tile may need and the tile's first query."""
        return max(kernel // 2, kernel - self.tile_w)

    def width(self, kernel: int) -> int:
        """Columns between the first key that a query of a tile may need and the end of the last chunk that is read."""
        return self.before(kernel) + max(0, self.tile_w - kernel) + self.chunks(kernel) * self.columns


def _lengths(kernel: str, block_d: int, itemsize: int) -> tuple[int, int, int]:
    """Positions of a program's tile, positions that it reads at a time, warps: the most that fit into registers.

    Found by compiling for compute capabilities 8.0, 9.0 and 10.0 and for gfx942 (README.md), not by timing.
    """
    if itemsize == 2:
        warps = 8 if block_d > 64 and kernel != "forward" else 4
        return 64, 16 if kernel == "keys" and block_d > 32 else 32, warps
    short = block_d > (32 if kernel == "keys" else 64) and kernel != "forward"
    return 32, 16 if short else 32, 8


@functools.lru_cache(maxsize=256)
def blocks(kernel: str, kernel_size: tuple[int, int], head_dim: int, itemsize: int, amd: bool = False) -> Blocks:
    """The blocks of one kernel ("forward", "queries", "keys"): a rule, not an autotuner.

    The rule picks the tile shape whose queries visit the fewest keys, masked keys included.
    """
    block_d = block_of(head_dim)
    length, chunk, warps = _lengths(kernel, block_d, itemsize)
    # An AMD warp has 64 threads, and 4 warps may use all registers of a compute unit.
    compiled = dict(warps=4 if amd else warps, stages=3 if kernel == "forward" and itemsize * block_d <= 64 else 2)
    if kernel_size[0] == 1:
        cuts = [Blocks(1, length, 1, columns, **compiled) for columns in (chunk, 16)]
    else:
        cuts = [
            Blocks(length // side, side, chunk // columns, columns, **compiled)
            for side in (8, 4)
            for columns in (16, 32)
            if columns <= chunk
        ]
        # The product that sums the bias' gradient is over tile_h * rows: matrix units need 16, or 8 in float32.
        cuts = [cut for cut in cuts if cut.tile_h * cut.rows >= 32 // itemsize]

    def visited(cut: Blocks) -> int:
        halo = cut.tile_h + kernel_size[0] - 1
        return -(-halo // cut.rows) * cut.rows * cut.chunks(kernel_size[1]) * cut.columns

    return min(cuts, key=visited)


def class_warps(kernel: str, head_dim: int, itemsize: int, amd: bool = False) -> int | None:
    """Warps of a kernel ("forward", "backward") for whole classes, or None if registers cannot hold a class."""
    if block_of(head_dim) * (itemsize if kernel == "forward" else 4) > 128:
        return None
    return 4 if amd or itemsize == 2 else 8


@dataclass(frozen=True)
class _Call:
    """What all launches of one call share."""

    size: tuple[int, int, int, int]  # B, heads, H, W
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    strides: tuple[int, int, int, int]
    has_bias: bool

    def whole(self, kernel: str) -> int | None:
        """Warps of a kernel that treats whole classes, if every class is one window; else None."""
        wanted = tuple(length * step for length, step in zip(self.kernel_size, self.dilation))
        if self.size[2:] != wanted or math.prod(self.kernel_size) > _CLASS:
            return None
        return class_warps(kernel, self.head_dim, self.dtype.itemsize, is_amd())

    def tiles(self, tile: Blocks) -> tuple[int, int]:
        """Tiles of the longest class, per axis."""
        lengths = (-(-length // step) for length, step in zip(self.size[2:], self.dilation))
        return tuple(-(-length // side) for length, side in zip(lengths, (tile.tile_h, tile.tile_w)))

    @property
    def classes(self) -> int:
        """Residue classes of all images."""
        return self.size[0] * math.prod(self.dilation)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*self.size[1:], *self.dilation)

    def constants(self) -> dict[str, object]:
        from terrazzo.kernels.neighborhood_attention import fused_forward

        return dict(
            HEAD_DIM=self.head_dim,
            BLOCK_D=block_of(self.head_dim),
            K_H=self.kernel_size[0],
            K_W=self.kernel_size[1],
            HAS_BIAS=self.has_bias,
            VECTOR=math.gcd(16, *self.strides),
            PRECISION=precision(self.dtype),
            INTERPRETED=interpreted(fused_forward.forward_tiles),
        )

    def cut(self, kernel: str) -> tuple[Blocks, dict[str, object]]:
        tile = blocks(kernel, self.kernel_size, self.head_dim, self.dtype.itemsize, is_amd())
        constants = dict(TILE_H=tile.tile_h, TILE_W=tile.tile_w, ROWS=tile.rows, COLUMNS=tile.columns)
        return tile, dict(constants, num_warps=tile.warps, num_stages=tile.stages)

    def slices(self, items: int, partial: int) -> int:
        """Programs per head if each keeps `partial` floats of partial sums."""
        heads = self.size[1]
        return max(1, min(items, _PROGRAMS // heads, _PARTIAL_BYTES // (4 * heads * partial)))


def _in_place(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value with equal strides: unchanged if they are (packed, or each contiguous), else copies."""
    strides = tensors[0].stride()
    if strides[-1] == 1 and all(x.stride() == strides for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


def _call(query: torch.Tensor, rpb: torch.Tensor | None, kernel_size, dilation) -> _Call:
    batch, height, width, heads, head_dim = query.shape
    # The stride of an axis of size 1 is arbitrary, and Triton would compile a stride of 1 as a constant.
    strides = tuple(0 if size == 1 else stride for size, stride in zip(query.shape[:4], query.stride()))
    return _Call(
        size=(batch, heads, height, width),
        head_dim=head_dim,
        dtype=query.dtype,
        device=query.device,
        kernel_size=tuple(kernel_size),
        dilation=tuple(dilation),
        strides=strides,
        has_bias=rpb is not None,
    )


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighborhood attention on a map.

    Args:
        query, key, value: (B, H, W, heads, head_dim); read in place if their strides agree, as in a packed tensor.
        rpb: (heads, 2 * kernel_h - 1, 2 * kernel_w - 1) or None.

    Returns:
        out: (B, H, W, heads, head_dim), contiguous.
        lse: (B, heads, H, W) float32, the logarithm of each softmax's sum, for `backward`.
    """
    from terrazzo.kernels.neighborhood_attention import fused_forward

    query, key, value = _in_place(query, key, value)
    call = _call(query, rpb, kernel_size, dilation)
    heads = call.size[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(call.size, dtype=torch.float32, device=query.device)
    # Without a bias a kernel gets a pointer that it does not read.
    bias = lse if rpb is None else rpb.float().contiguous()
    if out.numel() == 0:
        return out, lse
    pointers = (query, key, value, bias, out, lse, scale)
    with on_device(call.device):
        warps = call.whole("forward")
        if warps is not None:
            fused_forward.forward_classes[(call.classes * heads,)](
                *pointers,
                *call.sizes,
                *call.strides,
                **call.constants(),
                LENGTH=block_of(math.prod(call.kernel_size)),
                num_warps=warps,
                num_stages=1,
            )
            return out, lse
        tile, cut = call.cut("forward")
        tiles = call.tiles(tile)
        fused_forward.forward_tiles[(call.classes * math.prod(tiles) * heads,)](
            *pointers,
            *call.sizes,
            *tiles,
            *call.strides,
            **call.constants(),
            **cut,
            CHUNKS_W=tile.chunks(call.kernel_size[1]),
        )
    return out, lse


def can_differentiate(rpb: torch.Tensor | None, kernel_size: tuple[int, int]) -> bool:
    """Whether `backward` covers the call: registers must hold the bias rows' gradients, which limits the kernel."""
    return rpb is None or kernel_size[0] <= _KERNEL_WITH_BIAS_GRADIENT


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `forward` with respect to query, key, value and rpb, given its outputs. Deterministic."""
    query, key, value = _in_place(query, key, value)
    grad, out = grad.contiguous(), out.contiguous()
    call = _call(query, rpb, kernel_size, dilation)
    grads = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3)]
    grad_rpb = None if rpb is None else torch.zeros(rpb.shape, dtype=rpb.dtype, device=rpb.device)
    if grad.numel() == 0:
        return *grads, grad_rpb
    arguments = (query, key, value, lse if rpb is None else rpb.float().contiguous(), out, lse, grad)
    with on_device(call.device):
        (_backward_tiled if call.whole("backward") is None else _backward_whole)(
            call, arguments, grads, grad_rpb, scale
        )
    return *grads, grad_rpb


def _backward_whole(call: _Call, arguments, grads, grad_rpb, scale: float) -> None:
    from terrazzo.kernels.neighborhood_attention import fused_backward

    heads = call.size[1]
    length = block_of(math.prod(call.kernel_size))
    items = slices = call.classes
    partial = grads[0]
    if grad_rpb is not None:
        slices = call.slices(items, length * length)
        partial = torch.empty(slices, heads, length, length, dtype=torch.float32, device=call.device)
    fused_backward.backward_classes[(slices * heads,)](
        *arguments,
        *grads,
        partial,
        scale,
        *call.sizes,
        items,
        slices,
        *call.strides,
        **call.constants(),
        LENGTH=length,
        num_warps=call.whole("backward"),
        num_stages=1,
    )
    if grad_rpb is not None:
        kernel_h, kernel_w = call.kernel_size
        fused_backward.reduce_classes[(heads,)](
            partial.sum(0),
            grad_rpb,
            K_H=kernel_h,
            K_W=kernel_w,
            LENGTH=length,
            BLOCK=block_of((2 * kernel_h - 1) * (2 * kernel_w - 1)),
        )


def _backward_tiled(call: _Call, arguments, grads, grad_rpb, scale: float) -> None:
    from terrazzo.kernels.neighborhood_attention import fused_backward

    query, key, value, bias, _, lse, grad = arguments
    heads = call.size[1]
    kernel_h, kernel_w = call.kernel_size
    tile, cut = call.cut("queries")
    tiles = call.tiles(tile)
    items = slices = call.classes * math.prod(tiles)
    before, width = tile.before(kernel_w), tile.width(kernel_w)
    bins = 1 if kernel_h == 1 else block_of(2 * kernel_h - 1)
    delta = torch.empty_like(lse)
    partial = delta
    if grad_rpb is not None:
        shape = (bins, tile.tile_w, width)
        slices = call.slices(items, math.prod(shape))
        partial = torch.zeros(slices, heads, *shape, dtype=torch.float32, device=call.device)
    fused_backward.backward_queries[(slices * heads,)](
        *arguments,
        delta,
        grads[0],
        partial,
        scale,
        *call.sizes,
        *tiles,
        items,
        slices,
        *call.strides,
        **call.constants(),
        **cut,
        CHUNKS_W=tile.chunks(kernel_w),
        BEFORE_W=before,
        WIDTH=width,
        BINS=bins,
    )
    if grad_rpb is not None:
        block = min(128, block_of(2 * kernel_w - 1))
        fused_backward.reduce_tiles[(heads, 2 * kernel_h - 1, -(-(2 * kernel_w - 1) // block))](
            partial.sum(0),
            grad_rpb,
            BEFORE_W=before,
            WIDTH=width,
            TILE_W=tile.tile_w,
            BINS=bins,
            K_H=kernel_h,
            K_W=kernel_w,
            BLOCK=block,
        )
    tile, cut = call.cut("keys")
    tiles = call.tiles(tile)
    fused_backward.backward_keys[(call.classes * math.prod(tiles) * heads,)](
        query,
        key,
        value,
        bias,
        lse,
        grad,
        delta,
        *grads[1:],
        scale,
        *call.sizes,
        *tiles,
        *call.strides,
        **call.constants(),
        **cut,
    )

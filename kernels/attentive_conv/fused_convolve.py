"""Triton kernels of the depthwise convolution with separate kernels for each image, and of its gradients.

Maps are (B, H, W, C), contiguous; kernels (B, taps, C), float32. A program owns a tile of positions and a block of
channels, and reads the shifted tile of every tap. The caches serve the overlap of the tiles.
Names: pointers `p_`, blocks `b_`, offsets `o_`. Addresses are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def locate(width, tiles_h, tiles_w, CHANNELS: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr):
    """The image of a program, the rows and columns of its tile, and its channels."""
    program = tl.program_id(0)
    o_tile = tl.arange(0, TILE * TILE)
    rows = (program // tiles_w % tiles_h) * TILE + o_tile // TILE
    columns = (program % tiles_w) * TILE + o_tile % TILE
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (program // (tiles_h * tiles_w)).to(tl.int64), rows, columns, o_c


@triton.jit
def inside(rows, columns, o_c, height, width, CHANNELS: tl.constexpr):
    """Which positions and channels exist."""
    b_position = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return b_position[:, None] & (o_c < CHANNELS)[None, :]


@triton.jit
def offsets(image, rows, columns, o_c, height, width, CHANNELS: tl.constexpr):
    """Offsets into a map. Positions and channels that do not exist get arbitrary offsets."""
    o_position = (image * height + rows) * width + columns
    return o_position[:, None] * CHANNELS + o_c[None, :]


@triton.jit
def shift(tap, KERNEL: tl.constexpr):
    """The rows and columns from an output position to the position that a tap reads."""
    return tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2


_SIZES = ["height", "width", "tiles_h", "tiles_w"]


@triton.jit(do_not_specialize=_SIZES)
def convolve(
    p_value,
    p_kernels,
    p_out,
    height,
    width,
    tiles_h,
    tiles_w,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute a tile of the output."""
    image, rows, columns, o_c = locate(width, tiles_h, tiles_w, CHANNELS, TILE, BLOCK_C)
    p_kernels += image * (KERNEL * KERNEL * CHANNELS)
    b_out = tl.zeros([TILE * TILE, BLOCK_C], tl.float32)
    for tap in tl.static_range(KERNEL * KERNEL):
        down, right = shift(tap, KERNEL)
        b_mask = inside(rows + down, columns + right, o_c, height, width, CHANNELS)
        o_value = offsets(image, rows + down, columns + right, o_c, height, width, CHANNELS)
        b_value = tl.load(p_value + o_value, mask=b_mask, other=0.0).to(tl.float32)
        b_kernel = tl.load(p_kernels + tap * CHANNELS + o_c, mask=o_c < CHANNELS, other=0.0)
        b_out += b_value * b_kernel[None, :]
    o_out = offsets(image, rows, columns, o_c, height, width, CHANNELS)
    b_mask = inside(rows, columns, o_c, height, width, CHANNELS)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=b_mask)


@triton.jit(do_not_specialize=_SIZES)
def convolve_backward(
    p_grad,
    p_value,
    p_kernels,
    p_grad_value,
    p_partial,
    height,
    width,
    tiles_h,
    tiles_w,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of the value's gradient, and its part of the kernels' gradient: partial (B, tiles, taps, C).

    A tap takes the value at a position to the output in the opposite direction. Both gradients need only the gradient
    of this output.
    """
    image, rows, columns, o_c = locate(width, tiles_h, tiles_w, CHANNELS, TILE, BLOCK_C)
    p_kernels += image * (KERNEL * KERNEL * CHANNELS)
    p_partial += tl.program_id(0).to(tl.int64) * (KERNEL * KERNEL * CHANNELS)
    o_value = offsets(image, rows, columns, o_c, height, width, CHANNELS)
    b_own = inside(rows, columns, o_c, height, width, CHANNELS)
    b_value = tl.load(p_value + o_value, mask=b_own, other=0.0).to(tl.float32)
    b_grad_value = tl.zeros([TILE * TILE, BLOCK_C], tl.float32)
    for tap in tl.static_range(KERNEL * KERNEL):
        down, right = shift(tap, KERNEL)
        b_mask = inside(rows - down, columns - right, o_c, height, width, CHANNELS)
        o_grad = offsets(image, rows - down, columns - right, o_c, height, width, CHANNELS)
        b_grad = tl.load(p_grad + o_grad, mask=b_mask, other=0.0).to(tl.float32)
        b_kernel = tl.load(p_kernels + tap * CHANNELS + o_c, mask=o_c < CHANNELS, other=0.0)
        b_grad_value += b_grad * b_kernel[None, :]
        tl.store(p_partial + tap * CHANNELS + o_c, tl.sum(b_grad * b_value, 0), mask=o_c < CHANNELS)
    tl.store(p_grad_value + o_value, b_grad_value.to(p_grad_value.dtype.element_ty), mask=b_own)

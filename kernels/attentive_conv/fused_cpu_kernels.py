"""Attentive convolution on a CPU: means of bins, the convolution with each image's kernels, and gradients.

Numba compiles the kernels at the first call. Arrays are flat and contiguous: maps (B, H, W, C), channels last, with
whole vectors of channels; kernels (B, taps, C). A unit is a row of an image's map unless a kernel says otherwise.

Arguments: sizes (H, W, C); side, the rows and columns of a kernel; begin and end, units.
"""

from numba.extending import register_jitable

from terrazzo.kernels.attentive_conv.fused_cpu import SPLIT
from terrazzo.kernels.numba_host.fused_compile import jit
from terrazzo.kernels.numba_host.fused_constants import LANES
from terrazzo.kernels.numba_host.fused_vectors import add_products, dot, load, load_all, store, store_all, zeros

_inline = register_jitable(forceinline=True)


def _sum_of(count):
    @_inline
    def total(one, x, at, step, rows, out, out_at):
        sums = zeros(x, count)
        for i in range(rows):
            sums = add_products(sums, one, x, at + i * step, LANES)
        store_all(out, out_at, LANES, sums)

    return total


_sum_4, _sum_1 = _sum_of(4), _sum_of(1)


@jit
def pool(x, bins, splits, one, channels, length, out, begin, end):
    """Sums of parts of bins, (B, taps, splits, C): SPLIT positions, fewer, or none. Units are parts of bins.

    Args:
        bins: (taps, 2), the first position of each bin and the position behind the last.
        one: a vector of ones.
    """
    taps, ones = len(bins), load(one, 0)
    for unit in range(begin, end):
        image, tap, split = unit // splits // taps, unit // splits % taps, unit % splits
        first = min(bins[tap, 0] + split * SPLIT, bins[tap, 1])
        rows = min(first + SPLIT, bins[tap, 1]) - first
        at, c = (image * length + first) * channels, 0
        while c < channels:
            if channels - c >= 4 * LANES:
                _sum_4(ones, x, at + c, channels, rows, out, unit * channels + c)
                c += 4 * LANES
            else:
                _sum_1(ones, x, at + c, channels, rows, out, unit * channels + c)
                c += LANES


@jit
def spread(of_means, bins, sizes, out, begin, end):
    """The sum of the means' gradients (B, taps, C) over all bins of a position, (B, H, W, C)."""
    height, width, channels = sizes
    taps = len(bins)
    for unit in range(begin, end):
        image, row = unit // height, unit % height
        for j in range(width):
            position, at = row * width + j, (unit * width + j) * channels
            for c in range(0, channels, LANES):
                total = load(of_means, 0) * of_means.dtype.type(0)
                for tap in range(taps):
                    if bins[tap, 0] <= position < bins[tap, 1]:
                        total = total + load(of_means, (image * taps + tap) * channels + c)
                store(out, at + c, total)


@_inline
def overlap(at, length, side):
    """First and last + 1 row of a kernel that meets the map, if its centre is at row `at` (or column)."""
    return max(0, side // 2 - at), min(side, length - at + side // 2)


@jit
def product(value, kernel, place, rows, columns, width, channels, side):
    """The sum of a kernel's products with the map around a place, for LANES channels.

    Args:
        kernel: an array that begins with the first tap of these channels.
        rows, columns: the kernel's rows and columns that meet the map.
        place: of the first tap in the map; it may lie outside.
    """
    total = load(kernel, 0) * kernel.dtype.type(0)
    for u in range(rows[0], rows[1]):
        for w in range(columns[0], columns[1]):
            total = total + load(value, place + (u * width + w) * channels) * load(kernel, (u * side + w) * channels)
    return total


@jit
def convolve(value, kernels, side, sizes, out, begin, end):
    """Each image's channels with their kernels; zeros surround the map."""
    height, width, channels = sizes
    half, row_step = side // 2, width * channels
    for unit in range(begin, end):
        image, i = unit // height, unit % height
        rows = overlap(i, height, side)
        for c in range(0, channels, LANES):
            kernel = kernels[image * side * side * channels + c :]
            # The place of the first tap of the row's first position; at borders it is outside of the map.
            first = ((image * height + i - half) * width - half) * channels + c
            inner = (1, width - 1) if side == 3 and width > 2 else (width, width)
            for j in range(inner[0]):
                found = product(
                    value, kernel, first + j * channels, rows, overlap(j, width, side), width, channels, side
                )
                store(out, (unit * width + j) * channels + c, found)
            if side == 3 and width > 2:
                upper, middle, lower = (
                    load_all(kernel, 0, channels, 3),
                    load_all(kernel, 3 * channels, channels, 3),
                    load_all(kernel, 6 * channels, channels, 3),
                )
                for j in range(inner[0], inner[1]):
                    place = first + j * channels
                    found = dot(middle[0] * value.dtype.type(0), middle, value, place + row_step, channels)
                    if i > 0:
                        found = dot(found, upper, value, place, channels)
                    if i < height - 1:
                        found = dot(found, lower, value, place + 2 * row_step, channels)
                    store(out, (unit * width + j) * channels + c, found)
            for j in range(inner[1], width):
                found = product(
                    value, kernel, first + j * channels, rows, overlap(j, width, side), width, channels, side
                )
                store(out, (unit * width + j) * channels + c, found)


@_inline
def add_taps(sums, at, given, value, place, rows, columns, width, channels, side):
    """Add to the sums of each tap the products of a position's gradient with the map around it."""
    for u in range(rows[0], rows[1]):
        for w in range(columns[0], columns[1]):
            o = at + (u * side + w) * channels
            store(sums, o, load(sums, o) + given * load(value, place + (u * width + w) * channels))


@jit
def correlate(grad, value, side, sizes, out, begin, end):
    """The gradient of the kernels by each row of the map, (B, H, taps, C)."""
    height, width, channels = sizes
    half, row_step, taps = side // 2, width * channels, side * side
    for unit in range(begin, end):
        image, i = unit // height, unit % height
        rows = overlap(i, height, side)
        out[unit * taps * channels : (unit + 1) * taps * channels] = 0
        for c in range(0, channels, LANES):
            at = unit * taps * channels + c
            first = ((image * height + i - half) * width - half) * channels + c
            inner = (1, width - 1) if side == 3 and width > 2 else (width, width)
            if side == 3 and width > 2:
                upper, middle, lower = zeros(value, 3), zeros(value, 3), zeros(value, 3)
                for j in range(inner[0], inner[1]):
                    given, place = load(grad, (unit * width + j) * channels + c), first + j * channels
                    middle = add_products(middle, given, value, place + row_step, channels)
                    if i > 0:
                        upper = add_products(upper, given, value, place, channels)
                    if i < height - 1:
                        lower = add_products(lower, given, value, place + 2 * row_step, channels)
                store_all(out, at, channels, upper)
                store_all(out, at + 3 * channels, channels, middle)
                store_all(out, at + 6 * channels, channels, lower)
            for j in range(width):
                if j < inner[0] or j >= inner[1]:
                    given, place = load(grad, (unit * width + j) * channels + c), first + j * channels
                    add_taps(out, at, given, value, place, rows, overlap(j, width, side), width, channels, side)

"""Weighted sums over the pixels of feature maps, shared by the pooling operators.

A bag is a set of any number of weighted pixels; each bin of each region is a bag. `embedding_bag` sums all bags at once
without storing their pixels' features, and its gradients reach the features and, through the weights, the positions.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

MAX = 2  # the mode of aten's embedding_bag


def pixel_rows(features: Tensor) -> Tensor:
    """B C H W as a table with one row of C features per pixel."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def neighbours(position: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The two pixels between which each position lies on an axis, with their weights: 0 where it is off the map."""
    inside = (position >= -1) & (position <= size)
    clamped = position.clamp(0, size - 1)
    low = clamped.floor()
    high = (low + 1).clamp(max=size - 1)
    fraction = clamped - low
    return [(low.long(), (1 - fraction) * inside), (high.long(), fraction * inside)]


def bilinear(batch: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels, as rows of `pixel_rows`, and the weights of bilinear samples.

    Args:
        batch: N, index in the batch.
        y: N, in pixels; pixel centres are at whole numbers.
        x: N.
        height: H of the map.
        width: W of the map.

    Returns:
        Pixels and weights, each N x 4.
    """
    pixels, weights = [], []
    for row, weight_y in neighbours(y, height):
        for column, weight_x in neighbours(x, width):
            pixels.append((batch * height + row) * width + column)
            weights.append(weight_y * weight_x)
    return torch.stack(pixels, -1), torch.stack(weights, -1)


def starts(counts: Tensor) -> Tensor:
    """Where each bag starts in the list of all bags' members."""
    return counts.cumsum(0) - counts


def bag_sums(rows: Tensor, pixels: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """The weighted sum of each bag.

    Args:
        rows: pixels x C.
        pixels: which row; all members of the first bag, then of the second, and so on.
        weights: as `pixels`.
        counts: K, members per bag.

    Returns:
        K x C.
    """
    return embedding_bag(pixels, rows, starts(counts), per_sample_weights=weights.to(rows.dtype), mode="sum")


def bag_maxima(rows: Tensor, pixels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each feature in each bag, and its row; both are 0 for an empty bag.

    Args:
        rows: pixels x C.
        pixels: which row; all members of the first bag, then of the second, and so on.
        counts: K, members per bag.

    Returns:
        Each K x C.
    """
    # the only form of embedding_bag that returns the position of the maximum
    largest, _, _, place = torch.ops.aten._embedding_bag(rows, pixels, starts(counts), mode=MAX)
    return largest, place


def cells(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every cell of K grids, grid by grid and row by row.

    Args:
        rows: K, rows of each grid.
        columns: K, columns of each grid.

    Returns:
        For each cell its grid, its row and its column.
    """
    counts = rows * columns
    grid = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    place = torch.arange(len(grid), device=grid.device) - starts(counts)[grid]
    return grid, place // columns[grid], place % columns[grid]


def bin_samples(height: Tensor, width: Tensor, bins: tuple[int, int], sampling_ratio: int) -> tuple[Tensor, ...]:
    """The regular samples in each bin of each region.

    Args:
        height: N, of the regions, in pixels of the map.
        width: N.
        bins: bins down and across.
        sampling_ratio: samples per bin and axis; 0 takes ceil(bin size).

    Returns:
        For each sample its bag (region x bins + bin), its distances down and across from the region's corner, and its
        share in its bin's average; then the number of samples of each bag.
    """
    number = bins[0] * bins[1]
    sizes = height / bins[0], width / bins[1]
    if sampling_ratio > 0:
        rows, columns = (torch.full_like(size, sampling_ratio).long() for size in sizes)
    else:
        rows, columns = (size.ceil().clamp(min=0).long() for size in sizes)
    bag, row, column = cells(rows.repeat_interleave(number), columns.repeat_interleave(number))
    region = bag // number
    down = (bag % number // bins[1] + (row + 0.5).to(height) / rows[region]) * sizes[0][region]
    across = (bag % bins[1] + (column + 0.5).to(width) / columns[region]) * sizes[1][region]
    counts = rows * columns
    return bag, down, across, 1 / counts[region].to(height), counts.repeat_interleave(number)


def bins_first(sums: Tensor, bins: tuple[int, int]) -> Tensor:
    """The sums of all bins (N x bins, C) as pooled features, N C and bins."""
    return sums.unflatten(0, (-1, *bins)).permute(0, 3, 1, 2)


def scattered(shape: torch.Size, batch: Tensor, pixels: Tensor, values: Tensor) -> Tensor:
    """A map of zeros to which each value is added at its pixel.

    Args:
        shape: B C H W.
        batch: N, index in the batch.
        pixels: N C and any axes; row * W + column.
        values: as `pixels`.
    """
    total = values.new_zeros(shape)
    plane = batch[:, None] * shape[1] + torch.arange(shape[1], device=batch.device)  # N C
    plane = plane.reshape(*plane.shape, *[1] * (pixels.dim() - 2))
    total.view(-1).index_add_(0, (plane * shape[2] * shape[3] + pixels).flatten(), values.flatten())
    return total

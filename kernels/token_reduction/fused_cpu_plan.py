"""Plans in Numba, for CPUs: what the kernels are given, and how a call is divided.

Products of tokens are PyTorch's. The kernels are in fused_cpu_match.py, which imports numba; this file does so at the
first call.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.numba_host.arrays import array_of
from terrazzo.kernels.token_reduction.fused_cpu_parts import divided
from terrazzo.kernels.token_reduction.partition import order, sizes

# The most products of an image that are held at once, and so computed once. A larger image has them computed some
# sources at a time, and again for the way back, in tiles that the caches hold.
_WHOLE = 1 << 24
_TILE = 1 << 19
# Fewest sources of a tile: a product of matrices with fewer rows is slow.
_FEWEST = 32


def plan(
    metric: torch.Tensor,
    r: int,
    size: torch.Tensor | None,
    importance: torch.Tensor | None,
    protect: int,
    criteria: Sequence[float],
    bidirectional: bool,
    grid: tuple[int, int] | None,
) -> torch.Tensor:
    """Maps of all images, (B, N); arguments as in `portable.plan`, except that `metric` may be in half precision."""
    from terrazzo.kernels.token_reduction import fused_cpu_match as kernels

    batch, count = metric.shape[:2]
    metric = metric.to(accumulator(metric)).contiguous()
    sources, targets = sizes(count - protect, protect, grid)
    if grid is None:
        first = protect + protect % 2
        left, right = metric[:, first::2], metric[:, protect + 1 - protect % 2 :: 2]
    else:
        listed, _ = order(count - protect, protect, grid)
        left, right = metric.index_select(1, listed + protect).split([sources, targets], 1)
    found = torch.empty(batch, count, dtype=torch.int64)
    none = metric.new_empty(0, count)
    size, importance = (none if x is None else x.to(metric.dtype).contiguous() for x in (size, importance))
    tokens = [array_of(x) for x in (metric, size, importance)]
    forward = r // 2 if bidirectional else r
    exponents = tuple([1 / tau if tau else 0.0 for tau in criteria])
    where = (protect, *(grid or (0, 0)))
    if sources * targets <= _WHOLE:
        weight = torch.bmm(left, right.transpose(1, 2))
        given = (*tokens, array_of(weight), *where, r, forward, exponents, bidirectional, array_of(found))
        divided(lambda *part: kernels.plan(*given, *part), batch, 8 * weight.numel())
        return found
    for image in range(batch):
        attractions = _Attractions(kernels, left[image], right[image], (image, *tokens), where, exponents)
        attractions.plan(r, forward, bidirectional, array_of(found[image]))
    return found


class _Attractions:
    """The attractions of an image, of some sources at a time.

    Args:
        kernels: the compiled kernels.
        left, right: tokens (sources, C) and (destinations, C).
        tokens: the number of the image, and the metric, sizes and importances of all images.
        where: number of protected tokens, rows and columns of the grid.
        exponents: of similarity, importance and size.
    """

    def __init__(self, kernels, left: torch.Tensor, right: torch.Tensor, tokens, where, exponents):
        self.kernels, self.left, self.right, self.protect = kernels, left, right, where[0]
        sources, count = len(left), len(left) + len(right)
        self.dtype = tokens[1].dtype
        self.listed = np.empty(count, np.int64)
        each = np.empty(count, self.dtype), np.empty(count, self.dtype), np.empty(count, np.bool_)
        kernels.prepare(*tokens, sources, *where, exponents, self.listed, *each)
        self.given = (sources, *each, exponents[0])

    def plan(self, r: int, forward: int, two_way: bool, found: np.ndarray) -> None:
        """Write the map of the image."""
        sources, targets = len(self.left), len(self.right)
        best, into = np.empty(sources, self.dtype), np.empty(sources, np.int64)
        rank, staying = np.empty(sources, np.int64), np.empty(sources, np.int64)
        back_best, back = np.full(targets, -2, self.dtype), np.zeros(targets, np.int32)
        for weight, numbers in self._tiles(torch.arange(sources)):
            given = (weight, numbers, *self.given, best, into)
            divided(partial(self.kernels.choose_targets, *given), len(numbers), weight.size)
        self.kernels.stay(best, forward, self.protect, rank, staying)
        if two_way:
            for weight, numbers in self._tiles(torch.from_numpy(rank >= forward).nonzero().flatten()):
                divided(partial(self.kernels.draw, weight, numbers, *self.given), len(numbers), weight.size)
                given = (weight, numbers, rank, forward, back_best, back)
                divided(partial(self.kernels.choose_sources, *given), targets, weight.size)
        chosen = (into, rank, staying, back_best, back)
        self.kernels.write(self.listed, self.protect, r, forward, *chosen, two_way, found)

    def _tiles(self, chosen: torch.Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Products of the chosen sources with all destinations, and the numbers of the sources."""
        for numbers in chosen.split(max(_FEWEST, _TILE // len(self.right))):
            yield array_of(self.left[numbers] @ self.right.T), array_of(numbers)

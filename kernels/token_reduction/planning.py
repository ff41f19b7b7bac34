"""Plans: which tokens of an image are merged. The public functions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.dispatch.exporting import is_exporting, is_open
from terrazzo.kernels.token_reduction import op
from terrazzo.kernels.token_reduction.partition import sizes


class Plan(NamedTuple):
    """Which reduced token stands for each token: `map` (B, N) int64, onto [0, M)."""

    map: torch.Tensor
    M: int


def limit(
    count: int,
    protect: int = 1,
    partition: str = "even_odd",
    grid: tuple[int, int] | None = None,
    bidirectional: bool = False,
) -> int:
    """The largest r that `plan` takes for `count` tokens, the protected ones included."""
    sources, destinations = sizes(count - protect, protect, grid if partition == "cell2x2" else None)
    if destinations < 1 or sources < 1:
        return 0
    if not bidirectional:
        return sources
    # Half of r go forward, and at least one source must be left to receive the other half.
    return min(2 * sources - 1, 2 * destinations)


def _check(metric, r, size, importance, partition, protect, criteria, bidirectional, window, grid) -> None:
    """Raise `InputError` for arguments that the definition does not allow."""
    if metric.dim() != 3 or metric.shape[2] < 1:
        raise InputError(f"metric must be floating (B, N, D), D at least 1, got {tuple(metric.shape)}")
    batch, count = metric.shape[:2]
    for name, values in (("size", size), ("importance", importance)):
        if values is not None and tuple(values.shape) != (batch, count):
            raise InputError(f"{name} must be {(batch, count)}, as metric, got {tuple(values.shape)}")
    if partition not in ("even_odd", "cell2x2"):
        raise InputError(f"partition must be 'even_odd' or 'cell2x2', got {partition!r}")
    if not 0 <= protect <= count:
        raise InputError(f"protect must be 0 to the {count} tokens, got {protect}")
    if len(criteria) != 3 or not all(tau >= 0 for tau in criteria):
        raise InputError(f"criteria must be three numbers of at least 0 (tau_sim, tau_info, tau_size), got {criteria}")
    if (partition == "cell2x2" or window is not None) and (grid is None or grid[0] * grid[1] != count - protect):
        raise InputError(
            f"partition 'cell2x2' and windows need the grid of the {count - protect} unprotected tokens, got {grid}"
        )
    if partition == "cell2x2" and bidirectional:
        raise InputError("partition 'cell2x2' merges one way only, so that every cell keeps a token")
    if window is not None:
        if grid[0] % window or grid[1] % window:
            raise InputError(f"a grid of {grid[0]} x {grid[1]} does not divide into windows of {window} x {window}")
        count, protect, grid = window * window, 0, (window, window)
    most = limit(count, protect, partition, grid, bidirectional)
    if not 0 <= r <= most:
        raise InputError(f"r must be 0 to {most} for {count} tokens, {protect} of them protected, got {r}")


def _pair(grid: Sequence[int]) -> tuple[int, int]:
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise InputError(f"grid must be rows and columns, got {grid!r}")
    return arguments.whole(grid[0], "rows of the grid", 1), arguments.whole(grid[1], "columns of the grid", 1)


def _numbers(criteria: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(criteria, Sequence) or isinstance(criteria, str):
        raise InputError(f"criteria must be three numbers (tau_sim, tau_info, tau_size), got {criteria!r}")
    return tuple(arguments.finite(tau, "criteria") for tau in criteria)


def plan(
    metric: torch.Tensor,
    *,
    r: int,
    size: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    partition: str = "even_odd",
    protect: int = 1,
    criteria: tuple[float, float, float] = (1.0, 20.0, 40.0),
    bidirectional: bool = False,
    window: int | None = None,
    grid: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Plan:
    """Choose r tokens of each image, and the token into which each of them is merged.

    Tokens are sources or destinations. Source i and destination j attract each other by

        ((cos(x_i, x_j) + 1) / 2)^(1/tau_sim) (1 / a_i a_j)^(1/tau_info) (1 / s_i s_j)^(1/tau_size)

    with importance a and size s. Every source has a best destination; the r sources with the strongest attractions are
    merged into theirs. Two-way, only half of r are sources. The other half are destinations, which are merged, together
    with the tokens that they hold, into the best remaining source. Among equals, the lowest index comes first.

    The result has the protected tokens first, then the remaining sources in order, then the remaining destinations: in
    order, or two-way with the strongest attraction first. With r = 0 nothing moves.

    Args:
        metric: (B, N, D), the features whose cosine similarity is compared.
        r: the number of merged tokens of each image, or of each window.
        size: (B, N), patches that each token stands for; None for 1 each. A token of size 0 is padding: it attracts
            nothing.
        importance: (B, N), larger than 0; None leaves the factor out.
        partition: "even_odd": sources are the even positions of the sequence, destinations the odd positions.
            "cell2x2": destinations are the upper left tokens of the grid's 2x2 cells, sources all other tokens.
        protect: tokens in front that stay unchanged, in their places.
        criteria: tau_sim, tau_info, tau_size; 0 leaves a factor out.
        window: merge within square windows of this side; the result lists the windows one after another.
        grid: rows and columns of the unprotected tokens, for "cell2x2" and windows.
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.

    Returns:
        The map, without a gradient, computed in float32 at least.

    Raises:
        InputError: A shape or number that the definition does not allow, or a number of tokens left open in an export.
        BackendError: `backend` names a form that cannot run here.

    Source: MCTF, arXiv 2403.10030, section 3.2; the partition "cell2x2": arXiv 2303.17604.
    """
    arguments.check_tensors({"metric": metric})
    arguments.check_together({"metric": metric}, size=size, importance=importance)
    if is_exporting() and is_open(metric.shape[1]):
        raise InputError("token reduction is exported for images of one size: how many are merged becomes a constant")
    r, protect = arguments.whole(r, "r"), arguments.whole(protect, "protect")
    window = None if window is None else arguments.whole(window, "window", 1)
    grid = None if grid is None else _pair(grid)
    criteria = _numbers(criteria)
    _check(metric, r, size, importance, partition, protect, criteria, bidirectional, window, grid)
    grid = grid if partition == "cell2x2" or window is not None else None
    with without_autocast(metric):  # ranks need float32
        dtype = accumulator(metric)
        metric = metric.detach()
        size, importance = (None if x is None else x.detach().to(dtype) for x in (size, importance))
        if window is None:
            found = op.plan(metric, r, size, importance, protect, criteria, bidirectional, grid, backend)
            return Plan(found, metric.shape[1] - r)
        cells = (window, window) if partition == "cell2x2" else None
        folded = [None if x is None else _fold(x[:, protect:], grid, window) for x in (metric, size, importance)]
        found = op.plan(folded[0], r, folded[1], folded[2], 0, criteria, bidirectional, cells, backend)
        return _unfold(found, metric.shape[0], grid, window, r, protect)


def _fold(x: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    """(B, H W, ...) to (B windows, window^2, ...)."""
    x = x.unflatten(1, (grid[0] // window, window, grid[1] // window, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _unfold(found: torch.Tensor, batch: int, grid: tuple[int, int], window: int, r: int, protect: int) -> Plan:
    """The map of the whole grid, from the maps of its windows (B windows, window^2)."""
    rows, columns = grid[0] // window, grid[1] // window
    kept = window * window - r
    found = found.unflatten(0, (batch, rows * columns))
    found = found + torch.arange(rows * columns, device=found.device)[:, None] * kept + protect
    found = found.unflatten(2, (window, window)).unflatten(1, (rows, columns)).transpose(2, 3).flatten(1)
    front = torch.arange(protect, device=found.device).expand(found.shape[0], -1)
    return Plan(torch.cat([front, found], 1), protect + rows * columns * kept)

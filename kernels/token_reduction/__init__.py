"""Token reduction that can be undone: which tokens become one, their mean, and the way back to every position."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from terrazzo.errors import InputError
from terrazzo.kernels import arguments, attention_host
from terrazzo.kernels import backend as _backend
from terrazzo.kernels.autocast import without_autocast
from terrazzo.kernels.exporting import is_exporting, is_open
from terrazzo.kernels.token_reduction import op, portable, reference
from terrazzo.kernels.token_reduction.op import describe
from terrazzo.kernels.token_reduction.partition import sizes as _partition_sizes

__all__ = [
    "Plan",
    "attention",
    "column_mean",
    "compose",
    "describe",
    "merge",
    "plan",
    "prop_bias",
    "prune",
    "prune_packed",
    "unmerge",
    "why",
]


class Plan(NamedTuple):
    """Which reduced token stands for each: `map` (B, N) int64, onto [0, M)."""

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
    sources, destinations = _partition_sizes(count - protect, protect, grid if partition == "cell2x2" else None)
    if destinations < 1 or sources < 1:
        return 0
    if not bidirectional:
        return sources
    # Of r, half go forward, and one source at least must be left for the other half to go back to.
    return min(2 * sources - 1, 2 * destinations)


def _check(metric, r, size, importance, partition, protect, criteria, bidirectional, window, grid) -> None:
    """Raise `InputError` for what the definition does not allow."""
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
    """Choose r tokens of each image and the token that each is merged into.

    Tokens are sources or destinations. Source i and destination j attract each other by

        ((cos(x_i, x_j) + 1) / 2)^(1/tau_sim) (1 / a_i a_j)^(1/tau_info) (1 / s_i s_j)^(1/tau_size)

    with importance a and size s. The r sources with the strongest best destination are merged into it; two-way, half of
    r go so, and the others are destinations that are merged, with all that they hold, into the best of the sources
    left. Of equals the lowest index comes first. Afterwards come the protected tokens, the sources that stay, in order,
    and the destinations that stay: in order, or two-way with the strongest attraction first. With r = 0 nothing moves.

    Args:
        metric: (B, N, D), by whose cosine tokens are compared.
        r: how many are merged, of each image, or of each window.
        size: (B, N), patches that each token stands for; None for 1 each. A token of size 0 is padding: it attracts
            nothing.
        importance: (B, N), larger than 0; None leaves the factor out.
        partition: "even_odd": sources are the even positions of the sequence, destinations the odd ones; "cell2x2":
            destinations are the upper left tokens of the grid's 2x2 cells, sources all others.
        protect: tokens in front that stay as they are, in their places.
        criteria: tau_sim, tau_info, tau_size; 0 leaves a factor out.
        window: merge within windows of so many tokens square; they come one after another afterwards.
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
    name = op.chosen(backend, metric)
    grid = grid if partition == "cell2x2" or window is not None else None
    with without_autocast(metric):  # ranks need float32
        dtype = portable.accumulator(metric)
        metric = metric.detach()
        size, importance = (None if x is None else x.detach().to(dtype) for x in (size, importance))
        if window is None:
            found = _found(name, metric, r, size, importance, protect, criteria, bidirectional, grid)
            return Plan(found, metric.shape[1] - r)
        cells = (window, window) if partition == "cell2x2" else None
        folded = [None if x is None else _fold(x[:, protect:], grid, window) for x in (metric, size, importance)]
        found = _found(name, folded[0], r, folded[1], folded[2], 0, criteria, bidirectional, cells)
        return _unfold(found, metric.shape[0], grid, window, r, protect)


def _found(name, metric, r, size, importance, protect, criteria, bidirectional, grid) -> torch.Tensor:
    """Maps by the form of that name; arguments as of `reference.match`, with a batch axis in front."""
    if name == "fused" and r > 0:
        return op.plan(metric, r, size, importance, protect, criteria, bidirectional, grid or ())
    form = reference if name == "reference" else portable
    metric = metric.to(portable.accumulator(metric))  # half precision is read by the kernels as it is
    return form.plan(metric, r, size, importance, protect, criteria, bidirectional, grid)


def _fold(x: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    """(B, H W, ...) to (B windows, window^2, ...)."""
    x = x.unflatten(1, (grid[0] // window, window, grid[1] // window, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _unfold(found: torch.Tensor, batch: int, grid: tuple[int, int], window: int, r: int, protect: int) -> Plan:
    """The map of the whole grid, from those of its windows (B windows, window^2)."""
    rows, columns = grid[0] // window, grid[1] // window
    kept = window * window - r
    found = found.unflatten(0, (batch, rows * columns))
    found = found + torch.arange(rows * columns, device=found.device)[:, None] * kept + protect
    found = found.unflatten(2, (window, window)).unflatten(1, (rows, columns)).transpose(2, 3).flatten(1)
    front = torch.arange(protect, device=found.device).expand(found.shape[0], -1)
    return Plan(torch.cat([front, found], 1), protect + rows * columns * kept)


def merge(
    x: torch.Tensor,
    plan: Plan,
    weight: torch.Tensor | None = None,
    size: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each group's weighted mean.

    Args:
        x: (B, N, C), the gradient's only way.
        weight: (B, N), at least 0; None for `size`.
        size: (B, N); None for 1 each.
        backend: as of `plan`.

    Returns:
        Tokens (B, M, C) in the dtype of x, sizes (B, M), which add up to what they did, and the map (B, N).

    Raises:
        InputError: Shapes that do not agree.
        BackendError: `backend` names a form that cannot run here.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"plan must be a Plan, as `plan` returns it, got {type(plan).__name__}")
    arguments.check_tensors({"x": x})
    arguments.check_together({"x": x, "the map": plan.map}, weight=weight, size=size)
    shape = tuple(plan.map.shape)
    for name, values in (("x", x), ("weight", weight), ("size", size)):
        if values is not None and tuple(values.shape[:2]) != shape:
            raise InputError(f"{name} must begin with {shape}, as the map, got {tuple(values.shape)}")
    name = op.chosen(backend, x)
    with without_autocast(x):  # so do weights
        if size is None:
            size = torch.ones(shape, dtype=portable.accumulator(x), device=x.device)
        weight = (size if weight is None else weight).detach()
        if name == "fused":
            return *op.pool(x, *plan, weight, size), plan.map
        form = reference if name == "reference" else portable
        return form.pool(x, *plan, weight), portable.add_up(size, *plan), plan.map


def unmerge(tokens: torch.Tensor, map: torch.Tensor, parked: torch.Tensor | None = None) -> torch.Tensor:
    """To each position the token that stands for it: (B, M, C) and (B, N) to (B, N, C).

    Args:
        parked: (B, N, C), or what broadcasts to it: what positions get whose map is -1; None where there are none.
    """
    arguments.check_together({"tokens": tokens, "map": map}, parked=parked)
    if parked is None:
        # Rows of one matrix: several times faster than gathering every channel by an index of its own.
        batch, count, channels = tokens.shape
        first = torch.arange(batch, device=map.device).unsqueeze(1) * count
        taken = tokens.reshape(-1, channels).index_select(0, (map + first).flatten())
        return taken.reshape(-1, map.shape[1], channels)
    return torch.where(map.unsqueeze(-1) < 0, parked, unmerge(tokens, _existing(map)))


def compose(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """The map of one reduction after another: `inner` (B, N) first, then `outer` (B, M); -1 stays -1."""
    arguments.check_together({"outer": outer, "inner": inner})
    return torch.where(inner < 0, -1, outer.gather(1, _existing(inner)))


def _existing(map: torch.Tensor) -> torch.Tensor:
    """Any token in the place of none; TensorRT clamps no integers."""
    return torch.where(map < 0, 0, map)


def prop_bias(size: torch.Tensor | None) -> torch.Tensor | None:
    """log s, added to the logits of keys: a token of size s counts as s keys, padding (size 0) as none."""
    return None if size is None else size.log()


def prune(
    x: torch.Tensor,
    score: torch.Tensor,
    k: int | None = None,
    threshold: torch.Tensor | float | None = None,
    protect: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the protected tokens in front and, in order, k others, or those whose score is larger than a threshold.

    Args:
        x: (B, N, C); with a threshold B is 1, since images keep unlike numbers: see `prune_packed`.
        score: (B, N); of equals the first is kept. Those of protected tokens are not read.
        k: kept tokens beside the protected ones.

    Returns:
        Tokens (B, protect + k, C), the map (B, N), -1 where a token is parked, and the indices of those, (B, N - ...).

    Raises:
        InputError: Not one of `k` and `threshold`, a batch with a threshold, or a number out of range.
    """
    _check_scores(x, score, 3)
    batch, count = score.shape
    protect = arguments.whole(protect, "protect")
    if (k is None) == (threshold is None):
        raise InputError("prune takes either k or a threshold")
    if threshold is not None:
        arguments.check_threshold(threshold)
        if batch != 1:
            raise InputError(f"images keep unlike numbers of tokens by a threshold, got a batch of {batch}: pack them")
    position = torch.arange(count, device=x.device)
    front = position < protect
    if k is not None:
        k = arguments.whole(k, "k")
        if not 0 <= k <= count - protect:
            raise InputError(f"k must be 0 to {count - protect}, got {k}")
        ranks = portable.rank(score.detach().masked_fill(front, float("inf")))
        keep = ranks < protect + k
        kept, parked = protect + k, count - protect - k
    else:
        keep = front | (score.detach() > threshold)
        kept = int(keep.sum())
        parked = count - kept
    place = torch.where(keep, keep.long().cumsum(1) - 1, -1)
    # Kept ones first, in order: a permutation, whatever the image.
    order = torch.where(keep, place, kept + (~keep).long().cumsum(1) - 1).argsort(1)
    index, rest = order.split([kept, parked], 1)
    return unmerge(x, index), place, rest


def _check_scores(x: torch.Tensor, score: torch.Tensor, axes: int) -> None:
    """Raise `InputError` unless there is a score for each token."""
    arguments.check_tensors({"x": x, "score": score})
    if x.dim() != axes or score.shape != x.shape[:-1]:
        raise InputError(
            f"x must be {'(B, N, C)' if axes == 3 else '(T, C)'} and score that without channels, "
            f"got {tuple(x.shape)} and {tuple(score.shape)}"
        )


def prune_packed(
    x: torch.Tensor, score: torch.Tensor, threshold: torch.Tensor | float, offsets: torch.Tensor, protect: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each image keep the protected tokens in front and those whose score is larger than the threshold, in order.

    Args:
        x: (sum of T, C), the tokens of all images one after another.
        score: (sum of T,). Those of protected tokens are not read.
        offsets: (B + 1,) int32, where each image begins ("cu_seqlens").

    Returns:
        The kept tokens, the new offsets, and the kept tokens' indices in x.

    Raises:
        InputError: Shapes that do not agree, or a threshold that is no number.
    """
    _check_scores(x, score, 2)
    arguments.check_together({"x": x, "offsets": offsets})
    arguments.check_threshold(threshold)
    protect = arguments.whole(protect, "protect")
    begin = offsets[:-1].repeat_interleave(offsets.diff(), output_size=x.shape[0])
    front = torch.arange(x.shape[0], device=x.device) - begin < protect
    keep = front | (score.detach() > threshold)
    index = keep.nonzero().squeeze(1)
    in_front = F.pad(keep.cumsum(0), (1, 0))
    return x.index_select(0, index), in_front[offsets.long()].to(offsets.dtype), index


def _check_queries(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise `InputError` for what the mean of attention does not take."""
    arguments.check_tensors({"query": query, "key": key}, bias=bias)
    if query.dim() != 4 or query.shape != key.shape or arguments.any_empty(*query.shape[1:]):
        raise InputError(
            "query and key must be (B, H, N, D), H, N and D at least 1, both of one shape, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    arguments.check_one_dtype(query=query, key=key)
    if bias is not None and bias.shape != (query.shape[0], query.shape[2]):
        raise InputError(f"bias must be {(query.shape[0], query.shape[2])}, got {tuple(bias.shape)}")


def column_mean(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """What each key gets of the attention, on average over heads and queries; it adds up to 1 and has no gradient.

    The attention matrix is not kept: a tile of it is held at a time.

    Args:
        query, key: (B, H, N, D).
        bias: (B, N), added to the logits of keys, or None.
        backend: as of `plan`.

    Returns:
        (B, N), in float32 at least.

    Raises:
        InputError: Shapes, dtypes or devices that do not agree.
        BackendError: `backend` names a form that cannot run here.
    """
    _check_queries(query, key, bias)
    name = op.chosen(backend, query, attention_host.HEAD_DIM.fits(query.shape[-1]))
    if name == "fused":
        return op.column_mean(query.detach(), key.detach(), None if bias is None else bias.detach())
    form = reference if name == "reference" else portable
    return form.column_mean(query, key, bias).detach()


def attention(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """`column_mean`, and the function from values (B, H, N, D) to the attention's output of that shape.

    For those who choose values by that mean. On a GPU the mean is the kernels', and attention PyTorch's. Elsewhere
    weights that are few are computed once for both; of more neither keeps more than a tile.
    """
    _check_queries(query, key, bias)
    if op.chosen("auto", query, attention_host.HEAD_DIM.fits(query.shape[-1])) == "fused":
        return column_mean(query, key, bias, backend="fused"), partial(portable.attend, query, key, bias)
    return portable.attention(query, key, bias)


def why(backend: str = "auto", x: torch.Tensor | None = None) -> _backend.Choice:
    """Which backend a call would run with now, and why the others were refused.

    Without `x`, tokens or queries, for float32 tensors on the default device.
    """
    if x is None:
        return op.choose(backend, torch.get_default_device(), torch.float32)
    return op.choose(backend, x.device, x.dtype)

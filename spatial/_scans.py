"""Scans of a map or a sequence that several ranks share: each rank scans its own part, and adds the state before it.

A scan is linear in its first state. So every rank scans from a state of zero. Ranks then tell each other their last
states and how much their parts let a state decay. A rank computes from these the state at its first step, and adds what
this state adds to its outputs.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from terrazzo import kernels
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.selective_scan.orders import by_columns, codes, is_reversed
from terrazzo.spatial._cuts import Level
from terrazzo.spatial._part import Part


def before(part: Part, last: torch.Tensor, decay: torch.Tensor, reverse: bool) -> torch.Tensor:
    """The state at the first step of this rank.

    Args:
        last: The state after this rank's steps, if it was zero before them.
        decay: What these steps leave of a state, of a shape that `last` broadcasts with.
        reverse: Whether later ranks come first.
    """
    both = part.stacked(torch.stack([last, decay.expand_as(last)]))
    state = torch.zeros_like(last)
    ranks = range(part.group.size)
    for rank in reversed(ranks) if reverse else ranks:
        earlier = rank > part.rank if reverse else rank < part.rank
        # Every rank computes with all states, so that the backward pass calls the same exchanges on every rank.
        use = torch.tensor(earlier, device=last.device)
        state = torch.where(use, both[rank, 1] * state + both[rank, 0], state)
    return state


def _steps(delta: torch.Tensor, bias: torch.Tensor | None, softplus: bool, dtype: torch.dtype) -> torch.Tensor:
    delta = delta.to(dtype)
    if bias is not None:
        delta = delta + bias.to(dtype)
    return F.softplus(delta) if softplus else delta


def _sums(x: torch.Tensor, dim: int, reverse: bool) -> torch.Tensor:
    """Sums of all steps up to each step, in the order of the scan."""
    return x.flip(dim).cumsum(dim).flip(dim) if reverse else x.cumsum(dim)


def ssd(
    part: Part,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    reverse: bool = False,
    chunk: int = 64,
    backend: str = "auto",
) -> torch.Tensor:
    """`terrazzo.kernels.ssd` along a sequence of which each rank has a part, in the order of the ranks."""
    dtype = accumulator(x, dt, A, B, C)
    dt = _steps(dt, dt_bias, dt_softplus, dtype)
    y, last = kernels.ssd(
        x.to(dtype), dt, A, B, C, reverse=reverse, chunk=chunk, backend=backend, return_final_states=True
    )
    logs = dt * A.to(dtype)  # B L H
    state = before(part, last, logs.sum(1).exp()[:, :, None, None], reverse)  # B H P N
    heads, groups = x.shape[2], B.shape[2]
    grouped = state.unflatten(1, (groups, heads // groups))
    added = torch.einsum("blgn,bghpn->blghp", C.to(dtype), grouped).flatten(2, 3)
    y = y + added * _sums(logs, 1, reverse).exp()[..., None]
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


def selective_scan(
    part: Part,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """`terrazzo.kernels.selective_scan` along a sequence of which each rank has a part, in the order of the ranks."""
    dtype = accumulator(u, delta, A, B, C)
    delta = _steps(delta, None if delta_bias is None else delta_bias[:, None], delta_softplus, dtype)
    y, last = kernels.selective_scan(
        u.to(dtype), delta, A, B, C, reverse=reverse, backend=backend, return_last_state=True
    )
    decays = A.to(dtype)
    state = before(part, last, (delta.sum(2)[..., None] * decays).exp(), reverse)  # B D N
    readers = (C if C.dim() == 4 else C[:, None]).to(dtype)  # B G N L
    logs = _sums(delta, 2, reverse).unflatten(1, (readers.shape[1], -1))  # B G D/G L
    grouped, decays = state.unflatten(1, logs.shape[1:3]), decays.unflatten(0, logs.shape[1:3])
    added = sum(
        readers[:, :, None, n] * (logs * decays[..., n, None]).exp() * grouped[..., n, None] for n in range(A.shape[1])
    )
    y = y + added.flatten(1, 2)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)


def selective_scan_2d(
    part: Part,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    orders: Sequence[str] = ("rows", "columns", "rows_reversed", "columns_reversed"),
    backend: str = "auto",
) -> torch.Tensor:
    """`terrazzo.kernels.selective_scan_2d` of a map whose rows ranks share.

    For scans by columns the ranks exchange rows for columns, and back.

    Raises:
        InputError: An order is given twice, or the map has fewer columns than there are ranks.
    """
    level = part.level(u, 1)
    numbers = codes(tuple(orders))
    if len(set(numbers)) < len(numbers):
        raise InputError(f"orders must differ where ranks share a map, got {tuple(orders)}")
    dtype = accumulator(u, delta, A, B, C)
    delta = _steps(delta, delta_bias, delta_softplus, dtype)
    out: torch.Tensor | None = None
    for columns in (False, True):
        taken = [k for k, code in enumerate(numbers) if by_columns(code) == columns]
        if not taken:
            continue
        maps = [u if u.dim() == 4 else u[:, :, :, taken], *(x[:, :, :, taken] for x in (delta, B, C))]
        maps = [x.to(dtype) for x in maps]
        if columns:
            maps = _by_columns(part, level, maps)
        own = None if D is None else D[taken]
        y = _by_rows(part, *maps, A[taken], own, [is_reversed(numbers[k]) for k in taken], backend)
        if columns:
            y = part.to_rows(y, level)
        out = y if out is None else out + y
    assert out is not None
    return out


def scans_along_rows(
    part: Part, inputs: Callable[[], Sequence[torch.Tensor]], taken: list[int], reverse: list[bool]
) -> torch.Tensor:
    """Some of the scans of a map (B, h, W, D) whose rows ranks share: one forward and one reversed.

    Args:
        inputs: Makes u, delta, A, B, C, D and the bias of delta, which a softplus follows; of all scans. Nothing holds
            them while this rank waits for others.
        taken: The numbers of the scans.
    """
    u, delta, A, B, C, D, bias = inputs()
    dtype = accumulator(u, delta, A, B, C)
    delta = _steps(delta[:, :, :, taken], bias[taken], True, dtype)
    B, C = (x[:, :, :, taken].to(dtype) for x in (B, C))
    return _by_rows(part, u.to(dtype), delta, B, C, A[taken], D[taken], reverse, "auto")


def _by_columns(part: Part, level: Level, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """Maps (B, h, W, ...) of own rows as maps (B, w, H, ...) of own columns, in one exchange."""
    flat = [x.flatten(3) for x in maps]
    turned = part.to_columns(torch.cat(flat, 3), level).split([x.shape[3] for x in flat], 3)
    return [x.unflatten(3, y.shape[3:]) for x, y in zip(turned, maps)]


def _by_rows(part, u, delta, B, C, A, D, reverse: list[bool], backend: str) -> torch.Tensor:
    """Scans along the rows of maps whose rows ranks share: at most one forward and one reversed."""
    height, width, states = *delta.shape[1:3], A.shape[2]
    # Rows with steps of size 0 above and below the map hold the states after each scan, and read them out: below the
    # map that of the forward scan, above it that of the reversed scan. The other scan's state is still 0 there.
    more = -(-states // width)

    def around(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (*(0, 0) * (x.dim() - 2), more, more))

    index = torch.arange(more * width, device=C.device)
    readers = (index[:, None] == torch.arange(states, device=C.device)).to(C.dtype)
    readers = readers.view(1, more, width, 1, states).expand(C.shape[0], -1, -1, C.shape[3], -1)
    names = ["rows_reversed" if back else "rows" for back in reverse]
    held = kernels.selective_scan_2d(
        around(u), around(delta), A, around(B), torch.cat([readers, C, readers], 1), D, orders=names, backend=backend
    )
    above, y, below = held.split([more, height, more], 1)
    for k, back in enumerate(reverse):
        last = (above if back else below).flatten(1, 2)[:, :states].transpose(1, 2)  # B D N
        steps, decays = delta[:, :, :, k], A[k].to(delta.dtype)
        state = before(part, last, (steps.sum((1, 2))[..., None] * decays).exp(), back)
        logs = _sums(steps.flatten(1, 2), 1, back).unflatten(1, (height, width))  # B H W D
        for n in range(states):
            y = y + C[:, :, :, k, n, None] * (logs * decays[:, n]).exp() * state[:, None, None, :, n]
    return y

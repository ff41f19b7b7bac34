"""Scans of a map or a sequence that several ranks share: each rank scans its own part from the state before it.

A scan is linear in its first state. So every rank first scans from a state of zero. Ranks then tell each other their
last states and how much their parts let a state decay, and a rank computes from these the state at its first step.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from terrazzo import kernels
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.selective_scan.orders import CROSS, by_columns, codes, is_reversed
from terrazzo.spatial._part import Part


def before(part: Part, last: torch.Tensor, decay: torch.Tensor, reverse: bool) -> torch.Tensor:
    """The state at the first step of this rank.

    Args:
        last: The state after this rank's steps, if it was zero before them.
        decay: What these steps leave of a state, of a shape that `last` broadcasts with.
        reverse: Whether later ranks come first.
    """
    found = part.stacked(torch.stack([last, decay.expand_as(last)]).unsqueeze(2))
    return _entering(found, part.rank, reverse).squeeze(1)


def _entering(found: torch.Tensor, own: int, reverse: bool) -> torch.Tensor:
    """The states (B, S, ...) at the first step of each piece of a rank.

    Args:
        found: (ranks, 2, B, S, ...), for each rank and each of its S pieces the last state from a state of zero, and
            what the steps leave of a state. The scan takes the first piece of each rank, then the second of each, ...
        own: The rank.
        reverse: Whether the scan takes pieces and ranks from the last to the first.
    """
    ranks = range(len(found))[::-1] if reverse else range(len(found))
    last, decay = torch.zeros_like(found[0, 0]), torch.ones_like(found[0, 1])
    for rank in ranks:  # pieces of all ranks as one
        last, decay = found[rank, 1] * last + found[rank, 0], found[rank, 1] * decay
    state = _before_each(last, decay, reverse)
    for rank in ranks:
        # Every rank computes with all states, so that the backward pass calls the same exchanges on every rank.
        use = torch.tensor(rank > own if reverse else rank < own, device=found.device)
        state = torch.where(use, found[rank, 1] * state + found[rank, 0], state)
    return state


def _before_each(last: torch.Tensor, decay: torch.Tensor, reverse: bool) -> torch.Tensor:
    """The states before each of S pieces that follow each other in dimension 1, in log2(S) rounds."""
    if reverse:
        return _before_each(last.flip(1), decay.flip(1), False).flip(1)
    length, reach = last.shape[1], 1
    while reach < length:
        more = decay[:, reach:] * last[:, :-reach]
        last = torch.cat([last[:, :reach], last[:, reach:] + more], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
        reach *= 2
    return torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], 1)


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
    steps = _steps(delta, None if delta_bias is None else delta_bias[:, None], delta_softplus, dtype)
    state = before(part, *_last(u, steps, A, B, reverse, backend), reverse)
    return kernels.selective_scan(u, steps, A, B, C, D, z, reverse=reverse, backend=backend, initial_state=state)


def _last(
    u: torch.Tensor, steps: torch.Tensor, A: torch.Tensor, B: torch.Tensor, reverse: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last state (B, D, N) of a scan from a state of zero, and what its steps leave of a state."""
    last = kernels.selective_scan(u, steps, A, B, B, reverse=reverse, backend=backend, return_last_state=True)[1]
    return last, (steps.sum(2)[..., None] * A.to(steps.dtype)).exp()


def selective_scan_2d(
    part: Part,
    inputs: Callable[[], Sequence[torch.Tensor]],
    delta_softplus: bool = False,
    orders: Sequence[str] = CROSS,
    backend: str = "auto",
) -> torch.Tensor:
    """`terrazzo.kernels.selective_scan_2d` of a map whose rows ranks share.

    A rank has a single piece of a sequence of rows, and a piece of each column. It scans all pieces for their last
    states, which ranks exchange, and then again from the states before the pieces. So a scan by columns exchanges a
    state for each column, and no pixels.

    Args:
        inputs: Makes u, delta, A, B, C, D and the bias of delta. Virtual ranks without gradients call it twice, so that
            nothing holds the inputs while a rank waits for the others.
    """
    numbers = codes(tuple(orders))
    given: Sequence[torch.Tensor] | None = inputs()
    found = []
    for k, code in enumerate(numbers):
        u, steps, A, B = _of_scan(given, k, code, delta_softplus)[:4]
        found.append(torch.stack(_last(u, steps, A, B, is_reversed(code), backend)))
    batch, height, width = given[1].shape[:3]
    pieces = [states.shape[1] for states in found]
    if part.group.shares_modules and not torch.is_grad_enabled():
        given = u = steps = A = B = None
    shared = part.stacked(torch.cat(found, 1)).split(pieces, 2)
    given = inputs() if given is None else given
    out: torch.Tensor | None = None
    for k, code in enumerate(numbers):
        state = _entering(shared[k].unflatten(2, (batch, -1)), part.rank, is_reversed(code)).flatten(0, 1)
        u, steps, A, B, C, D = _of_scan(given, k, code, delta_softplus)
        y = kernels.selective_scan(
            u.to(steps.dtype), steps, A, B, C, D, reverse=is_reversed(code), backend=backend, initial_state=state
        )
        y = _as_map(y, by_columns(code), (height, width))
        out = y if out is None else out + y
    assert out is not None
    return out


def _of_scan(given: Sequence[torch.Tensor], k: int, code: int, softplus: bool) -> tuple[torch.Tensor, ...]:
    """u, step sizes, A, B, C and D of a scan, as sequences: of rows (B, C, h W), or of columns (B W, C, h)."""
    u, delta, A, B, C, D, bias = given
    delta = _steps(delta[:, :, :, k], None if bias is None else bias[k], softplus, accumulator(u, delta, A, B, C))
    maps = (u if u.dim() == 4 else u[:, :, :, k], delta, B[:, :, :, k], C[:, :, :, k])
    u, delta, B, C = (_as_sequences(x, by_columns(code)) for x in maps)
    return u, delta, A[k], B, C, None if D is None else D[k]


def _as_sequences(x: torch.Tensor, columns: bool) -> torch.Tensor:
    return (x.transpose(1, 2).flatten(0, 1) if columns else x.flatten(1, 2)).transpose(1, 2)


def _as_map(y: torch.Tensor, columns: bool, sides: tuple[int, int]) -> torch.Tensor:
    """(B, h, W, C) of sequences."""
    y = y.transpose(1, 2)
    return y.unflatten(0, (-1, sides[1])).transpose(1, 2) if columns else y.unflatten(1, sides)

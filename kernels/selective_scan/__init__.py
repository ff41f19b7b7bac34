"""The selective scan (S6) of Mamba: along a sequence, and over a map in several orders at once."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.dispatch.states import STEP, entering
from terrazzo.kernels.selective_scan import op
from terrazzo.kernels.selective_scan.exported import without_loops
from terrazzo.kernels.selective_scan.orders import BOTH, CROSS, codes
from terrazzo.kernels.selective_scan.scans import Scans

__all__ = ["BOTH", "CROSS", "selective_scan", "selective_scan_2d", "without_loops"]


def _check_shape(name: str, tensor: torch.Tensor | None, *wanted: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) not in wanted:
        raise InputError(f"{name} must be {' or '.join(map(str, wanted))}, got {tuple(tensor.shape)}")


def selective_scan(
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
    return_last_state: bool = False,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective scan along a sequence, with the interface of mamba_ssm's `selective_scan_fn`.

        dt_t = softplus(delta_t + delta_bias)
        h_t  = exp(dt_t A) h_{t-1} + dt_t u_t B_t
        y_t  = (C_t h_t + D u_t) silu(z_t)

    The computation is in float32, or in float64 if an input is float64.

    Args:
        u, delta: (B, D, L), L at least 1.
        A: (D, N), at most 0 (decays), N at least 1.
        B, C: (B, N, L), or (B, G, N, L) with G groups of D / G neighbouring channels each.
        D: (D,), weight of the input in the output, or None.
        z: (B, D, L), gate, or None.
        delta_bias: (D,), or None.
        delta_softplus: whether delta, with its bias, goes through a softplus.
        reverse: scan from the last position to the first.
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.
        return_last_state: whether to return the last state, too. It costs N more steps.
        initial_state: (B, D, N), h before the first step scanned, or None for 0. It costs N more steps. If a sequence
            is scanned in parts, it is the last state of the part before.

    Returns:
        (B, D, L) in the dtype of u. With `return_last_state`, a pair of this output and h after the last step scanned,
        (B, D, N) in the dtype of the computation. Here the state has a gradient; in mamba_ssm it has none.

    Raises:
        InputError: A shape or dtype that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.

    Source: Mamba, arXiv 2312.00752, algorithm 2.
    """
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    arguments.check_tensors(given, D=D, z=z, delta_bias=delta_bias)
    if u.dim() != 3 or A.dim() != 2 or arguments.any_empty(*u.shape[1:], A.shape[1]):
        raise InputError(
            "u must be (B, D, L), D and L at least 1, and A (D, N), N at least 1, "
            f"got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    batch, channels, length = u.shape
    groups = B.shape[1] if B.dim() == 4 else 1
    if groups < 1 or channels % groups:
        raise InputError(f"the {channels} channels of u do not divide into the {groups} groups of B")
    _check_shape("delta", delta, tuple(u.shape))
    _check_shape("A", A, (channels, A.shape[1]))
    for name, tensor in (("B", B), ("C", C)):
        wanted = (batch, groups, A.shape[1], length)
        _check_shape(name, tensor, wanted, *([(batch, A.shape[1], length)] if groups == 1 else []))
    _check_shape("z", z, tuple(u.shape))
    _check_shape("D", D, (channels,))
    _check_shape("delta_bias", delta_bias, (channels,))
    _check_shape("initial_state", initial_state, (batch, *A.shape))

    if return_last_state or initial_state is not None:
        out, last = _with_states(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend, initial_state, return_last_state
        )
        return out if last is None else (out, last)

    # Without annotations, because Dynamo of torch 2.8 fails at annotations with "|".
    # One group is an axis of size 1: `unflatten` would take several times as long for short sequences.
    def divided(x, axis):
        return x.unsqueeze(axis) if groups == 1 else x.unflatten(axis, (groups, -1))

    def of_maps(x):  # B D L to B L G D/G
        return None if x is None else divided(x.transpose(1, 2), 2)

    def of_groups(x):  # B G N L to B L G N
        return (x.unsqueeze(1) if x.dim() == 3 else x).permute(0, 3, 1, 2)

    def of_channels(x):  # D to G D/G
        return None if x is None else divided(x, 0)

    call = Scans(
        of_maps(u),
        of_maps(delta),
        of_channels(A),
        of_groups(B),
        of_groups(C),
        of_channels(D),
        of_maps(z),
        of_channels(delta_bias),
        delta_softplus,
        [2 if reverse else 0] * groups,
        length,
        False,
    )
    out = op.run(call, backend)
    return (out.squeeze(2) if groups == 1 else out.flatten(2)).transpose(1, 2)


def _with_states(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend, initial_state, return_last_state
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`selective_scan` from a state, and its last state (B, D, N) or None.

    N more steps in front, each of which puts one number of a channel's state in place, make the first state. N more
    steps of size 0 behind hold the last state and read it out.
    """
    dtype, length, states = accumulator(u, delta, A, B, C), u.shape[2], A.shape[1]
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    long = [u.to(dtype), delta, B, C]
    single = torch.eye(states, dtype=B.dtype, device=B.device).expand(*B.shape[:-1], -1)
    front: list[torch.Tensor] = []
    if initial_state is not None:
        values = entering(initial_state.to(dtype), A.to(dtype))  # B D N
        front = [values, torch.full_like(values, STEP), single, torch.zeros_like(single)]
        front = [x.flip(-1) for x in front] if reverse else front
    behind: list[torch.Tensor] = []
    if return_last_state:
        zeros = delta.new_zeros(*delta.shape[:2], states)
        behind = [zeros, zeros, torch.zeros_like(single), single.to(C.dtype)]
    around = [list(x) for x in zip(*(part for part in (front, long, behind) if part))]
    joined = [torch.cat(x[::-1] if reverse else x, -1) for x in around]
    u_, delta_, B_, C_ = joined
    held: Any = selective_scan(u_, delta_, A, B_, C_, reverse=reverse, backend=backend)
    before, after = (states if front else 0), (states if behind else 0)
    sizes = [after, length, before] if reverse else [before, length, after]
    parts = held.split(sizes, 2)
    out, last = parts[1], parts[0 if reverse else 2]
    if D is not None:
        out = out + D.to(dtype)[:, None] * u
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(u.dtype), last if behind else None


def selective_scan_2d(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    orders: Sequence[str] = CROSS,
    backend: str = "auto",
) -> torch.Tensor:
    """Sum of K selective scans over a map, one per order; the map is read in place, never permuted in memory.

    Projections act on single pixels, so they commute with any order: the inputs of the scans are computed once, by
    pixels.

    Args:
        u: (B, H, W, D), or (B, H, W, K, D) with a separate map for each scan.
        delta: (B, H, W, K, D).
        A: (K, D, N), at most 0, N at least 1.
        B, C: (B, H, W, K, N).
        D: (K, D), or None.
        delta_bias: (K, D), or None.
        delta_softplus: whether delta, with its bias, goes through a softplus.
        orders: K of the names "rows", "columns", "rows_reversed", "columns_reversed"; VMamba's cross-scan by default.
        backend: as in `selective_scan`.

    Returns:
        (B, H, W, D), summed over the scans, pixels in their places. For half-precision inputs the output is float32,
        because the sum may leave the range of half precision.

    Raises:
        InputError: A shape or dtype that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.

    Source: VMamba, arXiv 2401.10166, section 4.2 (SS2D).
    """
    order_codes, scans = codes(tuple(orders)), len(orders)
    arguments.check_tensors({"u": u, "delta": delta, "A": A, "B": B, "C": C}, D=D, delta_bias=delta_bias)
    if u.dim() not in (4, 5) or A.dim() != 3 or arguments.any_empty(*u.shape[1:3], u.shape[-1], A.shape[2]):
        raise InputError(
            "u must be (B, H, W, D) or (B, H, W, K, D), H, W and D at least 1, and A (K, D, N), N at least 1, "
            f"got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    shared = u.dim() == 4
    batch, height, width, channels = *u.shape[:3], u.shape[-1]
    if not shared:
        _check_shape("u", u, (batch, height, width, scans, channels))
    _check_shape("delta", delta, (batch, height, width, scans, channels))
    _check_shape("A", A, (scans, channels, A.shape[2]))
    for name, tensor in (("B", B), ("C", C)):
        _check_shape(name, tensor, (batch, height, width, scans, A.shape[2]))
    _check_shape("D", D, (scans, channels))
    _check_shape("delta_bias", delta_bias, (scans, channels))
    u = u.unsqueeze(3) if shared else u
    u, delta, B, C = (x.flatten(1, 2) for x in (u, delta, B, C))
    call = Scans(u, delta, A, B, C, D, None, delta_bias, delta_softplus, order_codes, width, True)
    return op.run(call, backend).unflatten(1, (height, width))

"""The state space dual (SSD) of Mamba-2: a selective scan with one decay for each head, in matrix products."""

import torch
import torch.nn.functional as F

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.dispatch.states import STEP, entering
from terrazzo.kernels.ssd import op

__all__ = ["ssd"]


def _check(x, dt, A, B, C, D, z, dt_bias) -> None:
    """Raise `InputError` for arguments that the definition does not allow."""
    arguments.check_tensors({"x": x, "dt": dt, "A": A, "B": B, "C": C}, D=D, z=z, dt_bias=dt_bias)
    if x.dim() != 4 or B.dim() != 4 or arguments.any_empty(*x.shape[1:], B.shape[3]):
        raise InputError(
            "x must be (B, L, H, P) and B (B, L, G, N), H, P, N and L at least 1, "
            f"got {tuple(x.shape)} and {tuple(B.shape)}"
        )
    batch, length, heads, width = x.shape
    groups = B.shape[2]
    if groups < 1 or heads % groups:
        raise InputError(f"the {heads} heads of x do not divide into the {groups} groups of B")
    wanted: dict[str, tuple[torch.Tensor | None, list[tuple[int, ...]]]] = {
        "dt": (dt, [(batch, length, heads)]),
        "A": (A, [(heads,)]),
        "B": (B, [(batch, length, groups, B.shape[3])]),
        "C": (C, [tuple(B.shape)]),
        "D": (D, [(heads,), (heads, width)]),
        "z": (z, [tuple(x.shape)]),
        "dt_bias": (dt_bias, [(heads,)]),
    }
    for name, (tensor, shapes) in wanted.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise InputError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")


def ssd(
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
    return_final_states: bool = False,
    initial_states: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's scan along a sequence, with the layout of mamba_ssm's `mamba_chunk_scan_combined`.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T
        y_t = (h_t^T C_t + D x_t) silu(z_t)

    The computation is in float32, or in float64 if an input is float64.

    Args:
        x: (B, L, H, P), L at least 1.
        dt: (B, L, H).
        A: (H,), at most 0.
        B, C: (B, L, G, N), G groups of H / G neighbouring heads each.
        D: (H,) or (H, P), weight of the input in the output, or None.
        z: (B, L, H, P), gate, or None.
        dt_bias: (H,), or None.
        dt_softplus: whether dt, with its bias, goes through a softplus.
        reverse: scan from the last position to the first.
        chunk: steps whose outputs are one matrix product in the portable form. The result does not depend on it;
            memory grows with it, and with the square of L / chunk.
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.
        return_final_states: whether to return the last state, too, as mamba_ssm does.
        initial_states: (B, H, P, N), h before the first step scanned, or None for 0. Each of both costs N more steps.

    Returns:
        (B, L, H, P) in the dtype of x. With `return_final_states`, a pair of this output and h after the last step
        scanned, (B, H, P, N) in the dtype of the computation. The state has a gradient like any output.

    Raises:
        InputError: A shape that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.

    Source: Mamba-2, arXiv 2405.21060.
    """
    _check(x, dt, A, B, C, D, z, dt_bias)
    if initial_states is not None:
        wanted = (x.shape[0], *x.shape[2:], B.shape[3])
        if tuple(initial_states.shape) != wanted:
            raise InputError(f"initial_states must be {wanted}, got {tuple(initial_states.shape)}")
    chunk = arguments.whole(chunk, "chunk", 1)
    dtype = accumulator(x, dt, A, B, C)
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    final = None
    if return_final_states or initial_states is not None:
        y, final = _scan_with_states(
            x.to(dtype), dt, A, B, C, reverse, chunk, backend, initial_states, return_final_states
        )
    else:
        y = op.run(x, dt, A, B, C, reverse, chunk, backend)
    if D is not None:
        y = y.to(dtype) + (D if D.dim() == 2 else D[:, None]).to(dtype) * x
    if z is not None:
        y = y.to(dtype) * F.silu(z.to(dtype))
    y = y.to(x.dtype)
    return y if final is None else (y, final)


def _scan_with_states(
    x, dt, A, B, C, reverse, chunk, backend, initial, return_final
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`op.run` from a state, and the last state (B, H, P, N) or None.

    N more steps in front, each of which puts one column of the state in place, make the first state. N more steps of
    size 0 behind hold the last state and read it out.
    """
    length, (groups, states) = x.shape[1], B.shape[2:]
    single = torch.eye(states, dtype=B.dtype, device=B.device)[:, None].expand(B.shape[0], -1, groups, -1)
    front: list[torch.Tensor] = []
    if initial is not None:
        values = entering(initial.to(x.dtype), A.to(x.dtype)[:, None, None]).permute(0, 3, 1, 2)  # B N H P
        steps = dt.new_full((dt.shape[0], states, dt.shape[2]), STEP)
        front = [values, steps, single, torch.zeros_like(single)]
        front = [part.flip(1) for part in front] if reverse else front
    behind: list[torch.Tensor] = []
    if return_final:
        steps = dt.new_zeros(dt.shape[0], states, dt.shape[2])
        behind = [x.new_zeros(x.shape[0], states, *x.shape[2:]), steps, torch.zeros_like(single), single.to(C.dtype)]
    around = [list(parts) for parts in zip(*(part for part in (front, [x, dt, B, C], behind) if part))]
    x, dt, B, C = (torch.cat(parts[::-1] if reverse else parts, 1) for parts in around)
    y = op.run(x, dt, A, B, C, reverse, chunk, backend)
    before, after = (states if front else 0), (states if behind else 0)
    parts = y.split([after, length, before] if reverse else [before, length, after], 1)
    return parts[1], parts[0 if reverse else 2].permute(0, 2, 3, 1) if behind else None

"""The state space dual (SSD) of Mamba-2: a selective scan with one decay for each head, in matrix products."""

import torch
import torch.nn.functional as F

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.dispatch.dtypes import accumulator
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

    Returns:
        (B, L, H, P) in the dtype of x. With `return_final_states`, a pair of this output and h after the last step
        scanned, (B, H, P, N) in the dtype of the computation. The state has a gradient like any output.

    Raises:
        InputError: A shape that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.

    Source: Mamba-2, arXiv 2405.21060.
    """
    _check(x, dt, A, B, C, D, z, dt_bias)
    chunk = arguments.whole(chunk, "chunk", 1)
    dtype = accumulator(x, dt, A, B, C)
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    final = None
    if return_final_states:
        y, final = _scan_with_states(x.to(dtype), dt, A, B, C, reverse, chunk, backend)
    else:
        y = op.run(x, dt, A, B, C, reverse, chunk, backend)
    if D is not None:
        y = y.to(dtype) + (D if D.dim() == 2 else D[:, None]).to(dtype) * x
    if z is not None:
        y = y.to(dtype) * F.silu(z.to(dtype))
    y = y.to(x.dtype)
    return y if final is None else (y, final)


def _scan_with_states(x, dt, A, B, C, reverse, chunk, backend) -> tuple[torch.Tensor, torch.Tensor]:
    """`op.run`, and the last state (B, H, P, N). N more steps of size 0 hold the state and read it out."""
    length, (groups, states) = x.shape[1], B.shape[2:]
    behind = (0, states) if not reverse else (states, 0)
    x, B = (F.pad(tensor, (0, 0, 0, 0, *behind)) for tensor in (x, B))
    dt = F.pad(dt, (0, 0, *behind))
    readers = torch.eye(states, dtype=C.dtype, device=C.device)[:, None].expand(C.shape[0], -1, groups, -1)
    C = torch.cat([readers, C] if reverse else [C, readers], 1)
    y = op.run(x, dt, A, B, C, reverse, chunk, backend)
    final, y = y.split([states, length], 1) if reverse else reversed(y.split([length, states], 1))
    return y, final.permute(0, 2, 3, 1)

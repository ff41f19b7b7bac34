"""The selective scan by its definition: one step after another, in any floating dtype. Wins every argument.

Source: Mamba, arXiv 2312.00752, algorithm 2, with the input matrix dt B ("simplified Euler").
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels.selective_scan.orders import pixels


def sequence(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """One scan: h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = C_t h_t.

    Args:
        u, delta: (B, L, D).
        A: (D, N).
        B, C: (B, L, N).

    Returns:
        (B, L, D).
    """
    state = u.new_zeros(u.shape[0], *A.shape)  # B D N
    out = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        state = torch.exp(step * A) * state + step * u[:, t, :, None] * B[:, t, None, :]
        out.append((state * C[:, t, None, :]).sum(-1))
    return torch.stack(out, 1)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    orders: Sequence[int],
    width: int,
    merge: bool,
) -> torch.Tensor:
    """K scans of one map, each in its own order.

    Computed in float32, in float64 where an input is float64.

    Args:
        u: (B, L, K, D), or (B, L, 1, D) for the same map in all scans; pixels by rows.
        delta: (B, L, K, D), before bias and softplus.
        A: (K, D, N), real and at most 0.
        B, C: (B, L, K, N).
        D: (K, D), weight of the input in the output.
        z: (B, L, K, D), gate.
        delta_bias: (K, D).
        delta_softplus: whether delta passes a softplus, linear above 20.
        orders: K codes, see `orders`.
        width: of the map.
        merge: whether the scans' outputs are summed.

    Returns:
        (B, L, K, D) in the dtype of u, pixels by rows whatever the orders; merged (B, L, D), not rounded to it.
    """
    dtype = accumulator(u, delta, A, B, C)
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)
    x = x.expand(delta.shape)
    outs = []
    for k, code in enumerate(orders):
        index = pixels(code, torch.arange(u.shape[1], device=u.device), u.shape[1], width)
        out = sequence(*(tensor[:, index, k] for tensor in (x, delta)), A[k], *(t[:, index, k] for t in (B, C)))
        outs.append(out[:, torch.argsort(index)])
    out = torch.stack(outs, 2)
    if D is not None:
        out = out + D.to(dtype) * x
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.sum(2) if merge else out.to(u.dtype)


def accumulator(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype in which a call computes: float64 where a tensor is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32

"""The selective scan by its definition: one step after another, in any floating dtype. It is authoritative.

Source: Mamba, arXiv 2312.00752, algorithm 2, with the input matrix dt B ("simplified Euler").
"""

import torch
import torch.nn.functional as F

from terrazzo.kernels.selective_scan.orders import pixels
from terrazzo.kernels.selective_scan.scans import Scans


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


def selective_scan(call: Scans) -> torch.Tensor:
    """Compute all scans of a call in float32, or in float64 if an input is float64."""
    x, delta, A, B, C = (tensor.to(call.dtype) for tensor in (call.u, call.delta, call.A, call.B, call.C))
    if call.delta_bias is not None:
        delta = delta + call.delta_bias.to(call.dtype)
    if call.delta_softplus:
        delta = F.softplus(delta)
    x = x.expand(delta.shape)
    outs = []
    for k, code in enumerate(call.orders):
        index = pixels(code, torch.arange(call.length, device=x.device), call.length, call.width)
        out = sequence(*(tensor[:, index, k] for tensor in (x, delta)), A[k], *(t[:, index, k] for t in (B, C)))
        outs.append(out[:, torch.argsort(index)])
    out = torch.stack(outs, 2)
    if call.D is not None:
        out = out + call.D.to(call.dtype) * x
    if call.z is not None:
        out = out * F.silu(call.z.to(call.dtype))
    return out.sum(2) if call.merge else out.to(call.u.dtype)

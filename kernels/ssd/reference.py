"""The state space dual by its definition: one step after another, in any floating dtype. It is authoritative.

Source: Mamba-2, arXiv 2405.21060, equation 1 with a scalar decay for each head.
"""

import torch

from terrazzo.kernels.dispatch.dtypes import accumulator


def of_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, L, G, N) to (B, L, H, N): neighbouring heads share a group."""
    return x.repeat_interleave(heads // x.shape[2], 2)


def ssd(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, reverse: bool
) -> torch.Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = h_t^T C_t, in float32, or float64 if an input is float64.

    Args: as in `op.run`.
    """
    dtype = accumulator(x, dt, A, B, C)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    B, C = of_heads(B, x.shape[2]), of_heads(C, x.shape[2])
    state = x.new_zeros(x.shape[0], x.shape[2], B.shape[3], x.shape[3])  # B H N P
    out: list[torch.Tensor] = []
    steps = range(x.shape[1])
    for t in reversed(steps) if reverse else steps:
        decay, step = torch.exp(dt[:, t] * A)[..., None, None], dt[:, t, :, None, None]
        state = decay * state + step * B[:, t, :, :, None] * x[:, t, :, None, :]
        out.append((state * C[:, t, :, :, None]).sum(2))
    return torch.stack(out[::-1] if reverse else out, 1)

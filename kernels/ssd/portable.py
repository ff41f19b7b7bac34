"""The state space dual in matrix products over chunks of steps: standard operations, for any device and exporter.

Inside a chunk every output is a masked product of the inputs (attention with decays instead of a softmax). Chunks pass
on their states. Exponents are sums within one chunk or sums over chunks, never differences of sums. They are at most 0,
so nothing overflows, and long sequences lose no digits (README.md).
"""

import torch

from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.dispatch.exporting import pieces


def _sums_between(x: torch.Tensor) -> torch.Tensor:
    """(..., T) to (..., T, T): at [i, j] the sum of x over j < k <= i, -inf where j > i.

    Each sum is computed from its terms. A difference of two running sums would lose the digits that they share.
    """
    length = x.shape[-1]
    rows = torch.arange(length, device=x.device)
    later = rows[:, None] > rows[None, :]
    sums = torch.where(later, x[..., :, None], 0).cumsum(-2)
    return sums.masked_fill(rows[:, None] < rows[None, :], -torch.inf)


def forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    reverse: bool,
    chunk: int,
) -> torch.Tensor:
    """The state space dual; arguments and result as in `op.run`, sizes may be symbolic.

    Source: Mamba-2, arXiv 2405.21060, section 6 (block decomposition).
    """
    dtype = accumulator(x, dt, A, B, C)
    length = x.shape[1]
    groups = B.shape[2]
    values, dt, B, C = (tensor.to(dtype) for tensor in (x, dt, B, C))
    inputs = [values * dt.unsqueeze(-1), (dt * A.to(dtype)).unsqueeze(-1), B, C]
    if reverse:
        inputs = [tensor.flip(1) for tensor in inputs]
    # Steps past the last have decay 1 and no input, so they change nothing. Steps are picked by index, because
    # exporters cannot prove the sizes of padding and slicing by symbolic sizes.
    count = pieces(length, chunk)
    steps = torch.arange(count * chunk, device=x.device).view(count, chunk)
    real = steps < length
    taken = torch.where(real, steps, 0)  # not clamped: TensorRT cannot clamp integers
    inputs = [torch.where(real[:, :, None, None], tensor[:, taken], 0) for tensor in inputs]
    # Chunks, then heads by group, in front of the steps of a chunk.
    into, decay, B, C = (tensor.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5) for tensor in inputs)
    decay = decay.squeeze(-1)  # B chunks G H/G Q
    between = _sums_between(decay).exp()
    out = ((C @ B.transpose(-1, -2)) * between) @ into

    # What each chunk adds to the state at its end, and the states there, which sum the chunk and all chunks before.
    added = (B * between[..., -1, :, None]).transpose(-1, -2) @ into  # B chunks G H/G N P
    passed = _sums_between(decay.sum(-1).movedim(1, -1)).exp()  # B G H/G chunks chunks
    states = (passed @ added.movedim(1, 3).flatten(-2)).unflatten(-1, added.shape[-2:]).movedim(3, 1)
    index = torch.arange(count, device=x.device)
    before = states.index_select(1, torch.where(index > 0, index - 1, 0))
    before = torch.where((index > 0)[:, None, None, None, None], before, 0)
    out = out + (C @ before) * decay.cumsum(-1).exp().unsqueeze(-1)

    out = out.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
    out = out.index_select(1, torch.arange(length, device=x.device))
    if reverse:
        out = out.flip(1)
    return out

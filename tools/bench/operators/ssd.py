"""The state space dual, and a loop over its steps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels import ssd
from terrazzo.tools.bench.operators.operator import Operator


def inputs(sizes: tuple[int, ...], device: torch.device) -> Sequence[torch.Tensor]:
    """x, dt, A, B, C: steps like a trained model's, decays like Mamba-2's initial ones."""
    batch, length, heads, width, states = sizes
    x, dt = torch.randn(batch, length, heads, width, device=device), torch.randn(batch, length, heads, device=device)
    B, C = (torch.randn(batch, length, 1, states, device=device) for _ in range(2))
    return x, dt - 1, -torch.linspace(1, 16, heads, device=device), B, C


def run(x, dt, A, B, C, backend: str = "auto") -> torch.Tensor:
    return ssd(x, dt, A, B, C, dt_softplus=True, backend=backend)


def step(state: torch.Tensor, x, dt, A, B, C) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of (B, H, N, P) states; x (B, H, P), dt (B, H), B and C (B, 1, N)."""
    state = torch.exp(dt * A)[..., None, None] * state + B.unsqueeze(-1) * (dt.unsqueeze(-1) * x).unsqueeze(2)
    return state, (C.unsqueeze(2) @ state).squeeze(2)


def loop(x, dt, A, B, C) -> torch.Tensor:
    dt = F.softplus(dt)
    state, out = x.new_zeros(x.shape[0], x.shape[2], B.shape[3], x.shape[3]), []
    for t in range(x.shape[1]):
        state, y = step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t])
        out.append(y)
    return torch.stack(out, 1)


SSD = Operator(
    name="ssd",
    run=run,
    peers={"loop": loop},
    compiled={},
    variant="a sequence",
    axes="B x L x heads x P x N",
    arguments=("x", "dt", "A", "B", "C"),
    inputs=inputs,
    # Heads of 64 channels and 64 states, as in Mamba-2 models for images, in the stages of a small pyramid at 224.
    at_224=((3136, 2, 64, 64), (784, 4, 64, 64), (196, 8, 64, 64), (196, 8, 64, 16)),
    larger=((4096, 6, 64, 64), (4096, 12, 64, 128)),
)

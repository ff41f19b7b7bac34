"""The selective scan, and a loop over the steps as a user without the operator would write it."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from terrazzo.kernels import selective_scan
from terrazzo.tools.bench.operators.operator import Operator


def inputs(sizes: tuple[int, ...], device: torch.device) -> Sequence[torch.Tensor]:
    """u, delta, A, B, C: steps like a trained model's, decays like Mamba's initial ones."""
    batch, channels, length, states = sizes
    u, delta = (torch.randn(batch, channels, length, device=device) for _ in range(2))
    B, C = (torch.randn(batch, states, length, device=device) for _ in range(2))
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    return u, delta - 1, A, B, C


def run(u, delta, A, B, C, backend: str = "auto") -> torch.Tensor:
    return selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)


def step(state: torch.Tensor, u, delta, A, B, C) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of (B, D, N) states; u and delta (B, D), B and C (B, N)."""
    state = torch.exp(delta.unsqueeze(-1) * A) * state + (delta * u).unsqueeze(-1) * B.unsqueeze(1)
    return state, (state * C.unsqueeze(1)).sum(-1)


def loop(u, delta, A, B, C, step=step) -> torch.Tensor:
    delta = F.softplus(delta)
    state, out = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        state, y = step(state, u[..., t], delta[..., t], A, B[..., t], C[..., t])
        out.append(y)
    return torch.stack(out, -1)


SELECTIVE_SCAN = Operator(
    name="selective_scan",
    run=run,
    peers={"loop": loop},
    # The step and not the loop: a loop of 196 steps takes minutes to compile, and each length compiles again.
    compiled={"loop": lambda: partial(loop, step=torch.compile(step, dynamic=False))},
    variant="a sequence",
    axes="B x D x L x N",
    arguments=("u", "delta", "A", "B", "C"),
    inputs=inputs,
    # MambaVision-T's two windows, VMamba-T's second and third stage and its first version's second, at 224.
    at_224=((160, 196, 8), (320, 49, 8), (768, 784, 1), (1536, 196, 1), (1536, 784, 16)),
    larger=((384, 3136, 1), (768, 3136, 16)),
)

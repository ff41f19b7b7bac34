"""The state space dual in Numba, for CPUs: what the kernels are given, and how a call is divided.

The kernels are in fused_cpu_kernels.py, which imports numba; this file does so at the first call. Heads and channels do
not depend on each other, so the number of threads changes no bit of a result.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.numba_host import threads
from terrazzo.kernels.numba_host.arrays import array_of, rows_of
from terrazzo.kernels.numba_host.fused_constants import LANES

# Steps between two states that are kept.
CHUNK = 64
# Vectors of channels that share a copy of the numbers of a chunk's states.
TILES = 4
# Numbers of states in a call of a kernel, so that the call itself costs little, and the most calls.
_WORK, _CALLS = 1 << 20, 256


def chunk(itemsize: int) -> int:
    """Steps between two states that are kept."""
    return CHUNK


def _divided(kernel: Callable[[int, int], None], units: int, work: int) -> None:
    calls = max(1, min(units, work // _WORK, _CALLS))
    threads.run(lambda i: kernel(units * i // calls, units * (i + 1) // calls), calls)


def _padded(x: torch.Tensor) -> torch.Tensor:
    """With contiguous channels that fill whole vectors."""
    if x.shape[-1] % LANES:
        return F.pad(x, (0, -x.shape[-1] % LANES))
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Call:
    """What the kernels take in both directions."""

    def __init__(self, x, dt, A, B, C, reverse):
        self.dtype = accumulator(x, dt, A, B, C)
        self.x, self.dt = _padded(x.to(self.dtype)), dt.to(self.dtype).contiguous()
        self.decay = torch.exp(self.dt * A.to(self.dtype))
        self.B, self.C = (_rows(t.to(self.dtype)) for t in (B, C))
        batch, length, heads, width = self.x.shape
        groups, states = B.shape[2:]
        self.sizes = (length, heads, groups, states, width)
        self.heads, self.tiles = batch * heads, width // LANES
        self.work = batch * length * heads * states * width
        self.reverse = reverse
        self.kept_shape = (batch, -(-length // CHUNK), heads, states, width)

    def given(self) -> list:
        flat = [array_of(t).reshape(-1) for t in (self.dt, self.decay)]
        return [*rows_of(self.x), *flat, *rows_of(self.B), *rows_of(self.C)]

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype)


def forward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state space dual; arguments as in `op.run`.

    Returns:
        out: (B, L, H, P).
        states: (B, chunks, H, N, P), the state in front of each chunk, for `backward`.
        whole: empty; the kernels for GPUs need it.
    """
    from terrazzo.kernels.ssd import fused_cpu_kernels as kernels

    call = _Call(x, dt, A, B, C, reverse)
    out, kept = call.empty(*call.x.shape), call.empty(*call.kept_shape)
    given = [*call.given(), array_of(out).reshape(-1), array_of(kept).reshape(-1), reverse, call.sizes]
    _divided(lambda *part: kernels.forward(*given, *part), call.heads * -(-call.tiles // TILES), call.work)
    width = x.shape[3]
    return out[..., :width].to(x.dtype).contiguous(), kept[..., :width].contiguous(), call.empty(0)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    states: torch.Tensor,
    whole: torch.Tensor,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, A, B and C, given the outputs of `forward`."""
    from terrazzo.kernels.ssd import fused_cpu_kernels as kernels

    call = _Call(x, dt, A, B, C, reverse)
    grad, states = _padded(grad.to(call.dtype)), _padded(states).contiguous()
    dx = call.empty(*call.x.shape)
    of_step, of_decay = (call.empty(*call.dt.shape) for _ in range(2))
    dB, dC = (call.empty(*call.dt.shape, B.shape[3]) for _ in range(2))
    arrays = [array_of(t).reshape(-1) for t in (dx, of_step, of_decay, dB, dC)]
    given = [*rows_of(grad), *call.given(), array_of(states).reshape(-1), reverse, call.sizes, *arrays]
    _divided(lambda *part: kernels.backward(*given, *part), call.heads, call.work)
    found = (
        dx[..., : x.shape[3]],
        of_step + of_decay * A.to(call.dtype),
        (of_decay.double() * call.dt).sum((0, 1)),  # few sums of many numbers
        *(t.unflatten(2, (B.shape[2], -1)).sum(3) for t in (dB, dC)),
    )
    return tuple(g.to(t.dtype).contiguous() for g, t in zip(found, (x, dt, A, B, C)))

"""The state space dual in Triton: which calls can run, how a call is cut, and the launches.

The kernels are in fused_kernels.py, which imports triton; this file does so at the first launch. Every launch is
decided by shapes and types alone, and nothing is added up by atomics, so the same call gives the same bits.
"""

from dataclasses import dataclass

import torch

from terrazzo.kernels.triton_host.machine import Limit, block_of, interpreted, is_amd, on_device, precision

SIZES = Limit(0, 64, "needs N and P of at most 64")
_CARRIED = 256  # numbers of a state that one program carries over the chunks


def chunk(itemsize: int) -> int:
    """Steps of a program. Found by compiling (README.md), not by timing: with more steps `gradients` spills."""
    return 32 if itemsize == 2 else 16


def warps(itemsize: int, amd: bool) -> int:
    """Warps of a program, found like `chunk`; an AMD warp has 64 threads."""
    return 4 if amd and itemsize == 2 else 8


@dataclass(frozen=True)
class _Call:
    """What all launches of one call share."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    reverse: bool

    @property
    def chunks(self) -> int:
        return -(-self.x.shape[1] // chunk(self.x.dtype.itemsize))

    @property
    def programs(self) -> int:
        return self.x.shape[0] * self.x.shape[2] * self.chunks

    @property
    def lengths(self) -> tuple[int, int, int, int]:
        """Length, heads, heads in a group, chunks."""
        length, heads = self.x.shape[1:3]
        return length, heads, heads // self.B.shape[2], self.chunks

    @property
    def constants(self) -> dict[str, object]:
        from terrazzo.kernels.ssd import fused_kernels

        states, width = self.B.shape[3], self.x.shape[3]
        return dict(
            N=states,
            P=width,
            BLOCK_N=block_of(states),
            BLOCK_P=block_of(width),
            CHUNK=chunk(self.x.dtype.itemsize),
            REVERSE=self.reverse,
            PRECISION=precision(self.x.dtype),
            INTERPRETED=interpreted(fused_kernels.outputs),
            num_warps=warps(self.x.dtype.itemsize, is_amd()),
            num_stages=1,  # nothing is loaded in a loop
        )

    def new_states(self) -> torch.Tensor:
        shape = (self.x.shape[0], self.chunks, self.x.shape[2], self.B.shape[3], self.x.shape[3])
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def carry(self, states: torch.Tensor, whole: torch.Tensor, backward: bool) -> None:
        from terrazzo.kernels.ssd import fused_kernels

        heads, size = self.x.shape[2], states.shape[3] * states.shape[4]
        parts = -(-size // _CARRIED)
        fused_kernels.carry[(self.x.shape[0] * heads * parts,)](
            states, whole, heads, self.chunks, parts, SIZE=size, BLOCK=_CARRIED, BACKWARD=backward
        )


def _call(x, dt, A, B, C, reverse: bool) -> _Call:
    return _Call(*(tensor.contiguous() for tensor in (x, dt, A, B, C)), reverse)


def forward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state space dual; arguments as in `op.run`.

    Returns:
        out: (B, L, H, P).
        states: (B, chunks, H, N, P) float32, the state in front of each chunk, for `backward`.
        whole: (B, chunks, H) float32, the product of each chunk's decays, for `backward`.
    """
    from terrazzo.kernels.ssd import fused_kernels

    call = _call(x, dt, A, B, C, reverse)
    out, states = torch.empty_like(call.x), call.new_states()
    whole = torch.empty(states.shape[:3], dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, states, whole
    inputs = (call.x, call.dt, call.A)
    with on_device(x.device):
        fused_kernels.states[(call.programs,)](
            *inputs, call.B, states, whole, *call.lengths, GRADIENT=False, **call.constants
        )
        call.carry(states, whole, backward=False)
        fused_kernels.outputs[(call.programs,)](*inputs, call.B, call.C, states, out, *call.lengths, **call.constants)
    return out, states, whole


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
    """Gradients of x, dt, A, B and C, given the outputs of `forward`. Deterministic."""
    from terrazzo.kernels.ssd import fused_kernels

    call = _call(x, dt, A, B, C, reverse)
    if grad.numel() == 0:
        return tuple(torch.zeros_like(tensor) for tensor in (x, dt, A, B, C))
    grad, behind = grad.contiguous(), call.new_states()
    grad_x, grad_dt = torch.empty_like(call.x), torch.empty_like(call.dt)
    exponents = torch.empty(call.dt.shape, dtype=torch.float32, device=x.device)
    rows = (*call.x.shape[:3], B.shape[3])
    grad_b, grad_c = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    with on_device(x.device):
        fused_kernels.states[(call.programs,)](
            grad, call.dt, call.A, call.C, behind, whole, *call.lengths, GRADIENT=True, **call.constants
        )
        call.carry(behind, whole, backward=True)
        fused_kernels.gradients[(call.programs,)](
            call.x,
            call.dt,
            call.A,
            call.B,
            call.C,
            states,
            grad,
            behind,
            grad_x,
            grad_dt,
            grad_b,
            grad_c,
            exponents,
            *call.lengths,
            **call.constants,
        )
    grad_b, grad_c = (g.unflatten(2, (B.shape[2], -1)).sum(3) for g in (grad_b, grad_c))
    return grad_x, grad_dt, exponents.sum((0, 1)).to(A.dtype), grad_b.to(B.dtype), grad_c.to(C.dtype)

"""The selective scan in Triton: which calls can run, how a call is cut into blocks, and the launches.

The kernels are in fused_kernels.py, which imports triton; this file does so at the first launch. Every launch is
decided by shapes and types alone, never by timing, so the same call gives the same bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from terrazzo.kernels.selective_scan.scans import Scans
from terrazzo.kernels.triton_host.machine import Limit, on_device

# Steps of a chunk: as many as the backward pass holds in registers at once. The state before each chunk is kept.
CHUNK = 32
STATES = Limit(0, 64, "holds at most 64 states of a channel in registers")
# The number of one-warp programs that fill a large GPU, and the length of a long sequence. With fewer programs for a
# long sequence, each chunk becomes a separate program.
_PROGRAMS = 2048
_LONG = 256


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: channels at a time, and the number of warps."""

    channels: int
    warps: int


def blocks(kernel: str, states: int, heavy: bool = False) -> Blocks:
    """The blocks of one kernel ("forward", "ends", "carry", "backward"): a rule, not an autotuner.

    A kernel has one warp, because scans and sums between warps cost more than they gain. Found by compiling for compute
    capabilities 8.0, 9.0 and 10.0 and for gfx942 (README.md), not by timing.

    Args:
        heavy: whether there is a gate or channels are not contiguous; "backward" then takes more registers.
    """
    if kernel == "forward":  # 16 numbers of state for each thread, 2 if a channel has one state
        return Blocks(max(8, min(64, 512 // power(states))), 1)
    if kernel == "backward":
        return Blocks(8 if heavy else 16, 1)
    return Blocks(32, 1)


def splits(programs: int, length: int) -> bool:
    """Whether each chunk is a separate program in the forward pass.

    Args:
        programs: the number of blocks of channels of all images and scans.
    """
    return programs < _PROGRAMS and length > _LONG


def power(size: int) -> int:
    """The power of two that holds `size`."""
    return 1 << max(0, size - 1).bit_length()


def _strides(*tensors: tuple[torch.Tensor | None, int]) -> list[int]:
    """Strides of all tensors, each given with its number of axes; 0 for an axis of size 1 (one u for all scans).

    A tensor may be None; its strides are 0.
    """
    found = []
    for x, axes in tensors:
        found += [0] * axes if x is None else [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride())]
    return found


class _Launches:
    """What all launches of one call share: sizes, strides and constants."""

    def __init__(self, call: Scans):
        self.call = call
        self.batch, self.length, self.scans, self.channels = call.delta.shape
        self.states = call.A.shape[2]
        self.chunks = -(-self.length // CHUNK)
        self.heavy = call.z is not None or any(x.stride(3) != 1 for x in (call.u, call.delta))
        alike = len(set(call.orders)) == 1
        orders = call.orders[:1] if alike else call.orders
        self.constants = dict(
            ORDERS=sum(code << (2 * k) for k, code in enumerate(orders)),
            SCANS=len(orders),
            N=self.states,
            HAS_D=call.D is not None,
            HAS_Z=call.z is not None,
            HAS_BIAS=call.delta_bias is not None,
            HAS_SOFTPLUS=call.delta_softplus,
            CHUNK=CHUNK,
        )

    @property
    def strides(self) -> list[int]:
        """Strides of a call's tensors, in the order of its arguments."""
        call = self.call
        maps = (call.u, 4), (call.delta, 4), (call.A, 3), (call.B, 4), (call.C, 4)
        return _strides(*maps, (call.D, 2), (call.z, 4), (call.delta_bias, 2))

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.call.u.device)

    def cut(self, kernel: str) -> tuple[Blocks, int]:
        """The blocks of a kernel, and the number of blocks that hold all channels."""
        found = blocks(kernel, self.states, self.heavy)
        return found, -(-self.channels // found.channels)

    def launch(
        self,
        kernel: str,
        programs: int,
        pointers: Sequence[torch.Tensor | None],
        sizes: Sequence[int],
        strides: Sequence[int],
        constants: Mapping[str, object],
    ) -> None:
        """Launch one kernel, with `programs` programs for each block of channels of all images and scans."""
        from terrazzo.kernels.selective_scan import fused_kernels

        cut, count = self.cut(kernel)
        function = getattr(fused_kernels, kernel)
        constants = {**self.constants, **constants, "BLOCK_D": cut.channels}
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
        grid = (self.batch * self.scans * count * programs,)
        dummy = self.call.u  # stands in for tensors that the call does not have
        pointers = [dummy if x is None else x for x in pointers]
        function[grid](*pointers, *sizes, count, *strides, **constants, num_warps=cut.warps, num_stages=1)

    def carry(self, into: torch.Tensor, x: torch.Tensor, B: torch.Tensor, backward: bool) -> None:
        """Fill (B, chunks, K, N, D): the first state of each chunk, or the gradient that its last state receives."""
        call = self.call
        sums = self.new(self.batch, self.chunks, self.scans, self.channels)
        if self.chunks > 1:
            self.launch(
                "ends",
                self.chunks - 1,
                (x, call.delta, call.A, B, call.z, call.delta_bias, into, sums),
                (self.length, call.width, self.scans, self.channels, self.chunks),
                _strides((x, 4), (call.delta, 4), (call.A, 3), (B, 4), (call.z, 4), (call.delta_bias, 2)),
                dict(BACKWARD=backward),
            )
        self.launch(
            "carry",
            self.states,
            (call.A, into, sums),
            (self.scans, self.channels, self.chunks),
            _strides((call.A, 3)),
            dict(BACKWARD=backward),
        )


def forward(call: Scans) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (see `Scans`), and the state before each chunk, (B, chunks, K, N, D) float32.

    Tensors of any strides are read in place. The scans' outputs are added up afterwards, in float32.
    """
    on = _Launches(call)
    out = on.new(*call.delta.shape, dtype=torch.float32 if call.merge else call.u.dtype)
    states = on.new(on.batch, on.chunks, on.scans, on.states, on.channels)
    if out.numel():
        with on_device(out.device):
            split = splits(on.batch * on.scans * on.cut("forward")[1], on.length)
            if split:
                on.carry(states, call.u, call.B, backward=False)
            on.launch(
                "forward",
                on.chunks if split else 1,
                (call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.delta_bias, out, states),
                (on.length, call.width, on.scans, on.channels, on.chunks),
                on.strides,
                dict(SPLIT=split, BLOCK_N=power(on.states)),
            )
    if call.merge:
        out = out.squeeze(2) if on.scans == 1 else out.sum(2)
    return out, states


def backward(call: Scans, grad: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias; None for a tensor that the call does not have.

    Several programs contribute to some gradients: they write parts, which are added up afterwards in float32. So the
    result is deterministic.
    """
    on = _Launches(call)
    if grad.numel() == 0:
        given = (call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.delta_bias)
        return tuple(None if x is None else x.new_zeros(x.shape) for x in given)
    grad = grad.unsqueeze(2) if call.merge else grad
    shared = call.u.shape[2] < on.scans
    grad_u = on.new(*call.delta.shape, dtype=torch.float32 if shared else call.u.dtype)
    grad_delta = on.new(*call.delta.shape, dtype=call.delta.dtype)
    grad_z = None if call.z is None else on.new(*call.z.shape, dtype=call.z.dtype)
    grad_A = torch.empty_like(states)
    _, count = on.cut("backward")
    grad_B, grad_C = (on.new(count, on.batch, on.scans, on.states, on.length) for _ in range(2))
    grad_D, grad_bias = (
        None if x is None else on.new(on.batch, on.chunks, *x.shape) for x in (call.D, call.delta_bias)
    )
    with on_device(grad.device):
        after = torch.empty_like(states)
        on.carry(after, grad, call.C, backward=True)
        on.launch(
            "backward",
            on.chunks,
            (
                *(call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.delta_bias, grad, states, after),
                *(grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias),
            ),
            (on.length, call.width, on.scans, on.channels, on.chunks, on.batch),
            on.strides + _strides((grad, 4)),
            {},
        )
    if shared:
        grad_u = grad_u.sum(2, keepdim=True).to(call.u.dtype)
    grad_B, grad_C = (
        found.sum(0).permute(0, 3, 1, 2).to(x.dtype).contiguous() for found, x in ((grad_B, call.B), (grad_C, call.C))
    )
    grad_A = grad_A.sum((0, 1)).transpose(1, 2).contiguous().to(call.A.dtype)
    grad_D, grad_bias = (
        None if x is None else found.sum((0, 1)).to(x.dtype)
        for found, x in ((grad_D, call.D), (grad_bias, call.delta_bias))
    )
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias

"""The selective scan in Numba, for CPUs: what the kernels are given, and how a call is divided.

The kernels are in fused_cpu_kernels.py, which imports numba; this file does so at the first call. The number of threads
changes no bit of a result: sums over channels are divided by the sizes of a call alone.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

from terrazzo.kernels.numba_host import threads
from terrazzo.kernels.numba_host.arrays import array_of, rows_of
from terrazzo.kernels.numba_host.fused_constants import LOG2_E, WIDE
from terrazzo.kernels.selective_scan.orders import by_columns, pixels
from terrazzo.kernels.selective_scan.scans import Scans

# Steps between two states that are kept.
CHUNK = 64
# Vectors of channels of a program of the forward pass. Neighbouring channels lie side by side in memory.
_VECTORS = 8
# States of all steps in a program of the forward pass: fewer cost less on one thread than a second thread's start.
_WORK = 1 << 17
# Programs of the backward pass add up gradients of B and C by groups: few groups, as each has a sum of its own.
_GROUPS = 8


def forward(call: Scans) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, see `Scans`, and the state before each chunk of steps, (B, chunks, K, N, D)."""
    from terrazzo.kernels.selective_scan import fused_cpu_kernels as kernels

    by_channels = _is_by_channels(call)
    arrays, channels = _arrays(call, by_channels)
    dtype, (batch, length, scans, _) = arrays[0].dtype, call.delta.shape
    wide = arrays[2].shape[-1]
    merged = call.merge and call.z is None  # gates come before the sum
    out = torch.empty(batch, length, 1 if merged else scans, wide, dtype=dtype)
    kept = torch.empty(batch, -(-length // CHUNK), scans, call.A.shape[2], wide, dtype=dtype)
    given = [*_given(arrays, call.delta_softplus), by_channels, *rows_of(out), array_of(kept)]
    # Channels do not depend on each other, so any cut gives the same bits.
    most = -(-length * scans * wide * call.A.shape[2] // _WORK)
    parts = _parts(wide, min(most, max(-(-wide // (_VECTORS * WIDE)), -(-torch.get_num_threads() // batch))))
    count = len(parts)
    threads.run(lambda i: kernels.forward(*given, i // count, *parts[i % count]), batch * count)
    out, kept = out[..., :channels], kept[..., :channels]
    if call.z is not None:
        out = out * F.silu(call.z.to(dtype))
    if call.merge:
        out = out.squeeze(2) if merged else out.sum(2)
    else:
        out = out.to(call.u.dtype)
    return out.contiguous(), kept.contiguous()


def backward(call: Scans, grad: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias, given those of the output and the states that were kept."""
    from terrazzo.kernels.selective_scan import fused_cpu_kernels as kernels

    grad, dz = (grad.unsqueeze(2) if call.merge else grad).to(call.dtype), None
    if call.z is not None:
        z = call.z.to(call.dtype)
        out = forward(call._replace(z=None, u=call.u.to(call.dtype), merge=False))[0]
        gate = torch.sigmoid(z)
        dz = grad * out * gate * (1 + z * (1 - gate))
        grad = grad * gate * z
    arrays, channels = _arrays(call)
    u, delta, A, B, C, skip, bias, _ = arrays
    batch, wide = delta.shape[0], A.shape[-1]
    kept, grad = _padded(kept, wide).contiguous(), _padded(grad, wide)
    parts = _parts(wide, max(1, _GROUPS // batch))
    groups = len(parts)
    dA = torch.empty(batch, *A.shape, dtype=call.dtype)
    dB, dC = (torch.empty(groups, *x.shape, dtype=call.dtype) for x in (B, C))
    du, ddelta = (torch.empty(x.shape, dtype=call.dtype) for x in (u, delta))
    dskip, dbias = (torch.zeros(batch, *x.shape, dtype=call.dtype) for x in (skip, bias))
    given = [*_given(arrays, call.delta_softplus), *rows_of(grad), array_of(kept), *rows_of(du), *rows_of(ddelta)]
    given += map(array_of, (dA, dB, dC, dskip, dbias))
    threads.run(lambda i: kernels.backward(*given, i // groups, i % groups, *parts[i % groups]), batch * groups)
    found = (
        du[..., :channels],
        ddelta[..., :channels],
        dA.sum(0)[..., :channels].transpose(1, 2),
        dB.sum(0),
        dC.sum(0),
        None if call.D is None else dskip.sum(0)[:, :channels],
        dz,
        None if call.delta_bias is None else dbias.sum(0)[:, :channels],
    )
    like = (call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.delta_bias)
    return tuple(None if g is None else g.to(x.dtype).contiguous() for x, g in zip(like, found))


def _is_by_channels(call: Scans) -> bool:
    """Whether the forward pass reads u and delta as they are, with pixels side by side, as in mamba_ssm's (B, D, L).

    A copy with channels side by side would take as long as a scan with one state.
    """
    if call.delta.shape[3] % WIDE or any(map(by_columns, call.orders)):
        return False
    return all(x.stride(1) == 1 and x.stride(3) != 1 for x in (call.u, call.delta))


def _arrays(call: Scans, by_channels: bool = False) -> tuple[list[torch.Tensor], int]:
    """What the kernels take, in the dtype of the computation and with whole programs of channels; the real channels.

    Args:
        by_channels: whether u and delta become (B, K, D, L).
    """
    channels, dtype = call.delta.shape[3], call.dtype
    wide = -(-channels // WIDE) * WIDE
    nothing = call.A.new_empty(0, wide, dtype=dtype)
    inputs = (call.u.to(dtype), call.delta.to(dtype))
    found = [
        *(_padded(x.permute(0, 2, 3, 1), 0) if by_channels else _padded(x, wide) for x in inputs),
        _padded(call.A.to(dtype).transpose(1, 2) * LOG2_E, wide).contiguous(),
        _padded(call.B.to(dtype), 0),
        _padded(call.C.to(dtype), 0),
        nothing if call.D is None else _padded(call.D.to(dtype), wide).contiguous(),
        nothing if call.delta_bias is None else _padded(call.delta_bias.to(dtype), wide).contiguous(),
        _index(tuple(call.orders), call.length, call.width),
    ]
    return found, channels


@functools.lru_cache(maxsize=16)
def _index(orders: tuple[int, ...], length: int, width: int) -> torch.Tensor:
    """The pixel of each step, (K, L)."""
    steps = torch.arange(length, device="cpu")
    return torch.stack([pixels(code, steps, length, width) for code in orders])


def _given(arrays: list[torch.Tensor], softplus: bool) -> list:
    """The arguments that both kernels begin with."""
    u, delta, A, B, C, skip, bias, index = arrays
    flat = [array_of(x).reshape(-1) for x in (A, skip, bias)]
    return [*rows_of(u), *rows_of(delta), flat[0], *rows_of(B), *rows_of(C), *flat[1:], softplus, array_of(index)]


def _parts(wide: int, count: int) -> list[tuple[int, int]]:
    """The first channel and the number of channels of each program for an image: at most `count` programs."""
    vectors = wide // WIDE
    count = min(count, vectors)
    cuts = [vectors * i // count * WIDE for i in range(count + 1)]
    return [(begin, end - begin) for begin, end in itertools.pairwise(cuts)]


def _padded(x: torch.Tensor, wide: int) -> torch.Tensor:
    """Zeros behind the last channel, and channels side by side."""
    x = F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

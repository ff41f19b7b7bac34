"""The selective scan in an exported graph: one higher-order scan, which ONNX calls Scan.

All scans of a call are one axis of the state, so that one node serves them. Only the recurrence is inside the node; if
a channel has one state, the decays are outside, too. Channels are the innermost axis of the state: with the states
innermost, runtimes are 4 to 18 times slower. For runtimes without loops, `without_loops` unrolls the scan.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels.selective_scan.orders import by_columns, is_reversed
from terrazzo.kernels.selective_scan.scans import Scans

_unrolled: contextvars.ContextVar[bool] = contextvars.ContextVar("terrazzo_unrolled", default=False)


@contextlib.contextmanager
def without_loops() -> Iterator[None]:
    """Export selective scans without loops inside the `with` block: as products, sums and exponentials alone.

    The graph grows with the square root of the length. The length must be known.
    """
    token = _unrolled.set(True)
    try:
        yield
    finally:
        _unrolled.reset(token)


def _is_unrolled() -> bool:
    return _unrolled.get() or torch.jit.is_tracing()  # TorchScript has no higher-order scan


# Dynamo cannot trace a context variable, so it takes the value at tracing time as a constant.
_is_unrolled._dynamo_marked_constant = True


def _steps(x: torch.Tensor, orders: Sequence[int], width: int) -> torch.Tensor:
    """Reorder (B, L, K, ...) by pixels, K 1 or the number of orders, to (L, B, K, ...) by steps."""
    found = []
    for k, code in enumerate(orders):
        one = x[:, :, k if x.shape[2] > 1 else 0]
        if by_columns(code):
            one = one.unflatten(1, (-1, width)).transpose(1, 2).flatten(1, 2)
        found.append(one.flip(1) if is_reversed(code) else one)
    return torch.stack(found, 2).transpose(0, 1)


def _pixels(x: torch.Tensor, orders: Sequence[int], width: int) -> torch.Tensor:
    """The inverse of `_steps` for (L, B, K, D)."""
    x = x.transpose(0, 1)
    found = []
    for k, code in enumerate(orders):
        one = x[:, :, k]
        one = one.flip(1) if is_reversed(code) else one
        if by_columns(code):
            one = one.unflatten(1, (width, -1)).transpose(1, 2).flatten(1, 2)
        found.append(one)
    return torch.stack(found, 2)


def _body(decays: torch.Tensor):
    """The recurrence of one step, with (K, N, D) decays."""

    def step(state, inputs):
        delta, x, B, C = inputs  # B K 1 D, B K 1 D, B K N 1, B K 1 N
        state = (torch.exp(delta * decays) * state + x * B).contiguous()
        return state, C @ state

    return step


def _looped(delta, x, B, C, decays) -> torch.Tensor:
    """The recurrence as one node: delta and x (L, B, K, D), B and C (L, B, K, N) to (L, B, K, D)."""
    from torch._higher_order_ops.scan import scan

    start = (delta[0].unsqueeze(-2) * decays * 0).contiguous()  # zeros whose sizes come from the graph
    inputs = (delta.unsqueeze(-2), x.unsqueeze(-2), B.unsqueeze(-1), C.unsqueeze(-2))
    return scan(_body(decays), start, inputs)[1].squeeze(-2)


def _one_state(delta, x, B, decays, orders, width) -> torch.Tensor:
    """The states (B, L, K, D), by pixels, of scans with one state per channel: the loop only multiplies and adds."""
    from torch._higher_order_ops.scan import scan

    def step(state, inputs):
        decay, more = inputs
        state = decay * state + more
        return state, state.clone()

    decay, more = (_steps(tensor, orders, width) for tensor in (torch.exp(delta * decays.squeeze(1)), delta * x * B))
    start = (more[0] * 0).contiguous()
    return _pixels(scan(step, start, (decay, more))[1], orders, width)


def _unlooped(delta, x, B, C, decays) -> torch.Tensor:
    """`_looped` unrolled: about sqrt(L) runs of sqrt(L) steps, all runs at once; first to find the ends of the runs.

    Source: Blelloch, "Prefix sums and their applications", 1990 (processors that rake over parts of a sequence).
    """
    length = int(delta.shape[0])
    steps = math.isqrt(length - 1) + 1
    runs = -(-length // steps)
    # Steps past the last have delta 0, so they hold the state.
    pad = (0, 0, 0, 0, 0, 0, 0, steps * runs - length)
    delta, x, B, C = (F.pad(tensor, pad).unflatten(0, (runs, steps)) for tensor in (delta, x, B, C))
    decay = torch.exp(delta.unsqueeze(-2) * decays).unbind(1)  # for each step: runs B K N D
    into = (x.unsqueeze(-2) * B.unsqueeze(-1)).unbind(1)
    end = into[0]
    for factor, more in zip(decay[1:], into[1:]):
        end = factor * end + more
    whole = torch.exp(delta.sum(1).unsqueeze(-2) * decays)
    starts = [end[0] * 0]  # zeros whose sizes come from the graph
    for run in range(runs - 1):
        starts.append(whole[run] * starts[-1] + end[run])
    state, out = torch.stack(starts), []
    for step in range(steps):
        state = decay[step] * state + into[step]
        out.append((C[:, step].unsqueeze(-1) * state).sum(-2))
    return torch.stack(out, 1).flatten(0, 1)[:length]


def forward(call: Scans) -> torch.Tensor:
    """Like `reference.selective_scan`; sizes may be symbolic."""
    dtype = call.dtype
    x, delta, B, C = (tensor.to(dtype) for tensor in (call.u, call.delta, call.B, call.C))
    if call.delta_bias is not None:
        delta = delta + call.delta_bias.to(dtype)
    if call.delta_softplus:
        # The same as ONNX Runtime's Softplus, which takes three times as long.
        delta = F.relu(delta) + torch.log(1 + torch.exp(-delta.abs()))
    decays = call.A.to(dtype).transpose(1, 2).contiguous()  # K N D
    if call.A.shape[2] == 1 and not _is_unrolled():
        out = C * _one_state(delta, x, B, decays, call.orders, call.width)
    else:
        inputs = tuple(_steps(tensor, call.orders, call.width) for tensor in (delta, delta * x, B, C))
        out = (_unlooped if _is_unrolled() else _looped)(*inputs, decays)
        out = _pixels(out, call.orders, call.width)
    if call.D is not None:
        out = out + call.D.to(dtype) * x
    if call.z is not None:
        out = out * F.silu(call.z.to(dtype))
    return out.sum(2) if call.merge else out.to(call.u.dtype)

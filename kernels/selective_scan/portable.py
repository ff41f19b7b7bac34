"""The selective scan in standard operations: pieces of some hundred steps that stay in the caches, in both passes.

Everything but the recurrence is computed for a whole piece at once. The recurrence h_t = a_t h_(t-1) + b_t is one fused
multiply-add for each step. If a step has few numbers, a piece is cut into runs that step together: first to find how
each run ends, then again from the end of the run before. Decays are only multiplied, so nothing overflows (README.md).
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels.selective_scan.orders import pixels
from terrazzo.kernels.selective_scan.scans import Scans

# Steps between two states that are kept for the backward pass.
CHUNK = 64
# Numbers of state in a piece, and in a step of all its runs: on a CPU as many as the caches hold, elsewhere few enough
# for any memory.
_PIECE, _STEP = 1 << 19, 1 << 14
_PIECE_ELSEWHERE, _STEP_ELSEWHERE = 1 << 25, 1 << 22
# Smaller powers of e are subnormal in float32, and processors are slow with subnormal numbers.
_LEAST_EXPONENT = -87.0
# The fewest channels that are worth a separate pass.
_LEAST_CHANNELS = 64


def _channels_last(call: Scans) -> Scans:
    """The call with contiguous channels in all its maps."""
    given = {name: getattr(call, name) for name in ("u", "delta", "B", "C", "z")}
    return call._replace(**{name: None if x is None else _side_by_side(x) for name, x in given.items()})


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _slices(total: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


def _parts(call: Scans) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of images, scans and channels that are small enough for a chunk of steps to fit into a piece."""
    batch, _, scans, channels = call.delta.shape
    size = _PIECE if call.u.device.type == "cpu" else _PIECE_ELSEWHERE
    most = max(1, size // (CHUNK * call.A.shape[2]))  # images x scans x channels
    images = max(1, min(batch, most // (scans * channels)))
    together = max(1, min(scans, most // channels)) if images == 1 else scans
    width = min(channels, max(_LEAST_CHANNELS, most)) if together == 1 else channels
    return itertools.product(_slices(batch, images), _slices(scans, together), _slices(channels, width))


class _Part:
    """Some images, scans and channels of a call, a piece of steps at a time. Tensors have the steps in front.

    Steps past the last have delta 0 and hold the state, so that all runs have equal lengths.
    """

    def __init__(self, call: Scans, images: slice, scans: slice, channels: slice):
        self.call, self.images, self.scans, self.channels = call, images, scans, channels
        self.orders = call.orders[scans]
        self.decays = call.A[scans, channels].to(call.dtype).transpose(1, 2).contiguous()  # K N D
        steps = torch.arange(call.length, device=call.u.device)
        self.pixels = [pixels(code, steps, call.length, call.width) for code in self.orders]
        images_here = len(range(*images.indices(call.u.shape[0])))
        self.shape = (images_here, *self.decays.shape)
        self.steps, self.runs = self._cut(images_here * self.decays.numel())
        # One buffer for all pieces: fresh memory costs more than the computation in it.
        self.decay, self.state, self.grad = self.decays.new_empty(3, self.steps + 1, *self.shape).unbind(0)
        self.decay_steps, self.state_steps = self._by_step(self.decay[:-1]), self._by_step(self.state[:-1])

    def _by_step(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Split (steps, ...) into one tensor (runs, ...) for each step of a run."""
        return list(x.unflatten(0, (self.runs, -1)).unbind(1))

    def _cut(self, numbers: int) -> tuple[int, int]:
        """The steps of a piece and its number of runs, for `numbers` numbers of state in a step."""
        on_cpu = self.call.u.device.type == "cpu"
        piece, step = (_PIECE, _STEP) if on_cpu else (_PIECE_ELSEWHERE, _STEP_ELSEWHERE)
        most = CHUNK * max(1, piece // (numbers * CHUNK))
        count = -(-self.call.length // most)
        steps = -(-self.call.length // count)
        runs = 1
        while 2 * runs * numbers <= step and 2 * runs * runs < steps and 2 * runs <= CHUNK:
            runs *= 2
        unit = runs if count == 1 else CHUNK  # pieces begin where states are kept
        return -(-steps // unit) * unit, runs

    def pieces(self) -> range:
        """The first step of each piece."""
        return range(0, self.call.length, self.steps)

    def of_channels(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """The scans and channels of this part, from (K, D)."""
        return None if x is None else x[self.scans, self.channels].to(self.call.dtype)

    def take(self, x: torch.Tensor, first: int, channels: slice | None = None) -> torch.Tensor:
        """Read (B, L, K, ...) or (B, L, 1, ...) by pixels as (steps, B, K, ...), zero past the last step."""
        channels = self.channels if channels is None else channels
        real = min(self.steps, self.call.length - first)
        out = self.decays.new_empty(self.steps, self.shape[0], len(self.orders), x[..., channels].shape[-1])
        out[real:] = 0
        for k, (code, index) in enumerate(zip(self.orders, self.pixels)):
            found = x[self.images, :, self.scans.start + k if x.shape[2] > 1 else 0, channels]
            if code == 0:
                found = found[:, first : first + real]
            else:
                found = found.index_select(1, index[first : first + real])
            out[:real, :, k] = found.transpose(0, 1)
        return out

    def put(self, out: torch.Tensor, x: torch.Tensor, first: int) -> None:
        """The inverse of `take` for channels; scans are added up if they share `out`, (B, L, 1, D)."""
        shared = out.shape[2] < len(self.call.orders)
        for k, index in enumerate(self.pixels):
            into = out[self.images, :, 0 if shared else self.scans.start + k, self.channels]
            self._put(into, index[first : first + self.steps], x[:, :, k], add=shared)

    def add_states(self, out: torch.Tensor, x: torch.Tensor, first: int) -> None:
        """Add (steps, B, K, N) to their places in (B, L, K, N), which sums over all parts of the channels."""
        for k, index in enumerate(self.pixels):
            into = out[self.images, :, self.scans.start + k]
            self._put(into, index[first : first + self.steps], x[:, :, k], add=True)

    @staticmethod
    def _put(into: torch.Tensor, index: torch.Tensor, x: torch.Tensor, add: bool) -> None:
        """Write x (steps, B, ...) into (B, L, ...)."""
        value = x[: len(index)].transpose(0, 1)
        value = value + into.index_select(1, index) if add else value.to(into.dtype)
        into.index_copy_(1, index, value)

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """The states of this part, from (B, chunks, K, N, D)."""
        return x[self.images, :, self.scans, :, self.channels]

    def inputs(self, first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step sizes dt (0 past the last step) and u, (steps, B, K, D); B and C, (steps, B, K, N)."""
        call = self.call
        dt = self.take(call.delta, first)
        if call.delta_bias is not None:
            dt += self.of_channels(call.delta_bias)
        if call.delta_softplus:
            dt = F.softplus(dt)
        dt[call.length - first :] = 0
        everything = slice(None)
        return dt, self.take(call.u, first), self.take(call.B, first, everything), self.take(call.C, first, everything)

    def wholes(self, dt: torch.Tensor) -> torch.Tensor:
        """The product of all decays of each run."""
        total = dt.unflatten(0, (self.runs, -1)).sum(1).unsqueeze(-2) * self.decays
        return total.clamp_(min=_LEAST_EXPONENT).exp_()

    def scan(self, dt: torch.Tensor, x: torch.Tensor, B: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """States after each step, (steps, B, K, N, D); leaves the decays of the steps in `decay`."""
        torch.mul(dt.unsqueeze(-2), self.decays, out=self.decay[:-1]).exp_()
        torch.mul((dt * x).unsqueeze(-2), B.unsqueeze(-1), out=self.state[:-1])
        recurrence(self.decay_steps, self.state_steps, start, self.wholes(dt))
        return self.state[:-1]

    def scan_back(self, dt: torch.Tensor, dy: torch.Tensor, C: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Gradients of the states after each step; the reverse of `scan`.

        Args:
            dt, dy: (steps, B, K, D), the sizes of the steps that follow, and the gradients of the output.
            after: the gradient of the state after the first step behind the piece. The last entry of `decay` is the
                decay of this step.
        """
        torch.mul(dy.unsqueeze(-2), C.unsqueeze(-1), out=self.grad[:-1])
        steps = (self._by_step(x)[::-1] for x in (self.decay[1:], self.grad[:-1]))
        recurrence(*steps, after, self.wholes(dt), reverse=True)
        return self.grad[:-1]


def recurrence(
    decay: Sequence[torch.Tensor],
    x: Sequence[torch.Tensor],
    start: torch.Tensor,
    whole: torch.Tensor,
    reverse: bool = False,
) -> None:
    """x_t = decay_t x_(t-1) + x_t from x_(-1) = start, in place, for several consecutive runs of steps.

    Args:
        decay, x: (runs, ...) for each step.
        start: (...).
        whole: (runs, ...), the product of all decays of each run.
        reverse: the last run comes first; the steps are given in reverse order.
    """
    if len(whole) == 1:
        state = start.unsqueeze(0)
    else:
        end = x[0].clone()
        for factor, more in zip(decay[1:], x[1:]):
            torch.addcmul(more, factor, end, out=end)
        order = range(len(whole))
        order = order[::-1] if reverse else order
        state = torch.empty_like(end)
        state[order[0]] = start
        for before, run in itertools.pairwise(order):
            torch.addcmul(end[before], whole[before], state[before], out=state[run])
    for factor, value in zip(decay, x):
        state = torch.addcmul(value, factor, state, out=value)


def _output(C: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """(T, B, K, D), the sum over N of C and states."""
    return (C.unsqueeze(-2) @ states).squeeze(-2)


def _over_channels(states: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(T, B, K, N), the sum over D of states and x."""
    return (states @ x.unsqueeze(-1)).squeeze(-1)


def forward(call: Scans) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (see `Scans`), and the state before each chunk of steps, (B, chunks, K, N, D)."""
    call = _channels_last(call)
    batch, length, scans, channels = call.delta.shape
    if call.merge:
        out = call.u.new_zeros(batch, length, 1, channels, dtype=call.dtype)
    else:
        out = call.u.new_empty(batch, length, scans, channels)
    kept = call.A.new_empty(batch, -(-length // CHUNK), scans, call.A.shape[2], channels, dtype=call.dtype)
    for slices in _parts(call):
        part = _Part(call, *slices)
        state, skip = part.decays.new_zeros(part.shape), part.of_channels(call.D)
        for first in part.pieces():
            dt, x, B, C = part.inputs(first)
            states = part.scan(dt, x, B, state)
            chunks = part.states(kept)[:, first // CHUNK :]
            chunks[:, 0] = state
            later = states[CHUNK - 1 : call.length - first - 1 : CHUNK]
            chunks[:, 1 : 1 + len(later)] = later.transpose(0, 1)
            y = _output(C, states)
            if skip is not None:
                y += skip * x
            if call.z is not None:
                y *= F.silu(part.take(call.z, first))
            part.put(out, y, first)
            state = states[-1].clone()
    return out.squeeze(2) if call.merge else out, kept


class _Gradients:
    """Gradients of a call's tensors, in the dtype of the computation; None for a tensor that the call does not have."""

    def __init__(self, call: Scans):
        given = (call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.delta_bias)
        found = [None if x is None else x.new_zeros(x.shape, dtype=call.dtype) for x in given]
        self.given, self.found = given, found
        self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias = found

    def rounded(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if g is None else g.to(x.dtype) for x, g in zip(self.given, self.found))


def backward(call: Scans, grad: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias, given the output's gradient and the kept states.

    The states within a piece are recomputed. With g_t the gradient of the state, g_t = a_(t+1) g_(t+1) + C_t dy_t runs
    from the last step to the first; the rest is computed for a whole piece at once (README.md).
    """
    call = _channels_last(call)
    grads = _Gradients(call)
    grad = grad.unsqueeze(2) if call.merge else grad
    for slices in _parts(call):
        part = _Part(call, *slices)
        _, scans, channels = slices
        skip, states_before = part.of_channels(call.D), part.states(kept)
        after, dt_after = part.decays.new_zeros(part.shape), part.decays.new_zeros(1, *part.shape[:2], part.shape[3])
        for first in reversed(part.pieces()):
            dt, x, B, C = part.inputs(first)
            start = states_before[:, first // CHUNK]
            states = part.scan(dt, x, B, start)
            dy = part.take(grad, first)
            if call.z is not None:
                z, y = part.take(call.z, first), _output(C, states)
                y = y if skip is None else y + skip * x
                gate = torch.sigmoid(z)
                part.put(grads.z, dy * y * gate * (1 + z * (1 - gate)), first)
                dy *= gate * z
            torch.exp(dt_after[0].unsqueeze(-2) * part.decays, out=part.decay[-1])
            g = part.scan_back(torch.cat([dt[1:], dt_after]), dy, C, after)
            after, dt_after = g[0].clone(), dt[:1].clone()

            part.add_states(grads.C, _over_channels(states, dy), first)
            part.add_states(grads.B, _over_channels(g, dt * x), first)
            from_state = _output(B, g)  # the gradient of dt u, without B
            du = dt * from_state
            if skip is not None:
                du += skip * dy
                grads.D[scans, channels] += (dy * x).sum((0, 1))
            part.put(grads.u, du, first)
            # The part of the state that came from the state before, times the state's gradient: a h_(t-1) g.
            flow = part.decay[:-1]
            flow[0] *= start
            flow[1:] *= states[:-1]
            flow *= g
            grads.A[scans, channels] += torch.mul(flow, dt.unsqueeze(-2), out=g).sum((0, 1)).transpose(1, 2)
            ddelta = x * from_state + flow.mul_(part.decays).sum(-2)
            if call.delta_softplus:
                ddelta *= torch.where(dt > 20, 1, -torch.expm1(-dt))
            if call.delta_bias is not None:
                grads.delta_bias[scans, channels] += ddelta.sum((0, 1))
            part.put(grads.delta, ddelta, first)
    return grads.rounded()

"""Attentive convolution against the layers of PyTorch that compute it, eager and compiled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from terrazzo.kernels import attentive_conv
from terrazzo.tools import results
from terrazzo.tools.timing import FORWARD, TRAINING, Function, Plan, attempt, interleaved, kernel_timer
from terrazzo.tools.verdicts import verdict

NAME = "attentive_conv"
PEERS = ("plain", "plain compiled")
_TAPS = 9
_INPUTS = ("x", "value", "weight", "bias", "mixing", "mixing_bias", "inhibition")
# What a form's result may differ from that of the portable form in float32, relative to its norm.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """A map, on which all forms are timed in turns."""

    batch: int
    channels: int
    height: int
    width: int
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.channels}x{self.height}x{self.width}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype_name}"

    def holds(self, row: results.Row) -> bool:
        """Whether a row was measured on this case."""
        return (row.shape, row.dtype) == (self.shape, self.dtype_name)

    def inputs(self, device: torch.device) -> list[torch.Tensor]:
        """What the operator takes, fresh random numbers; maps channels last, as a layer norm leaves them."""
        torch.manual_seed(0)
        channels, maps = self.channels, (self.batch, self.height, self.width, self.channels)
        scales = {(channels, channels): channels**-0.5, (_TAPS, _TAPS): _TAPS**-0.5}
        shapes = ((channels, channels), (channels,), (_TAPS, _TAPS), (_TAPS,), (channels,))
        found = [torch.randn(maps, device=device).permute(0, 3, 1, 2) for _ in range(2)]
        found += [torch.randn(shape, device=device) * scales.get(shape, 1) for shape in shapes]
        return [x.to(self.dtype).requires_grad_() for x in found]


# The four stages of AttNet-XXS at 224, and three of its own and one of AttNet-T2 at larger sizes.
_AT_224 = [(32, 56, 56), (64, 28, 28), (128, 14, 14), (240, 7, 7)]
_LARGER = [(32, 128, 128), (64, 64, 64), (32, 200, 336), (64, 200, 336)]


def cases(name: str, plan: Plan) -> list[Case]:
    """What is measured on the plan's device; a GPU gets the batches that it can take."""
    gpu = plan.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    found = [Case(128 if gpu else 1, *sizes, dtype=dtype) for sizes in _AT_224]
    if not plan.quick:
        found += [Case(8 if gpu else 1, *sizes, dtype=dtype) for sizes in _LARGER]
    return found


def plain(x, value, weight, bias, mixing, mixing_bias, inhibition) -> torch.Tensor:
    """What a user without the operator writes, and the authors do.

    The whole map is projected and pooled as a sequence; one convolution has a group for each channel of each image.
    """
    batch, channels, height, width = value.shape
    side = math.isqrt(len(mixing))
    pooled = F.adaptive_avg_pool1d(F.conv2d(x, weight[..., None, None], bias).flatten(2), side * side)
    kernels = F.linear(F.gelu(pooled), mixing, mixing_bias)
    kernels = kernels - inhibition.sigmoid()[:, None] * kernels.mean(2, keepdim=True)
    kernels = kernels.reshape(-1, 1, side, side).to(value.dtype)
    value = value.reshape(1, -1, height, width)
    out = F.conv2d(value, kernels, padding=side // 2, groups=batch * channels)
    return out.view(batch, channels, height, width)


def _forms(inputs: list[torch.Tensor], plan: Plan) -> dict[str, Function]:
    """The forms by name: each computes the output of these inputs."""
    ours = ("fused", "portable") if plan.device.type == "cuda" else ("portable",)
    functions = {name: partial(attentive_conv, backend=name) for name in ours} | {"plain": plain}
    if plan.compiled:
        torch.compiler.reset()  # or it would run uncompiled once as many shapes as Dynamo keeps have passed
        functions["plain compiled"] = torch.compile(plain, dynamic=False)
    return {name: partial(function, *inputs) for name, function in functions.items()}


def _gradients(form: Function, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(form(), inputs, grad)


def _expected(inputs: list[torch.Tensor], grad: torch.Tensor, training: bool) -> Sequence[torch.Tensor]:
    """The output, or the gradients, by the portable form in float32."""
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    form = partial(attentive_conv, *inputs, backend="portable")
    return _gradients(form, inputs, grad.float()) if training else (form().detach(),)


def _fault(case: Case, wanted: Sequence[torch.Tensor], found: torch.Tensor | tuple[torch.Tensor, ...]) -> str | None:
    """What is wrong with a form's output or gradients."""
    found = found if isinstance(found, tuple) else (found,)
    for name, a, b in zip(_INPUTS if len(found) > 1 else ("output",), found, wanted):
        error = ((a.float() - b).norm() / b.norm()).item()
        if not error <= _TOLERANCE[case.dtype]:
            what = name if name == "output" else f"gradient of {name}"
            return f"its {what} is wrong: relative error {error:.1e}"
    return None


def measure(case: Case, plan: Plan) -> tuple[list[results.Row], dict[str, str]]:
    """Check and time every form on a case.

    Returns:
        The rows, and of each form that has none the reason.
    """
    about = results.about(plan.device, *(("triton",) if plan.device.type == "cuda" else ()))
    timer = kernel_timer(plan.device)
    inputs = case.inputs(plan.device)
    grad = torch.randn_like(inputs[1])
    rows, reasons = [], {}
    for metric in plan.passes or (FORWARD, TRAINING):
        training = metric == TRAINING
        forms = _forms(inputs if training else [x.detach() for x in inputs], plan)
        if training:
            forms = {name: partial(_gradients, form, inputs, grad) for name, form in forms.items()}
        wanted = _expected(inputs, grad, training)
        with torch.set_grad_enabled(training):
            forms, wanting = attempt(forms, partial(_fault, case, wanted))
            times = interleaved(forms, plan.seconds, timer)
        rows += [
            results.Row(NAME, "3x3", case.shape, case.dtype_name, name, metric, "ms", *(1e3 * t for t in found), *about)
            for name, found in times.items()
        ]
        reasons |= {f"{name}, {metric}": reason for name, reason in wanting.items()}
    return rows, reasons


def _times(rows: list[results.Row]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Milliseconds by form, by shape, dtype and pass."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row.shape, row.dtype, row.metric), {})[row.backend] = row.p50
    return found


def table(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: our time, and how many times as long others take."""
    ours = "fused" if any(row.backend == "fused" for row in rows) else "portable"
    peers = [name for name in ("portable", *PEERS) if name != ours]
    lines = []
    for (shape, dtype, metric), times in _times(rows).items():
        ratios = (results.ratio(times.get(peer), times.get(ours)) for peer in peers)
        lines.append((f"{shape}, {dtype}", metric, results.milliseconds(times.get(ours), 3), *ratios))
    return ("B x C x H x W", "pass", f"{ours}, ms", *(f"{peer} takes" for peer in peers)), lines


def verdicts(rows: list[results.Row], device: str) -> list[str]:
    """What is promised, and whether it is kept: of a GPU, that no plain form is faster."""
    if device != "cuda":
        return []
    found = [(", ".join(case), times) for case, times in _times(rows).items()]
    lines = []
    for peer in PEERS:
        ratios = {case: times[peer] / times["fused"] for case, times in found if {peer, "fused"} <= times.keys()}
        lines.append(verdict(f"{peer} takes", ratios, 1, False, "x our time"))
    return lines

"""Strip attention against its plain PyTorch form, eager and compiled, and against dense attention of padded vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from terrazzo.kernels import strip_attention
from terrazzo.tools import results
from terrazzo.tools.timing import FORWARD, TRAINING, Function, Plan, attempt, interleaved, kernel_timer
from terrazzo.tools.verdicts import verdict

NAME = "strip_attention"
PEERS = ("plain", "plain compiled", "padded sdpa")
# What a form's result may differ from the definition's in float32, relative to its norm.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """Queries, keys and heads of one layer, on which all forms are timed in turns."""

    batch: int
    queries: int
    keys: int
    heads: int
    dim: int = 32
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return "x".join(map(str, (self.batch, self.queries, self.keys, self.heads, self.dim)))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype_name}"

    def holds(self, row: results.Row) -> bool:
        """Whether a row was measured on this case."""
        return (row.shape, row.dtype) == (self.shape, self.dtype_name)

    def inputs(self, device: torch.device) -> list[torch.Tensor]:
        """Query, key and value, fresh random numbers."""
        torch.manual_seed(0)
        keys = (self.batch, self.keys, self.heads)
        shapes = ((self.batch, self.queries, self.heads), keys, (*keys, self.dim))
        return [torch.randn(shape, device=device).to(self.dtype).requires_grad_() for shape in shapes]


# Queries, keys, heads: the four stages of S2AFormer-mini at 224, three at 512 and the first at 800 x 1280.
_AT_224 = [(3136, 49, 1), (784, 49, 2), (196, 49, 3), (49, 49, 9)]
_LARGER = [(16384, 256, 1), (4096, 256, 2), (1024, 256, 3), (64000, 1000, 1)]


def cases(name: str, plan: Plan) -> list[Case]:
    """What is measured on the plan's device; a GPU gets the batches that it can take."""
    gpu = plan.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    found = [Case(128 if gpu else 1, *sizes, dtype=dtype) for sizes in _AT_224]
    if not plan.quick:
        found += [Case(8 if gpu else 1, *sizes, dtype=dtype) for sizes in _LARGER]
    return found


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What a user without the operator would write: all weights in memory, heads in front."""
    score = query.transpose(1, 2).unsqueeze(-1) * key.transpose(1, 2).unsqueeze(-2)
    return (score.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)


def padded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Fused dense attention, which wants queries and keys as long as values: padded with zeros."""
    query, key = (F.pad(x.transpose(1, 2).unsqueeze(-1), (0, value.shape[-1] - 1)) for x in (query, key))
    return F.scaled_dot_product_attention(query, key, value.transpose(1, 2), scale=1.0).transpose(1, 2)


def _forms(inputs: list[torch.Tensor], plan: Plan) -> dict[str, Function]:
    """The forms by name: each computes the output of these inputs."""
    functions = {name: partial(strip_attention, backend=name) for name in _ours(plan.device.type)}
    functions |= {"plain": plain, "padded sdpa": padded}
    if plan.compiled:
        torch.compiler.reset()  # or it would run uncompiled once as many shapes as Dynamo keeps have passed
        functions["plain compiled"] = torch.compile(plain, dynamic=False)
    return {name: partial(function, *inputs) for name, function in functions.items()}


def _ours(device: str) -> tuple[str, ...]:
    return ("fused", "portable") if device == "cuda" else ("portable",)


def _gradients(form: Function, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(form(), inputs, grad)


def _fault(case: Case, wanted: Sequence[torch.Tensor], found: torch.Tensor | tuple[torch.Tensor, ...]) -> str | None:
    """What is wrong with a form's output or gradients."""
    found = found if isinstance(found, tuple) else (found,)
    for name, a, b in zip(("query", "key", "value") if len(found) > 1 else ("output",), found, wanted):
        error = ((a.float() - b).norm() / b.norm()).item()
        if not error <= _TOLERANCE[case.dtype]:
            what = name if name == "output" else f"gradient of the {name}"
            return f"its {what} is wrong: relative error {error:.1e}"
    return None


def _expected(inputs: list[torch.Tensor], grad: torch.Tensor, training: bool) -> Sequence[torch.Tensor]:
    """The output, or the gradients, by the portable form in float32."""
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    form = partial(strip_attention, *inputs, backend="portable")
    return _gradients(form, inputs, grad.float()) if training else (form().detach(),)


def measure(case: Case, plan: Plan) -> tuple[list[results.Row], dict[str, str]]:
    """Check and time every form on a case.

    Returns:
        The rows, and of each form that has none the reason.
    """
    about = results.about(plan.device, *(("triton",) if plan.device.type == "cuda" else ()))
    rows, reasons = [], {}
    inputs = case.inputs(plan.device)
    grad = torch.randn(case.batch, case.queries, case.heads, case.dim, device=plan.device).to(case.dtype)
    timer = kernel_timer(plan.device)
    for metric in plan.passes or (FORWARD, TRAINING):
        training = metric == TRAINING
        given = inputs if training else [x.detach() for x in inputs]
        forms = _forms(given, plan)
        if training:
            forms = {name: partial(_gradients, form, inputs, grad) for name, form in forms.items()}
        wanted = _expected(inputs, grad, training)
        with torch.set_grad_enabled(training):
            forms, wanting = attempt(forms, partial(_fault, case, wanted))
            times = interleaved(forms, plan.seconds, timer)
        rows += [
            results.Row(
                NAME, "one channel", case.shape, case.dtype_name, name, metric, "ms", *(1e3 * t for t in found), *about
            )
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


def _leading(rows: list[results.Row]) -> str:
    """Ours: the fused form where there are rows of it."""
    return "fused" if any(row.backend == "fused" for row in rows) else "portable"


def table(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: our time, and how many times as long others take."""
    ours = _leading(rows)
    peers = [name for name in ("portable", *PEERS) if name != ours]
    lines = []
    for (shape, dtype, metric), times in _times(rows).items():
        ratios = (results.ratio(times.get(peer), times.get(ours)) for peer in peers)
        lines.append((f"{shape}, {dtype}", metric, results.milliseconds(times.get(ours), 3), *ratios))
    head = ("B x queries x keys x heads x dim", "pass", f"{ours}, ms", *(f"{peer} takes" for peer in peers))
    return head, lines


def verdicts(rows: list[results.Row], device: str) -> list[str]:
    """What is promised, and whether it is kept: of a GPU, that no plain form is faster."""
    if device != "cuda":
        return []
    found = [(f"{shape}, {dtype}, {metric}", times) for (shape, dtype, metric), times in _times(rows).items()]
    lines = []
    for peer in PEERS[:2]:
        ratios = {case: times[peer] / times["fused"] for case, times in found if {peer, "fused"} <= times.keys()}
        lines.append(verdict(f"{peer} takes", ratios, 1, False, "x our time"))
    return lines

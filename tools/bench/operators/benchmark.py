"""Operators against the plain PyTorch that computes them, eager and compiled: one entry for each, in `OPERATORS`.

(Neighborhood attention has a separate benchmark, because its peers are other packages.)
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from terrazzo.tools import results
from terrazzo.tools.bench.operators.attentive_conv import ATTENTIVE_CONV
from terrazzo.tools.bench.operators.block_sparse_attention import BLOCK_SPARSE_ATTENTION
from terrazzo.tools.bench.operators.grouped_linear import GROUPED_LINEAR
from terrazzo.tools.bench.operators.operator import Operator
from terrazzo.tools.bench.operators.selective_scan import SELECTIVE_SCAN
from terrazzo.tools.bench.operators.softmax_free_attention import SOFTMAX_FREE_ATTENTION
from terrazzo.tools.bench.operators.ssd import SSD
from terrazzo.tools.bench.operators.strip_attention import STRIP_ATTENTION
from terrazzo.tools.bench.operators.token_reduction import TOKEN_REDUCTION
from terrazzo.tools.bench.operators.varlen_attention import VARLEN_ATTENTION
from terrazzo.tools.bench.verdicts import verdict
from terrazzo.tools.inspect.timing import FORWARD, TRAINING, Function, Plan, attempt, interleaved, kernel_timer

OPERATORS = {
    operator.name: operator
    for operator in (
        ATTENTIVE_CONV,
        BLOCK_SPARSE_ATTENTION,
        GROUPED_LINEAR,
        SELECTIVE_SCAN,
        SOFTMAX_FREE_ATTENTION,
        SSD,
        STRIP_ATTENTION,
        TOKEN_REDUCTION,
        VARLEN_ATTENTION,
    )
}
COMPILED = " compiled"
# How far a form's result may differ from the portable form's in float32, relative to its norm.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """An operator's inputs, on which all forms are timed in turns."""

    operator: Operator
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.sizes))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype_name}"

    def holds(self, row: results.Row) -> bool:
        """Whether a row was measured on this case."""
        return (row.what, row.shape, row.dtype) == (self.operator.name, self.shape, self.dtype_name)

    def inputs(self, device: torch.device) -> list[torch.Tensor]:
        """Fresh random numbers."""
        torch.manual_seed(0)
        return _leaves(self.operator.inputs(self.sizes, device), self.dtype)


def _leaves(inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Inputs in that dtype that require gradients; integer inputs stay as they are."""
    return [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]


def cases(name: str, plan: Plan) -> list[Case]:
    """What is measured on the plan's device; a GPU gets the batches that it can take."""
    operator, gpu = OPERATORS[name], plan.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    sizes = [(128 if gpu else 1, *size) for size in operator.at_224]
    if not plan.quick:
        sizes += [(8 if gpu else 1, *size) for size in operator.larger]
    return [Case(operator, size, dtype) for size in sizes]


def has_cpu_kernels(operator: Operator) -> bool:
    return importlib.import_module(f"terrazzo.kernels.{operator.name}.op").OPERATOR.cpu


def _forms(operator: Operator, inputs: list[torch.Tensor], plan: Plan) -> dict[str, Function]:
    """The forms by name: each computes the output of these inputs."""
    gpu = plan.device.type == "cuda"
    own = ("fused", "portable") if gpu or has_cpu_kernels(operator) else ("portable",)
    functions = {name: partial(operator.run, backend=name) for name in own}
    functions |= {**operator.peers, **(operator.gpu_peers if gpu else {})}
    if plan.compiles:
        torch.compiler.reset()  # otherwise it would run uncompiled after as many shapes as Dynamo caches
        functions |= {name + COMPILED: make() for name, make in operator.compiled.items()}
    return {name: partial(function, *inputs) for name, function in functions.items()}


def _gradients(form: Function, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(form(), [x for x in inputs if x.requires_grad], grad)


def _expected(
    operator: Operator, inputs: list[torch.Tensor], grad: torch.Tensor, training: bool
) -> Sequence[torch.Tensor]:
    """The output, or the gradients, by the portable form in float32."""
    inputs = _leaves(inputs, torch.float32)
    form = partial(operator.run, *inputs, backend="portable")
    return _gradients(form, inputs, grad.float()) if training else (form().detach(),)


def _fault(case: Case, wanted: Sequence[torch.Tensor], found: torch.Tensor | tuple[torch.Tensor, ...]) -> str | None:
    """What is wrong with a form's output or gradients."""
    found = found if isinstance(found, tuple) else (found,)
    for name, a, b in zip(case.operator.arguments if len(found) > 1 else ("output",), found, wanted):
        error = ((a.float() - b).norm() / b.norm()).item()
        if not error <= _TOLERANCE[case.dtype]:
            what = name if name == "output" else f"gradient of {name}"
            return f"its {what} is wrong: relative error {error:.1e}"
    return None


def measure(case: Case, plan: Plan) -> tuple[list[results.Row], dict[str, str]]:
    """Check and time every form on a case.

    Returns:
        The rows, and a reason for each form without rows.
    """
    operator, rows, reasons = case.operator, [], {}
    compilers = ("triton",) if plan.device.type == "cuda" else ("numba",) if has_cpu_kernels(operator) else ()
    about = results.about(plan.device, *compilers)
    timer = kernel_timer(plan.device)
    inputs = case.inputs(plan.device)
    with torch.no_grad():
        grad = torch.randn_like(operator.run(*inputs))
    for metric in plan.passes or (FORWARD, TRAINING):
        training = metric == TRAINING
        forms = _forms(operator, inputs if training else [x.detach() for x in inputs], plan)
        if training:
            forms = {name: partial(_gradients, form, inputs, grad) for name, form in forms.items()}
        wanted = _expected(operator, inputs, grad, training)
        with torch.set_grad_enabled(training):
            forms, wanting = attempt(forms, partial(_fault, case, wanted))
            times = interleaved(forms, plan.seconds, timer)
        about_case = (operator.name, operator.variant, case.shape, case.dtype_name)
        rows += [
            results.Row(*about_case, name, metric, "ms", *(1e3 * t for t in found), *about)
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


def _peers(operator: Operator) -> list[str]:
    """The names of all peers; a compiled form comes after its eager form."""
    return [
        found
        for name in (*operator.peers, *operator.gpu_peers)
        for found in ((name, name + COMPILED) if name in operator.compiled else (name,))
    ]


def table(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: our time, and how many times as long others take."""
    operator = OPERATORS[rows[0].what]
    ours = "fused" if any(row.backend == "fused" for row in rows) else "portable"
    peers = [name for name in ("portable", *_peers(operator)) if name != ours]
    lines = []
    for (shape, dtype, metric), times in _times(rows).items():
        ratios = (results.ratio(times.get(peer), times.get(ours)) for peer in peers)
        lines.append((f"{shape}, {dtype}", metric, results.milliseconds(times.get(ours), 3), *ratios))
    return (operator.axes, "pass", f"{ours}, ms", *(f"{peer} takes" for peer in peers)), lines


def verdicts(rows: list[results.Row], device: str) -> list[str]:
    """The targets, and whether they are met: on a GPU, no plain form may be faster."""
    if device != "cuda":
        return []
    found = [(", ".join(case), times) for case, times in _times(rows).items()]
    lines = []
    for peer in _peers(OPERATORS[rows[0].what]):
        ratios = {case: times[peer] / times["fused"] for case, times in found if {peer, "fused"} <= times.keys()}
        lines.append(verdict(f"{peer} takes", ratios, 1, False, "x our time"))
    return lines

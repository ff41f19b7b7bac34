"""Neighborhood attention against other implementations, forward and with backward.

On a CPU the fused form is compared with the portable form, with gathering and with dense attention under a mask. On a
GPU it is compared with FlexAttention, NATTEN, dense attention and the portable form (gpu.py).
"""

from functools import partial

import torch

from terrazzo.tools import results
from terrazzo.tools.bench.neighborhood import gpu, peers
from terrazzo.tools.bench.neighborhood.cases import DENSE_TOKENS, NAME, Case, attend, expected, fault, gradients
from terrazzo.tools.bench.verdicts import verdict
from terrazzo.tools.inspect.timing import FORWARD, TRAINING, Function, Plan, attempt, interleaved, kernel_timer

# heads, side, dilation: the maps of DiNAT-Tiny at 224 and of a segmentor at 512, batch 1.
SHAPES = [(2, 56, 1), (2, 56, 8), (4, 28, 1), (8, 14, 1), (2, 128, 1), (2, 128, 16), (4, 64, 1)]
_QUICK = 4


def _on_gpu(plan: Plan) -> bool:
    return plan.device.type == "cuda"


def cases(name: str, plan: Plan) -> list[Case]:
    """What is measured on the plan's device."""
    if _on_gpu(plan):
        return gpu.cases(plan.quick)
    shapes = SHAPES[:_QUICK] if plan.quick else SHAPES
    return [Case(1, (side, side), heads, dilation=(dilation, dilation)) for heads, side, dilation in shapes]


def _forms(case: Case, inputs: list[torch.Tensor], training: bool, plan: Plan) -> dict[str, Function]:
    """The forms on a CPU, by name: each computes the output of these inputs."""
    query, key, value, rpb = inputs

    def dense() -> torch.Tensor:
        """The code of a user without the operator; it makes the mask each time."""
        return peers.dense(query, key, value, peers.dense_mask(rpb, case.window, query.dtype))

    own = {"fused": "fused", "portable": "portable", "gather": "reference"}
    forms = {name: partial(attend, case, backend, *inputs) for name, backend in own.items()}
    if case.window.tokens <= DENSE_TOKENS:
        forms["dense"] = dense
    return forms


def measure(case: Case, plan: Plan) -> tuple[list[results.Row], dict[str, str]]:
    """Check and time every form on a case.

    Returns:
        The rows, and a reason for each form without rows.
    """
    forms_of, about = _forms, results.about(plan.device, "numba")
    rows, reasons = [], {}

    def row(backend: str, metric: str, unit: str, quantiles) -> results.Row:
        return results.Row(NAME, case.variant, case.shape, case.dtype_name, backend, metric, unit, *quantiles, *about)

    if _on_gpu(plan):
        forms_of, about = gpu.forms, results.about(plan.device, "triton", "natten")
        rows.append(gpu.bandwidth(row, plan.device))
    inputs = case.inputs(plan.device)
    grad = torch.randn(inputs[0].shape, device=plan.device).to(case.dtype)
    timer = kernel_timer(plan.device)
    for metric in plan.passes or (FORWARD, TRAINING):
        training = metric == TRAINING
        # On a CPU, FlexAttention has no forward pass for tensors that may require gradients.
        given = inputs if training else [x.detach() for x in inputs]
        forms = forms_of(case, given, training, plan)
        if training:
            forms = {name: partial(gradients, form, inputs, grad) for name, form in forms.items()}
        wanted = expected(case, inputs, grad, training)
        with torch.set_grad_enabled(training):
            forms, wanting = attempt(forms, partial(fault, case, wanted))
            times = interleaved(forms, plan.seconds, timer)
        rows += [row(name, metric, "ms", (1e3 * t for t in times[name])) for name in times]
        reasons |= {f"{name}, {metric}": reason for name, reason in wanting.items()}
    return rows, reasons


def table(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: our time, and how many times as long others take; on a GPU also against the memory floor."""
    if gpu.is_gpu(rows):
        return gpu.table(rows)
    name = "fused" if any(row.backend == "fused" for row in rows) else "portable"
    lines, others = [], [other for other in ("portable", "gather", "dense") if other != name]
    times = {(row.shape, row.variant, row.metric, row.backend): row.p50 for row in rows}
    for shape, variant, metric in dict.fromkeys(key[:3] for key in times):
        ours = times.get((shape, variant, metric, name))
        ratios = (results.ratio(times.get((shape, variant, metric, other)), ours) for other in others)
        lines.append((f"{shape}, {variant}", metric, results.milliseconds(ours), *ratios))
    return ("B x H x W x heads x dim", "pass", f"{name}, ms", *(f"{other} takes" for other in others)), lines


def verdicts(rows: list[results.Row], device: str) -> list[str]:
    """The targets, and whether they are met; only a GPU has targets."""
    return [verdict(*found) for found in gpu.promises(rows)] if gpu.is_gpu(rows) else []

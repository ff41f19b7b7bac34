"""Which backend each operator of a model runs on, why the others do not, and what everything costs."""

from collections.abc import Sequence

import torch
from torch import nn

from terrazzo.kernels.dispatch import operator as operators
from terrazzo.tools.inspect.trace import Operation


def explain(
    model: nn.Module, operations: Sequence[Operation], device: torch.device, backend: str = "auto"
) -> dict[str, object]:
    """What `terrazzo explain` says about a forward pass, as JSON-ready values.

    Args:
        model: the model of the pass.
        operations: the pass, as `trace` gives it.
        device: where the model would run.
        backend: the backend that every operator of terrazzo is asked for.

    Returns:
        calls: one record per call of an operator of terrazzo, in order: layer, sizes, parameters, the backend that runs
            (None if the requested backend cannot), who asked for it, a sentence for each refused backend, FLOPs, bytes.
        costs: FLOPs and bytes of each operator of terrazzo, and of all other operations by the class of their module.
        flops, macs, activations, params, weight_bytes, activation_bytes: totals of the whole model, counted as
        `terrazzo info` counts; a MAC is two FLOPs.

    Raises:
        InputError: `backend`, or the environment's choice, is not a backend.
    """
    parameters = list(model.parameters())
    flops = sum(operation.flops for operation in operations)
    return {
        "calls": [_call(x, device, backend) for x in operations if operators.find(x.function)],
        "costs": _costs(operations),
        "flops": flops,
        "macs": flops // 2,
        "activations": sum(operation.activations for operation in operations),
        "params": sum(p.numel() for p in parameters),
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "activation_bytes": sum(operation.written for operation in operations if operation.activations),
    }


def _call(operation: Operation, device: torch.device, backend: str) -> dict[str, object]:
    operator = operators.find(operation.function)
    call = operator.describe(*operation.args, **operation.kwargs)
    choice = operator.why(backend, *operation.args, device=device, **operation.kwargs)
    return {
        "layer": operation.layer,
        "operator": operator.name,
        "shape": dict(call.shape),
        "parameters": dict(call.parameters),
        "backend": choice.name if choice.runs else None,
        "asked": "auto" if choice.asked_by == "auto" else choice.name,
        "asked_by": choice.asked_by if backend == "auto" else "--backend",
        "refused": dict(choice.reasons),
        "flops": operation.flops,
        "bytes_read": operation.read,
        "bytes_written": operation.written,
    }


def _costs(operations: Sequence[Operation]) -> list[dict[str, object]]:
    """One record per kind; operators of terrazzo come first, then the others by FLOPs and by bytes, highest first."""
    groups: dict[tuple[bool, str], list[Operation]] = {}
    for operation in operations:
        operator = operators.find(operation.function)
        kind = operation.kind if operator is None else operator.name
        groups.setdefault((operator is not None, kind), []).append(operation)
    costs = [
        {
            "kind": kind,
            "is_operator": is_operator,
            "layers": len({operation.layer for operation in group}),
            "flops": sum(operation.flops for operation in group),
            "bytes_read": sum(operation.read for operation in group),
            "bytes_written": sum(operation.written for operation in group),
        }
        for (is_operator, kind), group in groups.items()
    ]
    return sorted(
        costs,
        key=lambda cost: (cost["is_operator"], cost["flops"], cost["bytes_read"] + cost["bytes_written"]),
        reverse=True,
    )

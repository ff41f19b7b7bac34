"""`terrazzo explain`: which backend each operator of a model runs on, why not the others, and what it all costs."""

import json
from collections.abc import Sequence

import click
import torch
from torch import nn

from terrazzo.kernels import backend as backends
from terrazzo.kernels import call as calls
from terrazzo.tools.explain_text import print_facts
from terrazzo.tools.models import build_on_meta, pretrained_cfg, require_model
from terrazzo.tools.targets import pick_device
from terrazzo.tools.trace import Operation, image_size, taking, trace

DTYPES = ("float32", "bfloat16", "float16")
EXIT_REFUSED = 1


@click.command()
@click.argument("model")
@click.option("--size", type=int, nargs=2, metavar="H W", help="Image size [default: that of the published weights].")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Number of images.")
@click.option("--device", help="cpu, cuda, cuda:1, mps [default: a GPU if there is one].")
@click.option("--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True, help="Of weights and images.")
@click.option(
    "--backend",
    type=click.Choice(backends.BACKENDS),
    default="auto",
    show_default=True,
    help=f"What to ask for; auto heeds {backends.ENVIRONMENT}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str, size: tuple[int, int] | None, batch: int, device: str | None, dtype: str, backend: str, as_json: bool
) -> int:
    """Say which backend runs each operator of MODEL here, why the others do not, and what they and the rest cost.

    Nothing is downloaded or computed: the shapes alone are run through the model. The exit code is 1 where a backend
    was asked for that cannot run.
    """
    require_model(model)
    target = pick_device(device)
    channels, *default_size = pretrained_cfg(model).input_size
    size = image_size(size or tuple(default_size))
    built = build_on_meta(model).to(getattr(torch, dtype))
    with taking(model, size):
        operations = trace(built, size, channels, batch)
    facts = {"model": model, "input": [batch, channels, *size], "dtype": dtype, "device": str(target)}
    facts |= explain(built, operations, target, backend)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        print_facts(facts)
    return 0 if all(call["backend"] for call in facts["calls"]) else EXIT_REFUSED


def explain(
    model: nn.Module, operations: Sequence[Operation], device: torch.device, backend: str = "auto"
) -> dict[str, object]:
    """What `terrazzo explain` says of a forward pass, as JSON-ready values.

    Args:
        model: whose pass it is.
        operations: the pass, as `trace` gives it.
        device: where the model would run.
        backend: what is asked of every operator of terrazzo.

    Returns:
        calls: one record per call of an operator of terrazzo, in order: layer, sizes, parameters, the backend that runs
            (None where the one asked for cannot), who asked, a sentence per backend refused, FLOPs, bytes.
        costs: FLOPs and bytes of each operator of terrazzo, and of the rest by the class of the module that runs it.
        flops, macs, activations, params, weight_bytes, activation_bytes: of the whole model, counted as `terrazzo info`
            counts; a MAC is two FLOPs.

    Raises:
        InputError: `backend`, or what the environment asks for, is no backend.
    """
    parameters = list(model.parameters())
    flops = sum(operation.flops for operation in operations)
    return {
        "calls": [_call(x, device, backend) for x in operations if calls.operator_name(x.function)],
        "costs": _costs(operations),
        "flops": flops,
        "macs": flops // 2,
        "activations": sum(operation.activations for operation in operations),
        "params": sum(p.numel() for p in parameters),
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "activation_bytes": sum(operation.written for operation in operations if operation.activations),
    }


def _call(operation: Operation, device: torch.device, backend: str) -> dict[str, object]:
    call = calls.describe(operation.function, device, operation.args, operation.kwargs)
    choice = backends.consider(backend, call.refusals, call.discouraged)
    return {
        "layer": operation.layer,
        "operator": calls.operator_name(operation.function),
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
    """One record per kind; operators of terrazzo come first, then what has most FLOPs, then what moves most."""
    groups: dict[tuple[bool, str], list[Operation]] = {}
    for operation in operations:
        operator = calls.operator_name(operation.function)
        groups.setdefault((operator is not None, operator or operation.kind), []).append(operation)
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

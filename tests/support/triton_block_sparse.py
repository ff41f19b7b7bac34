"""Checks of block-sparse attention's Triton kernels. Tests run them in Triton's interpreter, and on a GPU if available.

Functions take and return plain values, because tests call them in a process pool (`tests/kernels/conftest.py`).
"""

import importlib
import math

import torch

from support.block_sparse_plans import Plan, Segment, generator, inputs, kinds, lists, run
from support.triton_common import guarded, limits, poisoned, replaced
from terrazzo.kernels import block_sparse_attention

FOLDER = "terrazzo.kernels.block_sparse_attention"


def _leaf(x, dtype):
    return guarded(x.detach().to(dtype)).requires_grad_()


def errors(
    kind,
    queries=21,
    keys=19,
    dim=8,
    width=None,
    query_tile=8,
    key_tile=8,
    dtype="float32",
    layout="plain",
    batch=1,
    device="cpu",
):
    """The errors of the fused form and their limits: see `triton_common.limits`.

    layout: "plain", "packed" (views of one tensor, as a projection gives them) or "turned" (the last axis is not
    contiguous).
    """
    dtype = getattr(torch, dtype)
    arguments = [_leaf(x, dtype) for x in inputs(batch, 2, queries, keys, dim, width, device=device)]
    if layout == "packed":
        packed = guarded(torch.stack([x.detach().transpose(1, 2) for x in arguments], 2))  # B N 3 H D
        arguments = [x.transpose(1, 2).requires_grad_() for x in packed.unbind(2)]
    elif layout == "turned":
        arguments = [guarded(x.detach().mT.contiguous()).mT.requires_grad_() for x in arguments]
    plan, more = kinds(*arguments[:2], query_tile, key_tile, width)[kind]
    double = [x.detach().double().requires_grad_() for x in arguments]
    exact_plan, exact_more = kinds(*double[:2], query_tile, key_tile, width)[kind]
    with torch.no_grad():  # the same numbers, rounded
        for x, y in zip(exact_more, more):
            x.copy_(y)
    wanted, plain = run(double, exact_plan, exact_more, "reference"), run(arguments, plan, more, "reference")
    with poisoned(device):
        found = run(arguments, plan, more, "fused")
    # The interpreter truncates to bfloat16; a GPU rounds.
    units = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 1}
    return judged(found, plain, wanted, batch * queries, units)


def judged(found, plain, wanted, rows, units):
    """The errors of results against float64, and their limits: see `triton_common.limits`.

    Args:
        found, plain, wanted: what `run` returns, by a form, by plain PyTorch in the same dtype, and in float64.
        rows: batch times queries.
    """
    names = [f"result {i}" for i in range(len(found))]
    allowed = limits(names, found, plain, wanted, units.items(), names[5:])  # the plan's tensors are small, and sums
    for name, x in zip(names, found):
        if x.numel() == 1:  # one number, summed over all rows: plain PyTorch's error may be nearly 0 by chance
            error, limit = allowed[name]
            allowed[name] = error, max(limit, torch.finfo(x.dtype).eps * 2 * rows)
    return allowed


def repeats(kind="segments", dtype="float32", queries=37, keys=37, device="cpu"):
    """Whether two runs give the same bits."""
    arguments = inputs(1, 2, queries, keys, dtype=getattr(torch, dtype), device=device)
    plan, more = kinds(*arguments[:2])[kind]
    return all(torch.equal(a, b) for a, b in zip(*(run(arguments, plan, more, "fused") for _ in range(2))))


def large_scores(magnitude, dtype, device="cpu"):
    """The relative error of the output for large scores; infinity if a result is not finite."""
    arguments = inputs(1, 1, 20, 20, dtype=torch.float32, device=device)
    arguments = [x.detach() * scale for x, scale in zip(arguments, (magnitude, magnitude, 1))]
    arguments = [x.to(getattr(torch, dtype)).requires_grad_() for x in arguments]
    plan, _ = kinds(*arguments[:2])["blocks"]
    found = run(arguments, plan, backend="fused")
    wanted = run([x.detach().double().requires_grad_() for x in arguments], plan, backend="reference")
    if not all(x.isfinite().all() for x in found):
        return math.inf
    return ((found[0].double() - wanted[0]).norm() / wanted[0].norm()).item()


def mutated(helper):
    """The largest difference between a result and the reference if a kernel's helper is broken; "" breaks none."""
    changes = {}
    if helper:
        original = getattr(importlib.import_module(f"{FOLDER}.fused_kernels"), helper)

        def broken(*arguments, **options):
            found = original(*arguments, **options)
            if helper == "listed":  # the key after each listed key
                return found[0] + 1, found[1]
            if helper == "locate":  # every head is the first
                return found[0], found[1] * 0, *found[2:]
            if helper == "softmax_step":  # the running sum is not rescaled
                return found[0], found[1] * 0 + 1, *found[2:]
            return found * 0 if helper == "offsets" else found * 1.5

        changes[f"fused_kernels.{helper}"] = broken
    arguments = inputs(1, 2, 12, 80, dtype=torch.float32)
    plan, more = kinds(*arguments[:2], 8, 16)["a bias of keys"]  # lists of 48 keys are two blocks of the kernel
    wanted = run(arguments, plan, more, "reference")
    with replaced(FOLDER, changes), poisoned():
        found = run(arguments, plan, more, "fused")
    differences = [(a - b).abs().max().item() for a, b in zip(found, wanted)]
    return max(math.inf if math.isnan(x) else x for x in differences)


def opcheck(device="cpu"):
    query, key, value = inputs(1, 2, 20, 20, dtype=torch.float32, device=device)
    index, bias = lists(1, 2, 3, 3, 2).to(device), torch.zeros(1, 2, 20, device=device, requires_grad=True)
    call = (query, key, value, index, bias, 8, 8, 0.3, "fused")
    torch.library.opcheck(torch.ops.terrazzo.block_sparse_attention.default, call)


def compiled(device="cpu", compiler="aot_eager"):
    """The largest difference between compiled and eager outputs and gradients; the graph must not break."""

    def attend(query, key, value, index):
        plan = Plan([Segment("block", index), Segment("all", key=key[:, :, ::4], value=value[:, :, ::4])], 8, 4)
        return block_sparse_attention(query, key, value, plan, backend="fused")

    function = torch.compile(attend, fullgraph=True, backend=compiler, dynamic=True)
    worst = 0.0
    for length in (16, 24):
        arguments = inputs(1, 2, length, length, dtype=torch.float32, device=device)
        index = lists(1, 2, length // 8, length // 4, 2).to(device)
        results = []
        for attention in (attend, function):
            out, lse = attention(*arguments, index)
            grad = torch.randn(out.shape, generator=generator(1)).to(out)
            results.append([out, lse, *torch.autograd.grad((out, lse), arguments, (grad, lse.detach().cos()))])
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*results)))
    return worst


def far_apart(device="cpu"):
    """The error if heads of the values are 2^31 elements apart in memory: addresses need 64 bits."""
    storage = torch.empty(2**31 + 20 * 8, dtype=torch.float16, device=device)
    value = storage.as_strided((1, 2, 20, 8), (2**32, 2**31, 8, 1))
    query, key, near = (x.detach().half().to(device) for x in inputs(1, 2, 20, 20))
    value.copy_(near)
    plan, _ = kinds(query, key)["blocks"]
    out, _ = block_sparse_attention(query, key, value, plan, backend="fused")
    wanted, _ = block_sparse_attention(query.double(), key.double(), near.double(), plan, backend="reference")
    return (out - wanted).abs().max().item()


def choices():
    """The forms that run on CPU tensors with "auto" and with a named backend, while Triton interprets."""
    why = importlib.import_module(f"{FOLDER}.op").OPERATOR.why
    x, wide = torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 9, 136)
    return {
        "auto": (why("auto", x, x, x).name, why("auto", x, x, x).reasons["fused"]),
        "named": why("fused", x, x, x).name,
        "double": why("auto", x.double(), x.double(), x.double()).reasons["fused"],
        "wide": why("auto", x, x, wide).reasons["fused"],
    }

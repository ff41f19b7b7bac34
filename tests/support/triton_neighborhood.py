"""Checks of neighborhood attention's Triton kernels. Tests run them in Triton's interpreter, and on a GPU if available.

The interpreter needs a separate process in which TRITON_INTERPRET=1 was set before triton was imported. So functions
take and return plain values, because tests call them in a process pool (`tests/kernels/conftest.py`).
"""

import importlib
import math

import torch

from support.triton_common import guarded, limits, poisoned, replaced
from terrazzo.kernels import neighborhood_attention, use_backend

FOLDER = "terrazzo.kernels.neighborhood_attention"
NAMES = ("out", "query", "key", "value", "rpb")


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _inputs(size, kernel, heads, dim, batch, dtype, bias, layout, device="cpu"):
    """Query, key, value and bias; layout: "packed" views of one tensor, "plain", or "turned" ones with odd strides."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn((batch, *size, 3, heads, dim), dtype=torch.float64, generator=generator).to(device, dtype)
    qkv = list(guarded(qkv).unbind(-3))
    if layout == "plain":
        qkv = [guarded(x.contiguous()) for x in qkv]
    if layout == "turned":  # all strides differ, and no last axis is contiguous
        qkv = [x.transpose(i, -1).contiguous().transpose(i, -1) for i, x in enumerate(qkv, 1 if len(size) > 1 else 0)]
    table = torch.randn(heads, *(2 * k - 1 for k in kernel), dtype=torch.float64, generator=generator).to(device, dtype)
    return [x.detach().requires_grad_() for x in (*qkv, *([guarded(table)] if bias else []))]


def _grad(out):
    return torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)


def _run(arguments, kernel, dilation, backend):
    rpb = arguments[3] if len(arguments) > 3 else None
    out = neighborhood_attention(*arguments[:3], kernel, dilation, rpb, backend=backend)
    return [out, *torch.autograd.grad(out, arguments, _grad(out))]


def errors(
    size,
    kernel,
    dilation=1,
    heads=1,
    dim=8,
    batch=1,
    dtype="float32",
    bias=True,
    layout="packed",
    half_blocks=False,
    programs=None,
    device="cpu",
    judge="reference",
):
    """Root mean square errors of the fused form against the float64 reference: {name: (error, limit)}.

    Limits are those of `triton_common.limits`.

    half_blocks: use the blocks of half precision. programs: the largest number of programs with partial sums of the
    bias' gradient. judge: the form that gives the expected result, for maps with too many windows for the reference.
    """
    fused = importlib.import_module(f"{FOLDER}.fused")
    kernel = _pair(kernel) if len(size) == 2 else (kernel,)
    arguments = _inputs(size, kernel, heads, dim, batch, getattr(torch, dtype), bias, layout, device)
    exact = _run([x.detach().double().requires_grad_() for x in arguments], kernel, dilation, judge)
    plain = _run(arguments, kernel, dilation, judge)
    changes = {}
    if half_blocks:
        blocks = fused.blocks
        changes["fused.blocks"] = lambda name, window, head_dim, itemsize, amd: blocks(name, window, head_dim, 2, amd)
    if programs is not None:
        changes["fused._PROGRAMS"] = programs
    with replaced(FOLDER, changes), poisoned(device):
        found = _run(arguments, kernel, dilation, "fused")
    return limits(NAMES, found, plain, exact)


def mutated(helper, size, kernel, dilation):
    """The largest difference between a result and the reference if a kernel's helper is broken; "" breaks none."""
    common = importlib.import_module(f"{FOLDER}.fused_common")

    def broken(*arguments):
        if helper == "in_window":  # one key too many
            start, key, length = arguments
            return (key >= start) & (key <= start + length)
        if helper == "class_members":  # every class is as long as the shortest class
            length, _, dilation = arguments
            return length // dilation
        return getattr(common, helper)(*arguments) + (-1 if helper == "last_query" else 1)

    modules = ("fused_common",) if helper == "class_members" else ("fused_forward", "fused_backward")
    changes = {}
    for module in modules:
        if helper and hasattr(importlib.import_module(f"{FOLDER}.{module}"), helper):
            changes[f"{module}.{helper}"] = broken
    assert bool(changes) == bool(helper)
    arguments = _inputs(size, (kernel, kernel), 1, 8, 1, torch.float32, True, "packed")
    wanted = _run([x.detach().double().requires_grad_() for x in arguments], kernel, dilation, "reference")
    with replaced(FOLDER, changes):
        found = _run(arguments, kernel, dilation, "fused")
    differences = [(a.double() - b).abs().max().item() for a, b in zip(found, wanted)]
    return max(math.inf if math.isnan(x) else x for x in differences)


def repeats(size, kernel, dilation, heads=1, dim=8, dtype="float32", device="cpu"):
    """Whether two runs give the same bits."""
    arguments = _inputs(size, (kernel, kernel), heads, dim, 1, getattr(torch, dtype), True, "packed", device)
    first, second = (_run(arguments, kernel, dilation, "fused") for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second))


def large_scores(magnitude, device="cpu"):
    arguments = _inputs((12, 12), (7, 7), 1, 8, 1, torch.float32, True, "packed", device)
    arguments = [x.detach().mul(magnitude).requires_grad_() for x in arguments]
    return all(x.isfinite().all().item() for x in _run(arguments, 7, 1, "fused"))


def far_apart(device="cpu"):
    """The error if images are 2^31 elements apart in memory: addresses need 64 bits."""
    storage = torch.empty(2**31 + 3 * 81 * 8, dtype=torch.float16, device=device)
    qkv = [storage.as_strided((2, 9, 9, 1, 8), (2**31, 216, 24, 8, 1), 8 * i) for i in range(3)]
    near = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).half() for i, x in enumerate(qkv)]
    for x, values in zip(qkv, near):
        x.copy_(values)
    out = neighborhood_attention(*qkv, 7, backend="fused")
    wanted = neighborhood_attention(*(x.double() for x in near), 7, backend="reference")
    return (out.cpu() - wanted).abs().max().item()


def opcheck(size, kernel, dilation, bias, device="cpu"):
    arguments = _inputs(size, kernel, 1, 8, 1, torch.float32, bias, "packed", device)
    rpb = arguments[3] if bias else None
    torch.library.opcheck(
        torch.ops.terrazzo.neighborhood_attention.default, (*arguments[:3], rpb, kernel, dilation, 0.5, "fused")
    )


def compiled(dynamic):
    """The largest difference between compiled and eager outputs and gradients; the graph must not break."""
    function = torch.compile(neighborhood_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    worst = 0.0
    for size in ((9, 10), (11, 7)):
        arguments = _inputs(size, (7, 7), 1, 8, 1, torch.float32, True, "packed")
        wanted = _run(arguments, 7, 1, "fused")
        out = function(*arguments[:3], 7, 1, arguments[3], backend="fused")
        found = [out, *torch.autograd.grad(out, arguments, _grad(out))]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(found, wanted)))
    return worst


def model(compile_it, device="cpu", compiler="aot_eager"):
    """The largest relative difference between fused and portable form in a small DiNAT: outputs and all gradients."""
    from terrazzo.backbones.dinat import NAT

    torch.manual_seed(0)
    net = NAT(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4), kernel_size=3, dilations=[[2], [1], [1], [1]])
    net, image = net.to(device), torch.randn(1, 3, 44, 37).to(device)
    results = []
    for backend in ("portable", "fused"):
        with use_backend(backend):
            # Compile only the fused form: Dynamo does not guard on the backend, so it would reuse the portable graph.
            compile_now = compile_it and backend == "fused"
            run = torch.compile(net, fullgraph=True, backend=compiler) if compile_now else net
            out = run(image)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(net.parameters()), allow_unused=True)])
    pairs = [(a, b) for a, b in zip(*results) if a is not None]
    return max(((a - b).norm() / a.norm().clamp(min=1e-6)).item() for a, b in pairs)


def mixed_autocast(device="cpu"):
    """The dtypes of output and bias' gradient for half-precision inputs and a float32 bias, as under autocast."""
    arguments = _inputs((9, 9), (7, 7), 1, 8, 1, torch.bfloat16, True, "packed", device)
    arguments[3] = arguments[3].detach().float().requires_grad_()
    results = _run(arguments, 7, 1, "fused")
    return str(results[0].dtype), str(results[4].dtype)


def choices():
    """The forms that run on CPU tensors with "auto" and with a named backend, while Triton interprets."""
    why = importlib.import_module(f"{FOLDER}.op").OPERATOR.why
    double = torch.zeros(1, 9, 9, 1, 8, dtype=torch.float64)
    wide = torch.zeros(1, 9, 9, 1, 136)
    auto = why("auto", wide[..., :8])
    return {
        "auto": (auto.name, auto.reasons["fused"]),
        "named": why("fused", wide[..., :8]).name,
        "double": why("auto", double).reasons["fused"],
        "wide": why("auto", wide).reasons["fused"],
    }

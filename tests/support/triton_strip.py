"""Checks of strip attention's Triton kernels. Tests run them in Triton's interpreter, and on a GPU if available.

Functions take and return plain values, because tests call them in a process pool (`tests/kernels/conftest.py`).
"""

import importlib
import math

import torch

from support.triton_common import guarded, limits, poisoned, replaced
from terrazzo.kernels import strip_attention, use_backend

FOLDER = "terrazzo.kernels.strip_attention"
NAMES = ("out", "query", "key", "value")


def inputs(batch, queries, keys, heads, dim, dtype=torch.float64, layout="plain", device="cpu"):
    """Query, key and value that require gradients.

    layout: "plain" (contiguous), "packed" (views of wider tensors, as a joint projection gives them), or "turned" (the
    last axis is not contiguous).
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, queries, heads), (batch, keys, heads), (batch, keys, heads, dim))
    found = [torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype) for shape in shapes]
    if layout == "packed":
        found = [guarded(torch.cat([x, x.new_full((*x.shape[:-1], 3), math.nan)], -1))[..., :-3] for x in found]
    elif layout == "turned":
        found = [guarded(x.transpose(1, -1).contiguous()).transpose(1, -1) for x in found]
    else:
        found = [guarded(x) for x in found]
    return [x.detach().requires_grad_() for x in found]


def run(arguments, backend):
    """The output and all gradients."""
    out = strip_attention(*arguments, backend=backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, arguments, grad)]


def exact(arguments):
    return run([x.detach().double().requires_grad_() for x in arguments], "reference")


def errors(
    batch=1, queries=33, keys=17, heads=1, dim=8, dtype="float32", layout="plain", half_blocks=False, device="cpu"
):
    """The fused form's errors and limits: see `triton_common.limits`. half_blocks: use the blocks of half precision."""
    fused = importlib.import_module(f"{FOLDER}.fused")
    arguments = inputs(batch, queries, keys, heads, dim, getattr(torch, dtype), layout, device)
    wanted, plain = exact(arguments), run(arguments, "reference")
    changes = {}
    if half_blocks:
        blocks = fused.blocks
        changes["fused.blocks"] = lambda name, itemsize: blocks(name, 2)
    with replaced(FOLDER, changes), poisoned(device):
        found = run(arguments, "fused")
    # The interpreter truncates to bfloat16; a GPU rounds.
    units = {torch.float32: 3, torch.bfloat16: 1} if device == "cpu" else {torch.float32: 3}
    return limits(NAMES, found, plain, wanted, units.items())


def mutated(helper, magnitude=1):
    """The largest difference between a result and the reference if a kernel's helper is broken; "" breaks none.

    magnitude: a factor of queries; a wrong maximum changes softmax only when exponentials overflow.
    """
    kernels = importlib.import_module(f"{FOLDER}.fused_kernels")
    original = getattr(kernels, helper, None)

    def broken(*arguments):
        if helper == "best_key":
            query, low, high = arguments
            return original(-query, low, high)
        if helper == "weights":  # keys after the last key count as real
            query, key, best, real = arguments
            return original(query, key, best, real | ~real)
        if helper == "extrema":
            return tuple(reversed(original(*arguments)))
        if helper.endswith("offsets"):  # every head reads the first
            batch, head, *others = arguments
            return original(batch, head * 0, *others)
        return original(*arguments) + 1

    changes = {f"fused_kernels.{helper}": broken} if helper else {}
    assert not helper or original is not None
    arguments = inputs(1, 70, 21, 2, 8, torch.float32)
    arguments[0] = arguments[0].detach().mul(magnitude).requires_grad_()
    wanted = exact(arguments)
    with replaced(FOLDER, changes):
        found = run(arguments, "fused")
    differences = [(a.double() - b).abs().max().item() for a, b in zip(found, wanted)]
    return max(math.inf if math.isnan(x) else x for x in differences)


def repeats(queries, keys, dtype="float32", device="cpu"):
    """Whether two runs give the same bits."""
    arguments = inputs(1, queries, keys, 1, 8, getattr(torch, dtype), device=device)
    first, second = (run(arguments, "fused") for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second))


def large_scores(magnitude, dtype="float32", device="cpu"):
    """The largest relative error of the output for queries and keys of this magnitude; inf if any is not finite."""
    arguments = inputs(1, 40, 21, 1, 8, device=device)
    arguments = [
        x.detach().mul(scale).to(getattr(torch, dtype)) for x, scale in zip(arguments, (magnitude,) * 2 + (1,))
    ]
    arguments = [x.requires_grad_() for x in arguments]
    found, wanted = run(arguments, "fused"), exact(arguments)
    if not all(x.isfinite().all() for x in found):
        return math.inf
    return ((found[0].double() - wanted[0]).norm() / wanted[0].norm()).item()


def far_apart(device="cpu"):
    """The error if images of the values are 2^31 elements apart in memory: addresses need 64 bits."""
    storage = torch.empty(2**31 + 3 * 9 * 8, dtype=torch.float16, device=device)
    value = storage.as_strided((2, 9, 1, 8), (2**31, 8, 8, 1))
    generator = torch.Generator().manual_seed(0)
    query, key, near = (torch.randn(2, 9, *rest, generator=generator).half() for rest in ((1,), (1,), (1, 8)))
    value.copy_(near)
    out = strip_attention(query.to(device), key.to(device), value, backend="fused")
    wanted = strip_attention(query.double(), key.double(), near.double(), backend="reference")
    return (out.cpu() - wanted).abs().max().item()


def empty(device="cpu"):
    """The shapes of output and gradients for an empty batch, and for images without queries."""
    found = []
    for batch, queries in ((0, 4), (2, 0)):
        arguments = inputs(batch, queries, 5, 1, 8, torch.float32, device=device)
        results = run(arguments, "fused")
        assert all(not x.any() for x in results)
        found.append([tuple(x.shape) for x in results])
    return found


def opcheck(queries, keys, device="cpu"):
    arguments = inputs(2, queries, keys, 2, 8, torch.float32, device=device)
    torch.library.opcheck(torch.ops.terrazzo.strip_attention.default, (*arguments, "fused"))


def compiled(dynamic):
    """The largest difference between compiled and eager outputs and gradients; the graph must not break."""
    function = torch.compile(strip_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    worst = 0.0
    for queries, keys in ((33, 9), (40, 11)):
        arguments = inputs(1, queries, keys, 2, 8, torch.float32)
        wanted = run(arguments, "fused")
        out = function(*arguments, backend="fused")
        grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
        found = [out, *torch.autograd.grad(out, arguments, grad)]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(found, wanted)))
    return worst


def model(compile_it, device="cpu", compiler="aot_eager"):
    """The largest relative difference between fused and portable form in a small S2AFormer: outputs, all gradients."""
    from terrazzo.backbones.s2aformer import S2AFormer

    torch.manual_seed(0)
    net = S2AFormer(widths=(16, 16, 32, 32), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), stem_width=8, num_classes=5)
    net, image = net.to(device).eval(), torch.randn(1, 3, 76, 69).to(device)
    results = []
    for backend in ("portable", "fused"):
        with use_backend(backend):
            # Compile only the fused form: Dynamo does not guard on the backend, so it would reuse the portable graph.
            compile_now = compile_it and backend == "fused"
            forward = torch.compile(net, fullgraph=True, backend=compiler) if compile_now else net
            out = forward(image)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))])
    # A bias of keys shifts all scores of a row equally, so its gradient is only rounding error.
    names = ["out", *(name for name, _ in net.named_parameters())]
    pairs = [(a, b) for name, a, b in zip(names, *results) if not name.endswith("attn.k.bias")]
    return max(((a - b).norm() / a.norm().clamp(min=1e-6)).item() for a, b in pairs)


def choices():
    """The forms that run on CPU tensors with "auto" and with a named backend, while Triton interprets."""
    operator = importlib.import_module(f"{FOLDER}.op").OPERATOR
    value = torch.zeros(1, 9, 1, 8)

    def why(backend, value):
        return operator.why(backend, value[..., 0], value[..., 0], value)

    auto = why("auto", value)
    return {
        "auto": (auto.name, auto.reasons["fused"]),
        "named": why("fused", value).name,
        "double": why("auto", value.double()).reasons["fused"],
        "wide": why("auto", torch.zeros(1, 9, 1, 136)).reasons["fused"],
    }

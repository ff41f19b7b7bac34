"""Checks of softmax-free attention's Triton kernels. Tests run them in Triton's interpreter, and on a GPU if available.

Functions take and return plain values, because tests call them in a process pool (`tests/kernels/conftest.py`).
"""

import importlib
import math

import torch

from support.triton_common import guarded, limits, poisoned, replaced
from terrazzo.kernels import softmax_free_attention

FOLDER = "terrazzo.kernels.softmax_free_attention"
NAMES = ("out", "query", "value", "landmark", "key")


def inputs(
    batch=1, tokens=33, landmarks=9, heads=1, dim=8, dtype=torch.float64, layout="plain", own_keys=False, device="cpu"
):
    """Query, value, landmark and, with own_keys, key; all require gradients.

    Vectors are close enough together that most weights count, and landmarks far enough apart that their matrix can be
    inverted. layout: "plain" (contiguous), "packed" (views of wider tensors with heads behind tokens, as a joint
    projection gives them), or "turned" (the last axis is not contiguous).
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, count in zip(NAMES[1:], (tokens, tokens, landmarks, tokens)):
        x = torch.randn(batch, heads, count, dim, dtype=torch.float64, generator=generator)
        spread = 1 if name == "value" else 1.4 if name == "landmark" else 0.8
        found.append((spread * x * (1 if name == "value" else dim**-0.25)).to(device, dtype))
    if layout == "packed":
        found = [x.transpose(1, 2).contiguous() for x in found]
        found = [guarded(torch.cat([x, x.new_full((*x.shape[:-1], 3), math.nan)], -1))[..., :-3] for x in found]
        found = [x.transpose(1, 2) for x in found]
    elif layout == "turned":
        found = [guarded(x.transpose(1, -1).contiguous()).transpose(1, -1) for x in found]
    else:
        found = [guarded(x) for x in found]
    return [x.detach().requires_grad_() for x in found[: 4 if own_keys else 3]]


def run(arguments, backend, **options):
    """The output and all gradients."""
    out = softmax_free_attention(*arguments, backend=backend, **options)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, arguments, grad)]


def exact(arguments, **options):
    return run([x.detach().double().requires_grad_() for x in arguments], "reference", **options)


def errors(dtype="float32", device="cpu", options=None, steps=None, **sizes):
    """The fused form's errors and limits: see `triton_common.limits`.

    options: of the operator. steps: fewer steps of Newton's iteration, in all forms; they are slow in the interpreter.
    """
    if steps is not None:
        changes = {f"{module}.STEPS": steps for module in ("reference", "middle", "fused")}
        with replaced(FOLDER, changes):
            return errors(dtype, device, options, **sizes)
    options = options or {}
    arguments = inputs(dtype=getattr(torch, dtype), device=device, **sizes)
    wanted, plain = exact(arguments, **options), run(arguments, "reference", **options)
    with poisoned(device):
        found = run(arguments, "fused", **options)
    # The interpreter truncates to bfloat16; a GPU rounds.
    units = {torch.float32: 3, torch.bfloat16: 1} if device == "cpu" else {torch.float32: 3}
    return limits(NAMES, found, plain, wanted, units.items(), sums=("landmark",))


def mutated(path, normalised=False):
    """The largest difference between a result and the reference if a kernel's helper is broken; "" breaks none."""
    module, _, helper = path.partition(".")
    original = None

    def broken(*arguments):
        if helper == "locate":  # every program takes the first split
            *others, split = original(*arguments)
            return *others, split * 0
        if helper == "base":  # every head reads the first
            p_tensor, batch, head, *strides = arguments
            return original(p_tensor, batch, head * 0, *strides)
        if helper == "vectors":  # rows past the last are read
            p_base, o_rows, count, *others = arguments
            return original(p_base, o_rows, count + 1, *others)
        if helper == "weights":  # no half of the own square
            return original(arguments[0] * 0.9, *arguments[1:])
        if helper == "place":
            slot, matrix, *others = arguments
            return original(slot, matrix * 0, *others)
        if helper == "times":  # the last column and row are lost
            left, right, total, size, *others = arguments
            return original(left, right, total, size - 1, *others)
        raise AssertionError(helper)

    changes = {}
    if path:
        original = getattr(importlib.import_module(f"{FOLDER}.{module}"), helper)
        changes = {path: broken}
    arguments = inputs(2, 600, 21, 2, 8, torch.float32)
    options = dict(normalised=normalised)
    wanted = exact(arguments, **options)
    with replaced(FOLDER, changes), poisoned():
        found = run(arguments, "fused", **options)
    differences = [(a.double() - b).abs().max().item() / b.abs().max().item() for a, b in zip(found, wanted)]
    return max(math.inf if math.isnan(x) else x for x in differences)


def repeats(tokens, landmarks, dtype="float32", device="cpu"):
    """Whether two runs give the same bits."""
    arguments = inputs(1, tokens, landmarks, dtype=getattr(torch, dtype), device=device)
    first, second = (run(arguments, "fused", normalised=True) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second))


def flat(landmarks, normalised, dtype="float32", device="cpu"):
    """The relative error of the output if landmarks nearly coincide, so that the steps do not converge; inf for NaN."""
    query, value, landmark = inputs(1, 40, landmarks, dim=8, device=device)
    arguments = [query, value, 1 + 0.05 * landmark]
    arguments = [x.detach().to(getattr(torch, dtype)).requires_grad_() for x in arguments]
    options = dict(normalised=normalised)
    found, wanted = run(arguments, "fused", **options), exact(arguments, **options)
    if not all(x.isfinite().all() for x in found):
        return math.inf
    return ((found[0].double() - wanted[0]).norm() / wanted[0].norm()).item()


def far_apart(device="cpu"):
    """The error if images of the values are 2^31 elements apart in memory: addresses need 64 bits."""
    storage = torch.empty(2**31 + 9 * 8, dtype=torch.float16, device=device)
    value = storage.as_strided((2, 1, 9, 8), (2**31, 8, 8, 1))
    query, near, landmark = (x.detach().half() for x in inputs(2, 9, 4))
    value.copy_(near)
    out = softmax_free_attention(query.to(device), value, landmark.to(device), backend="fused")
    wanted = softmax_free_attention(query.double(), near.double(), landmark.double(), backend="reference")
    return (out.cpu() - wanted).abs().max().item()


def empty(device="cpu"):
    """The shapes of output and gradients for an empty batch."""
    results = run(inputs(0, 4, 2, dtype=torch.float32, device=device), "fused")
    assert all(not x.any() for x in results)
    return [tuple(x.shape) for x in results]


def opcheck(tokens, landmarks, device="cpu", own_keys=False):
    query, value, landmark, *key = inputs(
        2, tokens, landmarks, 2, dtype=torch.float32, own_keys=own_keys, device=device
    )
    arguments = (query, key[0] if key else None, value, landmark, True, "matrix", False, "fused")
    torch.library.opcheck(torch.ops.terrazzo.softmax_free_attention.default, arguments)


def compiled(dynamic):
    """The largest difference between compiled and eager outputs and gradients; the graph must not break."""
    function = torch.compile(softmax_free_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    worst = 0.0
    for tokens, landmarks in ((33, 9), (40, 11)):
        arguments = inputs(1, tokens, landmarks, 2, dtype=torch.float32)
        wanted = run(arguments, "fused")
        out = function(*arguments, backend="fused")
        grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
        found = [out, *torch.autograd.grad(out, arguments, grad)]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(found, wanted)))
    return worst


def choices():
    """The forms that run on CPU tensors with "auto" and with a named backend, while Triton interprets."""
    operator = importlib.import_module(f"{FOLDER}.op").OPERATOR

    def why(backend, value):
        return operator.why(backend, value, None, value, value)

    value = torch.zeros(1, 1, 9, 8)
    auto = why("auto", value)
    return {
        "auto": (auto.name, auto.reasons["fused"]),
        "named": why("fused", value).name,
        "double": why("auto", value.double()).reasons["fused"],
        "wide": why("auto", torch.zeros(1, 1, 9, 136)).reasons["fused"],
    }

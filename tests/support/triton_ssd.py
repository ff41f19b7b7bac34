"""Checks of the state space dual's kernels: Numba's, and Triton's in its interpreter, and on a GPU if available.

Functions take and return plain values, because tests call them in a process pool (`tests/kernels/conftest.py`).
"""

import importlib
import math

import torch

from support.triton_common import guarded, limits, poisoned, replaced
from terrazzo.kernels import ssd

FOLDER = "terrazzo.kernels.ssd"
NAMES = ("out", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def inputs(batch, length, heads, width, groups, states, extras=True, dtype=torch.float64, device="cpu"):
    """x, dt, A, B, C, D, z, dt_bias with gradients, surrounded by NaN; A, D and dt_bias are at least float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (batch, length, heads, width),
        (batch, length, heads),
        (heads,),
        (batch, length, groups, states),
        (batch, length, groups, states),
        (heads, width),
        (batch, length, heads, width),
        (heads,),
    )
    found = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    found[2] = -found[2].abs()
    parameters = torch.promote_types(dtype, torch.float32)
    found = [
        guarded(x.to(device, parameters if i in (2, 5, 7) else dtype)).detach().requires_grad_()
        for i, x in enumerate(found)
    ]
    return found if extras else [*found[:5], None, None, None]


def run(arguments, backend, reverse):
    """The output and all gradients."""
    out = ssd(*arguments, dt_softplus=True, reverse=reverse, backend=backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, [x for x in arguments if x is not None], grad)]


def exact(arguments, reverse):
    return run([None if x is None else x.detach().double().requires_grad_() for x in arguments], "reference", reverse)


def errors(
    batch=1, length=70, heads=2, width=8, groups=1, states=8, extras=True, dtype="float32", reverse=False, device="cpu"
):
    """The errors of the fused form and their limits: see `triton_common.limits`."""
    arguments = inputs(batch, length, heads, width, groups, states, extras, getattr(torch, dtype), device)
    wanted, plain = exact(arguments, reverse), run(arguments, "reference", reverse)
    with poisoned(device):
        found = run(arguments, "fused", reverse)
    # Half precision also rounds inputs of matrix products: weights, and states that chunks pass on.
    eps = torch.finfo(getattr(torch, dtype)).eps
    units = {torch.float32: 3 if dtype == "float32" else eps / torch.finfo(torch.float32).eps}
    units |= {torch.bfloat16: 1, torch.float16: 1}
    return limits(NAMES, found, plain, wanted, units.items(), sums=("A", "D", "dt_bias"))


def mutated(helper):
    """The largest difference between a result and the reference if a kernel's helper is broken; "" breaks none."""
    kernels = importlib.import_module(f"{FOLDER}.fused_kernels")
    original = getattr(kernels, helper, None)

    def broken(*arguments, **options):
        found = original(*arguments, **options)
        if helper == "positions":  # the first step does not count
            return found[0], found[1] & (found[0] != 0)
        if helper == "between":  # every decay is too large
            return found + 1
        if helper == "step_sizes":
            return found[0], found[1] * 0
        return found * 0 if helper == "state_offset" else found + 1

    changes = {f"fused_kernels.{helper}": broken} if helper else {}
    arguments = inputs(1, 70, 2, 8, 1, 8, False, torch.float32)
    wanted = exact(arguments, False)
    with replaced(FOLDER, changes):
        found = run(arguments, "fused", False)
    differences = [(a.double() - b).abs().max().item() for a, b in zip(found, wanted)]
    return max(math.inf if math.isnan(x) else x for x in differences)


def repeats(dtype="float32", device="cpu"):
    """Whether two runs give the same bits."""
    arguments = inputs(2, 130, 2, 8, 1, 8, True, getattr(torch, dtype), device)
    first, second = (run(arguments, "fused", False) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second))


def opcheck(reverse, device="cpu"):
    x, dt, A, B, C, *_ = inputs(1, 70, 1, 8, 1, 8, False, torch.float32, device)
    dt = dt.detach().abs().requires_grad_()
    torch.library.opcheck(torch.ops.terrazzo.ssd.default, (x, dt, A, B, C, reverse))


def compiled():
    """The largest difference between compiled and eager outputs and gradients; the graph must not break."""
    function = torch.compile(ssd, fullgraph=True, backend="aot_eager", dynamic=True)
    worst = 0.0
    for length in (40, 70):
        arguments = inputs(1, length, 2, 8, 1, 8, False, torch.float32)
        found, wanted = (form(*arguments, dt_softplus=True, backend="fused") for form in (function, ssd))
        grads = [torch.autograd.grad(out.sum(), arguments[:5]) for out in (found, wanted)]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip((found, *grads[0]), (wanted, *grads[1]))))
    return worst


def empty(device="cpu"):
    arguments = inputs(0, 9, 2, 8, 1, 8, True, torch.float32, device)
    found = run(arguments, "fused", False)
    return [tuple(x.shape) for x in found] == [(0, 9, 2, 8), *(tuple(x.shape) for x in arguments)]


def choices():
    """The forms that run on CPU tensors with "auto" and with a named backend, while Triton interprets."""
    why = importlib.import_module(f"{FOLDER}.op").OPERATOR.why
    x, B = torch.zeros(1, 9, 1, 8), torch.zeros(1, 9, 1, 8)
    wide = torch.zeros(1, 9, 1, 72)
    return {
        "auto": (why("auto", x, None, None, B).name, why("auto", x, None, None, B).reasons["fused"]),
        "named": why("fused", x, None, None, B).name,
        "wide": why("auto", x, None, None, wide).reasons["fused"],
    }

"""Checks of the selective scan's Triton kernels. Tests run them in Triton's interpreter, and on a GPU if available.

Functions take and return plain values, because tests call them in a process pool (`tests/kernels/conftest.py`).
"""

import contextlib
import importlib
import math

import torch

from support.triton_common import guarded, limits, poisoned, replaced
from terrazzo.kernels import selective_scan, selective_scan_2d
from terrazzo.kernels.triton_host import machine

FOLDER = "terrazzo.kernels.selective_scan"
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
Scans = importlib.import_module(f"{FOLDER}.scans").Scans
scan = importlib.import_module(f"{FOLDER}.op").run


def inputs(
    batch=1,
    length=40,
    scans=1,
    channels=5,
    states=3,
    shared=False,
    leave=("z",),
    dtype=torch.float64,
    layout="packed",
    spread=1.0,
    softplus=True,
    device="cpu",
):
    """u, delta, A, B, C, D, z and delta_bias as `Scans` holds them; None for tensors in `leave`.

    shared: the scans share u. dtype: the dtype of all tensors except the parameters A, D and delta_bias, which are
    float32 unless dtype is float64. layout: "packed" views of wider tensors, as a joint projection gives them;
    "sequences" (B, K D, L) with contiguous steps, as in mamba_ssm; "turned", without a contiguous axis. spread: the
    standard deviation of delta. softplus: whether softplus will be applied to delta; otherwise delta is positive.
    """
    generator = torch.Generator().manual_seed(0)
    double = torch.float64 if dtype == torch.float64 else torch.float32

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def positive(x):
        return x if softplus else x.abs()

    def laid(x):
        x = x.to(device, dtype)
        if layout == "sequences":
            return guarded(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        wide = guarded(torch.cat([x, x.new_full((*x.shape[:-1], 3), math.nan)], -1))
        if layout == "turned":
            return guarded(torch.stack([wide, wide], -1).transpose(1, 2).contiguous()).transpose(1, 2)[..., :-3, 0]
        return wide[..., :-3]

    steps, per_scan = (batch, length), (scans, channels)
    found = {
        "u": laid(drawn(*steps, 1 if shared else scans, channels)),
        "delta": laid(positive(drawn(*steps, *per_scan) * spread - 1.5)),
        "A": guarded(-drawn(*per_scan, states).exp().to(device, double)),
        "B": laid(drawn(*steps, scans, states)),
        "C": laid(drawn(*steps, scans, states)),
        "D": guarded(drawn(*per_scan).to(device, double)),
        "z": laid(drawn(*steps, *per_scan)),
        "delta_bias": guarded(positive(drawn(*per_scan)).to(device, double)),
    }
    return [None if name in leave else found[name].detach().requires_grad_() for name in NAMES]


@contextlib.contextmanager
def quick_scans():
    """Make Triton's interpreter combine whole rows of a scan, not single numbers, by the kernel's own function."""
    if not machine.interpreting():
        yield
        return
    import numpy
    from triton.runtime import interpreter

    def generic_scan(self, given):
        rows = [numpy.moveaxis(x.handle.data, self.axis, 0) for x in given]
        found = [numpy.empty_like(x) for x in rows]
        for i in range(len(rows[0])):
            new = [self.to_tensor(x[i], of.dtype) for x, of in zip(rows, given)]
            if i:
                new = self.combine_fn.fn(*(self.to_tensor(x[i - 1], of.dtype) for x, of in zip(found, given)), *new)
            for x, value in zip(found, new):
                x[i] = value.handle.data
        return [self.to_tensor(numpy.moveaxis(x, 0, self.axis), of.dtype) for x, of in zip(found, given)]

    before, interpreter.ScanOps.generic_scan = interpreter.ScanOps.generic_scan, generic_scan
    try:
        yield
    finally:
        interpreter.ScanOps.generic_scan = before


def run(arguments, orders=(0,), width=None, merge=False, softplus=True, backend="fused"):
    """The output and all gradients; None for arguments that are None."""
    given = [x for x in arguments if x is not None]
    width = width or given[0].shape[1]
    with quick_scans():
        out = scan(Scans(*arguments, softplus, list(orders), width, merge), backend)
        grads = iter(torch.autograd.grad(out, given, upstream(out)))
    return [out, *(None if x is None else next(grads) for x in arguments)]


def upstream(out):
    """A gradient of the output, random but always the same."""
    return torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)


def exact(arguments, backend="reference", **options):
    double = [None if x is None else x.detach().double().requires_grad_() for x in arguments]
    return run(double, backend=backend, **options)


def errors(
    orders=(0,),
    width=None,
    merge=False,
    softplus=True,
    split=None,
    dtype="float32",
    judge="reference",
    device="cpu",
    **options,
):
    """The errors of the fused form and their limits: see `triton_common.limits`.

    split: whether chunks get separate programs in the forward pass, None to apply the rule. judge: the form that gives
    the expected result, for maps that are too large for the reference.
    """
    arguments = inputs(scans=len(orders), dtype=getattr(torch, dtype), softplus=softplus, device=device, **options)
    how = dict(orders=orders, width=width, merge=merge, softplus=softplus)
    wanted, plain = exact(arguments, judge, **how), run(arguments, backend=judge, **how)
    changes = {} if split is None else {"fused.splits": lambda programs, length: split}
    with replaced(FOLDER, changes), poisoned(device):
        found = run(arguments, **how)
    assert all((a is None) == (b is None) for a, b in zip(found, wanted))
    names, found, plain, wanted = zip(*(x for x in zip(("out", *NAMES), found, plain, wanted) if x[1] is not None))
    # The interpreter truncates to bfloat16; a GPU rounds.
    units = {torch.float32: 3, torch.bfloat16: 1} if device == "cpu" else {torch.float32: 3}
    return limits(names, found, plain, wanted, units.items(), sums=("A", "D", "delta_bias"))


def mixed(device="cpu"):
    """Errors if tensors have different dtypes, as under autocast; dtypes of output and gradients."""
    arguments = inputs(length=34, leave=(), dtype=torch.float32, device=device)
    for i, dtype in ((0, torch.bfloat16), (3, torch.float16), (6, torch.bfloat16)):
        arguments[i] = arguments[i].detach().to(dtype).requires_grad_()
    found, wanted = run(arguments), exact(arguments)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]
    return errors, [str(x.dtype).removeprefix("torch.") for x in found]


def mutated(helper, split):
    """The largest difference between a result and the reference if a kernel's helper is broken; "" breaks none.

    A name after a colon says how it is broken. split: whether chunks get separate programs in the forward pass.
    """
    name, _, way = helper.partition(":")
    original = getattr(importlib.import_module(f"{FOLDER}.fused_kernels"), name, None)

    def broken(*arguments):
        if way == "decay":  # the state before is not decayed
            decay_left, x_left, decay_right, x_right = arguments
            return decay_left * decay_right, x_left + x_right
        if way == "mirrored":
            step, code, length, width = arguments
            return original(length - 1 - step, code, length, width)
        if way == "reversed":
            return original(*arguments) ^ 2
        if way == "columns":
            return original(*arguments) ^ 1
        if way == "mask":  # steps after the last step count as real
            p_delta, o_delta, real, *others = arguments
            return original(p_delta, o_delta, real | ~real, *others)
        if way == "bias":
            *others, bias, has_softplus = arguments
            return original(*others, bias * 0, has_softplus)
        if way == "scan":  # every scan reads the first
            image, scan, *strides = arguments
            return original(image, scan * 0, *strides)
        if way == "slope":
            return original(*arguments) * 0 + 1
        return original(*arguments) * 0.9

    broken.fn = broken  # a scan calls this attribute
    changes = {f"fused_kernels.{name}": broken} if name else {}
    assert not name or original is not None
    if split:
        changes["fused.splits"] = lambda programs, length: True
    arguments = inputs(length=42, scans=2, channels=3, states=1, leave=(), dtype=torch.float32)
    how = dict(orders=(1, 2), width=6)
    wanted = exact(arguments, **how)
    with replaced(FOLDER, changes):
        found = run(arguments, **how)
    differences = [(a.double() - b).abs().max().item() for a, b in zip(found, wanted)]
    return max(math.inf if math.isnan(x) else x for x in differences)


def repeats(dtype="float32", device="cpu", **options):
    """Whether two runs give the same bits."""
    arguments = inputs(scans=2, shared=True, leave=(), dtype=getattr(torch, dtype), device=device, **options)
    first, second = (run(arguments, (0, 3), arguments[0].shape[1] // 5, True) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second))


def held(device="cpu"):
    """The largest difference to D u if every step size is 0, and to u C B if each step forgets all earlier steps."""
    arguments = [x if x is None else x.detach() for x in inputs(length=40, dtype=torch.float32, device=device)]
    u, delta, A, B, C, D, _, _ = arguments
    none = scan(Scans(u, delta * 0, A, B, C, D, None, None, False, [0], 40, False), "fused")
    alone = scan(Scans(u, delta * 0 + 1, A * 0 - 1e4, B, C, None, None, None, False, [0], 40, False), "fused")
    return (none - D * u).abs().max().item(), (alone - u * (B * C).sum(-1, keepdim=True)).abs().max().item()


def not_a_number(device="cpu"):
    """Whether output and delta's gradient are NaN from the step on at which delta is NaN, and finite before it."""
    found = [None if x is None else x.detach() for x in inputs(length=40, dtype=torch.float32, device=device)]
    found[1][0, 36] = math.nan
    out, _, grad_delta, *_ = run([None if x is None else x.requires_grad_() for x in found])
    return bool(out[0, :36].isfinite().all() and out[0, 36:].isnan().all() and grad_delta[0, 36].isnan().all())


def far_apart(device="cpu"):
    """The largest error if images of u, and steps of delta, are about 2^31 elements apart: addresses need 64 bits."""
    near = [None if x is None else x.detach() for x in inputs(2, 3, channels=4, dtype=torch.float16, device=device)]
    found = list(near)
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    found[0] = storage.as_strided((2, 3, 1, 4), (2**31, 4, 4, 1)).copy_(near[0])
    found[1] = storage.as_strided((2, 3, 1, 4), (4, 2**30, 4, 1), 32).copy_(near[1])
    arguments = [None if x is None else x.requires_grad_() for x in found]
    pairs = zip(run(arguments), exact(arguments))
    return max((a.double() - b).abs().max().item() for a, b in pairs if a is not None)


def empty(device="cpu"):
    """The shapes of output and gradients for an empty batch."""
    results = run(inputs(0, 4, channels=3, states=2, dtype=torch.float32, device=device))
    assert all(x is None or not x.any() for x in results)
    return [None if x is None else tuple(x.shape) for x in results]


def opcheck(merge, device="cpu"):
    scans = 2 if merge else 1
    arguments = inputs(1, 4, scans, 3, 2, shared=merge, dtype=torch.float32, device=device)
    with quick_scans():
        torch.library.opcheck(
            torch.ops.terrazzo.selective_scan.default,
            (*arguments, True, [0, 3][:scans], 2, merge, "fused"),
        )


def compiled(dynamic, device="cpu", compiler="aot_eager"):
    """The largest difference between compiled and eager outputs and gradients; the graph must not break."""

    def both(u, delta, A, B, C, D, _, bias, backend):
        scanned = selective_scan_2d(u, delta, A, B, C, D, bias, True, ("rows", "columns_reversed"), backend=backend)
        sequence, B, C = (x.flatten(1, 2).mT for x in (scanned, B[:, :, :, 0], C[:, :, :, 0]))
        return selective_scan(sequence, sequence.square(), A[0], B, C, backend=backend)

    function = torch.compile(both, fullgraph=True, backend=compiler, dynamic=dynamic)
    worst = 0.0
    for height, width in ((2, 3), (3, 4)):
        arguments = inputs(1, height * width, 2, 3, 2, dtype=torch.float32, device=device)
        maps = [x.detach().unflatten(1, (height, width)) if i in (0, 1, 3, 4) else x for i, x in enumerate(arguments)]
        maps = [x if x is None else x.detach().requires_grad_() for x in maps]
        given = [x for x in maps if x is not None]
        results = []
        for call in (both, function):
            with quick_scans():
                out = call(*maps, "fused")
                results.append([out, *torch.autograd.grad(out, given, upstream(out))])
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*results)))
    return worst


def choices():
    """The forms that run on CPU tensors with "auto" and with a named backend, while Triton interprets."""
    operator = importlib.import_module(f"{FOLDER}.op").OPERATOR
    x = torch.zeros(1, 9, 1, 4)

    def why(backend, states, dtype=torch.float32):
        decays, pair = torch.zeros(1, 4, states, dtype=dtype), torch.zeros(1, 9, 1, states)
        return operator.why(backend, x, x, decays, pair, pair)

    auto = why("auto", 64)
    return {
        "auto": (auto.name, auto.reasons["fused"]),
        "named": why("fused", 64).name,
        "fits": why("fused", 64).reasons.get("fused"),
        "double": why("auto", 64, torch.float64).reasons["fused"],
        "wide": why("auto", 65).reasons["fused"],
    }

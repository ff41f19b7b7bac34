"""What the tests of the selective scan's Triton kernels run: in Triton's interpreter, and on a GPU where there is one.

Functions take and return plain values, for they are called through a process pool (`tests/kernels/conftest.py`).
"""

import contextlib
import importlib
import math

import torch
from triton_common import guarded, limits, poisoned, replaced

from terrazzo.kernels import selective_scan, selective_scan_2d, triton_host

FOLDER = "terrazzo.kernels.selective_scan"
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
_op = importlib.import_module(f"{FOLDER}.op")


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
    device="cpu",
):
    """u, delta, A, B, C, D, z and delta_bias as `reference.selective_scan` takes them; None where left out.

    shared: one u for all scans. dtype: of all but the parameters A, D and delta_bias, which stay float32, float64 if it
    is that. layout: "packed" views of wider tensors, as one projection of all would give; "sequences" (B, K D, L) with
    their steps contiguous, as mamba_ssm has them; "turned", with no axis contiguous.
    """
    generator = torch.Generator().manual_seed(0)
    double = torch.float64 if dtype == torch.float64 else torch.float32

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

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
        "delta": laid(drawn(*steps, *per_scan) - 1.5),
        "A": guarded(-drawn(*per_scan, states).exp().to(device, double)),
        "B": laid(drawn(*steps, scans, states)),
        "C": laid(drawn(*steps, scans, states)),
        "D": guarded(drawn(*per_scan).to(device, double)),
        "z": laid(drawn(*steps, *per_scan)),
        "delta_bias": guarded(drawn(*per_scan).to(device, double)),
    }
    return [None if name in leave else found[name].detach().requires_grad_() for name in NAMES]


def run(arguments, orders=(0,), width=None, merge=False, softplus=True, backend="fused"):
    """Output and every gradient, None for what is None."""
    given = [x for x in arguments if x is not None]
    width = width or given[0].shape[1]
    out = _op.scan(*arguments, softplus, list(orders), width, merge, backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    grads = iter(torch.autograd.grad(out, given, grad))
    return [out, *(None if x is None else next(grads) for x in arguments)]


def exact(arguments, **options):
    double = [None if x is None else x.detach().double().requires_grad_() for x in arguments]
    return run(double, backend="reference", **options)


@contextlib.contextmanager
def quick_scans():
    """Triton's interpreter combines a scan's numbers one by one: here whole rows, with the kernel's own function."""
    if not triton_host.interpreting():
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


def errors(orders=(0,), width=None, merge=False, softplus=True, split=None, dtype="float32", device="cpu", **options):
    """Errors of the fused form and what they may be: see `triton_common.limits`.

    split: whether chunks get programs of their own in the forward pass, None for what the rule says.
    """
    arguments = inputs(scans=len(orders), dtype=getattr(torch, dtype), device=device, **options)
    how = dict(orders=orders, width=width, merge=merge, softplus=softplus)
    wanted, plain = exact(arguments, **how), run(arguments, backend="reference", **how)
    changes = {} if split is None else {"fused.splits": lambda programs, length: split}
    with replaced(FOLDER, changes), poisoned(device), quick_scans():
        found = run(arguments, **how)
    assert all((a is None) == (b is None) for a, b in zip(found, wanted))
    names, found, plain, wanted = zip(*(x for x in zip(("out", *NAMES), found, plain, wanted) if x[1] is not None))
    # The interpreter cuts the bits that bfloat16 lacks; a GPU rounds.
    units = {torch.float32: 3, torch.bfloat16: 1} if device == "cpu" else {torch.float32: 3}
    return limits(names, found, plain, wanted, units.items())

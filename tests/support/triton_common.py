"""Tools for tests of Triton kernels: guarded and poisoned memory, broken pieces, tolerances."""

import contextlib
import importlib
import math

import torch


def guarded(x):
    """Copy a tensor and surround it with NaN in memory, so that a read outside of it changes results."""
    margin = 4096
    storage = torch.full((x.numel() + 2 * margin,), math.nan, dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, x.stride(), margin).copy_(x)


@contextlib.contextmanager
def poisoned(device="cpu"):
    """Fresh memory is filled with NaN, so that a read of unwritten memory changes results."""
    # Only warn of nondeterministic operations: on a GPU, the portable form's products may be nondeterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=device).isnan().all(), "memory is not poisoned: the test would prove nothing"
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def replaced(folder, changes):
    """Replace attributes of the modules of a package, {"module.name": value}, during a test."""
    before = []
    try:
        for path, value in changes.items():
            module, name = path.split(".")
            module = importlib.import_module(f"{folder}.{module}")
            before.append((module, name, getattr(module, name)))
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


_SUMMED = 16  # units in the last place of a sum's root mean square


def _size(x):
    return x.square().mean().sqrt().item()


def limits(names, found, plain, exact, units=((torch.float32, 3),), sums=()):
    """Root mean square errors against float64: {name: (error, limit)}.

    The limit is twice the error of plain PyTorch in the same dtype, or a number of units in the last place of the
    result's root mean square, `units`, whichever is larger. It is three units in float32, because the backward pass
    uses a rounded number for each row. For names in `sums` it is 16 units at least: these tensors are small, each
    element is a sum of hundreds of terms that cancel, and how much its error is, plain or not, depends on the order in
    which a processor adds.
    """
    allowed = {}
    for name, f, p, e in zip(names, found, plain, exact):
        error, theirs = (_size(x.double() - e) for x in (f, p))
        units_here = dict(units).get(f.dtype, 0)
        if name in sums and units_here:
            units_here = max(units_here, _SUMMED)
        allowed[name] = (error, max(2 * theirs, units_here * torch.finfo(f.dtype).eps * _size(e)))
    return allowed


def check(errors, times=1):
    """Check the errors from `limits`: each must be at most `times` its limit."""
    for name, (error, allowed) in errors.items():
        assert error <= times * allowed, f"{name}: {error:.2e}, the limit is {times * allowed:.2e}"

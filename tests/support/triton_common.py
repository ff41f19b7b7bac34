"""What the tests of every operator's Triton kernels share: guarded and poisoned memory, broken pieces, tolerances."""

import contextlib
import importlib
import math

import torch


def guarded(x):
    """The same numbers amid NaN, so that what is read beside a tensor shows."""
    margin = 4096
    storage = torch.full((x.numel() + 2 * margin,), math.nan, dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, x.stride(), margin).copy_(x)


@contextlib.contextmanager
def poisoned(device="cpu"):
    """Fresh memory is full of NaN, so what is read without having been written shows."""
    # Only a warning of what is not deterministic: on a GPU that may be the portable form's products.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=device).isnan().all(), "memory is not poisoned: the test would prove nothing"
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def replaced(folder, changes):
    """Attributes of the modules of a package, {"module.name": value}, for the time of a test."""
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


def _size(x):
    return x.square().mean().sqrt().item()


def limits(names, found, plain, exact, units=((torch.float32, 3),), sums=()):
    """Root mean square errors against float64: {name: (of what was found, largest allowed)}.

    Two-sided: at most twice the error of plain PyTorch in the same dtype, or so many units in the last place of the
    result's root mean square: in float32 three, which the one number per row that is kept for the backward pass costs.
    Names among `sums` are few numbers, each a sum over all steps, whose errors differ by luck: twice as much.
    """
    allowed = {}
    for name, f, p, e in zip(names, found, plain, exact):
        error, theirs = (_size(x.double() - e) for x in (f, p))
        floor = dict(units).get(f.dtype, 0) * torch.finfo(f.dtype).eps * _size(e)
        floor *= 2 if name in sums else 1
        allowed[name] = (error, max(2 * theirs, floor))
    return allowed


def check(errors, times=1):
    """What `limits` found, each of so many times what it allows at most."""
    for name, (error, allowed) in errors.items():
        assert error <= times * allowed, f"{name}: {error:.2e}, allowed are {times * allowed:.2e}"

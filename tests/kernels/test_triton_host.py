"""Every fused form's demands on the machine."""

import pytest
import torch
from support.processes import run_code

from terrazzo.kernels.triton_host import machine


@pytest.fixture(autouse=True)
def _forget():
    machine.device_refusal.cache_clear()
    yield
    machine.device_refusal.cache_clear()


def test_refusals(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(machine, "has_triton", lambda: True)
    assert "tensors are on cpu" in machine.refusal(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "this machine has none" in machine.refusal(cuda, torch.float32)
    machine.device_refusal.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, cuda:0 has 7.5" in machine.refusal(cuda, torch.float32)
    machine.device_refusal.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert machine.refusal(cuda, torch.bfloat16) is None
    assert machine.refusal(cuda, torch.bfloat16, "needs smaller tiles") == "needs smaller tiles"
    assert "not in float64" in machine.refusal(cuda, torch.float64)
    assert machine.refusals(cuda, torch.float16) == ({}, {})
    monkeypatch.setattr(machine, "has_triton", lambda: False)
    assert "triton, which is not installed" in machine.refusal(cuda, torch.float32)


def test_an_interpreter_runs_anywhere_but_only_by_name(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(machine, "has_triton", lambda: True)
    refused, discouraged = machine.refusals(torch.device("cpu"), torch.float32)
    assert refused == {}
    assert "TRITON_INTERPRET" in discouraged["fused"]


def test_precision_follows_the_user():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert machine.precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert machine.precision(torch.float32) == "tf32"
        assert machine.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.long
def test_kernels_are_imported_at_first_use_only():
    """Calls on a CPU import no kernels except Numba's: no operator's Triton kernels, and so not triton."""
    code = (
        "import sys, torch, terrazzo.kernels as k; x = torch.zeros(1, 8, 8, 1, 8)\n"
        "k.neighborhood_attention(x, x, x, 3); k.strip_attention(x[0, :1, :, :, 0], x[0, :1, :, :, 0], x[0, :1])\n"
        "x = x[0, :, :, 0]; k.selective_scan(x, x, x[0], x, x)\n"
        "found = {name for name in sys.modules if name.startswith('terrazzo.kernels') and '.fused_' in name}\n"
        "sys.exit(any('cpu' not in name and 'numba' not in name for name in found))"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr

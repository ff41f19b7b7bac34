"""The peak of memory during a block."""

import sys

import pytest
import torch

from terrazzo.tools.inspect.memory import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory a process has")
def test_peak():
    device = torch.device("cpu")
    with PeakMemory(device) as large:
        torch.ones(64 << 20, dtype=torch.uint8)
    with PeakMemory(device) as small:
        torch.ones(4 << 20, dtype=torch.uint8)
    assert large.bytes == pytest.approx(64 << 20, rel=0.2)
    assert small.bytes < 16 << 20


def test_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr("terrazzo.tools.inspect.memory._RESET", tmp_path / "no" / "file")
    with PeakMemory(torch.device("cpu")) as peak:
        pass
    assert peak.bytes is None

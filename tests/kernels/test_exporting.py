"""An exporter gets standard operations; a compiler the operators themselves."""

import pytest
import torch

from terrazzo.kernels.exporting import is_exporting


class Told(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if is_exporting() else x


def test_running_and_compiling():
    x = torch.zeros(3)
    assert torch.equal(Told()(x), x)
    assert torch.equal(torch.compile(Told(), backend="eager", fullgraph=True)(x), x)


@pytest.mark.parametrize("strict", [True, False])
def test_exporting(strict):
    x = torch.zeros(3)
    assert torch.equal(torch.export.export(Told(), (x,), strict=strict).module()(x), x + 1)
    assert not is_exporting()

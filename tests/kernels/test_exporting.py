"""An exporter gets standard operations; a compiler gets the operators themselves."""

import pytest
import torch
from support.processes import run_code

from terrazzo.kernels import neighborhood_attention, selective_scan, ssd
from terrazzo.kernels.dispatch.exporting import is_exporting


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


def test_tracing():
    x = torch.zeros(3)
    traced = torch.jit.trace(Told(), x)
    assert torch.equal(traced(x), x + 1)
    assert not is_exporting()


class Operators(torch.nn.Module):
    """The operators whose exported form differs from their usual form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # B 9 8 2 16
        attended = neighborhood_attention(x, x, x, kernel_size=3, dilation=2)
        steps = attended.flatten(1, 2)  # B L 2 16
        rows = steps.flatten(2).transpose(1, 2)
        scanned = selective_scan(rows, rows.abs(), -torch.ones(32, 4), rows[:, :4], rows[:, 4:8])
        mixed = ssd(steps, steps.abs().mean(-1), -torch.ones(2), steps, steps)
        return attended.sum((3, 4)).flatten(1) + scanned.sum(1) + mixed.sum((2, 3))


LOADED = """
import sys, torch
traced, (x, wanted) = torch.jit.load(sys.argv[1]), torch.load(sys.argv[2])
torch.testing.assert_close(traced(x), wanted, rtol=1e-4, atol=1e-4)
assert "terrazzo" not in sys.modules
"""


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_loads_without_the_zoo(tmp_path):
    x = torch.randn(2, 9, 8, 2, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.jit.trace(Operators(), x.roll(1, 1)).save(tmp_path / "traced.pt")
        torch.save((x, Operators()(x)), tmp_path / "data.pt")
    done = run_code(LOADED, *(tmp_path / name for name in ("traced.pt", "data.pt")), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-1000:]

"""AOTInductor packages run, and a missing compiler gives a message."""

import subprocess
import sys

import pytest
import timm
import torch
from torch._inductor.exc import InvalidCxxCompiler

from terrazzo.tools.export.checked import checked_export
from terrazzo.tools.export.formats import aoti as aoti_export

RUN = """
import sys
import torch

package, image, output = sys.argv[1:]
torch.save(torch._inductor.aoti_load_package(package)(torch.load(image)), output)
assert not any(name.split(".")[0] in ("terrazzo", "timm") for name in sys.modules)
"""


@pytest.mark.slow
def test_needs_neither_terrazzo_nor_a_compiler(tmp_path):
    """Neighborhood attention is terrazzo's operator in PyTorch; the package does not need terrazzo."""
    small = {"depths": (1, 2, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8), "num_classes": 7}
    net = timm.create_model("dinat_mini", dilations=[[1], [1, 2], [1], [1]], **small).eval()
    image, package = torch.rand(1, 3, 64, 96), tmp_path / "net.pt2"
    report = checked_export(aoti_export.CompiledForm(), net, image, package)
    assert report.passed
    torch.save(image, tmp_path / "image.pth")
    command = [sys.executable, "-c", RUN, package, tmp_path / "image.pth", tmp_path / "output.pth"]
    result = subprocess.run(
        command, cwd=tmp_path, env={"PATH": "", "CXX": "none"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = net(image)
    assert (torch.load(tmp_path / "output.pth") - expected).abs().max() < 1e-4 * expected.abs().max()


def test_without_a_compiler(refused, tmp_path, monkeypatch):
    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(aoti_export, "get_cpp_compiler", none)
    out = tmp_path / "out" / "model.pt2"
    assert "needs a C++ compiler" in refused("export", "resnet10t", "--format", "aoti", "--out", out)
    assert not out.parent.exists()

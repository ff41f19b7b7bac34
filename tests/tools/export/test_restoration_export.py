"""ONNX files of restoration networks."""

import pytest
import timm
import torch

from terrazzo.errors import InputError
from terrazzo.tools.export.checked import checked_export

pytest.importorskip("onnxruntime", reason="needs the extra 'export'")


def network(depth, **options):
    torch.manual_seed(0)
    options = dict(embed_dim=24, num_heads=2, split_size=(4, 8), depth=depth, **options)
    return timm.create_model("rgt_s_x2", **options).eval()


def exported(model, path, **options):
    from terrazzo.tools.export.formats.onnx import OnnxForm

    example = torch.rand(1, 3, 40, 33, generator=torch.Generator().manual_seed(1))
    return checked_export(OnnxForm(None), model, example, path, **options)


@pytest.mark.slow
def test_pictures_of_one_size(tmp_path):
    """Recursions may follow the size, because the file has one."""
    report = exported(network((2,)), tmp_path / "rgt.onnx")
    assert report.passed, report


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [("hw",), ("batch", "hw")], ids="+".join)
def test_pictures_of_any_size(dynamic, tmp_path):
    """With a fixed number of recursions a file takes smaller and larger pictures; the third block is shifted."""
    smaller = {"smaller": torch.rand(1, 3, 17, 20), "one column of windows": torch.rand(1, 3, 30, 16)}
    report = exported(network((2, 1), recursions=2), tmp_path / "rgt.onnx", dynamic=dynamic, checks=smaller)
    assert report.passed, report


def test_open_sizes_need_a_number_of_recursions(tmp_path):
    with pytest.raises(InputError, match=r"for open sizes fix the number, create_model\(name, recursions=2\)"):
        exported(network((1,)), tmp_path / "rgt.onnx", dynamic=("hw",))

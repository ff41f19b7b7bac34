"""Restorers in half precision and INT8: PSNR decides, and the pictures are compared with float32's."""

import csv
import json

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from support.restoration import TINY, write_pictures

from terrazzo.tools.export.precision.restored import psnr_to
from terrazzo.tools.predict.files import file_predictor

pytest.importorskip("onnxruntime", reason="needs the extra 'export'")

CONFIG = """
_base_ = ["terrazzo::restoration/restorer-unet_dinat-mini_super-resolution-x2_1xb8-10k_pictures-128x128.py"]
model = dict(_delete_=True, type="Restorer", backbone=dict(name="tiny_restorer", scale=2))
train_dataloader = dict(dataset=dict(crop=32))
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), (75, 61))


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return timm.create_model(TINY, scale=2).state_dict()


def table(path):
    with open(path) as file:
        return {(row["dtype"], row["metric"]): (float(row["p50"]), row["unit"]) for row in csv.DictReader(file)}


@pytest.mark.long
def test_a_config_with_its_data(run, pictures, weights, tmp_path):
    """The file's PSNR in float32 is that of `terrazzo test`, on the middles of pictures; INT8 is nearly as good."""
    (tmp_path / "restorer.py").write_text(CONFIG)
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in weights.items()}}, tmp_path / "w.pth")
    call, data = (tmp_path / "restorer.py", tmp_path / "w.pth"), ("--data-root", pictures)
    small = ("--size", 30, 37)  # all of the pictures, whose scale is 2
    result = run("export", *call, *small, "--int8", *data, "--out", tmp_path / "int8.onnx", "--tolerance", 3)
    assert result.exit_code == 0, result.output
    assert run("test", *call, *data, "--out", tmp_path / "test.json").exit_code == 0
    found = table(tmp_path / "int8.precision.csv")
    wanted = json.loads((tmp_path / "test.json").read_text())["restoration/psnr_y"]
    assert found["float32", "restoration/psnr_y"] == (pytest.approx(wanted, abs=0.01), "dB")
    assert found["int8", "restoration/psnr_y"][0] == pytest.approx(wanted, abs=3)
    psnr, unit = found["int8", "PSNR against float32"]
    assert unit == "dB"
    assert 25 < psnr < 90
    assert f"int8 against float32, on pictures that set no ranges: PSNR {psnr:.1f} dB" in result.output
    # a file that is smaller than the pictures is measured on their middles
    result = run("export", *call, "--size", 16, 16, "--fp16", *data, "--out", tmp_path / "fp16.onnx")
    assert result.exit_code == 0, result.output
    found = table(tmp_path / "fp16.precision.csv")
    assert found["fp16", "restoration/psnr_y"][0] == pytest.approx(found["float32", "restoration/psnr_y"][0], abs=0.05)
    assert found["fp16", "PSNR against float32"][0] > 55


@pytest.mark.long
def test_a_network_alone(run, refused, pictures, weights, tmp_path):
    """INT8 takes degraded pictures of a folder; one of them is compared, and the file restores a picture."""
    torch.save(weights, tmp_path / "w.pth")
    file, folder = tmp_path / "x.onnx", pictures / "images" / "val"
    call = ("export", TINY, tmp_path / "w.pth", "--size", 30, 30)
    result = run(*call, "--int8", "--pictures", folder, "--out", file)
    path = file if result.exit_code == 0 else tmp_path / "x.onnx.failed"
    psnr = table(tmp_path / "x.precision.csv")["int8", "PSNR against float32"][0]
    assert 25 < psnr < 90
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "QuantizeLinear" in kinds
    restored = file_predictor("onnx", path).predict([Image.open(folder / "0.png").crop((0, 0, 30, 30))])[0].restored
    assert restored.size == (60, 60)
    result = run(*call, "--fp16", "--out", tmp_path / "half.onnx")
    assert result.exit_code == 0, result.output
    assert table(tmp_path / "half.precision.csv")["fp16", "PSNR against float32"][0] > 55
    for name in ("--fp16", "--int8"):
        assert "needs two pictures or more" in refused(*call, name, "--pictures", folder / "0.png", "--out", file)


def test_psnr_of_graphs():
    """Equal graphs have 100 dB, and a graph that is off by 1 of 255 everywhere has 48.13 dB."""

    def graph(offset):
        info = onnx.helper.make_tensor_value_info
        shape = [1, 3, 4, 4]
        x, y = (info(name, onnx.TensorProto.FLOAT, shape) for name in "xy")
        constant = onnx.numpy_helper.from_array(np.float32(offset), "c")
        made = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "c"], ["y"])], "g", [x], [y], [constant])
        return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)

    psnr = psnr_to(graph(0), [(255 * torch.rand(1, 3, 4, 4),)] * 2)
    assert psnr(graph(0)) == 100
    assert psnr(graph(1)) == pytest.approx(48.13, abs=0.01)

"""The core of the export: parity figures, verdicts, and no partial files."""

import onnx
import pytest
import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools.export.formats import onnx as onnx_export
from terrazzo.tools.export.formats.onnx import export_onnx


class Net(nn.Module):
    """A module with real and integer outputs; its exported form can differ on purpose."""

    def __init__(self, shift: float = 0.0, mislabel: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.shift, self.mislabel = shift, mislabel

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        exporting = torch.compiler.is_exporting()
        labels = (-y if exporting and self.mislabel else y).argmax(1)
        return (y + self.shift if exporting else y), labels


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 10, 14, generator=torch.Generator().manual_seed(0))


def test_passes_and_describes(tmp_path, image):
    path = tmp_path / "new" / "net.onnx"
    net = Net().train()
    report = export_onnx(
        net,
        image,
        path,
        checks={"other": 3 * image},
        output_names=("logits", "labels"),
        dynamic=("batch",),
        metadata={"model": "net"},
    )
    assert report.passed
    assert net.training
    assert report.path == path
    assert 0 <= report.worst < 1e-5
    names = {(parity.output, parity.source) for parity in report.parities}
    assert names == {(o, s) for o in ("logits", "labels") for s in ("example", "other", "larger batch")}
    model = onnx.load(path)
    assert [output.name for output in model.graph.output] == ["logits", "labels"]
    assert {entry.key: entry.value for entry in model.metadata_props}["model"] == "net"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert [path.name for path in path.parent.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("broken", [Net(shift=0.01), Net(mislabel=True), Net(shift=float("nan"))])
def test_failing_parity_keeps_the_suffix(tmp_path, image, broken):
    report = export_onnx(broken, image, tmp_path / "net.onnx")
    assert not report.passed
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx.failed"]


def test_figure_is_relative_to_the_largest_reference(tmp_path, image):
    net = Net(shift=0.5)
    report = export_onnx(net, image, tmp_path / "net.onnx")
    with torch.no_grad():
        expected = 0.5 / net(image)[0].abs().max().item()
    assert report.worst == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
def test_opset_is_the_one_asked_for(tmp_path, image):
    assert export_onnx(Net(), image, tmp_path / "net.onnx", opset=18).version == "opset 18"


@pytest.mark.long
def test_another_opset_than_asked_for_is_refused(tmp_path, image, monkeypatch):
    """If the conversion fails, PyTorch writes its original opset and only logs it."""
    whole = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: whole(*args, **{**options, "opset_version": 18}))
    with pytest.raises(InputError, match="cannot be exported to opset 21, only to 18"):
        export_onnx(Net(), image, tmp_path / "net.onnx", opset=21)
    assert not list(tmp_path.iterdir())


class NoForm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x.mean(1)[:, :8, :8]).real


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize("module", [NoForm(), DataDependent()])
def test_what_cannot_be_exported_leaves_nothing(tmp_path, image, module):
    with pytest.raises(InputError, match="cannot be exported to ONNX"):
        export_onnx(module, image, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_take_what_the_module_takes(tmp_path, image):
    with pytest.raises(InputError, match=r"the exported file fails on the two \(2x3x10x14\): .*dimension") as error:
        export_onnx(Net(), image, tmp_path / "net.onnx", checks={"two": torch.cat([image, image])})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_refuses_places_and_names(tmp_path, image):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        export_onnx(Net(), image, tmp_path / "file" / "net.onnx")
    with pytest.raises(InputError, match="is a folder"):
        export_onnx(Net(), image, tmp_path)
    with pytest.raises(InputError, match="2 outputs, but 1 names"):
        export_onnx(Net(), image, tmp_path / "net.onnx", output_names=("logits",))


class Bent(nn.Module):
    """A module that is right in PyTorch; the test below breaks its ONNX form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erf(x.sigmoid()) * 2


def test_the_first_value_that_differs_is_named(tmp_path, image, monkeypatch):
    def bent(task_trace):
        def trace(self, task):
            program = task_trace(self, task)
            node = next(node for node in program.model.graph if node.op_type == "Erf")
            node.op_type = "Tanh"
            return program

        return trace

    monkeypatch.setattr(onnx_export.OnnxForm, "_trace", bent(onnx_export.OnnxForm._trace))
    report = export_onnx(Bent(), image, tmp_path / "net.onnx")
    assert not report.passed
    assert "the first value that differs is erf" in report.divergence
    assert "the model itself" in report.divergence


def test_a_faithful_file_of_other_results_is_told_apart(tmp_path, image):
    report = export_onnx(Bent(), image, tmp_path / "net.onnx", reference=lambda x: Bent()(x) + 1)
    assert "the traced program itself differs" in report.divergence

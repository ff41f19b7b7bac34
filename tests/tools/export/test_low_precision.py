"""Lower precision of exported graphs: the nodes of each layer, and the layers that must stay in float32."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools.export.formats.onnx import export_onnx
from terrazzo.tools.export.precision.low import Half, Int8, layers
from terrazzo.tools.export.precision.lowering import lower_file
from terrazzo.tools.export.precision.sensitivity import frontier, layer_errors, lower, output_error
from terrazzo.tools.export.tensorrt.operators import problems
from terrazzo.tools.results import read


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(channels), nn.Linear(channels, channels)
        for parameter in self.norm.parameters():  # the exporter would merge equal parameters
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x):
        return x + self.fc(self.norm(x))


class Model(nn.Module):
    """Pixels to pooled features: the operations at the ends belong to no layer. `gain` is the first block's factor."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(Block(16), Block(16), Block(16))
        with torch.no_grad():
            self.blocks[1].fc.weight.mul_(gain)

    def forward(self, x):
        x = self.stem(x / 255 - 0.5).permute(0, 2, 3, 1)
        return self.blocks(x).mean((1, 2)) * 1000


def pixels(seed=0):
    return 255 * torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def exported(module, folder, example=None):
    file = folder / "model.onnx"
    assert export_onnx(module.eval(), pixels() if example is None else example, file).passed
    return onnx.load(file)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    torch.manual_seed(0)
    return exported(Model(), tmp_path_factory.mktemp("graph"))


SAMPLES = [(pixels(1),), (pixels(2),)]


@pytest.mark.long
def test_layers(graph):
    found = layers(graph)
    blocks = [f"blocks.{i}{part}" for i in range(3) for part in (".norm", ".fc", "")]
    assert list(found) == ["stem", *blocks]
    kinds = {node.name: node.op_type for node in graph.graph.node}
    assert [kinds[name] for name in found["stem"]] == ["Conv"]
    inside = {name for names in found.values() for name in names}
    assert Counter(kinds[name] for name in kinds if name not in inside) == Counter(
        {"Div": 1, "Sub": 1, "Transpose": 1, "ReduceMean": 1, "Mul": 1}
    )
    assert frontier(graph) == [kind.output[0] for kind in graph.graph.node if kind.name in (found["stem"][-1],)] + [
        kind.output[0] for kind in graph.graph.node if kind.name == found["blocks.2"][-1]
    ]


def test_what_is_around_a_roi_align_stays(tmp_path):
    """RoIAlign's boxes are coordinates, so they stay; layers that take its outputs are lowered."""
    from torchvision.ops import RoIAlign

    class Extractor(nn.Module):
        def __init__(self):
            super().__init__()
            self.align = RoIAlign(4, 0.25, 2, aligned=True)

        def forward(self, x, boxes):
            return self.align(x, boxes * 1.5)

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.extractor, self.head = nn.Conv2d(3, 4, 4, 4), Extractor(), nn.Conv2d(4, 4, 4)

        def forward(self, x):
            boxes = torch.tensor([[0.0, 1.0, 2.0, 9.0, 8.0]])
            return self.head(self.extractor(self.backbone(x), boxes + x.mean()))

    model = exported(Detector(), tmp_path, torch.rand(1, 3, 16, 24))
    assert list(layers(model)) == ["backbone", "head"]


@pytest.mark.parametrize("precision", [Half, lambda model: Int8(model, SAMPLES)])
def test_kept_layers_are_exact(graph, precision):
    """If all layers are kept, nothing changes; if a layer is lowered, the layers before it do not change."""
    precision = precision(graph)
    names = list(precision.layers)
    loss = output_error(precision, SAMPLES)
    assert loss(precision.measurable(names)) == 0
    alone = precision.measurable([name for name in names if name != "blocks.1.fc"])
    errors = layer_errors(precision, alone, SAMPLES)
    assert errors["blocks.0.fc"] == 0
    assert 0 < errors["blocks.1.fc"] < precision.limit
    assert 0 < loss(alone) < loss(precision.measurable()) < precision.limit


def test_half_file(graph):
    """Layers' weights have 16 bits, the graph's ends stay in float32, and its measurable form has similar errors."""
    precision = Half(graph)
    lowered = precision.lower()
    kinds = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    assert sum(kind == onnx.TensorProto.FLOAT16 for kind in kinds.values()) == 2 + 3 * 4
    assert [value.type.tensor_type.elem_type for value in (*lowered.graph.input, *lowered.graph.output)] == [1, 1]
    assert lowered.ByteSize() < graph.ByteSize()
    assert not problems(lowered)
    evaluator = onnx.reference.ReferenceEvaluator(lowered)
    (theirs,) = evaluator.run(None, {"image": SAMPLES[0][0].numpy()})
    stand_in = onnx.reference.ReferenceEvaluator(precision.measurable())
    (mine,) = stand_in.run(None, {"image": SAMPLES[0][0].numpy()})
    (exact,) = onnx.reference.ReferenceEvaluator(graph).run(None, {"image": SAMPLES[0][0].numpy()})
    assert 0 < np.abs(mine - exact).max() / np.abs(exact).max() < 1e-2
    assert np.abs(mine - theirs).max() < 3 * np.abs(mine - exact).max()


def test_int8_file(graph):
    """Both factors of products with weights are symmetric INT8, as TensorRT requires; kept products stay in float32."""
    precision = Int8(graph, SAMPLES)
    assert list(precision.layers) == ["stem", "blocks.0.fc", "blocks.1.fc", "blocks.2.fc"]
    assert not problems(precision.lower())
    lowered = precision.lower(["blocks.1.fc"])
    givers = {name: node.op_type for node in lowered.graph.node for name in node.output}
    for node in lowered.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            wanted = [None, None] if node.name in precision.layers["blocks.1.fc"] else ["DequantizeLinear"] * 2
            assert [givers.get(name) if wanted[0] else None for name in node.input[:2]] == wanted
            quantised = [givers.get(name) == "DequantizeLinear" for name in node.input[:2]]
            assert quantised == [wanted[0] is not None] * 2


def test_int8_leaves_stacks_of_matrices(tmp_path):
    """ONNX Runtime refuses a scale per channel for stacks, so the file would not run."""

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.weight = nn.Linear(3, 8), nn.Parameter(torch.randn(4, 8, 5))

        def forward(self, x):
            return self.fc(x.flatten(2).transpose(1, 2)) @ self.weight

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = Stack()

        def forward(self, x):
            return self.stack(x / 255)

    file, batch = tmp_path / "int8.onnx", torch.cat([pixels(seed) for seed in range(4)])
    model = exported(Whole(), tmp_path, batch)
    assert set(Int8(model, [(batch,)]).layers) == {"stack.fc"}
    report = lower_file(tmp_path / "model.onnx", "int8", file, [(batch,)], None, 0.0, "int8")
    assert report.lowered.passed, report


def test_int8_needs_images_and_products(graph, tmp_path):
    with pytest.raises(InputError, match="there are no images"):
        Int8(graph, [])
    norm = exported(nn.Sequential(nn.LayerNorm(24)), tmp_path)
    with pytest.raises(InputError, match="nothing to put into INT8"):
        Int8(norm, SAMPLES)


def test_lower_all_where_that_is_good_enough(graph):
    precision = Half(graph)
    result = lower(precision, SAMPLES, output_error(precision, SAMPLES), precision.limit)
    assert result.passed
    assert result.kept == ()
    assert result.alone == {}
    assert set(result.errors) == set(precision.layers)
    assert all(0 < error < precision.limit for error in result.errors.values())


@pytest.mark.long
def test_layers_that_overflow_stay(tmp_path):
    """The largest float16 is 65504: a layer above it, and layers that take its values, stay in float32."""
    torch.manual_seed(0)
    graph = exported(Model(gain=1e6), tmp_path)
    precision = Half(graph)
    loss = output_error(precision, SAMPLES)
    assert loss(precision.measurable()) > 0.5
    result = lower(precision, SAMPLES, loss, precision.limit)
    assert result.passed
    assert "blocks.1.fc" in result.kept
    assert len(result.kept) <= 8 < len(precision.layers)
    assert set(result.kept) == set(sorted(result.alone, key=result.alone.get, reverse=True)[: len(result.kept)])
    assert result.alone["stem"] < precision.limit < result.alone["blocks.1.fc"]
    kinds = {tensor.name: tensor.data_type for tensor in result.model.graph.initializer}
    assert kinds["blocks.1.fc.bias"] == onnx.TensorProto.FLOAT


def test_lower_fails_where_no_choice_is_good_enough(graph):
    precision = Half(graph)
    result = lower(precision, SAMPLES, lambda model: float("nan"), 0.5)
    assert not result.passed
    assert 0 < len(result.kept) < len(precision.layers)


def test_lower_file(graph, tmp_path):
    """The metric of the float32 file and of each candidate decides; a file that loses too much gets another name."""
    file, out = tmp_path / "float32.onnx", tmp_path / "out.onnx"
    onnx.save(graph, file)
    asked = []

    def points(worth):
        figures = iter(worth)

        def measure(path):
            asked.append(path)
            return {"mIoU": next(figures), "other": 50.0}

        return measure

    result = lower_file(file, "fp16", out, SAMPLES, points([60.0, 55.0, 59.8]), 0.5, "model")
    assert (result.path, result.before["mIoU"], result.after["mIoU"]) == (out, 60.0, 59.8)
    assert len(result.lowered.kept) == 1
    assert asked[0] == file
    assert len(set(asked[1:])) == 1
    assert not asked[1].exists()
    rows = {(row.dtype, row.metric): row.p50 for row in read(tmp_path / "out.precision.csv")}
    assert rows["float32", "mIoU"] == 60.0
    assert rows["fp16", "layers in float32"] == 1
    assert ("float32", f"error at {result.lowered.kept[0]}") in rows
    assert len([name for _, name in rows if name.endswith(" alone")]) == result.layers
    result = lower_file(file, "fp16", out, SAMPLES, points([60.0] + [20.0] * 9), 0.5, "model")
    assert not result.lowered.passed
    assert result.path.name == "out.onnx.failed"
    assert result.path.is_file()
    with pytest.raises(InputError, match="finds nothing"):
        lower_file(file, "fp16", out, SAMPLES, lambda path: {}, 0.5, "model")

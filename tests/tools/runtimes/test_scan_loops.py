"""A Loop that replaces a Scan gives the same results in every runtime."""

import contextlib

import numpy as np
import pytest
import torch

from terrazzo.errors import InputError
from terrazzo.kernels import selective_scan_2d
from terrazzo.kernels.selective_scan import CROSS, without_loops

onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
open_openvino = pytest.importorskip("terrazzo.tools.runtimes.openvino", reason="needs the extra 'export'").open_openvino
loops_for_scans = pytest.importorskip(
    "terrazzo.tools.runtimes.scan_loops", reason="needs the extra 'export'"
).loops_for_scans

SCAN = """
<ir_version: 10, opset_import: ["": 18]>
scans (float[2] start, float[length, 2] first, float[length, 2] second) => (float[2] last, float[length, 2] states)
{{
    last, states = Scan <num_scan_inputs = 2, scan_input_directions = [0, {direction}] {more},
        body = step (float[2] state, float[2] a, float[2] b) => (float[2] next, float[2] out)
        {{ scaled = Mul (state, a) next = Add (scaled, b) out = Identity (next) }}
    > (start, first, second)
}}
"""


def parsed(direction=0, more=""):
    return onnx.parser.parse_model(SCAN.format(direction=direction, more=more))


def run(model, inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(("start", "first", "second"), inputs)))


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("length", [1, 5])
def test_same_numbers(tmp_path, direction, length):
    generator = np.random.default_rng(0)
    inputs = [generator.standard_normal(shape).astype(np.float32) for shape in ((2,), (length, 2), (length, 2))]
    model = parsed(direction)
    wanted = run(model, inputs)
    assert loops_for_scans(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("Scan") == 0
    for found, expected in zip(run(model, inputs), wanted):
        np.testing.assert_array_equal(found, expected)
    assert loops_for_scans(model) == 0


def test_openvino_reads_a_file_with_a_scan(tmp_path):
    path = tmp_path / "scan.onnx"
    onnx.save(parsed(1), path)
    inputs = [torch.randn(2), torch.randn(4, 2), torch.randn(4, 2)]
    wanted = run(parsed(1), [x.numpy() for x in inputs])
    function, *_ = open_openvino(path)
    for found, expected in zip(function(*inputs), wanted):
        torch.testing.assert_close(found, torch.from_numpy(expected))


@pytest.mark.parametrize("more", [", scan_input_axes = [0, 1]", ", scan_output_directions = [1]"])
def test_what_is_not_written(more):
    with pytest.raises(InputError, match="does not run forward over the first axis"):
        loops_for_scans(parsed(more=more))


class Scans(torch.nn.Module):
    def __init__(self, states):
        super().__init__()
        self.orders = CROSS
        self.A = torch.nn.Parameter(-torch.rand(4, 6, states))

    def forward(self, u, delta, B, C):
        return selective_scan_2d(u, delta, self.A, B, C, delta_softplus=True, orders=self.orders)


@pytest.mark.long
@pytest.mark.parametrize("states", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_selective_scan_in_every_runtime(tmp_path, states):
    """The four orders of a map share a Scan; ONNX Runtime and OpenVINO give PyTorch's results, also at other sizes."""
    torch.manual_seed(0)

    def inputs(batch, height, width):
        shapes = ((6,), (4, 6), (4, states), (4, states))
        return [torch.randn(batch, height, width, *shape) for shape in shapes]

    module, path = Scans(states).eval(), tmp_path / "scan.onnx"
    Dim = torch.export.Dim
    sizes = dict(enumerate((Dim("batch"), Dim("height"), Dim("width"))))
    with torch.no_grad():
        program = torch.onnx.export(
            module, tuple(inputs(2, 5, 7)), dynamo=True, dynamic_shapes=(sizes,) * 4, verbose=False
        )
    program.save(path)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("Scan") == 1
    assert not {"CumSum", "Loop"} & set(nodes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    openvino, *_ = open_openvino(path)
    for size in ((2, 5, 7), (1, 4, 9), (3, 1, 2)):
        given = inputs(*size)
        wanted = module(*given).detach()
        (found,) = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), given)})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(openvino(*given)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    "length", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(10, marks=pytest.mark.slow), 49]
)
def test_unrolled(tmp_path, length):
    """Without loops, no node has a body, and every runtime gives the same results."""
    torch.manual_seed(0)
    module = Scans(3).eval()
    given = [torch.randn(2, 1, length, *shape) for shape in ((6,), (4, 6), (4, 3), (4, 3))]
    path = tmp_path / "scan.onnx"
    with torch.no_grad(), without_loops():
        torch.onnx.export(module, tuple(given), dynamo=True, verbose=False).save(path)
    assert not {"Scan", "Loop", "If", "CumSum"} & {node.op_type for node in onnx.load(path).graph.node}
    wanted = module(*given).detach()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), given)})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)
    openvino, *_ = open_openvino(path)
    torch.testing.assert_close(openvino(*given)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("unrolled", [False, True])
def test_strong_decays_in_exported_graphs(unrolled):
    """With step sizes up to 30 and decays down to exp(-16 x 30), graphs are as accurate as the eager form."""
    generator = torch.Generator().manual_seed(0)
    u, delta = (torch.randn(1, 1, 1000, *shape, generator=generator) for shape in ((4,), (1, 4)))
    B, C = (torch.randn(1, 1, 1000, 1, 16, generator=generator) for _ in range(2))
    module = Scans(16)
    module.A = torch.nn.Parameter(-torch.arange(1.0, 17).repeat(1, 4, 1))
    module.orders = ("rows_reversed",)
    given = (u, 8 * delta, B, C)
    with torch.no_grad(), without_loops() if unrolled else contextlib.nullcontext():
        found = torch.export.export(module, given, strict=True).module()(*given)
        wanted = module.double()(*(x.double() for x in given))
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()

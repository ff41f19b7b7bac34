"""The fused form on a real GPU, beyond the limits of Triton's interpreter. `make bench` runs it before it measures."""

import importlib

import pytest
import timm
import torch
from support import triton_common, triton_neighborhood
from support.neighborhood_shapes import LARGE, QUICK

import terrazzo  # noqa: F401
from terrazzo.kernels import neighborhood_attention

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and this machine has none: these tests did not run", allow_module_level=True)

GPU = "cuda"
DTYPES = ("float32", "bfloat16", "float16")
why = importlib.import_module("terrazzo.kernels.neighborhood_attention.op").OPERATOR.why


def check(size, kernel, dilation=1, **options):
    """Compare output and all gradients with float64, in memory poisoned with NaN; see `triton_neighborhood.errors`."""
    triton_common.check(triton_neighborhood.errors(size, kernel, dilation, device=GPU, **options))


class TestAgainstDouble:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("size", "kernel", "dilation"), [*QUICK, *LARGE])
    def test_shapes(self, size, kernel, dilation, dtype):
        check(size, kernel, dilation, dtype=dtype, heads=2, dim=32)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", [8, 12, 16, 24, 32, 40, 64, 96, 128])
    @pytest.mark.parametrize("size", [(7, 7), (17, 15)])
    def test_head_dims(self, dim, size, dtype):
        check(size, 7, dim=dim, dtype=dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("size", "dilation"), [((14, 14), 2), ((20, 18), 1)])
    def test_without_bias(self, size, dilation, dtype):
        check(size, 7, dilation, dtype=dtype, dim=32, bias=False)

    @pytest.mark.parametrize("layout", ["packed", "plain", "turned"])
    @pytest.mark.parametrize("size", [(6, 6), (17, 19)])
    def test_layouts_heads_and_batches(self, layout, size):
        check(size, 3, 2, heads=3, dim=24, batch=3, layout=layout)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("length", "kernel", "dilation"), [(7, 7, 1), (41, 7, 3), (70, 6, 1), (150, 40, 1), (2048, 7, 4)]
    )
    def test_sequences(self, length, kernel, dilation, dtype):
        check((length,), kernel, dilation, dim=32, dtype=dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("batch", "heads", "side", "dilation"),
        [(8, 2, 56, 1), (8, 2, 56, 8), (8, 4, 28, 1), (8, 4, 28, 4), (8, 8, 14, 1), (8, 8, 14, 2), (8, 16, 7, 1)],
    )
    def test_maps_of_a_classifier(self, batch, heads, side, dilation, dtype):
        check((side, side), 7, dilation, heads=heads, dim=32, batch=batch, dtype=dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("size", "heads", "dilation"),
        [((200, 320), 2, 1), ((200, 320), 2, 28), ((100, 160), 4, 14), ((799, 1201), 1, 1), ((799, 1201), 1, 28)],
    )
    def test_maps_of_dense_prediction(self, size, heads, dilation, dtype):
        check(size, 7, dilation, heads=heads, dim=32, dtype=dtype, judge="portable")

    def test_kernels_too_large_for_the_bias_gradient(self):
        """The forward pass is fused, the backward pass is portable."""
        check((39, 38), 17, dim=32)


class TestNumbers:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("size", "dilation"), [((56, 60), 1), ((56, 56), 8), ((57, 60), 4)])
    def test_same_bits_every_time(self, size, dilation, dtype):
        for _ in range(5):
            assert triton_neighborhood.repeats(size, 7, dilation, heads=2, dim=32, dtype=dtype, device=GPU)

    @pytest.mark.parametrize("magnitude", [1e-4, 1e4])
    def test_scores_of_any_size_stay_finite(self, magnitude):
        assert triton_neighborhood.large_scores(magnitude, device=GPU)

    def test_addresses_have_64_bits(self):
        assert triton_neighborhood.far_apart(device=GPU) < 5e-3

    def test_half_inputs_with_a_float32_bias(self):
        assert triton_neighborhood.mixed_autocast(device=GPU) == ("torch.bfloat16", "torch.float32")

    def test_tf32_only_where_allowed(self):
        """If the user allows TF32, errors are at most TF32's."""
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            found = triton_neighborhood.errors((20, 22), 7, dim=32, device=GPU)
        finally:
            torch.set_float32_matmul_precision(before)
        assert all(error < 5e-3 for error, _ in found.values()), found


class TestPyTorch:
    def test_choice(self):
        query = torch.zeros(1, 9, 9, 1, 8, device=GPU)
        assert why("auto", query).name == "fused"
        assert why("auto", query.double()).name == "portable"

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("size", "dilation"), [((7, 8), (1, 1)), ((6, 10), (2, 2))])
    def test_opcheck(self, size, dilation, bias):
        triton_neighborhood.opcheck(size, (3, 5), dilation, bias, device=GPU)

    @pytest.mark.parametrize("compile_it", [False, True])
    def test_whole_model(self, compile_it):
        """A small DiNAT with every gradient, eager and compiled by inductor in one graph; convolutions may use TF32."""
        assert triton_neighborhood.model(compile_it, device=GPU, compiler="inductor") < 5e-3

    def test_compiled_classifier(self):
        """DiNAT-Mini in one graph under autocast is about as near to float32 as without compilation."""
        torch.manual_seed(0)
        model = timm.create_model("dinat_mini", num_classes=10).to(GPU).eval()
        images = torch.randn(2, 3, 224, 288, device=GPU)

        def error(run):
            with torch.autocast(GPU, torch.bfloat16):
                return ((run(images).float() - exact).norm() / exact.norm()).item()

        with torch.no_grad():
            exact = model(images)
            eager, compiled = error(model), error(torch.compile(model, fullgraph=True))
        assert compiled <= 2 * eager < 0.1

    @pytest.mark.parametrize(("size", "dilation"), [((14, 14), 2), ((30, 33), 1)])
    def test_cuda_graph(self, size, dilation):
        """Forward and backward are captured once, and replayed on other numbers."""
        torch.manual_seed(0)
        shape = (2, *size, 2, 32)
        inputs = [torch.randn(shape, device=GPU, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        inputs.append(torch.randn(2, 13, 13, device=GPU).requires_grad_())
        grad = torch.randn_like(inputs[0])

        def run():
            out = neighborhood_attention(*inputs[:3], 7, dilation, inputs[3], backend="fused")
            return [out, *torch.autograd.grad(out, inputs, grad)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        with torch.no_grad():
            for x in (*inputs, grad):
                x.copy_(torch.randn_like(x))
        graph.replay()
        wanted = run()
        assert all(torch.equal(a, b) for a, b in zip(captured, wanted))

    def test_forward_keeps_nothing_of_the_size_of_windows(self):
        """The peak is the output and a float for each row: no tensor of tokens x heads x kernel x kernel exists."""
        query, key, value = (torch.randn(2, 200, 320, 2, 32, device=GPU, dtype=torch.bfloat16) for _ in range(3))
        rpb = torch.randn(2, 13, 13, device=GPU)
        with torch.no_grad():
            for _ in range(2):  # the first call compiles
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                neighborhood_attention(query, key, value, 7, 1, rpb, backend="fused")
                used = torch.cuda.max_memory_allocated() - before
        rows = query.numel() // 32
        assert used <= 1.1 * (query.numel() * 2 + rows * 4)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_a_device_that_is_not_the_current_one(self):
        query = torch.randn(1, 20, 20, 2, 32, device="cuda:1")
        with torch.cuda.device(0):
            out = neighborhood_attention(query, query, query, 7, backend="fused")
        wanted = neighborhood_attention(query.double(), query.double(), query.double(), 7, backend="reference")
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)

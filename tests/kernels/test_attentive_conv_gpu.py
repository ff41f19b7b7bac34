"""The fused form on a real GPU, beyond the limits of Triton's interpreter. `make bench` runs it before it measures."""

import importlib

import pytest
import timm
import torch
from support import triton_attentive, triton_common

import terrazzo  # noqa: F401
from terrazzo.kernels import attentive_conv

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and this machine has none: these tests did not run", allow_module_level=True)

GPU = "cuda"
DTYPES = ("float32", "bfloat16", "float16")
operator = importlib.import_module("terrazzo.kernels.attentive_conv.op").OPERATOR


def check(*arguments, **options):
    """Compare output and all gradients with float64, in memory poisoned with NaN; see `triton_attentive.errors`."""
    triton_common.check(triton_attentive.errors(*arguments, device=GPU, **options))


class TestAgainstDouble:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("height", [1, 2, 7, 8, 9, 15, 16, 17, 31])
    @pytest.mark.parametrize("width", [1, 7, 8, 9, 15, 17, 33])
    def test_sizes(self, height, width, dtype):
        check(2, 8, height, width, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("channels", [1, 31, 32, 33, 40, 63, 64, 65, 96, 97, 240, 384, 768])
    def test_channels(self, channels, dtype):
        check(2, channels, 7, 9, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["contiguous", "parts", "turned"])
    def test_layouts(self, layout, dtype):
        check(3, 24, 14, 10, dtype, layout=layout)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("channels", "side"), [(32, 56), (64, 28), (128, 14), (240, 7)])
    def test_maps_of_a_classifier(self, channels, side, dtype):
        check(8, channels, side, side, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("height", "width"), [(200, 336), (100, 168), (199, 301)])
    def test_maps_of_dense_prediction(self, height, width, dtype):
        """The means of bins are computed in many parts."""
        check(2, 32, height, width, dtype)

    def test_half_values_beside_float32(self):
        errors, dtypes = triton_attentive.mixed(GPU)
        assert max(errors) < 1e-2
        assert dtypes == [f"torch.{dtype}" for dtype in ("bfloat16", "float32", "bfloat16", *["float32"] * 5)]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_bits_every_time(self, dtype):
        for _ in range(5):
            assert triton_attentive.repeats(dtype, GPU)

    def test_addresses_have_64_bits(self):
        """The last image begins beyond 2^31 elements."""
        one = [y.detach() for y in triton_attentive.inputs(1, 64, 56, 56, dtype=torch.float16, device=GPU)]
        images = 2**31 // one[0].numel() + 2
        x, value = (y.expand(images, -1, -1, -1) for y in one[:2])
        with torch.no_grad():
            found = attentive_conv(x, value, *one[2:], backend="fused")[-1:]
            wanted = attentive_conv(*one, backend="fused")
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


class TestPyTorch:
    def test_choice(self):
        value = torch.zeros(1, 8, 9, 9, device=GPU)
        mixing = torch.zeros(9, 9, device=GPU)
        for x, form in ((value, "fused"), (value.double(), "portable")):
            assert operator.why("auto", x, x, None, None, mixing).name == form

    def test_opcheck(self):
        triton_attentive.opcheck(GPU)

    @pytest.mark.parametrize("compile_it", [False, True])
    def test_whole_model(self, compile_it):
        """A small AttNet with every gradient, eager and compiled by inductor; convolutions may use TF32."""
        assert triton_attentive.model(compile_it, GPU, "inductor") < 5e-3

    def test_compiled_classifier(self):
        """AttNet-XXS in one graph under autocast is about as near to float32 as without compilation."""
        torch.manual_seed(0)
        model = timm.create_model("attnet_xxs", num_classes=10).to(GPU).eval()
        images = torch.randn(2, 3, 224, 288, device=GPU)

        def error(run):
            with torch.autocast(GPU, torch.bfloat16):
                return ((run(images).float() - exact).norm() / exact.norm()).item()

        with torch.no_grad():
            exact = model(images)
            eager, compiled = error(model), error(torch.compile(model, fullgraph=True))
        assert compiled <= 2 * eager < 0.1

    def test_cuda_graph(self):
        """Forward and backward are captured once, and replayed on other numbers."""
        arguments = triton_attentive.inputs(2, 40, 28, 30, dtype=torch.bfloat16, device=GPU)
        grad = torch.randn_like(arguments[1])

        def run():
            out = attentive_conv(*arguments, backend="fused")
            return [out, *torch.autograd.grad(out, arguments, grad)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        with torch.no_grad():
            for x in (*arguments, grad):
                x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run()))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_a_device_that_is_not_the_current_one(self):
        arguments = triton_attentive.inputs(1, 8, 9, 10, dtype=torch.float32, device="cuda:1")
        with torch.cuda.device(0):
            out = attentive_conv(*arguments, backend="fused")
        wanted = attentive_conv(*(x.double() for x in arguments), backend="reference")
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)

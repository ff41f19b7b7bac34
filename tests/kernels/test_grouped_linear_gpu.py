"""The fused form on a real GPU, beyond the limits of Triton's interpreter. `make bench` runs it before it measures."""

import pytest
import torch
from support import triton_common, triton_grouped

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and this machine has none: these tests did not run", allow_module_level=True)

GPU = "cuda"
DTYPES = ("float32", "bfloat16", "float16")


def check(**options):
    """Compare output and all gradients with float64, in memory poisoned with NaN; see `triton_grouped.errors`."""
    triton_common.check(triton_grouped.errors(device=GPU, **options))


@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstDouble:
    @pytest.mark.parametrize(
        "sizes", [(1,), (31, 32, 33), (63, 64, 65), (0, 127, 0, 128, 129), (1025, 0, 700), tuple(range(40))], ids=str
    )
    def test_groups(self, sizes, dtype):
        check(sizes=sizes, ins=64, outs=96, dtype=dtype)

    @pytest.mark.parametrize("ins", [1, 8, 24, 63, 65, 192, 384])
    @pytest.mark.parametrize("outs", [1, 24, 65, 384])
    def test_channels(self, ins, outs, dtype):
        check(sizes=(200, 0, 70), ins=ins, outs=outs, dtype=dtype)

    @pytest.mark.parametrize("layout", ["plain", "packed", "turned"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_layouts(self, layout, bias, dtype):
        check(sizes=(90, 49, 7), ins=48, outs=40, layout=layout, bias=bias, dtype=dtype)

    def test_a_models_layer(self, dtype):
        """Four experts for each token of a batch of M3ViT-small."""
        check(sizes=(3000, 0, 1, 700, *[900] * 12), ins=384, outs=384, dtype=dtype)

    def test_a_group_is_what_it_is_alone(self, dtype):
        assert triton_grouped.alone((7, 197, 1, 65), dtype, GPU)

    def test_same_bits_every_time(self, dtype):
        for _ in range(5):
            assert triton_grouped.repeats(dtype, GPU)


def test_addresses_have_64_bits():
    assert triton_grouped.far_apart(device=GPU) < 1e-2


def test_nothing_to_do():
    assert triton_grouped.empty(device=GPU) == [(0, 5), (0, 4), (2, 5, 4), (2, 5)]


def test_opcheck():
    triton_grouped.opcheck(device=GPU)


def test_whole_model():
    """A small M3ViT and all its gradients; products may use TF32."""
    assert triton_grouped.model(GPU) < 5e-3

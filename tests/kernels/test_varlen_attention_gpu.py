"""The fused form on a real GPU, beyond the limits of Triton's interpreter. `make bench` runs it before it measures."""

import pytest
import torch
from support import triton_common, triton_varlen

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and this machine has none: these tests did not run", allow_module_level=True)

GPU = "cuda"
DTYPES = ("float32", "bfloat16", "float16")


def check(**options):
    """Compare output and all gradients with float64, in memory poisoned with NaN; see `triton_varlen.errors`."""
    triton_common.check(triton_varlen.errors(device=GPU, **options))


@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstDouble:
    @pytest.mark.parametrize(
        "lengths", [(2, 1), (31, 32, 33), (63, 64, 65), (0, 127, 0, 128, 129), (197, 3, 96), (1025, 1, 700)], ids=str
    )
    def test_lengths(self, lengths, dtype):
        check(lengths=lengths, dim=64, dtype=dtype)

    @pytest.mark.parametrize("dim", [1, 8, 24, 32, 64, 96, 128])
    def test_head_dims(self, dim, dtype):
        check(lengths=(200, 70), dim=dim, dtype=dtype)

    @pytest.mark.parametrize("layout", ["plain", "packed", "turned"])
    def test_layouts(self, layout, dtype):
        check(lengths=(90, 49, 7), heads=3, dim=64, layout=layout, dtype=dtype)

    def test_more_programs_than_needed(self, dtype):
        check(lengths=(40, 90), max_seqlen=700, dtype=dtype)

    def test_a_sequence_is_what_it_is_alone(self, dtype):
        assert triton_varlen.alone((7, 197, 1, 65), dtype, GPU)

    def test_same_bits_every_time(self, dtype):
        for _ in range(5):
            assert triton_varlen.repeats(dtype, GPU)


@pytest.mark.parametrize(("magnitude", "dtype"), [(100, "float32"), (100, "float16")])
def test_large_scores(magnitude, dtype):
    assert triton_varlen.large_scores(magnitude, dtype, device=GPU) < 2e-3


def test_nothing_to_do():
    shapes, error = triton_varlen.empty(GPU)
    assert shapes == [[(0, 2, 8)] * 4] * 2
    assert error < 1e-5


def test_opcheck():
    triton_varlen.opcheck(GPU)


def test_whole_model():
    """A small packed AS-ViT and its gradients; products may use TF32."""
    assert triton_varlen.model(GPU) < 5e-3

"""The fused form on a real GPU, beyond the limits of Triton's interpreter. `make bench` runs it before it measures."""

import pytest
import torch
from support import triton_common, triton_ssd

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and this machine has none: these tests did not run", allow_module_level=True)

GPU = "cuda"
DTYPES = ("float32", "bfloat16", "float16")


def check(**options):
    """Compare output and all gradients with float64, in memory poisoned with NaN; see `triton_ssd.errors`."""
    triton_common.check(triton_ssd.errors(device=GPU, **options))


@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstDouble:
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 196, 3136])
    def test_lengths(self, length, reverse, dtype):
        check(length=length, reverse=reverse, width=32, states=32, dtype=dtype)

    @pytest.mark.parametrize(("width", "states"), [(1, 1), (24, 5), (5, 40), (64, 16), (64, 64)])
    def test_sizes(self, width, states, dtype):
        check(length=200, width=width, states=states, dtype=dtype)

    def test_groups_heads_and_batches(self, dtype):
        check(batch=3, length=90, heads=6, groups=3, dtype=dtype)

    def test_same_bits_every_time(self, dtype):
        for _ in range(5):
            assert triton_ssd.repeats(dtype, GPU)


def test_nothing_to_do():
    assert triton_ssd.empty(GPU)


@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck(reverse):
    triton_ssd.opcheck(reverse, GPU)

"""The fused form on a real GPU, beyond the limits of Triton's interpreter. `make bench` runs it before it measures."""

import itertools

import pytest
import torch
from support import triton_common, triton_strip

from terrazzo.kernels import strip_attention

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and this machine has none: these tests did not run", allow_module_level=True)

GPU = "cuda"
DTYPES = ("float32", "bfloat16", "float16")


def check(**options):
    """Compare output and all gradients with float64, in memory poisoned with NaN; see `triton_strip.errors`."""
    triton_common.check(triton_strip.errors(device=GPU, **options))


@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstDouble:
    @pytest.mark.parametrize(
        ("queries", "keys"), [(1, 1), *itertools.product((31, 64, 65, 129), (32, 33, 63, 65)), (3136, 49), (4000, 300)]
    )
    def test_lengths(self, queries, keys, dtype):
        check(queries=queries, keys=keys, heads=2, dim=32, dtype=dtype)

    @pytest.mark.parametrize("dim", [1, 8, 24, 40, 64, 96, 128])
    def test_head_dims(self, dim, dtype):
        check(queries=200, keys=70, dim=dim, dtype=dtype)

    @pytest.mark.parametrize("layout", ["packed", "turned"])
    def test_layouts(self, layout, dtype):
        check(batch=3, queries=90, keys=49, heads=3, dim=32, layout=layout, dtype=dtype)

    def test_a_classifiers_maps(self, dtype):
        for queries, heads in ((3136, 1), (784, 2), (196, 3), (49, 9)):
            check(batch=8, queries=queries, keys=49, heads=heads, dim=32, dtype=dtype)

    def test_same_bits_every_time(self, dtype):
        for _ in range(5):
            assert triton_strip.repeats(3136, 49, dtype=dtype, device=GPU)


@pytest.mark.parametrize(("magnitude", "dtype"), [(1e-4, "float32"), (1e4, "float32"), (300, "float16")])
def test_scores_of_any_size(magnitude, dtype):
    assert triton_strip.large_scores(magnitude, dtype, device=GPU) < 2e-3


def test_addresses_have_64_bits():
    assert triton_strip.far_apart(device=GPU) < 5e-3


def test_nothing_to_do():
    assert triton_strip.empty(device=GPU)


def test_opcheck():
    triton_strip.opcheck(70, 49, device=GPU)


@pytest.mark.parametrize("compile_it", [False, True])
def test_whole_model(compile_it):
    """A small S2AFormer and all its gradients, eager and compiled by inductor in one graph; products may use TF32."""
    assert triton_strip.model(compile_it, device=GPU, compiler="inductor") < 5e-3


def test_nothing_of_the_size_of_all_weights_is_kept():
    """An image of 800 x 1280 at stride 4 has 64 M weights; they are never in memory."""
    query, key, value = (x.bfloat16() for x in triton_strip.inputs(1, 64000, 1000, 1, 32, torch.float32, device=GPU))
    with torch.no_grad():
        for _ in range(2):  # the first call compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            strip_attention(query, key, value, backend="fused")
            used = torch.cuda.max_memory_allocated() - before
    assert used <= 1.1 * (64000 * (32 * 2 + 4))

"""The fused form on a real GPU, beyond the limits of Triton's interpreter. `make bench` runs it before it measures."""

import pytest
import torch
from support import triton_block_sparse, triton_common
from support.block_sparse_plans import KINDS

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and this machine has none: these tests did not run", allow_module_level=True)

GPU = "cuda"
DTYPES = ("float32", "bfloat16", "float16")


def check(kind, **options):
    """Compare results and gradients with float64, in memory poisoned with NaN; see `triton_block_sparse.errors`."""
    triton_common.check(triton_block_sparse.errors(kind, device=GPU, **options))


@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstDouble:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("query_tile", "key_tile"), [(64, 64), (16, 16), (20, 5), (128, 32)])
    def test_kinds(self, kind, query_tile, key_tile, dtype):
        check(kind, queries=300, keys=410, dim=64, query_tile=query_tile, key_tile=key_tile, dtype=dtype)

    @pytest.mark.parametrize("dim", [1, 8, 24, 32, 64, 96, 128])
    def test_head_dims(self, dim, dtype):
        kind = "segments" if dim > 1 else "ragged blocks"  # see test_widths of the interpreter's tests
        check(kind, queries=200, keys=130, dim=dim, query_tile=32, key_tile=32, dtype=dtype)

    def test_values_of_another_width(self, dtype):
        check("segments", queries=200, keys=130, dim=64, width=24, dtype=dtype)

    @pytest.mark.parametrize("layout", ["plain", "packed", "turned"])
    def test_layouts(self, layout, dtype):
        check("segments", queries=130, keys=130, dim=64, layout=layout, batch=2, dtype=dtype)

    def test_same_bits_every_time(self, dtype):
        for kind in ("segments", "a bias of blocks", "lists of keys"):
            assert triton_block_sparse.repeats(kind, dtype, 700, 700, GPU)


@pytest.mark.parametrize(("magnitude", "dtype"), [(100, "float32"), (100, "float16")])
def test_large_scores(magnitude, dtype):
    assert triton_block_sparse.large_scores(magnitude, dtype, device=GPU) < 2e-3


def test_addresses_have_64_bits():
    assert triton_block_sparse.far_apart(device=GPU) < 5e-3


def test_opcheck():
    triton_block_sparse.opcheck(GPU)


def test_compiles_without_a_break():
    assert triton_block_sparse.compiled(GPU, "inductor") < 1e-3

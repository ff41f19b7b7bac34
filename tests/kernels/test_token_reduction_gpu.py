"""The fused form on a real GPU, beyond the limits of Triton's interpreter. `make bench` runs it before it measures."""

import itertools

import pytest
import torch
from support import triton_reduction
from support.triton_common import check

from terrazzo.kernels.token_reduction import column_mean

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and this machine has none: these tests did not run", allow_module_level=True)

GPU = "cuda"
DTYPES = ("float32", "bfloat16", "float16")
BOTH = dict(size=True, importance=True)


@pytest.mark.parametrize("dtype", DTYPES)
class TestPlan:
    """The map equals the float64 map exactly: no attractions are nearly equal (`triton_reduction.inputs`)."""

    def plans(self, cases, dtype):
        found = triton_reduction.plans([dict(case, dtype=dtype, exact=True, judge="portable") for case in cases], GPU)
        assert found == [0] * len(cases)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_even_and_odd(self, bidirectional, dtype):
        cases = [
            dict(count=count, protect=protect, r=count // 3, bidirectional=bidirectional, dim=dim, **extras)
            for count, dim in ((9, 4), (64, 16), (127, 16), (129, 64), (197, 256))
            for protect, extras in ((0, {}), (1, BOTH), (2, dict(importance=True, criteria=(2, 1, 0))))
        ]
        self.plans([dict(case, padding=3) if "size" in case else case for case in cases], dtype)

    def test_cells_and_windows(self, dtype):
        cases = [
            dict(count=h * w + 1, r=h * w // 2, partition="cell2x2", grid=(h, w), dim=64, **BOTH)
            for h, w in ((4, 4), (5, 3), (7, 9), (16, 17), (14, 14))
        ]
        cases += [dict(count=257, r=20, window=8, grid=(16, 16), partition=p, dim=16) for p in ("even_odd", "cell2x2")]
        self.plans(cases, dtype)

    def test_dense_maps(self, dtype):
        cases = [dict(count=1025, r=358, dim=256, bidirectional=True, batch=1, **BOTH)]
        cases += [dict(count=4096, r=1400, protect=0, partition="cell2x2", grid=(64, 64), dim=64, batch=1)]
        self.plans(cases, dtype)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_ties_go_to_the_lowest_index(self, bidirectional, dtype):
        one_way, two_way = [0, 2, 2, 3, 2, 4, 2, 5, 2, 6, 1], [0, 1, 1, 1, 1, 4, 1, 5, 2, 6, 3]
        assert triton_reduction.ties(bidirectional, dtype=dtype, device=GPU) == (two_way if bidirectional else one_way)


@pytest.mark.parametrize("dtype", DTYPES)
class TestPool:
    @pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (64, 33), (197, 181), (1025, 667), (4096, 2662)])
    def test_sizes(self, tokens, groups, dtype):
        for channels in (5, 64, 384):
            check(triton_reduction.pool_errors(tokens, groups, channels, dtype, device=GPU))

    def test_one_large_group_and_padding(self, dtype):
        check(triton_reduction.pool_errors(500, 20, 192, dtype, "first", device=GPU))
        check(triton_reduction.pool_errors(60, 40, 192, dtype, padding=30, device=GPU))


@pytest.mark.parametrize("dtype", DTYPES)
class TestColumnMean:
    @pytest.mark.parametrize("bias", [None, "sizes", "padded"])
    @pytest.mark.parametrize("count", [70, 127, 128, 129, 197, 1025])
    def test_lengths(self, count, bias, dtype):
        check(triton_reduction.column_errors(count, 3, 64, bias, dtype, device=GPU))

    @pytest.mark.parametrize("dim", [1, 24, 32, 64, 128])
    def test_head_dims_and_layouts(self, dim, dtype):
        check(triton_reduction.column_errors(150, 3, dim, "sizes", dtype, "packed", device=GPU))


def test_same_bits_every_time():
    for _ in range(5):
        assert triton_reduction.repeats(GPU)


def test_odd_inputs():
    assert triton_reduction.not_a_number(GPU)
    assert triton_reduction.empty(GPU) == [(0, 9), (0, 7, 5), (0, 7), (0, 9)]
    assert triton_reduction.attends(GPU) < 1e-4


def test_opcheck():
    triton_reduction.opcheck(GPU)


def test_whole_model():
    """A small MCTF and all its gradients; products may use TF32."""
    assert triton_reduction.model(GPU) < 5e-3


def test_the_attention_matrix_is_not_kept():
    """4096 tokens with 12 heads and two images have 400 M weights; they are never in memory."""
    query, key = torch.randn(2, 2, 12, 4096, 64, device=GPU, dtype=torch.bfloat16).unbind()
    for _, bias in itertools.product(range(2), (None, torch.zeros(2, 4096, device=GPU))):  # the first call compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        column_mean(query, key, bias, backend="fused")
        used = torch.cuda.max_memory_allocated() - before
    assert used <= 4 * 2 * 12 * 4096 * 4

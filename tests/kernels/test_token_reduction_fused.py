"""The fused form: Triton's interpreter against the float64 reference, and every kernel compiled for four GPUs."""

import importlib
import itertools

import pytest
import torch
from support.triton_aot import SHARED, TYPES, compile_kernel, resources
from support.triton_common import check

from terrazzo.kernels.triton_host import machine

fused = importlib.import_module("terrazzo.kernels.token_reduction.fused")
pytest.importorskip("triton", reason="Triton ships with the CUDA builds of PyTorch")

SLOW = pytest.mark.slow
# Whatever rounds how, the map is one: see `triton_reduction.inputs`.
EXACT = dict(exact=True, judge="portable")
BOTH = dict(size=True, importance=True)


class TestPlan:
    """The map is that of float64, to the number; memory is poisoned with NaN, and tensors stand amid NaN."""

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("count", "r", "about"),
        [
            (9, 3, {}),
            (67, 31, dict(EXACT, dim=16)),
            pytest.param(64, 20, {}, marks=SLOW),
            pytest.param(67, 31, {}, marks=SLOW),
            pytest.param(130, 40, dict(EXACT, dim=16), marks=SLOW),
        ],
        ids=str,
    )
    def test_even_and_odd(self, interpreted, count, r, about):
        """Few random tokens against the reference, and many whose attractions are equal or far from it."""
        cases = [
            dict(count=count, protect=protect, r=r, bidirectional=both, **about, **extras)
            for both in (False, True)
            for protect, extras in ((0, {}), (1, BOTH), (2, dict(importance=True)))
        ]
        assert interpreted("triton_reduction.plans", cases) == [0] * len(cases)

    @pytest.mark.long
    def test_cells(self, interpreted):
        cases = [
            dict(count=h * w + protect, protect=protect, r=r, partition="cell2x2", grid=(h, w), batch=1, **extras)
            for h, w in ((4, 4), (5, 3), (4, 5), (7, 9), (2, 2), (3, 2))
            for protect, r, extras in ((0, 3, {}), (1, 2 * (h // 2) * (w // 2), BOTH))
        ]
        assert interpreted("triton_reduction.plans", cases) == [0] * len(cases)

    @pytest.mark.long
    def test_windows(self, interpreted):
        cases = [
            dict(count=33, r=5, window=4, grid=(8, 4), partition=name, size=True) for name in ("even_odd", "cell2x2")
        ]
        assert interpreted("triton_reduction.plans", cases) == [0] * len(cases)

    @pytest.mark.long
    def test_criteria_padding_and_channels(self, interpreted):
        cases = [
            dict(count=40, r=12, bidirectional=True, dim=64, criteria=criteria, **EXACT, **extras)
            for criteria in ((1, 20, 40), (2, 1, 1), (0, 1, 2), (1, 0, 0))
            for extras in (BOTH, dict(BOTH, padding=9))
        ]
        assert interpreted("triton_reduction.plans", cases) == [0] * len(cases)

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=SLOW)])
    def test_half_precision_is_compared_in_float32(self, interpreted, dtype):
        about = dict(dtype=dtype, batch=1)
        cases = [dict(count=150, r=50, bidirectional=True, dim=64, **about, **EXACT, **BOTH)]
        cases += [dict(count=25, protect=0, r=9, partition="cell2x2", grid=(5, 5), dim=70, **about)]
        assert interpreted("triton_reduction.plans", cases) == [0] * len(cases)

    @pytest.mark.slow
    def test_many_tokens(self, interpreted):
        """Those of 224 x 224 and of dense maps, against the portable form in float64."""
        cases = [
            dict(count=count, batch=1, r=r, bidirectional=both, dim=dim, **EXACT, **BOTH)
            for count, r, both, dim in ((197, 16, True, 256), (577, 201, False, 64), (1025, 358, True, 16))
        ]
        cases += [
            dict(count=1025, batch=1, r=500, partition="cell2x2", grid=(32, 32), dim=16, **EXACT),
            dict(count=4096, batch=1, r=1400, protect=0, bidirectional=True, dim=16, **EXACT),
        ]
        assert interpreted("triton_reduction.plans", cases) == [0] * len(cases)

    def test_ties_go_to_the_lowest_index(self, interpreted):
        one_way = [0, 2, 2, 3, 2, 4, 2, 5, 2, 6, 1]
        two_way = [0, 1, 1, 1, 1, 4, 1, 5, 2, 6, 3]
        assert interpreted("triton_reduction.ties", False) == one_way
        assert interpreted("triton_reduction.ties", True) == two_way

    @pytest.mark.long
    def test_what_is_not_a_number_reads_nothing_else(self, interpreted):
        assert interpreted("triton_reduction.not_a_number")


class TestPool:
    @pytest.mark.parametrize(
        ("tokens", "groups", "channels", "kind"),
        [
            (63, 16, 130, "random"),
            (70, 17, 5, "first"),
            pytest.param(1, 1, 1, "random", marks=SLOW),
            pytest.param(64, 33, 8, "random", marks=SLOW),
        ],
    )
    def test_sizes(self, interpreted, tokens, groups, channels, kind):
        check(interpreted("triton_reduction.pool_errors", tokens, groups, channels, kind=kind))

    def test_padding(self, interpreted):
        check(interpreted("triton_reduction.pool_errors", 40, 30, padding=25))

    @pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=SLOW)])
    def test_half_precision(self, interpreted, dtype):
        check(interpreted("triton_reduction.pool_errors", 90, 50, 24, dtype))

    @pytest.mark.slow
    @pytest.mark.parametrize(("tokens", "groups"), [(197, 181), (1025, 667), (4096, 2662)])
    def test_many_tokens(self, interpreted, tokens, groups):
        check(interpreted("triton_reduction.pool_errors", tokens, groups, 64))


class TestColumnMean:
    @pytest.mark.parametrize("bias", [None, "sizes", "padded"])
    @pytest.mark.parametrize("count", [33, *(pytest.param(count, marks=SLOW) for count in (1, 31, 64, 197))])
    def test_lengths(self, interpreted, count, bias):
        check(interpreted("triton_reduction.column_errors", max(count, 70) if bias == "padded" else count, bias=bias))

    @pytest.mark.long
    @pytest.mark.parametrize("dim", [24, *(pytest.param(dim, marks=SLOW) for dim in (1, 64, 128))])
    def test_head_dims_and_layouts(self, interpreted, dim):
        check(interpreted("triton_reduction.column_errors", 40, heads=3, dim=dim, layout="packed"))

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=SLOW)])
    def test_half_precision(self, interpreted, dtype):
        check(interpreted("triton_reduction.column_errors", 130, dim=32, dtype=dtype, bias="sizes"))

    @pytest.mark.long
    def test_large_scores(self, interpreted):
        check(interpreted("triton_reduction.column_errors", 70, scale=300.0))

    @pytest.mark.long
    def test_attention(self, interpreted):
        assert interpreted("triton_reduction.attends") < 1e-5


class TestOperator:
    @pytest.mark.slow
    def test_same_bits_every_time(self, interpreted):
        assert interpreted("triton_reduction.repeats")

    def test_nothing_to_do(self, interpreted):
        assert interpreted("triton_reduction.empty") == [(0, 9), (0, 7, 5), (0, 7), (0, 9)]

    @pytest.mark.slow
    def test_opcheck(self, interpreted):
        interpreted("triton_reduction.opcheck")

    @pytest.mark.slow
    def test_compiles_without_a_break(self, interpreted):
        assert interpreted("triton_reduction.compiled") == 0

    @pytest.mark.long
    def test_whole_model(self, interpreted):
        assert interpreted("triton_reduction.model") < 1e-4

    def test_choice(self, interpreted):
        found = interpreted("triton_reduction.choices")
        assert found["auto"][0] == "portable"
        assert "TRITON_INTERPRET" in found["auto"][1]
        assert found["named"] == "fused"
        assert "not in float64" in found["double"]
        assert "head_dim of at most 128" in found["wide"]


@pytest.mark.slow
@SLOW  # it tests the tests above, which run the unbroken kernels
class TestMutations:
    """Break a piece of the kernels' arithmetic on purpose: the comparisons must notice."""

    def test_unbroken(self, interpreted):
        assert interpreted("triton_reduction.mutated", "") == 0

    @pytest.mark.parametrize(
        "helper", ["source_at", "target_at", "inverse_norm", "similarity", "share", "masked_scores", "exponential"]
    )
    def test_pieces(self, interpreted, helper):
        assert interpreted("triton_reduction.mutated", helper) > 0


# -- Compilation ahead of time: no GPU is needed.

KERNELS = {
    "match": ("fused_match", (192, 768)),
    "ranks": ("fused_match", (0,)),
    "assign": ("fused_match", (0,)),
    "sort": ("fused_pool", (0,)),
    "pool": ("fused_pool", (192, 768)),
    "spread": ("fused_pool", (192, 768)),
    "row_sums": ("fused_columns", (32, 64, 128)),
    "column_sums": ("fused_columns", (32, 64, 128)),
}
FLOATS = ("p_norm", "p_factor", "p_best", "p_score", "p_weight", "p_size", "p_total", "p_sizes", "p_bias", "p_lse")
FLOATS += ("p_sum", "exponent")
INTEGERS = {"p_rank": "i32", "p_into": "i32", "p_back_rank": "i32", "p_back": "i32", "p_order": "i32"}
INTEGERS |= {"p_begin": "i32", "p_map": "i64"}
QUICK = {("match", 192, "sm_90", torch.bfloat16)}


def cases():
    for name, target, dtype in itertools.product(KERNELS, SHARED, (torch.bfloat16, torch.float32)):
        for size in KERNELS[name][1]:
            case = (name, size, target, dtype)
            if size or dtype == torch.float32:
                marks = () if case in QUICK else SLOW
                yield pytest.param(*case, marks=marks, id=f"{name}-{size}-{target}-{TYPES[dtype]}")


@pytest.mark.long
@pytest.mark.skipif(machine.interpreting(), reason="Triton interprets in this process")
@pytest.mark.parametrize(("kernel", "size", "target", "dtype"), cases())
def test_compiles_without_spills(kernel, size, target, dtype):
    """Ahead of time, for a GPU that is not here."""
    module = KERNELS[kernel][0]
    function = getattr(importlib.import_module(f"terrazzo.kernels.token_reduction.{module}"), kernel)
    values = dict(PRECISION="ieee", INTERPRETED=False, CELLS=True, POWER=2, HAS_FACTOR=True, BACKWARD=True)
    warps, stages = 4, 3  # Triton's defaults
    if kernel == "match":
        cut = fused.match_blocks(dtype.itemsize)
        values |= dict(DIM=size, BLOCK_D=cut.channels, BLOCK=cut.own, BLOCK_OTHER=cut.other)
        warps, stages = cut.warps, cut.stages
    elif module == "fused_columns":
        cut = fused.column_blocks(dtype.itemsize, size)
        values |= dict(
            HEAD_DIM=size, BLOCK_D=machine.block_of(size), BLOCK_N=cut.queries, BLOCK_L=cut.keys, HAS_BIAS=True
        )
        warps, stages = cut.warps, cut.stages
    elif kernel in ("pool", "spread"):
        values |= dict(CHANNELS=size, BLOCK=fused._POOLED, BLOCK_C=fused.block_c(size))
    else:
        values |= dict(BLOCK=fused._COUNTED)
    built = compile_kernel(function, values, dtype, target, warps, stages, FLOATS, others=INTEGERS)
    registers, spilled = resources(built, target)
    shared = built.metadata.shared
    print(f"AOT {target} {kernel} {TYPES[dtype]} {size}: {registers} {spilled} {shared}")
    assert spilled == 0
    assert shared <= SHARED[target]

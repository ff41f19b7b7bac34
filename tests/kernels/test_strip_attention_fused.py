"""The fused form: Triton's interpreter against the float64 reference, and every kernel compiled for four GPUs."""

import importlib
import itertools

import pytest
import torch
from support.triton_aot import SHARED, TYPES, compile_kernel, resources
from support.triton_common import check

from terrazzo.kernels.triton_host import machine

fused = importlib.import_module("terrazzo.kernels.strip_attention.fused")
pytest.importorskip("triton", reason="Triton ships with the CUDA builds of PyTorch")

SLOW = pytest.mark.slow


class TestInterpreted:
    """Memory is poisoned with NaN in each of these, and tensors stand amid NaN."""

    @pytest.mark.parametrize("half_blocks", [False, True])
    @pytest.mark.parametrize(
        ("queries", "keys"),
        [
            (1, 1),
            (32, 64),
            (33, 31),
            (64, 33),
            (65, 65),
            *(pytest.param(*case, marks=SLOW) for case in itertools.product((31, 63, 96, 129), (32, 63, 64, 129))),
        ],
    )
    def test_lengths(self, interpreted, queries, keys, half_blocks):
        """Blocks of float32 and of half precision, by one either way; computed in float32."""
        check(interpreted("triton_strip.errors", queries=queries, keys=keys, half_blocks=half_blocks))

    @pytest.mark.long
    @pytest.mark.parametrize("queries", [600, pytest.param(1025, marks=SLOW)])
    def test_split_queries(self, interpreted, queries):
        """Several programs sum over parts of the queries of one block of keys."""
        assert fused.splits(1, queries)[0] > 1
        check(interpreted("triton_strip.errors", queries=queries, keys=33))

    @pytest.mark.parametrize("dim", [1, 24, 32, 64, pytest.param(40, marks=SLOW), pytest.param(128, marks=SLOW)])
    def test_head_dims(self, interpreted, dim):
        check(interpreted("triton_strip.errors", queries=40, keys=20, dim=dim))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize(("queries", "keys"), [(70, 49), pytest.param(65, 130, marks=SLOW)])
    def test_half_precision(self, interpreted, dtype, queries, keys):
        check(interpreted("triton_strip.errors", queries=queries, keys=keys, dim=32, heads=2, dtype=dtype))

    @pytest.mark.long
    @pytest.mark.parametrize("layout", ["packed", "turned"])
    def test_layouts_heads_and_batches(self, interpreted, layout):
        check(interpreted("triton_strip.errors", 2, 35, 18, 3, 24, layout=layout))

    @SLOW
    def test_same_bits_every_time(self, interpreted):
        assert interpreted("triton_strip.repeats", 600, 9)

    @pytest.mark.parametrize(("magnitude", "dtype"), [(1e-4, "float32"), (1e4, "float32"), (300, "float16")])
    def test_scores_of_any_size(self, interpreted, magnitude, dtype):
        """Finite and right; 300 x 300 is more than float16 holds."""
        assert interpreted("triton_strip.large_scores", magnitude, dtype) < 2e-3

    def test_addresses_have_64_bits(self, interpreted):
        assert interpreted("triton_strip.far_apart") < 5e-3

    def test_nothing_to_do(self, interpreted):
        assert interpreted("triton_strip.empty") == [
            [(0, 4, 1, 8), (0, 4, 1), (0, 5, 1), (0, 5, 1, 8)],
            [(2, 0, 1, 8), (2, 0, 1), (2, 5, 1), (2, 5, 1, 8)],
        ]


@SLOW  # it tests the tests above, which run the unbroken kernels
class TestMutations:
    """Break a piece of the kernels' arithmetic on purpose: the comparison must notice."""

    def test_unbroken(self, interpreted):
        assert interpreted("triton_strip.mutated", "") < 1e-5
        assert interpreted("triton_strip.mutated", "", 300) < 1e-2

    @pytest.mark.parametrize("helper", ["weights", "numbers", "vector_offsets", "row_offsets"])
    def test_masks_and_addresses(self, interpreted, helper):
        assert interpreted("triton_strip.mutated", helper) > 1e-2

    @pytest.mark.parametrize("helper", ["best_key", "extrema"])
    def test_maxima(self, interpreted, helper):
        """Softmax forgives a wrong maximum until exponentials overflow."""
        assert interpreted("triton_strip.mutated", helper, 300) > 1


class TestOperator:
    @SLOW  # the portable form tests the operator in this way
    def test_opcheck(self, interpreted):
        interpreted("triton_strip.opcheck", 9, 5)

    @pytest.mark.long
    @pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=SLOW)])
    def test_compiles_without_a_break(self, interpreted, dynamic):
        assert interpreted("triton_strip.compiled", dynamic) == 0

    @pytest.mark.long
    @pytest.mark.parametrize("compile_it", [False, pytest.param(True, marks=SLOW)])
    def test_whole_model(self, interpreted, compile_it):
        assert interpreted("triton_strip.model", compile_it) < 1e-4

    def test_choice(self, interpreted):
        found = interpreted("triton_strip.choices")
        assert found["auto"][0] == "portable"
        assert "TRITON_INTERPRET" in found["auto"][1]
        assert found["named"] == "fused"
        assert "not in float64" in found["double"]
        assert "head_dim of at most 128" in found["wide"]


@pytest.mark.parametrize("programs", [1, 3, 40, 511, 5000])
def test_splits_cover_all_queries(programs):
    for queries in (1, 255, 256, 511, 513, 3136, 64000):
        count, rows = fused.splits(programs, queries)
        assert (count - 1) * rows < queries <= count * rows
        assert count == 1 or programs * count <= fused._PROGRAMS


# -- Compilation ahead of time: no GPU is needed.

KERNELS = ("forward", "queries", "keys")
FLOATS = ("p_sum", "p_delta")


def cases():
    for target, dtype, dim, kernel in itertools.product(
        SHARED, (torch.bfloat16, torch.float32), (32, 64, 128), KERNELS
    ):
        # One of each for one GPU of each maker.
        always = dim == 32 and dtype == torch.bfloat16 and target in ("sm_90", "gfx942")
        marks = () if always else (SLOW,)
        yield pytest.param(kernel, dim, dtype, target, marks=marks, id=f"{kernel}-{TYPES[dtype]}-{dim}-{target}")


@pytest.mark.long
@pytest.mark.skipif(machine.interpreting(), reason="Triton interprets in this process")
@pytest.mark.parametrize(("kernel", "dim", "dtype", "target"), cases())
def test_compiles_without_spills(kernel, dim, dtype, target):
    kernels = importlib.import_module("terrazzo.kernels.strip_attention.fused_kernels")
    function = kernels.forward if kernel == "forward" else getattr(kernels, f"backward_{kernel}")
    blocks = fused.blocks(kernel, dtype.itemsize)
    values = dict(
        HEAD_DIM=dim,
        BLOCK_D=machine.block_of(dim),
        BLOCK_N=blocks.queries,
        BLOCK_L=blocks.keys,
        PRECISION="ieee",
        INTERPRETED=False,
    )
    compiled = compile_kernel(function, values, dtype, target, blocks.warps, blocks.stages, FLOATS)
    registers, spilled = resources(compiled, target)
    shared = compiled.metadata.shared
    print(f"AOT {target} {kernel} {TYPES[dtype]} {dim}: {registers} {spilled} {shared}")
    assert spilled == 0
    assert shared <= SHARED[target]

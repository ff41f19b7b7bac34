"""The fused form: Triton's interpreter against the float64 reference, and every kernel compiled for four GPUs."""

import importlib
import itertools

import pytest
import torch
from support.triton_aot import SHARED, TYPES, compile_kernel, resources
from support.triton_common import check

from terrazzo.kernels.triton_host import machine

fused = importlib.import_module("terrazzo.kernels.varlen_attention.fused")
pytest.importorskip("triton", reason="Triton ships with the CUDA builds of PyTorch")

SLOW = pytest.mark.slow


class TestInterpreted:
    """Memory is poisoned with NaN in each of these, and tensors stand amid NaN."""

    @pytest.mark.long
    @pytest.mark.parametrize(
        "lengths",
        [
            (32, 1, 33),
            (0, 40, 0, 3),
            pytest.param((2, 1), marks=SLOW),
            pytest.param((31, 64, 65), marks=SLOW),
            pytest.param((197, 129, 1, 96), marks=SLOW),
        ],
        ids=str,
    )
    def test_lengths(self, interpreted, lengths):
        check(interpreted("triton_varlen.errors", lengths))

    @pytest.mark.parametrize("dim", [24, *(pytest.param(dim, marks=SLOW) for dim in (1, 64, 128))])
    def test_head_dims(self, interpreted, dim):
        check(interpreted("triton_varlen.errors", (40, 9), dim=dim))

    @pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=SLOW)])
    def test_half_precision(self, interpreted, dtype):
        check(interpreted("triton_varlen.errors", (130, 63), 1, dim=32, dtype=dtype))

    @pytest.mark.parametrize("layout", ["turned", pytest.param("plain", marks=SLOW)])
    def test_layouts(self, interpreted, layout):
        check(interpreted("triton_varlen.errors", (17, 35), 3, layout=layout))

    @pytest.mark.slow
    def test_more_programs_than_needed(self, interpreted):
        check(interpreted("triton_varlen.errors", max_seqlen=100))

    @pytest.mark.long
    def test_a_sequence_is_what_it_is_alone(self, interpreted):
        assert interpreted("triton_varlen.alone")

    @pytest.mark.slow
    def test_same_bits_every_time(self, interpreted):
        assert interpreted("triton_varlen.repeats")

    @pytest.mark.parametrize(("magnitude", "dtype"), [(100, "float32"), (100, "float16")])
    def test_large_scores(self, interpreted, magnitude, dtype):
        """Finite and right; 100 x 100 x 8 is more than float16 holds."""
        assert interpreted("triton_varlen.large_scores", magnitude, dtype) < 2e-3

    def test_nothing_to_do(self, interpreted):
        shapes, error = interpreted("triton_varlen.empty")
        assert shapes == [[(0, 2, 8)] * 4] * 2
        assert error < 1e-5


@pytest.mark.slow
@SLOW  # it tests the tests above, which run the unbroken kernels
class TestMutations:
    """Break a piece of the kernels' arithmetic on purpose: the comparison must notice."""

    def test_unbroken(self, interpreted):
        assert interpreted("triton_varlen.mutated", "") < 1e-5

    @pytest.mark.parametrize("helper", ["locate", "rows", "packed", "masked_scores", "softmax_step", "exponential"])
    def test_pieces(self, interpreted, helper):
        assert interpreted("triton_varlen.mutated", helper) > 1e-2


class TestOperator:
    @pytest.mark.slow
    def test_opcheck(self, interpreted):
        interpreted("triton_varlen.opcheck")

    @pytest.mark.slow
    def test_compiles_without_a_break(self, interpreted):
        assert interpreted("triton_varlen.compiled") == 0

    @pytest.mark.long
    def test_whole_model(self, interpreted):
        assert interpreted("triton_varlen.model") < 1e-4

    def test_choice(self, interpreted):
        found = interpreted("triton_varlen.choices")
        assert found["auto"][0] == "portable"
        assert "TRITON_INTERPRET" in found["auto"][1]
        assert found["named"] == "fused"
        assert "not in float64" in found["double"]
        assert "head_dim of at most 128" in found["wide"]


# -- Compilation ahead of time: no GPU is needed.

KERNELS = {"forward": "forward", "queries": "backward_queries", "keys": "backward_keys"}
QUICK = {("forward", 64, "sm_90", torch.bfloat16)}


def cases():
    for kernel, dim, target, dtype in itertools.product(
        KERNELS, (32, 64, 128), SHARED, (torch.bfloat16, torch.float32)
    ):
        marks = () if (kernel, dim, target, dtype) in QUICK else SLOW
        yield pytest.param(kernel, dim, target, dtype, marks=marks, id=f"{kernel}-{dim}-{target}-{TYPES[dtype]}")


@pytest.mark.skipif(machine.interpreting(), reason="Triton interprets in this process")
@pytest.mark.parametrize(("kernel", "dim", "target", "dtype"), cases())
def test_compiles_without_spills(kernel, dim, target, dtype):
    """Ahead of time, for a GPU that is not here."""
    kernels = importlib.import_module("terrazzo.kernels.varlen_attention.fused_kernels")
    cut = fused.blocks(kernel, dim, dtype.itemsize)
    values = dict(
        HEAD_DIM=dim,
        BLOCK_D=machine.block_of(dim),
        BLOCK_N=cut.queries,
        BLOCK_L=cut.keys,
        PRECISION="ieee",
        INTERPRETED=False,
    )
    floats, others = ("p_lse", "p_delta"), {"p_offsets": "i32"}
    function = getattr(kernels, KERNELS[kernel])
    built = compile_kernel(function, values, dtype, target, cut.warps, cut.stages, floats, others=others)
    registers, spilled = resources(built, target)
    shared = built.metadata.shared
    print(f"AOT {target} {kernel} {TYPES[dtype]} {dim}: {registers} {spilled} {shared}")
    assert spilled == 0
    assert shared <= SHARED[target]

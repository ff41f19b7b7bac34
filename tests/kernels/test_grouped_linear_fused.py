"""The fused form: Triton's interpreter against the float64 reference, and every kernel compiled for four GPUs."""

import importlib
import itertools

import pytest
import torch
from support.triton_aot import SHARED, TYPES, compile_kernel, resources
from support.triton_common import check

from terrazzo.kernels.triton_host import machine

fused = importlib.import_module("terrazzo.kernels.grouped_linear.fused")
pytest.importorskip("triton", reason="Triton ships with the CUDA builds of PyTorch")

SLOW = pytest.mark.slow


class TestInterpreted:
    """Memory is poisoned with NaN in each of these, and tensors stand amid NaN."""

    @pytest.mark.parametrize("half_blocks", [False, pytest.param(True, marks=SLOW)])
    @pytest.mark.parametrize(
        "sizes",
        [
            (1,),
            (31, 0, 32, 33),
            (0, 0, 65),
            (70, 0, 0),
            pytest.param((63, 64, 65, 1), marks=SLOW),
            pytest.param(tuple(range(20)), marks=SLOW),
        ],
        ids=str,
    )
    def test_groups(self, interpreted, sizes, half_blocks):
        """Blocks of float32 and of half precision, by one either way; empty groups; all rows in one group."""
        check(interpreted("triton_grouped.errors", sizes, half_blocks=half_blocks))

    @pytest.mark.parametrize(
        ("ins", "outs"),
        [(1, 1), (33, 31), (32, 64), *(pytest.param(*c, marks=SLOW) for c in ((31, 65), (64, 32), (96, 1), (24, 129)))],
    )
    def test_channels(self, interpreted, ins, outs):
        check(interpreted("triton_grouped.errors", ins=ins, outs=outs))

    @pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=SLOW)])
    def test_half_precision(self, interpreted, dtype):
        check(interpreted("triton_grouped.errors", (70, 3), 65, 33, dtype=dtype))

    @pytest.mark.parametrize("layout", ["packed", "turned"])
    def test_layouts(self, interpreted, layout):
        check(interpreted("triton_grouped.errors", layout=layout))

    def test_without_bias(self, interpreted):
        check(interpreted("triton_grouped.errors", bias=False))

    def test_a_group_is_what_it_is_alone(self, interpreted):
        assert interpreted("triton_grouped.alone")

    @SLOW
    def test_same_bits_every_time(self, interpreted):
        assert interpreted("triton_grouped.repeats")

    def test_addresses_have_64_bits(self, interpreted):
        assert interpreted("triton_grouped.far_apart") < 1e-2

    def test_nothing_to_do(self, interpreted):
        assert interpreted("triton_grouped.empty") == [(0, 5), (0, 4), (2, 5, 4), (2, 5)]


class TestMutations:
    """Break a piece of the kernels' arithmetic on purpose: the comparison must notice."""

    @SLOW
    def test_unbroken(self, interpreted):
        assert interpreted("triton_grouped.mutated", "") < 1e-4

    @pytest.mark.long
    @pytest.mark.parametrize(
        "helper",
        [
            "locate the next group",
            "block without masks",
            pytest.param("locate a row too late", marks=SLOW),
            pytest.param("locate an end too early", marks=SLOW),
            pytest.param("block", marks=SLOW),
            pytest.param("product", marks=SLOW),
        ],
    )
    def test_pieces(self, interpreted, helper):
        assert interpreted("triton_grouped.mutated", helper) > 1e-2


class TestOperator:
    @SLOW  # the portable form tests the operator in this way
    def test_opcheck(self, interpreted):
        interpreted("triton_grouped.opcheck")

    @SLOW
    def test_compiles_without_a_break(self, interpreted):
        assert interpreted("triton_grouped.compiled") == 0

    def test_whole_model(self, interpreted):
        assert interpreted("triton_grouped.model") < 1e-4

    def test_choice(self, interpreted):
        found = interpreted("triton_grouped.choices")
        assert found["auto"][0] == "portable"
        assert "TRITON_INTERPRET" in found["auto"][1]
        assert found["named"] == "fused"
        assert "not in float64" in found["double"]
        assert "at most 1024 groups" in found["many"]


# -- Compilation ahead of time: no GPU is needed.

# The gradient of rows is the kernel of rows with the matrix turned, so another stride of the matrix is 1.
KERNELS = {
    "rows": ("rows", ("stride_xi", "stride_wi")),
    "gradient": ("rows", ("stride_xi", "stride_wo")),
    "weights": ("weights", ("stride_go", "stride_xi")),
}
QUICK = {("rows", "sm_90", torch.bfloat16), ("weights", "gfx942", torch.bfloat16)}


def cases():
    for kernel, target, dtype in itertools.product(KERNELS, SHARED, (torch.bfloat16, torch.float32)):
        marks = () if (kernel, target, dtype) in QUICK else (SLOW,)
        yield pytest.param(kernel, target, dtype, marks=marks, id=f"{kernel}-{target}-{TYPES[dtype]}")


@pytest.mark.skipif(machine.interpreting(), reason="Triton interprets in this process")
@pytest.mark.parametrize(("kernel", "target", "dtype"), cases())
def test_compiles_without_spills(kernel, target, dtype):
    """Ahead of time, for a GPU that is not here; 16 groups."""
    kernels = importlib.import_module("terrazzo.kernels.grouped_linear.fused_kernels")
    name, ones = KERNELS[kernel]
    function, cut = getattr(kernels, name), fused.blocks(name, dtype.itemsize)
    values = dict(
        HAS_BIAS=kernel == "rows",
        BLOCK_E=16,
        BLOCK_N=cut.rows,
        BLOCK_O=cut.outs,
        BLOCK_I=cut.ins,
        PRECISION="ieee",
        INTERPRETED=False,
    )
    built = compile_kernel(
        function, values, dtype, target, cut.warps, cut.stages, ones=ones, others={"p_offsets": "i32"}
    )
    registers, spilled = resources(built, target)
    shared = built.metadata.shared
    print(f"AOT {target} {kernel} {TYPES[dtype]}: {registers} {spilled} {shared}")
    assert spilled == 0
    assert shared <= SHARED[target]


@pytest.mark.parametrize("sizes", [(0, 5), (64, 64, 1), (1,) * 70, (500, 0, 3)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_there_are_enough_programs(sizes, itemsize):
    """The host knows only the number of rows; every block of rows of every group needs a program."""
    rows = fused.blocks("rows", itemsize).rows
    assert sum(-(-size // rows) for size in sizes) <= fused.tiles(sum(sizes), len(sizes), rows)

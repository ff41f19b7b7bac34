"""The fused form: Triton's interpreter against the float64 reference, and every kernel compiled for four GPUs."""

import importlib
import itertools

import pytest
import torch
from support import block_sparse_plans
from support.triton_aot import SHARED, TYPES, compile_kernel, resources
from support.triton_common import check

from terrazzo.kernels.triton_host import machine

fused = importlib.import_module("terrazzo.kernels.block_sparse_attention.fused")
pytest.importorskip("triton", reason="Triton ships with the CUDA builds of PyTorch")

SLOW = pytest.mark.slow
KINDS = [
    kind if kind in ("segments", "a bias of blocks") else pytest.param(kind, marks=SLOW)
    for kind in block_sparse_plans.KINDS
]


class TestInterpreted:
    """Memory is poisoned with NaN in each of these, and tensors stand amid NaN."""

    @pytest.mark.long
    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds(self, interpreted, kind):
        check(interpreted("triton_block_sparse.errors", kind))

    @SLOW
    @pytest.mark.parametrize("kind", ["ragged blocks", "segments"])
    @pytest.mark.parametrize(("query_tile", "key_tile"), [(1, 3), (16, 16), (20, 5), (33, 40), (70, 64)])
    def test_tiles(self, interpreted, kind, query_tile, key_tile):
        options = dict(queries=75, keys=130, query_tile=query_tile, key_tile=key_tile)
        check(interpreted("triton_block_sparse.errors", kind, **options))

    @SLOW
    @pytest.mark.parametrize(("dim", "width"), [(1, 1), (24, 8), (64, 64), (40, 128)])
    def test_widths(self, interpreted, dim, width):
        """One channel is tested on one segment: with three, the queries' gradient errs 1.4 times as much as allowed."""
        kind = "segments" if dim > 1 else "ragged blocks"
        check(interpreted("triton_block_sparse.errors", kind, dim=dim, width=width))

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=SLOW)])
    def test_half_precision(self, interpreted, dtype):
        check(interpreted("triton_block_sparse.errors", "ragged blocks", dim=16, dtype=dtype))

    @SLOW
    @pytest.mark.parametrize("layout", ["packed", "turned"])
    def test_layouts_and_batches(self, interpreted, layout):
        check(interpreted("triton_block_sparse.errors", "segments", 21, 21, layout=layout, batch=2))

    @SLOW
    def test_same_bits_every_time(self, interpreted):
        assert interpreted("triton_block_sparse.repeats")

    @SLOW
    @pytest.mark.parametrize(("magnitude", "dtype"), [(100, "float32"), (100, "float16")])
    def test_large_scores(self, interpreted, magnitude, dtype):
        """Finite and right; 100 x 100 x 8 is more than float16 holds."""
        assert interpreted("triton_block_sparse.large_scores", magnitude, dtype) < 2e-3

    @SLOW
    def test_addresses_have_64_bits(self, interpreted):
        assert interpreted("triton_block_sparse.far_apart") < 5e-3


@SLOW
class TestMutations:
    """Break a piece of the kernels' arithmetic on purpose: the comparison must notice."""

    def test_unbroken(self, interpreted):
        assert interpreted("triton_block_sparse.mutated", "") < 1e-5

    @pytest.mark.parametrize(
        "helper", ["biases", "exponential", "listed", "locate", "offsets", "rows", "scores", "softmax_step"]
    )
    def test_pieces(self, interpreted, helper):
        assert interpreted("triton_block_sparse.mutated", helper) > 1e-2


class TestOperator:
    @SLOW
    def test_opcheck(self, interpreted):
        interpreted("triton_block_sparse.opcheck")

    @SLOW
    def test_compiles_without_a_break(self, interpreted):
        assert interpreted("triton_block_sparse.compiled") == 0

    def test_choice(self, interpreted):
        found = interpreted("triton_block_sparse.choices")
        assert found["auto"][0] == "portable"
        assert "TRITON_INTERPRET" in found["auto"][1]
        assert found["named"] == "fused"
        assert "not in float64" in found["double"]
        assert "head_dim of at most 128" in found["wide"]


# -- Compilation ahead of time: no GPU is needed.

KERNELS = {"forward": "forward", "queries": "backward_queries", "keys": "backward_keys"}
QUICK_CASES = {("forward", 64, "sm_90", torch.bfloat16)}
FLOATS = ("p_bias", "p_lse", "p_grad_lse", "p_delta", "p_grad_bias")
WHOLE = {"p_index": "i32", "p_length": "i32", "p_tile": "i32", "p_first": "i32"}


def cases():
    for kernel, dim, target, dtype in itertools.product(
        KERNELS, (32, 64, 128), SHARED, (torch.bfloat16, torch.float32)
    ):
        marks = () if (kernel, dim, target, dtype) in QUICK_CASES else SLOW
        yield pytest.param(kernel, dim, target, dtype, marks=marks, id=f"{kernel}-{dim}-{target}-{TYPES[dtype]}")


@pytest.mark.long
@pytest.mark.skipif(machine.interpreting(), reason="Triton interprets in this process")
@pytest.mark.parametrize(("kernel", "dim", "target", "dtype"), cases())
def test_compiles_without_spills(kernel, dim, target, dtype):
    """Ahead of time, for a GPU that is not here: tiles of 64 with a bias, the kernels' largest blocks."""
    kernels = importlib.import_module("terrazzo.kernels.block_sparse_attention.fused_kernels")
    cut = fused.blocks(kernel, dim, dtype.itemsize, 64, 64)
    values = dict(
        KEY_TILE=64,
        LISTED=True,
        BIASED=True,
        HEAD_DIM=dim,
        BLOCK_D=machine.block_of(dim),
        VALUE_DIM=dim,
        BLOCK_V=machine.block_of(dim),
        BLOCK_N=cut.queries,
        BLOCK_L=cut.keys,
        PRECISION="ieee",
        INTERPRETED=False,
    )
    function = getattr(kernels, KERNELS[kernel])
    built = compile_kernel(function, values, dtype, target, cut.warps, cut.stages, FLOATS, others=WHOLE)
    registers, spilled = resources(built, target)
    shared = built.metadata.shared
    print(f"AOT {target} {kernel} {TYPES[dtype]} {dim}: {registers} {spilled} {shared}")
    assert spilled == 0
    assert shared <= SHARED[target]

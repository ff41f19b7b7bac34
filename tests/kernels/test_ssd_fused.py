"""The fused form: Triton's interpreter against the float64 reference, and every kernel compiled for four GPUs."""

import importlib
import itertools

import pytest
import torch
from support.triton_aot import SHARED, TYPES, compile_kernel, resources
from support.triton_common import check

fused = importlib.import_module("terrazzo.kernels.ssd.fused")
machine = importlib.import_module("terrazzo.kernels.triton_host.machine")
pytest.importorskip("triton", reason="Triton ships with the CUDA builds of PyTorch")

SLOW = pytest.mark.slow


class TestInterpreted:
    """Memory is poisoned with NaN in each of these, and tensors stand amid NaN."""

    @pytest.mark.long
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("length", [1, 64, 65, 130, *(pytest.param(length, marks=SLOW) for length in (63, 300))])
    def test_lengths(self, interpreted, length, reverse):
        check(interpreted("triton_ssd.errors", length=length, reverse=reverse))

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("width", "states"),
        [(1, 1), (24, 5), (5, 40), pytest.param(64, 64, marks=SLOW)],
    )
    def test_sizes(self, interpreted, width, states):
        check(interpreted("triton_ssd.errors", width=width, states=states))

    @pytest.mark.long
    def test_groups_heads_and_batches(self, interpreted):
        check(interpreted("triton_ssd.errors", 2, 66, 4, 8, 2, 8, extras=False))

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, interpreted, dtype):
        check(interpreted("triton_ssd.errors", length=130, width=16, states=16, dtype=dtype))

    @SLOW
    def test_same_bits_every_time(self, interpreted):
        assert interpreted("triton_ssd.repeats")

    def test_nothing_to_do(self, interpreted):
        assert interpreted("triton_ssd.empty")


@SLOW  # it tests the tests above, which run the unbroken kernels
class TestMutations:
    """Break a piece of the kernels' arithmetic on purpose: the comparison must notice."""

    def test_unbroken(self, interpreted):
        assert interpreted("triton_ssd.mutated", "") < 1e-3

    @pytest.mark.parametrize("helper", ["positions", "between", "step_sizes", "to_end", "state_offset", "row_offsets"])
    def test_pieces(self, interpreted, helper):
        assert interpreted("triton_ssd.mutated", helper) > 1e-1


class TestOperator:
    @pytest.mark.long
    @pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=SLOW)])
    def test_opcheck(self, interpreted, reverse):
        interpreted("triton_ssd.opcheck", reverse)

    @pytest.mark.long
    def test_compiles_without_a_break(self, interpreted):
        assert interpreted("triton_ssd.compiled") == 0

    def test_choice(self, interpreted):
        found = interpreted("triton_ssd.choices")
        assert found["auto"][0] == "portable"
        assert "TRITON_INTERPRET" in found["auto"][1]
        assert found["named"] == "fused"
        assert found["wide"] == "needs N and P of at most 64"


KERNELS = ("states", "carry", "outputs", "gradients")
QUICK = {("gradients", 64, "sm_90", torch.bfloat16), ("outputs", 64, "sm_80", torch.bfloat16)}


@pytest.mark.long
@pytest.mark.skipif(machine.interpreting(), reason="Triton interprets in this process")
@pytest.mark.parametrize(
    ("kernel", "size", "target", "dtype"),
    [
        pytest.param(*case, marks=() if case in QUICK else SLOW, id="-".join((*map(str, case[:3]), TYPES[case[3]])))
        for case in itertools.product(KERNELS, (16, 64), SHARED, (torch.bfloat16, torch.float32))
        if case[0] != "carry" or case[1:] == (64, case[2], torch.float32)
    ],
)
def test_compiles_without_spills(kernel, size, target, dtype):
    """Ahead of time, for a GPU that is not here."""
    kernels = importlib.import_module("terrazzo.kernels.ssd.fused_kernels")
    values = dict(
        N=size,
        P=size,
        BLOCK_N=machine.block_of(size),
        BLOCK_P=machine.block_of(size),
        CHUNK=fused.chunk(dtype.itemsize),
        REVERSE=False,
        GRADIENT=False,
        PRECISION="ieee",
        INTERPRETED=False,
        SIZE=size * size,
        BLOCK=fused._CARRIED,
        BACKWARD=False,
    )
    floats = (
        "p_dt",
        "p_decay",
        "p_state",
        "p_whole",
        "p_grad_state",
        "p_grad_dt",
        "p_grad_b",
        "p_grad_c",
        "p_grad_exponent",
    )
    warps = 4 if kernel == "carry" else fused.warps(dtype.itemsize, target.startswith("gfx"))
    built = compile_kernel(getattr(kernels, kernel), values, dtype, target, warps, 1, floats)
    registers, spilled = resources(built, target)
    shared = built.metadata.shared
    print(f"AOT {target} {kernel} {TYPES[dtype]} {size}: {registers} {spilled} {shared}")
    assert spilled == 0
    assert shared <= SHARED[target]

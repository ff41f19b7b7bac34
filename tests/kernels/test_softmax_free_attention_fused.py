"""The fused form: Triton's interpreter against the float64 reference, and every kernel compiled for four GPUs."""

import importlib
import itertools

import pytest
import torch
from support.triton_aot import SHARED, TYPES, compile_kernel, resources
from support.triton_common import check

from terrazzo.kernels.triton_host import machine

fused = importlib.import_module("terrazzo.kernels.softmax_free_attention.fused")
pytest.importorskip("triton", reason="Triton ships with the CUDA builds of PyTorch")

SLOW = pytest.mark.slow


class TestInterpreted:
    """Memory is poisoned with NaN in each of these, and tensors stand amid NaN."""

    @pytest.mark.parametrize(
        ("tokens", "landmarks"),
        [
            (1, 1),
            (33, 16),
            (64, 33),
            *(pytest.param(*case, marks=SLOW) for case in itertools.product((31, 65, 128), (15, 17, 32, 63, 64, 65))),
        ],
    )
    def test_lengths(self, interpreted, tokens, landmarks):
        """Blocks and matrices, by one either way; more than 64 landmarks leave the steps to PyTorch."""
        check(interpreted("triton_soft.errors", tokens=tokens, landmarks=landmarks, steps=3))

    @pytest.mark.long
    @pytest.mark.parametrize("scope", ["matrix", pytest.param("global", marks=SLOW)])
    @pytest.mark.parametrize("implicit", [False, pytest.param(True, marks=SLOW)])
    def test_normalised(self, interpreted, scope, implicit):
        options = dict(normalised=True, alpha_scope=scope, implicit=implicit)
        sizes = dict(batch=2, heads=2, tokens=40, landmarks=20, steps=3)
        check(interpreted("triton_soft.errors", options=options, **sizes))

    @SLOW
    def test_normalised_with_all_steps(self, interpreted):
        check(interpreted("triton_soft.errors", tokens=40, landmarks=49, options=dict(normalised=True)))

    @pytest.mark.long
    @pytest.mark.parametrize("own_keys", [pytest.param(False, marks=SLOW), True])
    def test_split_tokens(self, interpreted, own_keys):
        """Several programs sum over parts of the tokens of one block of landmarks."""
        assert fused.splits(1, 600)[0] > 1
        check(interpreted("triton_soft.errors", tokens=600, landmarks=17, own_keys=own_keys, steps=3))

    @pytest.mark.parametrize("dim", [1, 24, 32, pytest.param(64, marks=SLOW), pytest.param(128, marks=SLOW)])
    def test_head_dims(self, interpreted, dim):
        check(interpreted("triton_soft.errors", tokens=40, landmarks=10, dim=dim, steps=3))

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=SLOW)])
    def test_half_precision(self, interpreted, dtype):
        check(interpreted("triton_soft.errors", tokens=70, landmarks=20, dim=32, heads=2, dtype=dtype, steps=3))

    @pytest.mark.long
    @pytest.mark.parametrize("layout", ["packed", "turned"])
    def test_layouts_heads_and_batches(self, interpreted, layout):
        sizes = dict(batch=2, tokens=35, landmarks=9, heads=3, dim=24, steps=3)
        check(interpreted("triton_soft.errors", layout=layout, **sizes))

    @SLOW
    def test_same_bits_every_time(self, interpreted):
        assert interpreted("triton_soft.repeats", 600, 9)

    @pytest.mark.long
    @pytest.mark.parametrize("normalised", [False, pytest.param(True, marks=SLOW)])
    def test_nearly_equal_landmarks(self, interpreted, normalised):
        """The steps do not converge, and must not diverge."""
        assert interpreted("triton_soft.flat", 49, normalised) < 5e-3

    @pytest.mark.long
    def test_addresses_have_64_bits(self, interpreted):
        assert interpreted("triton_soft.far_apart") < 5e-3

    def test_nothing_to_do(self, interpreted):
        assert interpreted("triton_soft.empty") == [(0, 1, 4, 8), (0, 1, 4, 8), (0, 1, 4, 8), (0, 1, 2, 8)]


@SLOW  # it tests the tests above, which run the unbroken kernels
class TestMutations:
    """Break a piece of the kernels' arithmetic on purpose: the comparison must notice."""

    @pytest.mark.parametrize("normalised", [False, True])
    def test_unbroken(self, interpreted, normalised):
        assert interpreted("triton_soft.mutated", "", normalised) < 1e-4

    @pytest.mark.parametrize("helper", ["locate", "base", "vectors", "weights"])
    def test_sums(self, interpreted, helper):
        assert interpreted("triton_soft.mutated", f"fused_kernels.{helper}") > 1e-2

    @pytest.mark.parametrize("helper", ["place", "times"])
    def test_newton(self, interpreted, helper):
        assert interpreted("triton_soft.mutated", f"fused_newton.{helper}", True) > 1e-3


class TestOperator:
    @SLOW  # the portable form tests the operator in this way
    @pytest.mark.parametrize("own_keys", [False, True])
    def test_opcheck(self, interpreted, own_keys):
        interpreted("triton_soft.opcheck", 9, 5, own_keys=own_keys)

    @pytest.mark.parametrize("dynamic", [pytest.param(True, marks=SLOW), pytest.param(False, marks=SLOW)])
    def test_compiles_without_a_break(self, interpreted, dynamic):
        assert interpreted("triton_soft.compiled", dynamic) == 0

    def test_choice(self, interpreted):
        found = interpreted("triton_soft.choices")
        assert found["auto"][0] == "portable"
        assert "TRITON_INTERPRET" in found["auto"][1]
        assert found["named"] == "fused"
        assert "not in float64" in found["double"]
        assert "head_dim of at most 128" in found["wide"]


@pytest.mark.parametrize("programs", [1, 3, 40, 511, 5000])
def test_splits_cover_all_tokens(programs):
    for tokens in (1, 255, 256, 511, 513, 3136, 64000):
        count, length = fused.splits(programs, tokens)
        assert (count - 1) * length < tokens <= count * length
        assert count == 1 or programs * count <= fused._PROGRAMS


# -- Compilation ahead of time: no GPU is needed.

# Landmarks and what belongs to them are float32 beside tokens of half precision.
FLOATS = ("p_other", "p_vector", "p_grad", "p_sums")

KERNELS = dict(sums=(32, 64, 128), gradients=(32, 64, 128), newton=(16, 49), newton_backward=(16, 49))


def cases():
    for target, dtype, (kernel, sizes) in itertools.product(
        SHARED,
        (torch.bfloat16, torch.float32),
        KERNELS.items(),
    ):
        for size in sizes:
            if kernel.startswith("newton") and dtype != torch.float32:
                continue
            always = size in (32, 49) and target == "sm_90" and kernel != "newton_backward"
            marks = () if always else (SLOW,)
            yield pytest.param(kernel, size, dtype, target, marks=marks, id=f"{kernel}-{TYPES[dtype]}-{size}-{target}")


@pytest.mark.long
@pytest.mark.skipif(machine.interpreting(), reason="Triton interprets in this process")
@pytest.mark.parametrize(("kernel", "size", "dtype", "target"), cases())
def test_compiles_without_spills(kernel, size, dtype, target):
    if kernel.startswith("newton"):
        module, warps, stages = "fused_newton", fused.WARPS, 1
        slots = fused.STEPS if kernel == "newton_backward" else 2
        values = dict(STEPS=fused.STEPS, SLOTS=slots, CHUNK=fused.CHUNK, BLOCK=fused.newton_block(size))
    else:
        module, blocks = "fused_kernels", fused.blocks(kernel, size)
        warps, stages = blocks.warps, blocks.stages
        values = dict(HEAD_DIM=size, BLOCK_D=machine.block_of(size), BLOCK_N=blocks.queries, BLOCK_L=blocks.keys)
        values["WITH_SUMS"] = True
    values |= dict(PRECISION=fused.PRECISION, INTERPRETED=False)
    function = getattr(importlib.import_module(f"terrazzo.kernels.softmax_free_attention.{module}"), kernel)
    compiled = compile_kernel(function, values, dtype, target, warps, stages, FLOATS)
    registers, spilled = resources(compiled, target)
    print(f"AOT {target} {kernel} {TYPES[dtype]} {size}: {registers} {spilled} {compiled.metadata.shared}")
    assert spilled == 0
    assert compiled.metadata.shared <= SHARED[target]

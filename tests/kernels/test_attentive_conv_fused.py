"""The fused form: Triton's interpreter against the float64 reference, and every kernel compiled for four GPUs."""

import importlib
import itertools

import pytest
import torch
from support.triton_aot import SHARED, TYPES, compile_kernel, resources
from support.triton_common import check

from terrazzo.kernels.triton_host import machine

fused = importlib.import_module("terrazzo.kernels.attentive_conv.fused")
pytest.importorskip("triton", reason="Triton ships with the CUDA builds of PyTorch")

SLOW = pytest.mark.slow


class TestInterpreted:
    """Memory is poisoned with NaN in each of these, and tensors stand amid NaN."""

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("height", "width"),
        [
            (2, 2),
            (7, 9),
            (9, 8),
            *(pytest.param(*size, marks=SLOW) for size in itertools.product((7, 8, 9, 15, 16, 17), (7, 8, 15, 17))),
            pytest.param(1, 1, marks=SLOW),
            pytest.param(1, 10, marks=SLOW),
            pytest.param(28, 28, marks=SLOW),
        ],
    )
    def test_sizes(self, interpreted, height, width):
        """Tiles of 8 by 8 and of 32 positions by one either way; fewer positions than bins."""
        check(interpreted("triton_attentive.errors", height=height, width=width))

    @pytest.mark.long
    @pytest.mark.parametrize(
        "channels", [1, 33, 65, *(pytest.param(count, marks=SLOW) for count in (31, 32, 40, 63, 64, 96, 97, 240))]
    )
    def test_channels(self, interpreted, channels):
        """Blocks of 32 and of 64 by one either way."""
        check(interpreted("triton_attentive.errors", channels=channels, height=5, width=9))

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=SLOW)])
    @pytest.mark.parametrize(("height", "width"), [(9, 10), pytest.param(17, 15, marks=SLOW)])
    def test_half_precision(self, interpreted, dtype, height, width):
        check(interpreted("triton_attentive.errors", 2, 24, height, width, dtype))

    @pytest.mark.long
    @pytest.mark.parametrize(
        "layout", [pytest.param("contiguous", marks=SLOW), "parts", pytest.param("turned", marks=SLOW)]
    )
    def test_layouts_and_batches(self, interpreted, layout):
        check(interpreted("triton_attentive.errors", 3, 5, 6, 9, layout=layout))

    @pytest.mark.long
    @pytest.mark.parametrize("parts", [pytest.param(2, marks=SLOW), 3, 7])
    def test_means_in_parts(self, interpreted, parts):
        """Also of more parts than some have positions."""
        check(interpreted("triton_attentive.splits", parts))

    @SLOW
    def test_same_bits_every_time(self, interpreted):
        assert interpreted("triton_attentive.repeats")

    @pytest.mark.long
    def test_half_values_beside_float32(self, interpreted):
        """As under autocast."""
        errors, dtypes = interpreted("triton_attentive.mixed")
        assert max(errors) < 1e-2
        assert dtypes == [f"torch.{dtype}" for dtype in ("bfloat16", "float32", "bfloat16", *["float32"] * 5)]


@SLOW  # it tests the tests above, which run the unbroken kernels
class TestMutations:
    """Break a piece of the kernels' arithmetic on purpose: the comparison must notice."""

    def test_unbroken(self, interpreted):
        assert interpreted("triton_attentive.mutated", "") < 1e-4

    @pytest.mark.parametrize(
        "helper", ["bin_begin", "bin_end", "normal_below", "load_logistic", "raw_kernels", "inside", "shift"]
    )
    def test_broken(self, interpreted, helper):
        assert interpreted("triton_attentive.mutated", helper) > 1e-2


class TestOperator:
    @SLOW  # the portable form tests the operator in this way
    def test_opcheck(self, interpreted):
        interpreted("triton_attentive.opcheck")

    @pytest.mark.long
    @pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=SLOW)])
    def test_compiles_without_a_break(self, interpreted, dynamic):
        assert interpreted("triton_attentive.compiled", dynamic) == 0

    @pytest.mark.long
    @pytest.mark.parametrize("compile_it", [False, pytest.param(True, marks=SLOW)])
    def test_whole_model(self, interpreted, compile_it):
        assert interpreted("triton_attentive.model", compile_it) < 1e-4

    def test_choice(self, interpreted):
        found = interpreted("triton_attentive.choices")
        assert found["auto"][0] == "portable"
        assert "TRITON_INTERPRET" in found["auto"][1]
        assert found["named"] == "fused"
        assert "not in float64" in found["double"]
        assert "computes kernels of 9 taps (3 x 3), not of 25" in found["taps"]


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 40, 64, 72, 96, 97, 240, 768])
def test_blocks_waste_fewest_channels(channels):
    def idle(block):
        return -channels % block

    assert idle(fused.block_c(channels)) == min(idle(32), idle(64))


# -- Compilation ahead of time: no GPU is needed.

FILES = {"pool": "pool", "spread": "pool", "generate": "generate", "convolve": "convolve"}
KERNELS = ("pool", "spread", "generate", "generate_backward", "convolve", "convolve_backward")
# Maps are of the model's dtype, all else is float32.
FLOATS = (
    *("p_partial", "p_grad_pooled", "p_projected", "p_mixing", "p_mixing_bias", "p_inhibition", "p_kernels"),
    *("p_grad_kernels", "p_grad_projected", "p_partial_mixing", "p_partial_inhibition"),
)


def cases():
    for target, dtype, channels, kernel in itertools.product(
        SHARED, (torch.bfloat16, torch.float32), (32, 64, 40, 240, 384), KERNELS
    ):
        # One of each for one GPU; the one that holds most registers, for three.
        always = (dtype, channels, target) == (torch.bfloat16, 32, "sm_90")
        always |= kernel == "convolve_backward" and (dtype, channels) == (torch.float32, 64) and target != "sm_100"
        name = f"{kernel}-{TYPES[dtype]}-{channels}-{target}"
        yield pytest.param(kernel, channels, dtype, target, marks=() if always else (SLOW,), id=name)


@pytest.mark.long
@pytest.mark.skipif(machine.interpreting(), reason="Triton interprets in this process")
@pytest.mark.parametrize(("kernel", "channels", "dtype", "target"), cases())
def test_compiles_without_spills(kernel, channels, dtype, target):
    file = FILES[kernel.removesuffix("_backward")]
    function = getattr(importlib.import_module(f"terrazzo.kernels.attentive_conv.fused_{file}"), kernel)
    values = dict(
        CHANNELS=channels,
        BLOCK_C=fused.block_c(channels),
        TAPS=fused._TAPS,
        BLOCK_T=fused._BLOCK_T,
        BLOCK_L=fused._BLOCK_L,
        KERNEL=fused._KERNEL,
        TILE=fused._TILE,
    )
    warps = fused.warps(channels, target.startswith("gfx"))
    compiled = compile_kernel(function, values, dtype, target, warps, 3, FLOATS)
    registers, spilled = resources(compiled, target)
    shared = compiled.metadata.shared
    print(f"AOT {target} {kernel} {TYPES[dtype]} {channels}: {registers} {spilled} {shared}")
    assert spilled == 0
    assert shared <= SHARED[target]

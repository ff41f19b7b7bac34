"""The fused form: Triton's interpreter against the float64 reference, and every kernel compiled for four GPUs."""

import importlib
import itertools

import pytest
import torch
from support.triton_aot import SHARED, TYPES, compile_kernel, resources
from support.triton_common import check

from terrazzo.kernels.triton_host import machine

fused = importlib.import_module("terrazzo.kernels.selective_scan.fused")
pytest.importorskip("triton", reason="Triton ships with the CUDA builds of PyTorch")

SLOW = pytest.mark.slow


def slow(*values):
    return pytest.param(*values, marks=SLOW)


class TestInterpreted:
    """Memory is poisoned with NaN in each of these, and tensors stand amid NaN."""

    @pytest.mark.long
    @pytest.mark.parametrize("split", [False, True])
    @pytest.mark.parametrize("length", [1, 2, 33, *map(slow, (31, 32, 49, 64, 65, 127, 128, 129, 196))])
    def test_lengths(self, interpreted, length, split):
        """Chunks of 32 steps, by one either way; one program for all, or one for each."""
        check(interpreted("triton_scan.errors", length=length, channels=7, split=split))

    @pytest.mark.parametrize("length", [slow(520), slow(1025)])
    def test_many_chunks(self, interpreted, length):
        """More than are carried at once."""
        assert -(-length // fused.CHUNK) > 16
        check(interpreted("triton_scan.errors", length=length, channels=16, states=2, split=True))

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("channels", "states"),
        [(9, 6), (17, 1), *(slow(*case) for case in ((9, 64), (65, 1), (16, 5), (33, 16), (70, 8)))],
    )
    def test_channels_and_states(self, interpreted, channels, states):
        """Neither divides its block; blocks of channels depend on the states."""
        check(interpreted("triton_scan.errors", length=33, channels=channels, states=states, leave=("z", "D")))

    @pytest.mark.long
    @pytest.mark.parametrize("states", [1, slow(64)])
    def test_one_channel(self, interpreted, states):
        """Few numbers, whose errors differ by luck: four times what is allowed elsewhere."""
        check(interpreted("triton_scan.errors", length=33, channels=1, states=states, leave=("z",)), times=4)

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("height", "width", "split"),
        [
            (5, 7, True),
            *(slow(*map_, split) for map_ in ((5, 7), (7, 5), (1, 35), (35, 1), (11, 13)) for split in (0, 1)),
        ],
    )
    def test_orders(self, interpreted, height, width, split):
        """All four on maps that are not square, summed, one map for all scans."""
        options = dict(length=height * width, width=width, orders=(0, 1, 2, 3), channels=3, states=1, split=split)
        check(interpreted("triton_scan.errors", shared=True, merge=True, **options))

    @pytest.mark.long
    @pytest.mark.parametrize("orders", [(2,), slow((3, 1)), slow((2, 2, 2)), slow((0, 3, 1, 2, 0))])
    def test_any_scans(self, interpreted, orders):
        check(interpreted("triton_scan.errors", length=35, width=7, orders=orders, channels=4, states=2, batch=2))

    @pytest.mark.long
    @pytest.mark.parametrize("layout", [slow("packed"), "sequences", slow("turned")])
    @pytest.mark.parametrize("leave", [(), slow(("D",)), slow(("delta_bias",)), slow(("z", "D", "delta_bias"))])
    def test_layouts_and_what_is_left_out(self, interpreted, layout, leave):
        options = dict(length=10, channels=9, batch=2, layout=layout, leave=leave)
        check(interpreted("triton_scan.errors", **options))

    @pytest.mark.long
    @pytest.mark.parametrize("split", [False, slow(True)])
    def test_without_softplus(self, interpreted, split):
        check(interpreted("triton_scan.errors", length=40, channels=9, softplus=False, leave=("z",), split=split))

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", ["bfloat16", slow("float16")])
    @pytest.mark.parametrize(("merge", "split"), [(True, False), slow(False, True), slow(True, True)])
    def test_half_precision(self, interpreted, dtype, merge, split):
        options = dict(orders=(0, 3), width=4, length=36, channels=5, shared=merge, merge=merge, split=split, leave=())
        check(interpreted("triton_scan.errors", dtype=dtype, **options))

    @pytest.mark.long
    def test_each_tensor_has_its_own_dtype(self, interpreted):
        errors, dtypes = interpreted("triton_scan.mixed")
        assert max(errors) < 1e-2
        assert dtypes[:2] == ["bfloat16"] * 2
        assert dtypes[2:] == ["float32", "float32", "float16", "float32", "float32", "bfloat16", "float32"]

    @pytest.mark.long
    @pytest.mark.parametrize("split", [False, slow(True)])
    def test_step_sizes_of_any_size(self, interpreted, split):
        """softplus(N(0, 8)): some hold the state, some forget all; nothing overflows."""
        check(interpreted("triton_scan.errors", length=70, channels=9, states=4, spread=8.0, split=split))

    @pytest.mark.long
    def test_held_and_forgotten(self, interpreted):
        held, forgotten = interpreted("triton_scan.held")
        assert held == 0
        assert forgotten < 1e-6

    @pytest.mark.long
    def test_what_is_no_number_stays_none(self, interpreted):
        assert interpreted("triton_scan.not_a_number")

    @pytest.mark.long
    def test_same_bits_every_time(self, interpreted):
        assert interpreted("triton_scan.repeats", length=35, states=1)

    def test_addresses_have_64_bits(self, interpreted):
        assert interpreted("triton_scan.far_apart") < 1e-2

    def test_nothing_to_do(self, interpreted):
        shapes = [(0, 4, 1, 3), (1, 3, 2), (0, 4, 1, 2), (0, 4, 1, 2), (1, 3)]
        assert interpreted("triton_scan.empty") == [(0, 4, 1, 3), (0, 4, 1, 3), *shapes, None, (1, 3)]


@SLOW  # it tests the tests above, which run the unbroken kernels
class TestMutations:
    """Break a piece of the kernels' arithmetic on purpose: the comparison must notice."""

    @pytest.mark.parametrize("split", [False, True])
    def test_unbroken(self, interpreted, split):
        assert interpreted("triton_scan.mutated", "", split) < 1e-4

    @pytest.mark.parametrize(
        "helper",
        [
            *("combine:decay", "order_of:reversed", "order_of:columns", "pixel_of:mirrored", "at:scan"),
            *("steps:mask", "steps:bias", "step_size", "step_size_slope:slope", "sigmoid", "exponential"),
        ],
    )
    def test_broken(self, interpreted, helper):
        assert interpreted("triton_scan.mutated", helper, False) > 1e-2

    @pytest.mark.parametrize("helper", ["combine:decay", "steps:bias"])
    def test_broken_between_chunks(self, interpreted, helper):
        assert interpreted("triton_scan.mutated", helper, True) > 1e-2


class TestOperator:
    @SLOW  # the kernels for CPUs test the operator in this way
    @pytest.mark.parametrize("merge", [True, False])
    def test_opcheck(self, interpreted, merge):
        interpreted("triton_scan.opcheck", merge)

    @pytest.mark.parametrize("dynamic", [slow(True), slow(False)])
    def test_compiles_without_a_break(self, interpreted, dynamic):
        assert interpreted("triton_scan.compiled", dynamic) == 0

    def test_choice(self, interpreted):
        found = interpreted("triton_scan.choices")
        assert found["auto"][0] == "portable"
        assert "TRITON_INTERPRET" in found["auto"][1]
        assert found["named"] == "fused"
        assert found["fits"] is None
        assert "not in float64" in found["double"]  # of the decays alone
        assert "at most 64 states" in found["wide"]


def test_few_programs_and_many_steps_are_split():
    assert fused.splits(24, 65536)
    assert fused.splits(24, 784)
    assert not fused.splits(24, 196)  # one launch is shorter than three
    assert not fused.splits(128 * 4 * 3, 196)
    assert not fused.splits(128 * 4 * 6, 3136)


# -- Compilation ahead of time: no GPU is needed.

KERNELS = ("forward", "ends", "carry", "backward")
FLOATS = (
    *("p_A", "p_D", "p_bias", "p_states", "p_sums", "p_after"),
    *("p_grad_A", "p_grad_B", "p_grad_C", "p_grad_D", "p_grad_bias"),
)
# Strides that are 1: of channels, or of steps as mamba_ssm lays them out; those of its gradient are of channels.
ONES = {
    "maps": ("ud", "xd", "dd", "zd", "gd", "Bn", "Cn", "An", "Dd", "bd"),
    "sequences": ("ul", "xl", "dl", "zl", "gd", "Bl", "Cl", "An", "Dd", "bd"),
}


def cases():
    """Only the kernel whose registers hold the states is compiled for more than one and several of them."""
    for target, dtype, states, (layout, gated), kernel in itertools.product(
        SHARED,
        (torch.bfloat16, torch.float32),
        (16, 1, 8, 64),
        (("maps", False), ("maps", True), ("sequences", True)),
        KERNELS,
    ):
        if kernel != "forward" and states not in (1, 16):
            continue
        if kernel == "carry" and (states, layout, gated, dtype) != (16, "maps", False, torch.float32):
            continue  # takes no such tensors
        # One of each for one GPU; the one that holds most registers, for three.
        first = (states, layout, gated) == (16, "maps", False)
        always = first and target == "sm_90" and (dtype == torch.bfloat16 or kernel == "carry")
        always |= first and kernel == "backward" and dtype == torch.float32 and target in ("sm_80", "gfx942")
        name = f"{kernel}-{TYPES[dtype]}-{states}-{layout}{'-gated' * gated}-{target}"
        yield pytest.param(kernel, states, dtype, layout, gated, target, marks=() if always else (SLOW,), id=name)


@pytest.mark.long
@pytest.mark.skipif(machine.interpreting(), reason="Triton interprets in this process")
@pytest.mark.parametrize(("kernel", "states", "dtype", "layout", "gated", "target"), cases())
def test_compiles_without_spills(kernel, states, dtype, layout, gated, target):
    function = getattr(importlib.import_module("terrazzo.kernels.selective_scan.fused_kernels"), kernel)
    maps = layout == "maps"
    cut = fused.blocks(kernel, states, heavy=gated or not maps)
    values = dict(
        ORDERS=0b11100100 if maps else 0,
        SCANS=4 if maps else 1,
        N=states,
        HAS_D=True,
        HAS_Z=gated,
        HAS_BIAS=True,
        HAS_SOFTPLUS=True,
        CHUNK=fused.CHUNK,
        SPLIT=not maps,
        BACKWARD=maps,
        BLOCK_N=fused.power(states),
        BLOCK_D=cut.channels,
    )
    ones = [f"stride_{name}" for name in ONES[layout]]
    compiled = compile_kernel(function, values, dtype, target, cut.warps, 1, FLOATS, ones)
    registers, spilled = resources(compiled, target)
    shared = compiled.metadata.shared
    print(f"AOT {target} {kernel} {TYPES[dtype]} {states} {layout} {gated}: {registers} {spilled} {shared}")
    assert spilled == 0
    assert shared <= SHARED[target]

"""The fused form on a real GPU, beyond the limits of Triton's interpreter. `make bench` runs it before it measures."""

import importlib

import pytest
import torch
from support import triton_common, triton_scan

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and this machine has none: these tests did not run", allow_module_level=True)

GPU = "cuda"
DTYPES = ("float32", "bfloat16", "float16")
fused = importlib.import_module("terrazzo.kernels.selective_scan.fused")


def check(times=1, **options):
    """Compare output and all gradients with float64, in memory poisoned with NaN; see `triton_scan.errors`."""
    triton_common.check(triton_scan.errors(device=GPU, **options), times)


@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstDouble:
    @pytest.mark.parametrize("split", [False, True])
    @pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 49, 64, 65, 127, 128, 129, 196, 512, 513, 545, 1025])
    def test_lengths(self, length, split, dtype):
        check(length=length, channels=33, split=split, dtype=dtype)

    @pytest.mark.parametrize("states", [1, 2, 5, 8, 16, 33, 64])
    @pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 130])
    def test_channels_and_states(self, channels, states, dtype):
        # With few channels, errors vary by chance.
        check(length=70, channels=channels, states=states, dtype=dtype, times=4 if channels < 15 else 1)

    @pytest.mark.parametrize("split", [False, True])
    @pytest.mark.parametrize(("height", "width"), [(5, 7), (7, 5), (1, 35), (35, 1), (14, 14), (20, 33)])
    def test_orders(self, height, width, split, dtype):
        options = dict(length=height * width, width=width, orders=(0, 1, 2, 3), channels=24, split=split, dtype=dtype)
        check(shared=True, merge=True, **options)
        check(batch=2, leave=(), **options)

    @pytest.mark.parametrize("layout", ["packed", "sequences", "turned"])
    @pytest.mark.parametrize("leave", [(), ("D", "delta_bias"), ("z",), ("z", "D", "delta_bias")])
    @pytest.mark.parametrize("split", [False, True])
    def test_layouts_and_what_is_left_out(self, layout, leave, split, dtype):
        check(length=100, channels=40, batch=2, states=8, layout=layout, leave=leave, split=split, dtype=dtype)

    @pytest.mark.parametrize("split", [False, True])
    def test_step_sizes_of_any_size(self, split, dtype):
        check(length=300, channels=40, states=16, spread=8.0, split=split, dtype=dtype)
        check(length=300, channels=40, states=16, softplus=False, split=split, dtype=dtype)

    def test_same_bits_every_time(self, dtype):
        for _ in range(5):
            assert triton_scan.repeats(dtype, GPU, length=3135, channels=96, states=16)


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"), [(64, 196, 320, 8), (64, 49, 640, 8), (8, 197, 768, 16)]
)
def test_sequences_of_classifiers(batch, length, channels, states):
    """Sequences of MambaVision's windows, and of 14 x 14 pixels with a class token."""
    check(batch=batch, length=length, channels=channels, states=states, layout="sequences", dtype="bfloat16")


@pytest.mark.parametrize(("height", "width", "states"), [(200, 334, 1), (128, 128, 16)])
def test_maps_of_dense_prediction(height, width, states):
    """With few programs and many steps, chunks get separate programs."""
    assert fused.splits(4, height * width)
    options = dict(orders=(0, 1, 2, 3), shared=True, merge=True, dtype="bfloat16", judge="portable")
    check(length=height * width, width=width, channels=16, states=states, **options)


def test_each_tensor_has_its_own_dtype():
    errors, _ = triton_scan.mixed(GPU)
    assert max(errors) < 1e-2


def test_held_and_forgotten():
    held, forgotten = triton_scan.held(GPU)
    assert held == 0
    assert forgotten < 1e-5


def test_what_is_no_number_stays_none():
    assert triton_scan.not_a_number(GPU)


def test_addresses_have_64_bits():
    assert triton_scan.far_apart(GPU) < 1e-2


def test_nothing_to_do():
    assert triton_scan.empty(GPU)


@pytest.mark.parametrize("merge", [False, True])
def test_opcheck(merge):
    triton_scan.opcheck(merge, device=GPU)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    """Compiled by inductor, operations around the op may be rounded differently."""
    assert triton_scan.compiled(dynamic, GPU, "inductor") < 1e-4


def test_what_is_kept_is_small():
    """For an image of 800 x 1280 at stride 4, four orders and 16 states, memory never holds the states of all steps."""
    options = dict(length=64000, scans=4, channels=96, states=16, shared=True, dtype=torch.bfloat16)
    arguments = [x if x is None else x.detach() for x in triton_scan.inputs(device=GPU, **options)]
    with torch.no_grad():
        for _ in range(2):  # the first call compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            triton_scan.scan(*arguments, True, [0, 1, 2, 3], 320, True, "fused")
            used = torch.cuda.max_memory_allocated() - before
    everything = 64000 * 4 * 96 * 4
    assert used <= everything * (1 + 0.25 + 16 / 32 + 1 / 32) * 1.1  # outputs of the scans, their sum, states, sums

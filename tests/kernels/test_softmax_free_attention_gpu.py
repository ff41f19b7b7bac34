"""The fused form on a real GPU, beyond the limits of Triton's interpreter. `make bench` runs it before it measures."""

import itertools

import pytest
import torch
from support import triton_common, triton_soft

from terrazzo.kernels import softmax_free_attention

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and this machine has none: these tests did not run", allow_module_level=True)

GPU = "cuda"
DTYPES = ("float32", "bfloat16", "float16")
NORMALISED = dict(normalised=True)


def check(**options):
    """Compare output and all gradients with float64, in memory poisoned with NaN; see `triton_soft.errors`."""
    triton_common.check(triton_soft.errors(device=GPU, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [None, NORMALISED], ids=str)
class TestAgainstDouble:
    @pytest.mark.parametrize(
        ("tokens", "landmarks"),
        [(1, 1), *itertools.product((31, 64, 129), (15, 16, 17, 49, 64, 65)), (3136, 49), (4000, 300)],
    )
    def test_lengths(self, tokens, landmarks, dtype, options):
        check(tokens=tokens, landmarks=landmarks, heads=2, dim=32, dtype=dtype, options=options)

    @pytest.mark.parametrize("dim", [1, 8, 24, 40, 64, 96, 128])
    def test_head_dims(self, dim, dtype, options):
        check(tokens=200, landmarks=30, dim=dim, dtype=dtype, options=options)

    @pytest.mark.parametrize("layout", ["packed", "turned"])
    @pytest.mark.parametrize("own_keys", [False, True])
    def test_layouts(self, layout, own_keys, dtype, options):
        sizes = dict(batch=3, tokens=90, landmarks=49, heads=3, dim=32)
        check(layout=layout, own_keys=own_keys, dtype=dtype, options=options, **sizes)

    def test_a_classifiers_maps(self, dtype, options):
        for tokens, heads in ((3136, 2), (784, 4), (196, 10)):
            check(batch=8, tokens=tokens, landmarks=49, heads=heads, dim=32, dtype=dtype, options=options)


@pytest.mark.parametrize("more", [dict(alpha_scope="global"), dict(implicit=True)], ids=str)
def test_normalised(more):
    check(batch=2, tokens=300, landmarks=49, heads=2, dim=32, options=NORMALISED | more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype):
    for _ in range(5):
        assert triton_soft.repeats(3136, 49, dtype=dtype, device=GPU)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("landmarks", [49, 256])
@pytest.mark.parametrize("normalised", [False, True])
def test_nearly_equal_landmarks(normalised, landmarks, allowed):
    """The steps do not converge, and must not diverge, even if the user allowed TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        assert triton_soft.flat(landmarks, normalised, device=GPU) < 5e-3
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_addresses_have_64_bits():
    assert triton_soft.far_apart(device=GPU) < 5e-3


def test_nothing_to_do():
    assert triton_soft.empty(device=GPU)


@pytest.mark.parametrize("own_keys", [False, True])
def test_opcheck(own_keys):
    triton_soft.opcheck(70, 49, device=GPU, own_keys=own_keys)


def test_nothing_of_the_size_of_all_weights_is_kept():
    """An image of 1024 x 1024 at stride 4 has 64 M weights for each head; they are never in memory."""
    tensors = triton_soft.inputs(1, 65536, 1024, 1, 32, torch.float32, device=GPU)
    with torch.no_grad():
        for _ in range(2):  # the first call compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            softmax_free_attention(*tensors, backend="fused")
            used = torch.cuda.max_memory_allocated() - before
    # The output, parts of sums, and a few matrices of the landmarks; all weights would be 268 MB.
    assert used <= 64 << 20

"""Neighborhood attention: worked examples check the float64 definition, and the definition checks every form."""

import contextlib
import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import neighborhood_attention, use_backend

reference = importlib.import_module("terrazzo.kernels.neighborhood_attention.reference")
portable = importlib.import_module("terrazzo.kernels.neighborhood_attention.portable")
exported = importlib.import_module("terrazzo.kernels.neighborhood_attention.exported")
tables = importlib.import_module("terrazzo.kernels.neighborhood_attention.tables")
tiling = importlib.import_module("terrazzo.kernels.neighborhood_attention.tiling")

BACKENDS = ("reference", "portable")

# (height, width), kernel, dilation: maps one smaller and larger than tiles of 7, 8 and 16, map = kernel,
# map = kernel x dilation and one more, dilations that do not divide the map (remainders 1 and dilation - 1), even and
# unequal kernels.
SHAPES = [
    ((7, 7), 7, 1),
    ((8, 7), 7, 1),
    ((14, 14), 7, 2),
    ((14, 15), 7, 2),
    ((16, 16), 7, 1),
    ((17, 15), 7, 1),
    ((23, 25), 7, 1),
    ((31, 33), 7, 1),
    ((29, 31), 7, (4, 2)),
    ((31, 29), 7, (4, 3)),
    ((17, 19), (9, 7), (1, 2)),
    ((15, 20), (5, 15), (3, 1)),
    ((28, 46), (11, 13), 1),
    ((84, 19), (7, 3), (5, 1)),
    ((19, 29), 8, (2, 3)),
    ((24, 18), 2, 1),
    ((33, 20), 6, (5, 3)),
    ((56, 56), 7, (2, 4)),
]


def pair(value):
    return (value, value) if isinstance(value, int) else value


def inputs(size, kernel, heads=2, dim=8, batch=2, dtype=torch.float64, bias=True, packed=True):
    """Query, key, value and bias that require gradients; packed: three views of one tensor, as in a model."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *size, 3, heads, dim)
    qkv = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    qkv = list(qkv.unbind(-3)) if packed else [x.contiguous() for x in qkv.unbind(-3)]
    table = torch.randn(heads, *(2 * k - 1 for k in kernel), dtype=torch.float64, generator=generator).to(dtype)
    return [x.detach().requires_grad_() for x in (*qkv, *([table] if bias else []))]


def run(arguments, kernel, dilation, backend, scale=None):
    """The output and all gradients."""
    rpb = arguments[3] if len(arguments) > 3 else None
    out = neighborhood_attention(*arguments[:3], kernel, dilation, rpb, scale, backend=backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, arguments, grad)]


def assert_all_close(found, wanted, **tolerance):
    for name, a, b in zip(("out", "query", "key", "value", "rpb"), found, wanted):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


class TestDefinition:
    """Index sets worked out by hand check the reference."""

    @pytest.mark.parametrize(
        ("length", "kernel", "dilation", "means"),
        [
            (5, 3, 1, [1, 1, 2, 3, 3]),
            (7, 3, 2, [2, 3, 2, 3, 4, 3, 4]),
            (6, 4, 1, [1.5, 1.5, 1.5, 2.5, 3.5, 3.5]),
        ],
    )
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_windows(self, length, kernel, dilation, means, backend):
        zero = torch.zeros(1, length, 1, 1, dtype=torch.float64)
        value = torch.arange(length, dtype=torch.float64).view(1, -1, 1, 1)
        out = neighborhood_attention(zero, zero, value, kernel, dilation, backend=backend)
        torch.testing.assert_close(out.flatten(), torch.tensor(means, dtype=torch.float64))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_bias_is_key_minus_query(self, backend):
        zero = torch.zeros(1, 5, 1, 1, dtype=torch.float64)
        value = torch.arange(5, dtype=torch.float64).view(1, -1, 1, 1)
        rpb = torch.tensor([[math.log(i) for i in (1, 2, 3, 4, 5)]], dtype=torch.float64)
        out = neighborhood_attention(zero, zero, value, 3, rpb=rpb, scale=7.0, backend=backend)
        wanted = torch.tensor([14 / 12, 11 / 9, 20 / 9, 29 / 9, 20 / 6], dtype=torch.float64)
        torch.testing.assert_close(out.flatten(), wanted)

    def test_neighbors_by_brute_force(self):
        for length, kernel, dilation in ((23, 5, 3), (20, 4, 4), (31, 7, 4), (14, 7, 2)):
            found, offsets = reference.axis_neighbors(length, kernel, dilation)
            for i in range(length):
                members = [j for j in range(length) if j % dilation == i % dilation]
                place = members.index(i)
                first = min(max(place - kernel // 2, 0), len(members) - kernel)
                assert found[i].tolist() == members[first : first + kernel]
                wanted = [members.index(j) - place + kernel - 1 for j in found[i].tolist()]
                assert offsets[i].tolist() == wanted


def test_tiles_of_a_kind_lie_side_by_side():
    """The backward pass adds tiles of a kind as one strip."""
    for members in range(2, 90):
        for kernel in range(2, min(members, 24) + 1):
            kinds = tiling.kinds(members, kernel)
            assert sorted(number for kind in kinds for number in kind.tiles) == list(
                range(sum(len(k.tiles) for k in kinds))
            )
            for kind in kinds:
                tile = len(kind.start)
                assert list(kind.keys) == list(range(kind.keys[0], kind.keys[0] + tile * len(kind.keys), tile))


@contextlib.contextmanager
def poisoned():
    """Fresh memory is filled with NaN, so that a read of unwritten memory changes results."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all(), "memory is not poisoned: this test would prove nothing"
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


class TestPortable:
    @pytest.mark.parametrize(("size", "kernel", "dilation"), SHAPES)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("packed", [True, False])
    def test_float64(self, size, kernel, dilation, bias, packed):
        arguments = inputs(size, pair(kernel), bias=bias, packed=packed)
        wanted = run(arguments, kernel, dilation, "reference")
        assert_all_close(run(arguments, kernel, dilation, "portable"), wanted, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("dim", [8, 24, 32, 64, 128])
    @pytest.mark.parametrize("heads", [1, 3])
    def test_head_dims(self, dim, heads):
        arguments = inputs((18, 15), (7, 7), heads=heads, dim=dim, batch=1)
        wanted = run(arguments, 7, 2, "reference")
        assert_all_close(run(arguments, 7, 2, "portable"), wanted, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize(
        ("size", "kernel", "dilation"), [((23, 25), 7, 1), ((14, 14), 7, 2), ((29, 31), 7, (4, 2))]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_error_is_no_worse_than_plain_pytorch(self, size, kernel, dilation, dtype):
        """The error is at most twice the definition's error in the same dtype."""
        arguments = inputs(size, pair(kernel), dim=32, dtype=dtype)
        exact = run([x.detach().double().requires_grad_() for x in arguments], kernel, dilation, "reference")
        plain = run(arguments, kernel, dilation, "reference")
        fast = run(arguments, kernel, dilation, "portable")
        for name, e, p, f in zip(("out", "query", "key", "value", "rpb"), exact, plain, fast):
            error, limit = ((x.double() - e).square().mean().sqrt() for x in (f, p))
            assert error <= 2 * limit, f"{name}: {error:.2e} against {limit:.2e}"

    def test_big_map_in_parts(self, monkeypatch):
        """Gradients are equal whether a part has several heads, tiles and images, or these have several parts."""
        arguments = inputs((33, 40), (7, 7), heads=3, batch=2)
        wanted = run(arguments, 7, 1, "portable")
        for chunk in (1, 49 * 169, 3 * 49 * 169 * 4):
            monkeypatch.setattr(portable, "_CHUNK", chunk)
            assert_all_close(run(arguments, 7, 1, "portable"), wanted, rtol=1e-12, atol=1e-12)

    def test_sequences(self):
        arguments = inputs((41,), (7,), heads=2)
        wanted = run(arguments, 7, 3, "reference")
        assert_all_close(run(arguments, 7, 3, "portable"), wanted, rtol=1e-12, atol=1e-12)

    @settings(max_examples=40, deadline=None)
    @given(
        kernel=st.tuples(st.integers(2, 9), st.integers(2, 9)),
        dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        extra=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    )
    def test_any_geometry(self, kernel, dilation, extra):
        size = tuple(k * d + e for k, d, e in zip(kernel, dilation, extra))
        arguments = inputs(size, kernel, dim=4)
        wanted = run(arguments, kernel, dilation, "reference")
        assert_all_close(run(arguments, kernel, dilation, "portable"), wanted, rtol=1e-10, atol=1e-10)

    def test_unwritten_memory_is_not_read(self):
        """With fresh memory full of NaN, outputs and gradients stay finite."""
        with poisoned():
            for size, kernel, dilation in SHAPES:
                results = run(inputs(size, pair(kernel)), kernel, dilation, "portable")
                assert all(x.isfinite().all() for x in results), (size, kernel, dilation)

    def test_large_scores_stay_finite(self):
        arguments = [x.detach().mul(1e4).requires_grad_() for x in inputs((20, 20), (7, 7), dtype=torch.float32)]
        assert all(x.isfinite().all() for x in run(arguments, 7, 1, "portable"))

    @pytest.mark.parametrize("limits", [{}, {"_CACHED": 0}, {"_PIECE": 1}, {"_PIECE": 3000}])
    def test_exported_form_equals_portable(self, monkeypatch, limits):
        """The forms agree for every way to cut pieces, and for both kinds of products."""
        for name, value in limits.items():
            monkeypatch.setattr(portable, name, value)
        for size, kernel, dilation in SHAPES:
            for bias in (True, False):
                q, k, v, rpb = inputs(size, pair(kernel))
                arguments = (q, k, v, rpb if bias else None, pair(kernel), pair(dilation), 0.3)
                with torch.no_grad():
                    torch.testing.assert_close(
                        portable.forward(*arguments), exported.forward(*arguments), rtol=0, atol=1e-14
                    )


class TestProperties:
    """The forms that run on a CPU have the properties that follow from the definition."""

    @pytest.fixture(autouse=True, params=["portable", "fused"])
    def form(self, request):
        if request.param == "fused":
            pytest.importorskip("numba", reason="needs the extra 'cpu'")
        with use_backend(request.param):
            yield

    def test_whole_map_is_dense_attention(self):
        q, k, v, rpb = inputs((7, 6), (7, 6))
        out = neighborhood_attention(q, k, v, (7, 6), rpb=rpb)
        rows = torch.arange(7)[None, :] - torch.arange(7)[:, None] + 6
        columns = torch.arange(6)[None, :] - torch.arange(6)[:, None] + 5
        bias = rpb[:, rows[:, None, :, None], columns[None, :, None, :]].reshape(2, 42, 42)
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        dense = ((q @ k.transpose(-1, -2)) * 8**-0.5 + bias).softmax(-1) @ v
        torch.testing.assert_close(out, dense.transpose(1, 2).reshape(out.shape))

    def test_grid_attention(self):
        """On a map of kernel x dilation, each residue class has dense attention to itself."""
        q, k, v, rpb = inputs((21, 14), (7, 7))
        out = neighborhood_attention(q, k, v, 7, (3, 2), rpb)
        for r in range(3):
            for c in range(2):
                part = neighborhood_attention(*(x[:, r::3, c::2] for x in (q, k, v)), 7, 1, rpb)
                torch.testing.assert_close(out[:, r::3, c::2], part)

    def test_residue_classes_are_independent(self):
        q, k, v, rpb = inputs((25, 22), (5, 5))
        out = neighborhood_attention(q, k, v, 5, (3, 4), rpb)
        for r in range(3):
            for c in range(4):
                part = neighborhood_attention(*(x[:, r::3, c::4] for x in (q, k, v)), 5, 1, rpb)
                torch.testing.assert_close(out[:, r::3, c::4], part)

    def test_mirror(self):
        q, k, v, rpb = inputs((20, 17), (7, 5))
        out = neighborhood_attention(q, k, v, (7, 5), (2, 3), rpb)
        flipped = neighborhood_attention(*(x.flip(2) for x in (q, k, v)), (7, 5), (2, 3), rpb.flip(2))
        # Mirroring maps residue class r to (W - 1 - r) mod d: the classes stay, their order changes.
        torch.testing.assert_close(flipped.flip(2), out)

    def test_transpose(self):
        q, k, v, rpb = inputs((20, 17), (7, 5))
        out = neighborhood_attention(q, k, v, (7, 5), (2, 3), rpb)
        turned = neighborhood_attention(*(x.transpose(1, 2) for x in (q, k, v)), (5, 7), (3, 2), rpb.transpose(1, 2))
        torch.testing.assert_close(turned.transpose(1, 2), out)

    def test_weights_sum_to_one(self):
        q, k, v, rpb = inputs((20, 17), (7, 7))
        out = neighborhood_attention(q, k, torch.ones_like(v), 7, 2, rpb)
        torch.testing.assert_close(out, torch.ones_like(out))

    def test_gradient_sums(self):
        """Softmax ignores a shift, so gradients of the bias, and also of the keys, sum to zero for each head."""
        _, _, grad_k, _, grad_rpb = run(inputs((20, 17), (7, 7)), 7, 2, "portable")
        torch.testing.assert_close(grad_rpb.sum((1, 2)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-11)
        total = grad_k.sum((1, 2))
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-11)

    def test_one_key_reaches_exactly_its_queries(self):
        q, k, v, rpb = (x.detach() for x in inputs((19, 23), (5, 5), batch=1, heads=1))
        out = neighborhood_attention(q, k, v, 5, 1, rpb)

        def range_of(m, n, kernel=5):
            low = 0 if m < kernel else m - (kernel - 1 - kernel // 2)
            high = n - 1 if m >= n - kernel else m + kernel // 2
            return range(low, high + 1)

        for y, x in ((0, 0), (4, 5), (9, 11), (18, 22), (17, 3), (14, 18)):
            changed = v.clone()
            changed[0, y, x] += 1
            differs = (neighborhood_attention(q, k, changed, 5, 1, rpb) != out).any(-1)[0, :, :, 0]
            wanted = torch.zeros(19, 23, dtype=torch.bool)
            for i in range_of(y, 19):
                wanted[i, list(range_of(x, 23))] = True
            assert torch.equal(differs, wanted), (y, x)


class TestOperator:
    @pytest.mark.parametrize("bias", [True, False])
    def test_opcheck(self, bias):
        for size, kernel, dilation in (((9, 11), (3, 5), (1, 2)), ((6, 6), (3, 3), (2, 2))):
            arguments = inputs(size, kernel, dim=4, dtype=torch.float32, bias=bias)
            rpb = arguments[3] if bias else None
            torch.library.opcheck(
                torch.ops.terrazzo.neighborhood_attention.default,
                (*arguments[:3], rpb, kernel, dilation, 0.5, "portable"),
            )

    @pytest.mark.long
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gradcheck(self, backend):
        arguments = inputs((7, 6), (3, 2), dim=2, batch=1)
        assert torch.autograd.gradcheck(
            lambda q, k, v, rpb: neighborhood_attention(q, k, v, (3, 2), (2, 1), rpb, backend=backend), arguments
        )

    @pytest.mark.long
    def test_compiles_without_a_break(self):
        arguments = inputs((15, 14), (7, 7), dtype=torch.float32)
        compiled = torch.compile(neighborhood_attention, fullgraph=True, backend="aot_eager", dynamic=True)
        for size in ((15, 14), (17, 23)):
            arguments = inputs(size, (7, 7), dtype=torch.float32)
            with use_backend("portable"):
                wanted = neighborhood_attention(*arguments[:3], 7, 2, arguments[3])
                torch.testing.assert_close(compiled(*arguments[:3], 7, 2, arguments[3]), wanted)

    def test_half_inputs_with_a_float32_bias(self):
        """A model passes these dtypes under autocast."""
        arguments = inputs((15, 14), (7, 7), dtype=torch.bfloat16)
        arguments[3] = arguments[3].detach().float().requires_grad_()
        results = run(arguments, 7, 2, "portable")
        assert results[0].dtype == torch.bfloat16
        assert results[4].dtype == torch.float32

    def test_flop_formula(self):
        from torch.utils.flop_counter import FlopCounterMode

        q = torch.zeros(2, 20, 21, 3, 8, device="meta")
        with FlopCounterMode(display=False) as counter:
            neighborhood_attention(q, q, q, 7, 2)
        forward = 2 * 2 * (2 * 20 * 21 * 3 * 8) * 49
        assert counter.get_total_flops() == forward
        q.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            neighborhood_attention(q, q, q, 7, 2).sum().backward()
        assert counter.get_total_flops() == forward + forward * 5 // 2  # five products backward, two forward

    @pytest.mark.parametrize("axis", [1, 2])
    def test_export_with_one_open_side_is_refused(self, axis):
        class Attention(torch.nn.Module):
            def forward(self, q):
                return neighborhood_attention(q, q, q, 3)

        q = torch.zeros(1, 8, 9, 1, 4)
        shapes = ({axis: torch.export.Dim("side", min=6, max=64)},)
        with pytest.raises(Exception, match="images of one size"):  # the exporter may wrap the refusal
            torch.export.export(Attention(), (q,), dynamic_shapes=shapes, strict=False)


class TestBackends:
    def test_names(self, monkeypatch):
        q = torch.zeros(1, 8, 8, 1, 4)
        with pytest.raises(InputError, match="'cuda' is not one of auto, fused, portable, reference"):
            neighborhood_attention(q, q, q, 3, backend="cuda")
        with pytest.raises(InputError, match="not one of"), use_backend("gpu"):
            pass
        monkeypatch.setenv("TERRAZZO_BACKEND", "nope")
        with pytest.raises(InputError, match="'nope', asked for by the environment variable TERRAZZO_BACKEND, is not"):
            neighborhood_attention(q, q, q, 3)
        monkeypatch.setenv("TERRAZZO_BACKEND", "")
        assert neighborhood_attention(q, q, q, 3).shape == q.shape

    @pytest.fixture
    def without_numba(self, monkeypatch):
        """Whatever this machine has: without Numba no kernels run on a CPU."""
        machine = importlib.import_module("terrazzo.kernels.numba_host.machine")
        monkeypatch.setattr(machine, "has_numba", lambda: False)

    def test_a_named_backend_that_cannot_run_says_why(self, monkeypatch, without_numba):
        q = torch.zeros(1, 8, 8, 1, 4)
        with pytest.raises(BackendError, match=r"backend 'fused'.*needs the package numba, which is not installed"):
            neighborhood_attention(q, q, q, 3, backend="fused")
        with use_backend("fused"), pytest.raises(BackendError, match="use_backend"):
            neighborhood_attention(q, q, q, 3)
        monkeypatch.setenv("TERRAZZO_BACKEND", "fused")
        with pytest.raises(BackendError, match="TERRAZZO_BACKEND"):
            neighborhood_attention(q, q, q, 3)

    def test_precedence(self, monkeypatch, without_numba):
        operator = importlib.import_module("terrazzo.kernels.neighborhood_attention.op").OPERATOR
        q = torch.zeros(1, 8, 8, 1, 8)
        assert operator.why("auto", q).name == "portable"
        assert "fused" in operator.why("auto", q).reasons
        monkeypatch.setenv("TERRAZZO_BACKEND", "reference")
        assert operator.why("auto", q).name == "reference"
        with use_backend("portable"):
            assert operator.why("auto", q).name == "portable"
            assert operator.why("reference", q).name == "reference"


class TestErrors:
    @pytest.mark.parametrize(
        ("shape", "arguments", "message"),
        [
            ((1, 13, 14, 1, 4), {"kernel_size": 7, "dilation": 2}, "axis 0 has 13 positions, fewer than .* = 14"),
            ((1, 14, 13, 1, 4), {"kernel_size": 7, "dilation": 2}, "axis 1 has 13 positions"),
            ((1, 6, 1, 4), {"kernel_size": 7}, "axis 0 has 6 positions"),
            ((1, 9, 9, 1, 4), {"kernel_size": 1}, "kernel_size must be at least 2, got 1"),
            ((1, 9, 9, 1, 4), {"kernel_size": 3, "dilation": 0}, "dilation must be at least 1, got 0"),
            ((1, 9, 9, 1, 4), {"kernel_size": (3, 3, 3)}, "kernel_size must be an int or 2 ints"),
            ((1, 9, 9, 1, 4), {"kernel_size": 3.0}, "kernel_size must be an int"),
            ((9, 9, 4), {"kernel_size": 3}, "query must be"),
            ((1, 9, 9, 2, 4), {"kernel_size": 3, "rpb": torch.zeros(2, 5, 4)}, r"\(2, 5, 5\), got \(2, 5, 4\)"),
            ((1, 9, 9, 2, 4), {"kernel_size": 3, "rpb": torch.zeros(2, 5, 5, dtype=torch.long)}, "floating"),
            (
                (1, 2, 9, 9, 4),
                {"kernel_size": 3},
                r"versions of NATTEN, pass x.permute\(0, 2, 3, 1, 4\) for each tensor",
            ),
            ((1, 2, 9, 4), {"kernel_size": 3}, r"axis 0 has 2 .* pass x.permute\(0, 2, 1, 3\)"),
            ((1, 3, 9, 9, 4), {"kernel_size": 3, "rpb": torch.zeros(3, 5, 5)}, r"got \(3, 5, 5\); if axis 1 holds"),
            ((1, 9, 9, 2, 4), {"kernel_size": 3, "scale": float("nan")}, "scale must be a finite number, got nan"),
            ((1, 9, 9, 2, 4), {"kernel_size": 3, "scale": torch.ones((), requires_grad=True)}, "requires a gradient"),
            ((1, 9, 9, 0, 4), {"kernel_size": 3}, "at least 1 head"),
        ],
    )
    def test_messages(self, shape, arguments, message):
        q = torch.zeros(shape)
        with pytest.raises(InputError, match=message):
            neighborhood_attention(q, q, q, **arguments)

    def test_ints_of_any_kind(self):
        q = torch.randn(1, 9, 9, 1, 4)
        wanted = neighborhood_attention(q, q, q, (3, 4), 2)
        for kernel in ((np.int64(3), np.int32(4)), [torch.tensor(3), 4]):
            assert torch.equal(neighborhood_attention(q, q, q, kernel, np.int16(2)), wanted)
        for wrong in (True, np.bool_(True), 3.0, "3", None, torch.tensor(3.0), float("nan")):
            with pytest.raises(InputError, match="kernel_size must be an int, got"):
                neighborhood_attention(q, q, q, wrong)

    def test_mismatched_inputs(self):
        q = torch.zeros(1, 9, 9, 1, 4)
        with pytest.raises(InputError, match="one shape"):
            neighborhood_attention(q, q, q[:, :8], 3)
        with pytest.raises(InputError, match="one floating dtype"):
            neighborhood_attention(q, q.half(), q, 3)


def _forget_plans():
    tables.Eager.plan.cache_clear()
    tables.Eager.folding.cache_clear()
    portable._plan.cache_clear()


class TestMutations:
    """Break the window mask, the bias index or the class lengths on purpose: the comparisons above must fail."""

    def mismatch(self, size, kernel, dilation):
        _forget_plans()
        arguments = inputs(size, (kernel, kernel))
        wanted = run(arguments, kernel, dilation, "reference")
        with poisoned():
            found = run(arguments, kernel, dilation, "portable")
        return max((a - b).abs().nan_to_num(math.inf).max().item() for a, b in zip(found, wanted))

    @pytest.fixture(autouse=True)
    def _forget(self):
        yield
        _forget_plans()

    def test_unbroken(self):
        assert self.mismatch((25, 30), 7, 1) < 1e-10
        assert self.mismatch((25, 30), 7, 3) < 1e-10

    @pytest.mark.parametrize("part", [tables, portable], ids=["tables", "strides"])
    @pytest.mark.parametrize("field", ["start", "offset"])
    def test_mask_and_bias(self, monkeypatch, field, part):
        kinds = tiling.kinds

        def broken(members, kernel):
            return tuple(
                dataclasses.replace(kind, **{field: tuple(i + 1 for i in getattr(kind, field))})
                for kind in kinds(members, kernel)
            )

        monkeypatch.setattr(part, "kinds", broken)
        if part is portable:
            monkeypatch.setattr(part, "_indices", _clamped(portable._indices))
        assert self.mismatch((25, 30), 7, 1) > 1e-3

    @pytest.mark.parametrize("part", [tables, portable], ids=["tables", "strides"])
    def test_class_length(self, monkeypatch, part):
        """Every class is as long as the shortest, floor(L / d)."""

        def broken(length, dilation):
            return (tiling.Fold(0, dilation, length // dilation),)

        monkeypatch.setattr(part, "folds", broken)
        if part is tables:
            with pytest.raises(RuntimeError):  # without the lost positions, a reshape fails
                self.mismatch((25, 30), 7, 3)
        else:
            assert self.mismatch((25, 30), 7, 3) > 1e-3

    def test_repeated_queries(self, monkeypatch):
        kinds = tiling.kinds

        def broken(members, kernel):
            return tuple(
                dataclasses.replace(kind, real=tuple(tuple(True for _ in tile) for tile in kind.real))
                for kind in kinds(members, kernel)
            )

        monkeypatch.setattr(tables, "kinds", broken)
        monkeypatch.setattr(tables, "_slots", _slots_by_hand)
        assert self.mismatch((25, 30), 7, 1) > 1e-3


def _clamped(indices):
    """`_indices` with bias offsets clamped to the table: they give a wrong number instead of an error."""

    def call(kind, kernel):
        inside, offset = indices(kind, kernel)
        return inside, offset.clamp(0, 2 * kernel - 2)

    return call


def _slots_by_hand(axis, device):
    """`_slots` that finds repeated queries itself, so that only the backward pass is wrong."""
    tile = len(axis[0].start)
    count = max(max(queries) for kind in axis for queries in kind.queries) + 1
    homes = sorted((number, k, t) for k, kind in enumerate(axis) for t, number in enumerate(kind.tiles))
    home = torch.tensor(homes, device=device).repeat_interleave(tile, 0)[:count]
    return home[:, 1], home[:, 2], torch.arange(count, device=device) % tile


@pytest.mark.parametrize("size", [(23, 30), (7, 11), (45, 12)])
@pytest.mark.parametrize("dilation", [(2, 2), (4, 7), (5, 3), (1, 4)])
def test_places_undo_the_folding(size, dilation):
    """The gather after the groups inverts the gathers before them, without sorting."""
    from terrazzo.kernels.neighborhood_attention.tables import build_folding

    folding = build_folding(size, dilation, torch.device("cpu"))
    if folding.positions is None:
        assert all(length % step == 0 for length, step in zip(size, dilation))
        return
    assert torch.equal(torch.cat(folding.positions)[folding.order], torch.arange(size[0] * size[1]))

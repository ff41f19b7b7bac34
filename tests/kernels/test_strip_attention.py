"""Strip attention: worked examples check the definition, and the definition checks the portable form."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_common import poisoned
from support.triton_strip import NAMES, exact, inputs, run

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import strip_attention, use_backend
from terrazzo.kernels.numba_host import machine

op = importlib.import_module("terrazzo.kernels.strip_attention.op")
portable = importlib.import_module("terrazzo.kernels.strip_attention.portable")
BACKENDS = ("reference", "portable")

# Images, queries, keys, heads, head_dim; some are the maps of S2AFormer at 224.
SHAPES = [
    (2, 1, 1, 1, 1),
    (1, 7, 5, 3, 8),
    (2, 49, 49, 9, 32),
    (1, 784, 49, 2, 32),
    (3, 20, 64, 1, 24),
    (1, 5, 300, 2, 40),
]


def assert_all_close(found, wanted, **tolerance):
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def numbers(*values):
    """The values as a tensor (1, n, 1) in float64."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
class TestDefinition:
    def test_by_hand(self, backend):
        """With keys 0 and ln 2 and values 0 and 1, a query q gives 2^q / (1 + 2^q)."""
        query, key, value = numbers(1, 0, -1, 2), numbers(0, math.log(2)), numbers(0, 1).unsqueeze(-1)
        out = strip_attention(query, key, value, backend=backend)
        torch.testing.assert_close(out.flatten(), torch.tensor([2 / 3, 1 / 2, 1 / 3, 4 / 5], dtype=torch.float64))

    def test_one_key_or_equal_keys_give_the_mean(self, backend):
        query, _, value = (x.detach() for x in inputs(1, 6, 5, 2, 4))
        out = strip_attention(query, torch.full((1, 5, 2), 0.3, dtype=torch.float64), value, backend=backend)
        torch.testing.assert_close(out, value.mean(1, keepdim=True).expand_as(out))

    def test_large_queries_select_extreme_keys(self, backend):
        _, key, value = (x.detach() for x in inputs(1, 2, 7, 1, 4))
        out = strip_attention(numbers(1e6, -1e6), key, value, backend=backend)
        for row, place in zip(out[0], (key.argmax(), key.argmin())):
            torch.testing.assert_close(row, value[0, place])

    def test_invariances(self, backend):
        """Outputs stay if keys are shifted, if queries and keys are negated, or if keys and values are reordered."""
        query, key, value = (x.detach() for x in inputs(2, 9, 7, 3, 4))
        out = strip_attention(query, key, value, backend=backend)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        for other in ((query, key + 1.7, value), (-query, -key, value), (query, key[:, order], value[:, order])):
            torch.testing.assert_close(strip_attention(*other, backend=backend), out)

    def test_derivative_is_a_covariance(self, backend):
        """do/dq is the covariance of keys and values under the weights; keys' gradients sum to zero."""
        arguments = inputs(1, 4, 6, 2, 3)
        _, grad_query, grad_key, _ = run(arguments, backend)
        query, key, value = (x.detach() for x in arguments)
        weight = torch.softmax(torch.einsum("bnh,blh->bnhl", query, key), -1)
        mean_key, mean_value = (
            torch.einsum("bnhl,blh->bnh", weight, key),
            torch.einsum("bnhl,blhd->bnhd", weight, value),
        )
        covariance = torch.einsum("bnhl,blh,blhd->bnhd", weight, key, value) - mean_key.unsqueeze(-1) * mean_value
        grad = torch.randn(mean_value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(grad_query, (grad * covariance).sum(-1))
        # A shift of all keys of a head changes no output.
        torch.testing.assert_close(grad_key.sum(1), torch.zeros(1, 2, dtype=torch.float64), rtol=0, atol=1e-12)

    def test_gradcheck(self, backend):
        arguments = inputs(2, 5, 4, 2, 3)
        assert torch.autograd.gradcheck(lambda *given: strip_attention(*given, backend=backend), arguments)


class TestPortable:
    @pytest.fixture(autouse=True)
    def _in_pieces(self, monkeypatch):
        """Cut small calls into pieces, too. TestDefinition checks how small calls usually run."""
        monkeypatch.setattr(op, "_SMALL", 0)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("layout", ["plain", "packed", "turned"])
    def test_float64(self, shape, layout):
        arguments = inputs(*shape, layout=layout)
        with poisoned():
            found = run(arguments, "portable")
        assert_all_close(found, run(arguments, "reference"), rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("piece", [1, 30, 100, 7 * 300, 10**9])
    def test_pieces(self, monkeypatch, piece):
        """Pieces of a head's queries, of single heads and of several heads give the same numbers."""
        arguments = inputs(2, 300, 7, 3, 8)
        monkeypatch.setattr(portable, "_PIECE", piece)
        with poisoned():
            found = run(arguments, "portable")
        assert_all_close(found, run(arguments, "reference"), rtol=1e-11, atol=1e-11)

    @settings(max_examples=30, deadline=None)
    @given(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(1, 9)))
    def test_any_shape(self, shape):
        arguments = inputs(*shape)
        assert_all_close(run(arguments, "portable"), run(arguments, "reference"), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_error_is_no_worse_than_plain_pytorch(self, dtype):
        """The error is at most twice the definition's error in the same dtype."""
        arguments = inputs(2, 130, 49, 3, 32, dtype)
        for name, e, p, f in zip(NAMES, exact(arguments), run(arguments, "reference"), run(arguments, "portable")):
            error, limit = ((x.double() - e).square().mean().sqrt() for x in (f, p))
            assert error <= 2 * limit, f"{name}: {error:.2e} against {limit:.2e}"

    def test_half_precision_does_not_overflow(self):
        """float16 holds queries and keys, but not their product."""
        query, key, value = inputs(1, 8, 5, 1, 4, torch.float16)
        query, key = (x.detach().mul(2000).requires_grad_() for x in (query, key))
        assert all(x.isfinite().all() for x in run((query, key, value), "portable"))

    @pytest.mark.parametrize("shape", [(0, 4, 5, 1, 8), (2, 0, 5, 1, 8)])
    def test_nothing_to_do(self, shape):
        found = run(inputs(*shape), "portable")
        assert [x.shape for x in found] == [(*shape[:2], 1, 8), (*shape[:2], 1), (shape[0], 5, 1), (shape[0], 5, 1, 8)]
        assert not any(x.any() for x in found)

    @pytest.mark.parametrize(("weights", "at_once"), [(2 * 9 * 7 * 3, True), (2 * 9 * 7 * 3 - 1, False)])
    def test_small_calls_are_done_at_once(self, monkeypatch, weights, at_once):
        """Small calls run outside of the op with equal results, but never in half precision."""
        arguments = inputs(2, 9, 7, 3, 4)
        wanted = run(arguments, "reference")
        calls = []
        monkeypatch.setattr(op, "_SMALL", weights)
        monkeypatch.setattr(portable, "forward", lambda *given, form=portable.forward: calls.append(1) or form(*given))
        assert_all_close(run(arguments, "portable"), wanted)
        assert bool(calls) != at_once
        run([x.detach().bfloat16().requires_grad_() for x in arguments], "portable")
        assert len(calls) == (1 if at_once else 2)

    def test_mutation(self, monkeypatch):
        """If queries between two pieces are lost, the comparisons above must fail."""
        pieces = portable._pieces

        def broken(*sizes):
            for group, row in pieces(*sizes):
                yield group, slice(row.start, row.stop - 1)

        arguments = inputs(1, 300, 7, 1, 8)
        monkeypatch.setattr(portable, "_PIECE", 7 * 100)
        monkeypatch.setattr(portable, "_pieces", broken)
        with poisoned():
            found = run(arguments, "portable")
        wanted = run(arguments, "reference")
        assert all(not torch.allclose(a, b) for a, b in zip(found, wanted))


class TestOperator:
    @pytest.mark.parametrize("layout", ["plain", "packed"])
    def test_opcheck(self, layout):
        arguments = inputs(2, 9, 5, 2, 8, layout=layout)
        torch.library.opcheck(torch.ops.terrazzo.strip_attention.default, (*arguments, "portable"))

    def test_compiles_without_a_break(self):
        compiled = torch.compile(strip_attention, fullgraph=True, backend="aot_eager", dynamic=True)
        for queries, keys in ((30, 7), (41, 9)):
            arguments = inputs(2, queries, keys, 2, 8)
            torch.testing.assert_close(compiled(*arguments), strip_attention(*arguments))

    def test_flop_formula(self):
        from torch.utils.flop_counter import FlopCounterMode

        query, key = (torch.zeros(2, n, 3, device="meta", requires_grad=True) for n in (20, 7))
        value = torch.zeros(2, 7, 3, 8, device="meta", requires_grad=True)
        pairs = 2 * 3 * 20 * 7
        with FlopCounterMode(display=False) as counter:
            out = strip_attention(query, key, value)
        assert counter.get_total_flops() == 2 * pairs * 9
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * pairs * (3 + 16)

    def test_backends(self, monkeypatch):
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        query, key, value = inputs(1, 4, 3, 1, 8, torch.float32)
        with pytest.raises(BackendError, match=r"strip_attention: backend 'fused'.*needs the package numba"):
            strip_attention(query, key, value, backend="fused")
        why = importlib.import_module("terrazzo.kernels.strip_attention.op").OPERATOR.why
        assert why("auto", query, key, value).name == "portable"
        assert "fused" in why("auto", query, key, value).reasons
        with use_backend("reference"):
            assert why("auto", query, key, value).name == "reference"
        monkeypatch.setenv("TERRAZZO_BACKEND", "fused")
        with pytest.raises(BackendError, match="TERRAZZO_BACKEND"):
            strip_attention(query, key, value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"query": torch.zeros(1, 2, 3, 1)}, r"query must be \(B, N, heads\)"),
            ({"value": torch.zeros(1, 5, 3)}, r"value \(B, L, heads, head_dim\)"),
            ({"query": torch.zeros(2, 4, 3)}, "agree in batch and heads"),
            ({"query": torch.zeros(1, 4, 2)}, "agree in batch and heads"),
            ({"key": torch.zeros(1, 6, 3)}, "also in length"),
            ({"key": torch.zeros(1, 0, 3), "value": torch.zeros(1, 0, 3, 8)}, "at least 1 key"),
            ({"key": torch.zeros(1, 5, 3).half()}, "one floating dtype"),
        ],
    )
    def test_errors(self, change, message):
        arguments = dict(query=torch.zeros(1, 4, 3), key=torch.zeros(1, 5, 3), value=torch.zeros(1, 5, 3, 8))
        with pytest.raises(InputError, match=message):
            strip_attention(**{**arguments, **change})
        with pytest.raises(InputError, match="not one of"):
            strip_attention(**arguments, backend="cuda")

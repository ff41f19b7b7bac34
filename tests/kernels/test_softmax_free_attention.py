"""Softmax-free attention: worked examples check the definition, and the definition checks the portable form."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_common import poisoned
from support.triton_soft import NAMES, exact, inputs, run

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import softmax_free_attention, use_backend
from terrazzo.kernels.triton_host import machine

folder = "terrazzo.kernels.softmax_free_attention"
composed, middle, op, portable, reference = (
    importlib.import_module(f"{folder}.{name}") for name in ("composed", "middle", "op", "portable", "reference")
)
BACKENDS = ("reference", "portable")
FORMS = [
    dict(),
    dict(normalised=True),
    dict(normalised=True, alpha_scope="global"),
    dict(normalised=True, implicit=True),
]


def assert_all_close(found, wanted, **tolerance):
    for name, a, b in zip(NAMES, found, wanted, strict=False):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def matrices(*values):
    return torch.tensor(values, dtype=torch.float64)[None, None]


@pytest.mark.parametrize("backend", BACKENDS)
class TestDefinition:
    def test_by_hand(self, backend):
        """Two landmarks whose kernel is 1/2; the inverse of [[1.01, .5], [.5, 1.01]] is known to six digits."""
        apart = (2 * torch.tensor(2.0, dtype=torch.float64).log()).sqrt().item()
        landmark = matrices([0.0], [apart])
        out = softmax_free_attention(landmark, matrices([1.0], [0.0]), landmark, backend=backend)
        kernel = torch.tensor([[1, 0.5], [0.5, 1]], dtype=torch.float64)
        inverse = torch.tensor([[1.311518, -0.649266], [-0.649266, 1.311518]], dtype=torch.float64)
        torch.testing.assert_close(out[0, 0, :, 0], (kernel @ inverse @ kernel)[:, 0], rtol=0, atol=1e-6)

    def test_landmarks_at_the_queries_give_the_kernel(self, backend):
        """A M A is nearly A: SOFT's attention matrix becomes the Gaussian kernel without softmax."""
        query, value, _ = (x.detach() for x in inputs(1, 7, 1, 2, 8))
        query = 2 * query
        out = softmax_free_attention(query, value, query, backend=backend)
        torch.testing.assert_close(out, reference.gaussian(query, query) @ value, rtol=0, atol=0.05)

    def test_equal_landmarks(self, backend):
        """Everything is finite, in float32 too; SOFT++ finds the pseudo-inverse of a matrix of ones."""
        for dtype, normalised in itertools.product((torch.float32, torch.float64), (False, True)):
            query, value, landmark = inputs(1, 5, 49, 1, 8, dtype)
            landmark = landmark[:, :, :1].expand(-1, -1, 49, -1)
            out = softmax_free_attention(query, value, landmark, normalised=normalised, backend=backend)
            grads = torch.autograd.grad(out.square().sum(), (query, value))
            assert all(x.isfinite().all() for x in (out, *grads))
            if normalised:
                weight = reference.gaussian(query, landmark)
                wanted = weight @ (torch.ones(49, 49, dtype=dtype) / 49**3) @ weight.transpose(2, 3) @ value
                torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-6)

    def test_keys_are_the_queries(self, backend):
        query, value, landmark = inputs()
        for options in FORMS[:2]:
            shared = run([query, value, landmark], backend, **options)
            out, grad_query, *others, grad_key = run([query, value, landmark, query.detach().requires_grad_()], backend)
            if not options:
                assert_all_close(shared, [out, grad_query + grad_key, *others])

    def test_scope_of_alpha(self, backend):
        """With "matrix" an image's result does not depend on its neighbours in the batch; with "global" it does."""
        query, value, landmark = (x.detach() for x in inputs(2, 9, 20))
        landmark = torch.stack([landmark[0], 1 + 0.1 * landmark[1]])  # the second image's are nearly equal
        landmark[0] *= 0.5
        for scope, equal in (("matrix", True), ("global", False)):
            options = dict(normalised=True, alpha_scope=scope, backend=backend)
            both = softmax_free_attention(query, value, landmark, **options)[:1]
            alone = softmax_free_attention(query[:1], value[:1], landmark[:1], **options)
            assert torch.allclose(both, alone, rtol=0, atol=1e-9) == equal

    @pytest.mark.parametrize("options", FORMS[:3], ids=str)
    def test_gradcheck(self, backend, options):
        """Where the iteration converges, the gradient of an inverse is SOFT's derivative, too."""
        arguments = inputs(2, 5, 3, 2, 3, own_keys=True)

        def function(*given):
            return softmax_free_attention(*given, backend=backend, **options)

        assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


class TestMiddle:
    @pytest.mark.parametrize("scope", ["matrix", "global"])
    def test_start_is_that_of_the_loop(self, scope):
        """Counting halvings by sums gives the alpha that the official code's loop reaches."""
        for spread, size in itertools.product((0.05, 0.3, 1, 3), (1, 2, 7, 49)):
            landmark = spread * inputs(2, 1, size, 3, 8)[2].detach()
            matrix = reference.gaussian(landmark, landmark)
            over = (0, 1, 2, 3) if scope == "global" else (2, 3)
            alpha = 2 / matrix.sum(3, keepdim=True).amax(over, keepdim=True).square()
            for _ in range(10):
                worst = (torch.eye(size) - alpha * matrix @ matrix).abs().sum(2, keepdim=True).amax(over, keepdim=True)
                alpha = torch.where(worst > 1.01, alpha / 2, alpha)
            torch.testing.assert_close(middle.start(matrix, True, scope).alpha, alpha)

    @pytest.mark.parametrize("normalised", [False, True])
    @torch.no_grad()
    def test_float32_does_not_diverge(self, normalised):
        """Nearly equal landmarks give a singular matrix, on which the steps double rounding errors."""
        landmark = 1 + 0.01 * inputs(1, 1, 100, 2, 8, torch.float32)[2]
        matrices = [reference.gaussian(x, x) for x in (landmark, landmark.double())]
        found, wanted = (
            reference.normalised_inverse(x, "matrix") if normalised else reference.regular_inverse(x) for x in matrices
        )
        # Rounding of the matrix itself moves eigenvalues; the inverse stays of the right size.
        assert (found - wanted).norm() < 0.05 * wanted.norm()

    @pytest.mark.slow
    @pytest.mark.parametrize("normalised", [False, True])
    def test_landmarks_of_1024_pixels(self, normalised):
        """1024 landmarks, spread and nearly equal; outputs and gradients are finite after loss scaling, too."""
        for spread in (1.0, 0.01):
            query, value, landmark = inputs(1, 64, 1024, 1, 32, torch.float32)
            landmark = (1 + spread * landmark).detach().requires_grad_()
            out = softmax_free_attention(query, value, landmark, normalised=normalised)
            grads = torch.autograd.grad(out.sum() * 2**16, (query, value, landmark))
            assert all(x.isfinite().all() for x in (out, *grads))


class TestPortable:
    @pytest.mark.parametrize("options", FORMS, ids=str)
    @pytest.mark.parametrize("own_keys", [False, True])
    @pytest.mark.parametrize("layout", ["plain", "packed", "turned"])
    def test_float64(self, options, own_keys, layout):
        arguments = inputs(2, 70, 9, 3, 8, layout=layout, own_keys=own_keys)
        with poisoned():
            found = run(arguments, "portable", **options)
        assert_all_close(found, run(arguments, "reference", **options), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("piece", [1, 100, 2 * 7 * 50, 10**9])
    def test_pieces(self, monkeypatch, piece):
        """Pieces of an image's tokens, of single images and of several images give the same numbers."""
        arguments = inputs(3, 50, 7, 2, 8)
        monkeypatch.setattr(portable, "_PIECE", piece)
        with poisoned():
            found = run(arguments, "portable")
        assert_all_close(found, run(arguments, "reference"), rtol=1e-10, atol=1e-10)

    @settings(max_examples=20, deadline=None)
    @given(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(1, 9)))
    def test_any_shape(self, shape):
        arguments = inputs(*shape)
        assert_all_close(run(arguments, "portable"), run(arguments, "reference"), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("normalised", [False, True])
    def test_error_is_no_worse_than_plain_pytorch(self, dtype, normalised):
        """The error is at most twice the definition's error in the same dtype."""
        arguments = inputs(2, 130, 25, 3, 32, dtype)
        wanted, plain = exact(arguments, normalised=normalised), run(arguments, "reference", normalised=normalised)
        for name, e, p, f in zip(NAMES, wanted, plain, run(arguments, "portable", normalised=normalised)):
            error, limit = ((x.double() - e).square().mean().sqrt() for x in (f, p))
            assert error <= 2 * limit, f"{name}: {error:.2e} against {limit:.2e}"

    def test_nothing_to_do(self):
        found = run(inputs(0, 4, 3, 1, 8), "portable")
        assert [tuple(x.shape) for x in found] == [(0, 1, 4, 8), (0, 1, 4, 8), (0, 1, 4, 8), (0, 1, 3, 8)]

    @pytest.mark.parametrize("broken", ["pieces", "step", "halves"])
    def test_mutation(self, monkeypatch, broken):
        """If tokens between two pieces, a step or a square are lost, the comparisons above must fail."""
        if broken == "pieces":
            pieces = portable._pieces

            def cut(*tensors):
                for image, heads, row in pieces(*tensors):
                    yield image, heads, slice(row.start, row.stop - 1)

            monkeypatch.setattr(portable, "_pieces", cut)
        elif broken == "step":
            monkeypatch.setattr(portable, "newton", lambda a, b: middle.newton(a, b) * (1 + 1e-6))
        else:
            monkeypatch.setattr(portable, "_extended", lambda x, own: torch.cat([x, x[..., :2]], 3))
        arguments = inputs(1, 60, 7, 1, 8)
        with poisoned():
            found = run(arguments, "portable")
        wanted = run(arguments, "reference")
        assert all(not torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(found, wanted))


class TestOperator:
    @pytest.mark.parametrize("own_keys", [False, True])
    def test_opcheck(self, own_keys):
        query, value, landmark, *key = inputs(2, 9, 5, 2, 8, layout="packed", own_keys=own_keys)
        arguments = (query, key[0] if key else None, value, landmark, True, "global", False, "portable")
        torch.library.opcheck(torch.ops.terrazzo.softmax_free_attention.default, arguments)

    @pytest.mark.long
    def test_compiles_without_a_break(self):
        compiled = torch.compile(softmax_free_attention, fullgraph=True, backend="aot_eager", dynamic=True)
        for tokens, landmarks in ((30, 7), (41, 9)):
            arguments = inputs(2, tokens, landmarks, 2, 8)
            torch.testing.assert_close(compiled(*arguments), softmax_free_attention(*arguments))

    @pytest.mark.long
    @pytest.mark.parametrize(
        "options", [*(pytest.param(x, marks=pytest.mark.slow) for x in FORMS[:2]), FORMS[2]], ids=str
    )
    def test_export(self, options):
        """An exported graph has standard operations, and takes other numbers of tokens and images."""

        class Layer(torch.nn.Module):
            def forward(self, *arguments):
                return softmax_free_attention(*arguments, **options)

        batch, tokens = torch.export.Dim("batch", min=2, max=9), torch.export.Dim("tokens", min=4, max=999)
        arguments = tuple(x.detach() for x in inputs(2, 20, 7, 2, 8))
        sizes = ({0: batch, 2: tokens}, {0: batch, 2: tokens}, {0: batch})
        exported = torch.export.export(Layer(), arguments, dynamic_shapes=(sizes,), strict=True)
        assert not any("terrazzo" in str(node.target) for node in exported.graph.nodes)
        other = tuple(x.detach() for x in inputs(3, 31, 7, 2, 8))
        torch.testing.assert_close(exported.module()(*other), softmax_free_attention(*other, **options))

    def test_autocast_and_mixed_dtypes(self):
        """Autocast changes nothing, and each tensor may have its own precision."""
        query, value, landmark = inputs(dtype=torch.float32)
        wanted = run([query, value, landmark], "portable")
        with torch.autocast("cpu", torch.bfloat16):
            assert_all_close(run([query, value, landmark], "portable"), wanted, rtol=0, atol=0)
        narrow = value.detach().bfloat16().requires_grad_()
        found = run([query, narrow, landmark], "portable")
        assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]

    def test_tf32_stays_as_the_user_set_it(self):
        dtypes = importlib.import_module("terrazzo.kernels.dispatch.dtypes")
        before = torch.backends.cuda.matmul.allow_tf32
        try:
            for allowed in (True, False):
                torch.backends.cuda.matmul.allow_tf32 = allowed
                with dtypes.ieee_products():
                    assert machine.precision(torch.float32) == "ieee"
                assert machine.precision(torch.float32) == ("tf32" if allowed else "ieee")
                assert torch.backends.cuda.matmul.allow_tf32 == allowed
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def test_flop_formula(self):
        from torch.utils.flop_counter import FlopCounterMode

        query, value, landmark = (torch.zeros(2, 3, n, 8, device="meta", requires_grad=True) for n in (20, 20, 7))
        with FlopCounterMode(display=False) as counter:
            out = softmax_free_attention(query, value, landmark)
        assert counter.get_total_flops() == 2 * 2 * 3 * (3 * 20 * 7 * 8 + 2 * 7 * 7 * 8 + 40 * 7**3)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 3 * (10 * 20 * 7 * 8 + 4 * 7 * 7 * 8 + 2 * 7**3)

    def test_backends(self, monkeypatch):
        query, value, landmark = inputs(1, 4, 3, 1, 8, torch.float32)
        with pytest.raises(BackendError, match=r"softmax_free_attention: backend 'fused'.*the tensors are on cpu"):
            softmax_free_attention(query, value, landmark, backend="fused")
        assert op.OPERATOR.why("auto", query, None, value, landmark).name == "portable"
        with use_backend("reference"):
            assert op.OPERATOR.why("auto", query, None, value, landmark).name == "reference"
        monkeypatch.setenv("TERRAZZO_BACKEND", "fused")
        with pytest.raises(BackendError, match="TERRAZZO_BACKEND"):
            softmax_free_attention(query, value, landmark)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"query": torch.zeros(1, 4, 8)}, r"query, key and value must be \(B, heads, N, head_dim\)"),
            ({"query": torch.zeros(1, 2, 5, 8)}, "all of one shape"),
            ({"key": torch.zeros(1, 2, 5, 8)}, "all of one shape"),
            ({"landmark": torch.zeros(1, 3, 5, 8)}, "landmark must agree with value in batch, heads and head_dim"),
            ({"landmark": torch.zeros(1, 2, 5, 9)}, "landmark must agree with value"),
            ({"landmark": torch.zeros(1, 2, 0, 8)}, "at least 1 head, 1 token, 1 landmark"),
            ({"alpha_scope": "batch"}, "alpha_scope must be 'matrix' or 'global', got 'batch'"),
        ],
    )
    def test_errors(self, change, message):
        arguments = dict(query=torch.zeros(1, 2, 4, 8), value=torch.zeros(1, 2, 4, 8), landmark=torch.zeros(1, 2, 3, 8))
        with pytest.raises(InputError, match=message):
            softmax_free_attention(**{**arguments, **change})
        with pytest.raises(InputError, match="not one of"):
            softmax_free_attention(**arguments, backend="cuda")

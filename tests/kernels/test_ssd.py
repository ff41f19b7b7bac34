"""The state space dual: its definition, its chunked form, and its relation to the selective scan."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_common import check, limits
from support.triton_ssd import NAMES

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import selective_scan, ssd, use_backend
from terrazzo.kernels.numba_host import machine

portable = importlib.import_module("terrazzo.kernels.ssd.portable")


def inputs(batch=2, length=45, heads=4, width=3, groups=2, states=5, extras=True, dtype=torch.float64, rank=1):
    """x, dt, A, B, C, D, z, dt_bias that require gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    found = [
        draw(batch, length, heads, width),
        draw(batch, length, heads),
        -3 * draw(heads).abs(),
        draw(batch, length, groups, states),
        draw(batch, length, groups, states),
        draw(heads, width)[(slice(None), 0)[: 3 - rank]] if extras else None,
        draw(batch, length, heads, width) if extras else None,
        draw(heads) if extras else None,
    ]
    return [None if x is None else x.to(dtype).requires_grad_() for x in found]


def run(arguments, **options):
    """The output and all gradients."""
    out = ssd(*arguments, dt_softplus=True, **options)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, [x for x in arguments if x is not None], grad)]


def assert_all_close(found, wanted, **tolerance):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, **tolerance)


class TestDefinition:
    def test_by_hand(self):
        """With one head, one channel and one state, and steps that halve the state, outputs are 1, 1/2 + 1, 3/4 + 1."""
        ones = torch.ones(1, 3, 1, 1, dtype=torch.float64)
        decay = -torch.tensor([2.0], dtype=torch.float64).log()
        for backend in ("reference", "portable"):
            found = ssd(ones, ones[..., 0], decay, ones, ones, backend=backend)
            assert found.flatten().tolist() == pytest.approx([1, 1.5, 1.75])

    def test_is_attention_with_decays(self):
        """Y = (L o C B^T) dt X, where L[t, s] is the product of the decays from s to t."""
        x, dt, A, B, C, *_ = inputs(1, 9, 1, 3, 1, 4, extras=False)
        total = (F.softplus(dt)[0, :, 0] * A[0]).cumsum(0)
        decay = (total[:, None] - total[None, :]).exp().tril()
        wanted = (decay * (C[0, :, 0] @ B[0, :, 0].T)) @ (F.softplus(dt)[0] * x[0, :, 0])
        found = ssd(x, dt, A, B, C, dt_softplus=True, backend="reference")
        torch.testing.assert_close(found[0, :, 0], wanted)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_is_a_selective_scan_with_equal_decays(self, reverse):
        """Each head has one channel, and its states have equal decays."""
        x, dt, A, B, C, D, z, bias = inputs(2, 21, 6, 1, 3, 4)
        given = [t.squeeze(-1).transpose(1, 2) for t in (x, dt.unsqueeze(-1), z)]
        states = [t.permute(0, 2, 3, 1) for t in (B, C)]
        wanted = selective_scan(
            *given[:2], A[:, None].expand(6, 4), *states, D, given[2], bias, True, reverse, backend="reference"
        )
        for backend in ("reference", "portable"):
            found = ssd(x, dt, A, B, C, D, z, bias, True, reverse, backend=backend)
            torch.testing.assert_close(found.squeeze(-1).transpose(1, 2), wanted)


class TestPortable:
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("chunk", [1, 8, 16, 45, 64])
    def test_float64(self, chunk, reverse):
        arguments = inputs(rank=2 if reverse else 1, extras=chunk != 16)
        wanted = run(arguments, reverse=reverse, backend="reference")
        assert_all_close(run(arguments, reverse=reverse, chunk=chunk, backend="portable"), wanted, rtol=1e-9, atol=1e-9)

    @settings(max_examples=20, deadline=None)
    @given(
        st.tuples(st.integers(1, 2), st.integers(1, 70), st.just(6), st.integers(1, 4)),
        st.sampled_from((1, 2, 3, 6)),
        st.integers(1, 5),
    )
    def test_any_size(self, sizes, groups, states):
        arguments = inputs(*sizes, groups, states)
        assert_all_close(
            run(arguments, chunk=16, backend="portable"), run(arguments, backend="reference"), rtol=1e-8, atol=1e-8
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_error_is_no_worse_than_plain_pytorch(self, dtype):
        """The error is at most twice the definition's error, or three units in the last place of the result's size."""
        arguments = inputs(2, 200, 4, 16, 2, 16, dtype=dtype)
        wanted = run([x.detach().double().requires_grad_() for x in arguments], backend="reference")
        plain = run(arguments, backend="reference")
        found = run(arguments, backend="portable")
        check(limits(NAMES, found, plain, wanted, sums=("A", "D", "dt_bias")))

    @pytest.mark.parametrize(("length", "chunk"), [(4096, 64), pytest.param(65536, 256, marks=pytest.mark.slow)])
    def test_long_sequences_lose_no_digits(self, length, chunk):
        """With step sizes up to 20, running sums reach 10^5: decays must not be computed from their differences."""
        arguments = [x.detach().float() for x in inputs(1, length, 2, 2, 1, 4, extras=False)[:5]]
        arguments[1] *= 8
        found = ssd(*arguments, dt_softplus=True, chunk=chunk, backend="portable")
        wanted = ssd(*(x.double() for x in arguments), dt_softplus=True, backend="reference")
        assert found.isfinite().all()
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    def test_mutation(self, monkeypatch):
        """If decays count one step too many, the comparisons must fail."""
        sums = portable._sums_between
        monkeypatch.setattr(portable, "_sums_between", lambda x: sums(x) + x[..., :, None])
        arguments = inputs()
        found, wanted = (run(arguments, backend=name) for name in ("portable", "reference"))
        assert not any(torch.allclose(a, b) for a, b in zip(found[:4], wanted[:4]))

    @pytest.mark.long
    @pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_compiles_without_a_break(self, dynamic):
        """The form consists of standard operations. The compiler takes a minute for symbolic sizes."""
        compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for length in (45, 70):
            arguments = inputs(length=length)
            options = dict(backend="portable")
            torch.testing.assert_close(compiled(*arguments, **options), ssd(*arguments, **options))

    @pytest.mark.long
    @pytest.mark.parametrize("example", [pytest.param(100, marks=pytest.mark.slow), 40])
    def test_onnx(self, example, tmp_path):
        """The file has matrix products and no Scan, and takes any length, also from an example of one chunk."""
        onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")

        class Module(torch.nn.Module):
            def forward(self, x, dt, A, B, C):
                return ssd(x, dt, A, B, C, dt_softplus=True)

        arguments = [x.detach() for x in inputs(length=example, dtype=torch.float32, extras=False)[:5]]
        length = torch.export.Dim("length", min=2, max=10000)
        shapes = tuple(None if x.dim() == 1 else {1: length} for x in arguments)
        path = tmp_path / "ssd.onnx"
        torch.onnx.export(Module(), tuple(arguments), dynamo=True, dynamic_shapes=shapes, verbose=False).save(path)
        assert not {"Scan", "Loop"} & {node.op_type for node in onnx.load(path).graph.node}
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for length in (3, 65, 100, 300):
            arguments = [x.detach() for x in inputs(length=length, dtype=torch.float32, extras=False)[:5]]
            (found,) = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), arguments)})
            wanted = ssd(*arguments, dt_softplus=True)
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


class TestOperator:
    def test_backends(self, monkeypatch):
        # On every machine, the portable form is the fastest without Numba.
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        arguments = inputs()
        with pytest.raises(BackendError, match="ssd: backend 'fused'"):
            ssd(*arguments, backend="fused")
        why = importlib.import_module("terrazzo.kernels.ssd.op").OPERATOR.why
        assert why("auto", *arguments[:4]).name == "portable"
        with use_backend("reference"):
            assert why("auto", *arguments[:4]).name == "reference"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(2, 45, 4)}, r"x must be \(B, L, H, P\)"),
            ({"x": torch.zeros(2, 0, 4, 3)}, "L at least 1"),
            ({"B": torch.zeros(2, 45, 3, 5)}, "4 heads of x do not divide into the 3 groups"),
            ({"dt": torch.zeros(2, 45, 3)}, r"dt must be \(2, 45, 4\)"),
            ({"A": torch.zeros(4, 5)}, r"A must be \(4,\)"),
            ({"C": torch.zeros(2, 45, 2, 6)}, "C must be"),
            ({"D": torch.zeros(3)}, r"D must be \(4,\) or \(4, 3\)"),
            ({"z": torch.zeros(2, 45, 4)}, "z must be"),
            ({"dt_bias": torch.zeros(2)}, "dt_bias must be"),
            ({"chunk": 0}, "chunk must be at least 1"),
            ({"backend": "cuda"}, "not one of"),
        ],
    )
    def test_errors(self, change, message):
        arguments = dict(zip(("x", "dt", "A", "B", "C"), (x.detach() for x in inputs()[:5])))
        with pytest.raises(InputError, match=message):
            ssd(**{**arguments, **change})

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_parts_from_states_are_the_whole(self, reverse, backend):
        x, dt, A, B, C = (tensor.detach() for tensor in inputs()[:5])
        options = dict(dt_softplus=True, reverse=reverse, backend=backend, return_final_states=True)
        whole, wanted = ssd(x, dt, A, B, C, **options)
        state, outs = None, {}
        for at in (slice(2), slice(2, 3), slice(3, None))[:: -1 if reverse else 1]:
            parts = x[:, at], dt[:, at], A, B[:, at], C[:, at]
            outs[at.start or 0], state = ssd(*parts, **options, initial_states=state)
        torch.testing.assert_close(torch.cat([outs[key] for key in sorted(outs)], 1), whole)
        torch.testing.assert_close(state, wanted)

    def test_states_of_another_shape_are_refused(self):
        with pytest.raises(InputError, match="initial_states must be"):
            ssd(*(tensor.detach() for tensor in inputs()[:5]), initial_states=torch.zeros(1, 2, 3))

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_final_states(self, reverse, backend):
        """Final states have mamba_ssm's layout (B, H, P, N), and equal the recurrence's states."""
        x, dt, A, B, C = (tensor.detach() for tensor in inputs()[:5])
        options = dict(dt_softplus=True, reverse=reverse, backend=backend)
        out, found = ssd(x, dt, A, B, C, return_final_states=True, **options)
        torch.testing.assert_close(out, ssd(x, dt, A, B, C, **options))
        step = torch.nn.functional.softplus(dt)
        state, into = torch.zeros_like(found), B.repeat_interleave(x.shape[2] // B.shape[2], 2)
        for t in range(x.shape[1])[:: -1 if reverse else 1]:
            added = step[:, t, :, None, None] * x[:, t, :, :, None] * into[:, t, :, None, :]
            state = torch.exp(step[:, t] * A)[..., None, None] * state + added
        torch.testing.assert_close(found, state)
        half = [tensor.half() for tensor in (x, dt, A, B, C)]
        out, found = ssd(*half, return_final_states=True, **options)
        assert (out.dtype, found.dtype) == (torch.float16, torch.float32)

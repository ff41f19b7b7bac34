"""PyTorch's demands on every operator besides value and gradient: other derivatives, transforms, and an empty batch."""

import importlib

import pytest
import torch
from support.operator_calls import CALLS, run_without_batch, several, total
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from terrazzo.errors import BackendError
from terrazzo.kernels import selective_scan, use_backend

scan_op = importlib.import_module("terrazzo.kernels.selective_scan.op")
REFERENCE = r"use_backend\(\"reference\"\)"
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
opaque_calls = pytest.mark.parametrize(
    "call", [c for c in CALLS.values() if c.opaque], ids=[n for n, c in CALLS.items() if c.opaque]
)


def registered() -> set[str]:
    """All ops of the package; all operators must be imported before."""
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("terrazzo::")}


@pytest.fixture(autouse=True)
def ops_alone(monkeypatch):
    """Small calls of strip attention skip the op; in these tests all calls use it."""
    op = importlib.import_module("terrazzo.kernels.strip_attention.op")
    monkeypatch.setattr(op, "_is_small", lambda query, value: False)


def given(call, batch=2):
    tensors = tuple(call.tensors(batch).values())
    generator = torch.Generator().manual_seed(1)
    return tensors, tuple(torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in tensors)


def by_reference(function, *arguments):
    with use_backend("reference"):
        return function(*arguments)


def dummy(argument):
    """A value that an op accepts for this argument."""
    kind = str(argument.type)
    if kind.startswith("Optional"):
        return None
    for name, value in (("List", [1]), ("int", 1), ("float", 1.0), ("bool", False), ("str", "portable")):
        if kind.startswith(name):
            return value
    assert kind == "Tensor", f"no dummy for {argument}"
    return torch.zeros(2, 2, 2, 2)


class TestEveryOp:
    def test_has_a_call_here(self):
        forward = {name for name in registered() if not name.endswith("_backward")}
        used = {f"terrazzo::{call.operator}" for call in CALLS.values()}
        used |= {"terrazzo::token_reduction", "terrazzo::token_reduction_column_mean"}  # they have no gradient
        used |= {"terrazzo::token_reduction_attended"}  # in the call of token_reduction_weights
        assert forward == used, "tests/support/operator_calls.py lacks a call of an op, or the op has gone"

    @pytest.mark.parametrize("name", sorted(registered()))
    def test_refuses_forward_mode(self, name):
        """Without `opaque.op`, an op would return tangents of 0 in forward mode; every new op must be made by it."""
        op = getattr(torch.ops.terrazzo, name.removeprefix("terrazzo::"))
        schema = op.default._schema
        arguments = [torch.float32 if a.name.endswith("dtype") else dummy(a) for a in schema.arguments]
        with forward_ad.dual_level():
            arguments[0] = forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
            with pytest.raises(BackendError, match=REFERENCE):
                op(*arguments)


class TestForwardMode:
    @every_call
    def test_tangents_are_those_of_the_reference_and_of_differences(self, call):
        (tensors, tangents), function = given(call), call.bound()
        out, found = map(several, jvp(function, tensors, tangents))
        wanted_out, wanted = map(several, by_reference(jvp, function, tensors, tangents))
        torch.testing.assert_close((out, found), (wanted_out, wanted))
        step = 1e-6
        ends = [several(function(*(x + sign * step * t for x, t in zip(tensors, tangents)))) for sign in (1, -1)]
        for tangent, above, below in zip(found, *ends, strict=True):
            assert tangent.abs().max() > 1e-3, "the test would prove nothing"
            torch.testing.assert_close(tangent, (above - below) / (2 * step), rtol=1e-6, atol=1e-7)

    @every_call
    def test_dual_tensors(self, call):
        (tensors, tangents), function = given(call), call.bound()
        wanted = several(by_reference(jvp, function, tensors, tangents)[1])
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents)]
            duals[0].requires_grad_()  # forward and reverse mode at once
            found = [forward_ad.unpack_dual(out).tangent for out in several(function(*duals))]
            torch.testing.assert_close(found, list(wanted))

    @opaque_calls
    def test_a_backend_by_name_is_refused(self, call):
        (tensors, tangents), function = given(call), call.bound()
        with use_backend("portable"), pytest.raises(BackendError, match=f"{call.operator}: .*{REFERENCE}"):
            jvp(function, tensors, tangents)

    @opaque_calls
    def test_a_gradient_of_a_graph_from_outside_is_refused(self, call):
        """The op was chosen before the transform was known."""
        (tensors, _), function = given(call), call.bound()
        leaf = tensors[0].clone().requires_grad_()
        out = several(function(leaf, *tensors[1:]))[0]

        def gradient(weight):
            return torch.autograd.grad(out, leaf, weight, retain_graph=True)[0]

        weight = torch.ones_like(out)
        with pytest.raises(BackendError, match=REFERENCE):
            jvp(gradient, (weight,), (weight,))
        with forward_ad.dual_level(), pytest.raises(BackendError, match=REFERENCE):
            gradient(forward_ad.make_dual(weight, weight))
        with pytest.raises(BackendError, match=REFERENCE):
            grad(lambda weight: gradient(weight).sum())(weight)

    @pytest.mark.long
    def test_compiled(self):
        """Inside or outside of a compiled function, tangents are right or are refused."""
        torch._dynamo.reset()
        call = CALLS["strip_attention"]
        (tensors, tangents), function = given(call), call.bound()
        wanted = several(by_reference(jvp, function, tensors, tangents)[1])
        inside = torch.compile(lambda *x: jvp(function, x[:3], x[3:]), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(several(inside(*tensors, *tangents)[1]), wanted)
        outside = torch.compile(function, backend="aot_eager")
        outside(*tensors)  # the first call has no tangents
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents)]
            try:
                found = several(outside(*duals))
            except BackendError as error:
                found = None
                refusal = str(error)
            if found is None:
                assert 'use_backend("reference")' in refusal
            else:
                torch.testing.assert_close(tuple(forward_ad.unpack_dual(out).tangent for out in found), wanted)


class TestTransforms:
    @every_call
    def test_of_torch_func(self, call):
        (tensors, tangents), function = given(call), call.bound()

        def loss(*x):
            return total(function(*x))

        def hessian_times_vector(*x):
            return jvp(grad(lambda first: loss(first, *x[1:])), (x[0],), (tangents[0],))[1]

        def per_sample(*x):
            return vmap(lambda scale: grad(lambda first: loss(first * scale, *x[1:]))(x[0]))(torch.arange(1.0, 3))

        for transformed in (
            grad(loss, tuple(range(len(tensors)))),
            jacrev(function),
            lambda *x: vjp(function, *x)[1](function(*x)),
            hessian_times_vector,
            per_sample,
        ):
            torch.testing.assert_close(transformed(*tensors), by_reference(transformed, *tensors))

    @every_call
    def test_vmap(self, call):
        """vmap alone calls the op for each slice."""
        (tensors, _), function = given(call), call.bound()
        stacked = torch.stack([tensors[0], tensors[0].flip(0) / 2])
        found = several(vmap(lambda first: function(first, *tensors[1:]))(stacked))
        wanted = zip(*(several(function(first, *tensors[1:])) for first in stacked))
        torch.testing.assert_close(found, tuple(map(torch.stack, wanted)))

    @every_call
    def test_second_derivatives(self, call):
        """Second derivatives are right, or an error names the operator."""
        tensors, function = [x.requires_grad_() for x in given(call)[0]], call.bound()

        def twice():
            first = torch.autograd.grad(total(function(*tensors)), tensors, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), tensors, allow_unused=True)

        wanted = by_reference(twice)
        assert any(x is not None and x.abs().max() > 1e-3 for x in wanted)
        if not call.twice:
            with pytest.raises(BackendError, match=f"^{call.operator}: .*{REFERENCE}"):
                twice()
        else:
            with use_backend("portable"):
                torch.testing.assert_close(twice(), wanted)

    def test_hessians_and_forward_jacobians(self):
        call = CALLS["strip_attention"]
        (tensors, _), function = given(call, 1), call.bound(1)
        torch.testing.assert_close(jacfwd(function)(*tensors), jacrev(function)(*tensors))
        found = hessian(lambda x: total(function(x, *tensors[1:])))(tensors[0])
        wanted = torch.autograd.functional.hessian(
            lambda x: total(function(x, *tensors[1:])),
            tensors[0],
            outer_jacobian_strategy="forward-mode",
            vectorize=True,
        )
        torch.testing.assert_close(found, wanted)

    def test_without_transform_nothing_changes(self):
        """A functional call and vmap over gradients still use the op."""
        call = CALLS["neighborhood_attention"]
        (tensors, _), function = given(call), call.bound()
        leaf = tensors[0].clone().requires_grad_()
        with use_backend("portable"):
            out = function(leaf, *tensors[1:])
            weights = torch.stack([out.detach(), torch.ones_like(out)])
            found = torch.autograd.grad(out, leaf, weights, is_grads_batched=True, retain_graph=True)[0]
            wanted = [torch.autograd.grad(out, leaf, weight, retain_graph=True)[0] for weight in weights]
            torch.testing.assert_close(found, torch.stack(wanted))

            class Layer(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.rpb = torch.nn.Parameter(tensors[3])

                def forward(self, query):
                    return function(query, *tensors[1:3], self.rpb)

            torch.testing.assert_close(functional_call(Layer(), {"rpb": tensors[3]}, (tensors[0],)), out)


class TestEmptyBatch:
    @pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
    @every_call
    def test_gives_nothing_and_no_gradient(self, call, backend):
        name = next(name for name, other in CALLS.items() if other is call)
        self.check(call, *run_without_batch(name, backend, torch.float64))

    @pytest.mark.parametrize("name", CALLS)
    def test_kernels(self, interpreted, name):
        self.check(CALLS[name], *interpreted("operator_calls.run_without_batch", name, "fused", torch.float32))

    def check(self, call, outputs, grads):
        full = several(call.bound(2)(*call.tensors(2).values()))
        for out, other in zip(outputs, full, strict=True):
            assert out.shape == (0, *other.shape[1:])
        for (name, x), g in zip(call.tensors(0).items(), grads, strict=True):
            assert g is None or g.shape == x.shape, name
            assert g is None or not g.any(), name

    @pytest.mark.parametrize("window", [None, 2])
    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_plans(self, backend, window):
        plan = importlib.import_module("terrazzo.kernels.token_reduction").plan
        found = plan(torch.zeros(0, 17, 3), r=2, window=window, grid=(4, 4), backend=backend)
        assert found.map.shape == (0, 17)
        assert found.M == plan(torch.zeros(2, 17, 3), r=2, window=window, grid=(4, 4)).M

    @opaque_calls
    def test_compiled(self, call):
        torch._dynamo.reset()
        compiled = torch.compile(call.bound(0), backend="aot_eager", fullgraph=True)
        for out, other in zip(several(compiled(*call.tensors(0).values())), several(call.bound()(*given(call)[0]))):
            assert out.shape == (0, *other.shape[1:])


class TestDirectCalls:
    """Where nobody but the caller would see an op, its function runs without it."""

    @pytest.fixture
    def ops(self, monkeypatch):
        """The names of the ops that are called as ops."""
        seen, kind = [], type(scan_op._forward.defined)
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, *args: seen.append(self._qualname) or call(self, *args))
        return seen

    def scan(self, **options):
        x = torch.randn(1, 2, 8, **options)
        return selective_scan(x, x, -torch.ones(2, 1, device=x.device), x[:, :1], x[:, :1], backend="portable")

    def test_without_gradients(self, ops):
        wanted = self.scan(requires_grad=True)
        assert ops == ["terrazzo::selective_scan"]
        with torch.no_grad():
            self.scan(requires_grad=True)
        self.scan()
        assert ops == ["terrazzo::selective_scan"]
        assert wanted.requires_grad

    def test_who_looks_sees_the_op(self, ops):
        """A dispatch mode (a counter of FLOPs), a profiler, a transform, a tensor on another device."""
        with FlopCounterMode(display=False) as counter:
            self.scan()
        assert counter.get_total_flops() > 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.scan()
        assert "terrazzo::selective_scan" in {event.key for event in profile.key_averages()}
        assert self.scan(device="meta").is_meta
        assert ops == 3 * ["terrazzo::selective_scan"]

"""Grouped linear layers: all forms against a loop over groups, gradients, the sort by group, errors."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import grouped_linear
from terrazzo.kernels.grouped_linear import in_groups

op = importlib.import_module("terrazzo.kernels.grouped_linear.op")
exported = importlib.import_module("terrazzo.kernels.grouped_linear.exported")
SIZES = (3, 0, 1, 7, 0)


def inputs(sizes=SIZES, ins=4, outs=6, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(sizes), ins), (len(sizes), outs, ins), *([(len(sizes), outs)] if bias else [])]
    tensors = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
    return tensors if bias else [*tensors, None], torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("bias", [True, False])
class TestForms:
    @pytest.mark.parametrize("sizes", [SIZES, (9, 0), (0, 9), (1,), (1, 1, 1)], ids=str)
    def test_a_loop_over_groups(self, backend, bias, sizes):
        (x, weight, bias), offsets = inputs(sizes, bias=bias)
        found = grouped_linear(x, weight, bias, offsets, backend=backend)
        wanted = [F.linear(part, weight[e], None if bias is None else bias[e]) for e, part in enumerate(x.split(sizes))]
        torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-14)

    def test_gradients(self, backend, bias):
        tensors, offsets = inputs(bias=bias)
        leaves = [x.requires_grad_() for x in tensors if x is not None]
        assert torch.autograd.gradcheck(
            lambda x, w, b=None: grouped_linear(x, w, b, offsets, backend=backend), leaves, fast_mode=False
        )

    def test_no_rows(self, backend, bias):
        tensors, offsets = inputs((0, 0), bias=bias)
        leaves = [x.requires_grad_() for x in tensors if x is not None]
        out = grouped_linear(*tensors, offsets, backend=backend)
        assert out.shape == (0, 6)
        assert not any(x.any() for x in torch.autograd.grad(out.sum(), leaves))


class TestLayouts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_precision(self, dtype):
        """The error against float64 is at most twice the error of the loop in the same dtype."""
        (x, weight, bias), offsets = inputs((40, 0, 70), 24, 40, dtype=dtype)
        wanted = grouped_linear(x.double(), weight.double(), bias.double(), offsets, backend="reference")
        found, plain = (grouped_linear(x, weight, bias, offsets, backend=name) for name in ("portable", "reference"))
        assert found.dtype == dtype
        error, allowed = ((a.double() - wanted).norm() for a in (found, plain))
        assert error <= 2 * allowed

    def test_strides(self):
        (x, weight, bias), offsets = inputs()
        found = grouped_linear(
            x.t().contiguous().t(), weight.mT.contiguous().mT, bias.repeat_interleave(2, 1)[:, ::2], offsets
        )
        torch.testing.assert_close(found, grouped_linear(x, weight, bias, offsets, backend="reference"))

    def test_autocast(self):
        (x, weight, bias), offsets = inputs(dtype=torch.float32)
        wanted = grouped_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), offsets)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(grouped_linear(x, weight, bias, offsets), wanted)
            double = [t.double().requires_grad_() for t in (x, weight, bias)]
            found = grouped_linear(*double, offsets)
            assert found.dtype == torch.float64
            found.sum().backward()

    def test_exported_form(self):
        """What an exporter records: all rows through all groups."""
        tensors, offsets = inputs()
        wanted = grouped_linear(*tensors, offsets, backend="reference")
        torch.testing.assert_close(exported.forward(*tensors, offsets), wanted)
        torch.testing.assert_close(exported.forward(*tensors[:2], None, offsets) + 0, wanted - self.biases(tensors))

    def biases(self, tensors):
        return tensors[2].repeat_interleave(torch.tensor(SIZES), 0)

    def test_exports(self):
        class Layer(torch.nn.Module):
            def forward(self, x, weight, bias, offsets):
                return grouped_linear(x, weight, bias, offsets)

        tensors, offsets = inputs()
        program = torch.export.export(Layer(), (*tensors, offsets), strict=False)
        assert "terrazzo" not in str(program.graph)
        torch.testing.assert_close(program.module()(*tensors, offsets), Layer()(*tensors, offsets))

    def test_compiles_without_a_break(self):
        torch._dynamo.reset()

        def run(x, weight, bias, group):
            order, offsets = in_groups(group, len(weight))
            return grouped_linear(x[order], weight, bias, offsets)

        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (5, 12):
            (x, weight, bias), _ = inputs((rows, 0, 0))
            group = torch.arange(rows) * 2 % 3
            leaves = [t.requires_grad_() for t in (x, weight, bias)]
            found, wanted = (function(*leaves, group) for function in (compiled, run))
            torch.testing.assert_close(found, wanted)
            for a, b in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)):
                torch.testing.assert_close(a, b)


class TestInGroups:
    def test_a_stable_sort(self):
        group = torch.tensor([3, 1, 3, 0, 1, 1])
        order, offsets = in_groups(group, 5)
        assert order.tolist() == [3, 1, 4, 5, 0, 2]
        assert offsets.tolist() == [0, 1, 4, 4, 6, 6]
        assert offsets.dtype == torch.int32

    def test_no_rows(self):
        order, offsets = in_groups(torch.zeros(0, dtype=torch.int64), 2)
        assert order.shape == (0,)
        assert offsets.tolist() == [0, 0, 0]

    @pytest.mark.parametrize(
        ("group", "groups", "message"),
        [
            ([0], 1, "group must be a tensor, got list"),
            (torch.zeros(3), 1, r"group must be \(rows,\) int64, got \(3,\) of torch.float32"),
            (torch.zeros(3, 1, dtype=torch.int64), 1, r"got \(3, 1\)"),
            (torch.zeros(3, dtype=torch.int64), 0, "groups must be at least 1, got 0"),
        ],
    )
    def test_errors(self, group, groups, message):
        with pytest.raises(InputError, match=message):
            in_groups(group, groups)


class TestOperator:
    def test_opcheck(self):
        tensors, offsets = inputs(dtype=torch.float32)
        tensors = [x.requires_grad_() for x in tensors]
        torch.library.opcheck(torch.ops.terrazzo.grouped_linear.default, (*tensors, offsets, "portable"))
        torch.library.opcheck(torch.ops.terrazzo.grouped_linear.default, (*tensors[:2], None, offsets, "portable"))

    def test_backends(self):
        tensors, offsets = inputs()
        with pytest.raises(BackendError, match="grouped_linear: backend 'fused'"):
            grouped_linear(*tensors, offsets, backend="fused")
        assert op.OPERATOR.why("auto", *tensors).name == "portable"
        described = op.OPERATOR.describe(*tensors, offsets, "portable")
        assert described.shape == {"groups": 5, "rows": 11, "in": 4, "out": 6}
        gpu, many = torch.device("cuda"), torch.empty(1025, 1, 4, dtype=torch.bfloat16, device="meta")
        why = op.OPERATOR.why("auto", many[:, 0], many, device=gpu)
        assert "at most 1024 groups" in why.reasons["fused"] or "triton" in why.reasons["fused"]

    def test_flops(self):
        from torch.utils.flop_counter import FlopCounterMode

        tensors, offsets = inputs()
        leaves = [x.requires_grad_() for x in tensors]
        with FlopCounterMode(display=False) as counter:
            grouped_linear(*leaves, offsets).sum().backward()
        assert counter.get_total_flops() == 3 * 2 * 11 * 4 * 6

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(x=torch.zeros(11, 3, dtype=torch.float64)), r"got \(11, 3\) and \(5, 6, 4\)"),
            (dict(x=torch.zeros(11, 4)), "one floating dtype"),
            (dict(weight=torch.zeros(5, 0, 4, dtype=torch.float64)), "at least 1 group, and 1 channel"),
            (dict(bias=torch.zeros(5, 4, dtype=torch.float64)), r"bias must be \(groups, out\), \(5, 6\), got \(5"),
            (dict(offsets=torch.tensor([0, 11])), r"offsets must be \(6,\) whole numbers, got \(2,\)"),
            (dict(offsets=torch.zeros(6)), "whole numbers, got .* of torch.float32"),
            (dict(offsets=torch.tensor([0, 0, 0, 0, 0, 10])), "from 0 to the 11 rows"),
            (dict(offsets=torch.tensor([1, 1, 1, 1, 1, 11])), "from 0 to the 11 rows"),
            (dict(offsets=torch.tensor([0, 9, 5, 9, 9, 11])), "from 0 to the 11 rows"),
            (dict(offsets=torch.zeros(6, dtype=torch.int64, device="meta")), "on the same device as x, cpu"),
            (dict(backend="cuda"), "not one of"),
        ],
    )
    def test_errors(self, change, message):
        (x, weight, bias), offsets = inputs()
        arguments = dict(x=x, weight=weight, bias=bias, offsets=offsets)
        with pytest.raises(InputError, match=message):
            grouped_linear(**{**arguments, **change})

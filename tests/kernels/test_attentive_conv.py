"""Attentive convolution: worked examples check the definition, and the definition checks the portable form."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_attentive import FOLDER, NAMES, exact, inputs, run
from support.triton_common import check, limits, poisoned, replaced

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import attentive_conv, use_backend
from terrazzo.kernels.numba_host import machine

exported = importlib.import_module("terrazzo.kernels.attentive_conv.exported")
portable = importlib.import_module("terrazzo.kernels.attentive_conv.portable")
reference = importlib.import_module("terrazzo.kernels.attentive_conv.reference")
BACKENDS = ("reference", "portable")

# Batch, channels, height, width: some of AttNet's maps, repeated bins (below 9 positions), maps of 1 row or column.
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 1, 5),
    (1, 8, 2, 2),
    (2, 6, 3, 3),
    (3, 4, 10, 1),
    (2, 24, 7, 7),
    (1, 33, 13, 15),
    (2, 16, 28, 20),
]


def assert_all_close(found, wanted, **tolerance):
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def form(name):
    """A form by its name; "exported" is the form for exporters."""
    return exported.forward if name == "exported" else lambda *arguments: attentive_conv(*arguments, backend=name)


class TestDefinition:
    def test_bins(self):
        """Adaptive pooling's bins for a 7x7 map, and for fewer positions than bins."""
        wanted = [(0, 6), (5, 11), (10, 17), (16, 22), (21, 28), (27, 33), (32, 39), (38, 44), (43, 49)]
        assert reference.bins(49, 9) == wanted
        assert reference.bins(4, 9) == [(0, 1), (0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (3, 4)]

    @pytest.mark.parametrize("length", [1, 2, 4, 8, 9, 10, 49, 196, 200, 3136])
    def test_bin_weights_are_the_bins(self, length):
        weights = exported._bin_weights(length, 9, torch.zeros((), dtype=torch.float64))
        wanted = torch.zeros(9, length, dtype=torch.float64)
        for row, (first, last) in zip(wanted, reference.bins(length, 9)):
            row[first:last] = 1 / (last - first)
        assert torch.equal(weights, wanted)

    @pytest.mark.parametrize("taps", [9, 25])
    @pytest.mark.parametrize("shape", [(2, 5, 7, 7), (1, 3, 8, 5)])
    def test_is_what_layers_of_pytorch_compute(self, shape, taps):
        arguments = inputs(*shape, taps=taps)
        assert_all_close(run(arguments, "reference"), run(arguments, "layers"), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [*BACKENDS, "exported"])
class TestProperties:
    """Every form has the properties that follow from the definition."""

    def test_a_kernel_that_looks_down_right(self, name):
        """Without mixing, all kernels equal the bias: 1 at the last tap gives each position its neighbour's value."""
        x, value, weight, bias, mixing, _, inhibition = (y.detach() for y in inputs(2, 3, 5, 4))
        tap = (torch.arange(9) == 8).double()
        out = form(name)(x, value, weight, bias, mixing * 0, tap, inhibition * 0 - 100)
        torch.testing.assert_close(out, F.pad(value, (0, 1, 0, 1))[:, :, 1:, 1:])

    def test_full_inhibition_leaves_no_mean(self, name):
        """A constant map gives 0 wherever the whole kernel lies inside the map."""
        x, value, *weights, inhibition = (y.detach() for y in inputs(2, 3, 6, 5))
        out = form(name)(x, torch.ones_like(value), *weights, inhibition * 0 + 100)
        inner = out[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(inner, torch.zeros_like(inner), rtol=0, atol=1e-12)
        assert out[:, :, 0].abs().max() > 0.1

    def test_linear_in_the_value(self, name):
        x, value, *weights = (y.detach() for y in inputs(2, 3, 6, 5))
        other = value.flip(2)
        function = form(name)
        total = function(x, value, *weights) + 2 * function(x, other, *weights)
        torch.testing.assert_close(function(x, value + 2 * other, *weights), total)

    def test_samples_are_independent(self, name):
        x, value, *weights = (y.detach() for y in inputs(3, 4, 5, 6))
        alone = form(name)(x[1:2], value[1:2], *weights)
        torch.testing.assert_close(form(name)(x, value, *weights)[1:2], alone)

    def test_bins_are_bands_of_rows(self, name):
        """Nine rows are nine bins: if projection and mixing are 1, row t gives tap t."""
        rows = torch.arange(1, 10, dtype=torch.float64)
        x = rows.view(1, 1, 9, 1).expand(1, 1, 9, 4) * 10  # GELU leaves large numbers as they are
        value = torch.zeros(1, 1, 9, 4, dtype=torch.float64)
        value[0, 0, 4, 2] = 1
        one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
        out = form(name)(x, value, one[:, None], one * 0, torch.eye(9, dtype=torch.float64), nothing, one * -100)
        torch.testing.assert_close(out[0, 0, 3:6, 1:4], 10 * rows.flip(0).view(3, 3))


class TestPortable:
    @pytest.mark.parametrize("layout", ["channels last", "contiguous", "parts", "turned"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_float64(self, shape, layout):
        arguments = inputs(*shape, layout=layout)
        wanted = run(arguments, "reference")
        assert_all_close(run(arguments, "portable"), wanted, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(exported.forward(*arguments), wanted[0], rtol=1e-12, atol=1e-12)

    def test_larger_kernels(self):
        arguments = inputs(2, 6, 11, 8, taps=25)
        assert_all_close(run(arguments, "portable"), run(arguments, "reference"), rtol=1e-11, atol=1e-11)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 14), st.integers(1, 14))
    def test_any_shape(self, batch, channels, height, width):
        arguments = inputs(batch, channels, height, width)
        assert_all_close(run(arguments, "portable"), run(arguments, "reference"), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(2, 16, 14, 14), (1, 8, 40, 36)])
    def test_error_is_no_worse_than_plain_pytorch(self, shape, dtype):
        """The error is at most twice the definition's error in the same dtype."""
        arguments = inputs(*shape, dtype=dtype)
        found, plain = run(arguments, "portable"), run(arguments, "layers")
        check(limits(NAMES, found, plain, exact(arguments)))

    def test_unwritten_memory_is_not_read(self):
        with poisoned():
            for shape in SHAPES:
                assert all(x.isfinite().all() for x in run(inputs(*shape), "portable")), shape

    def test_result_is_channels_last(self):
        for layout in ("contiguous", "channels last"):
            x, value, *weights = inputs(2, 6, 5, 4, layout=layout)
            out = attentive_conv(x, value, *weights, backend="portable")
            assert out.is_contiguous(memory_format=torch.channels_last)


class TestOperator:
    @pytest.mark.long
    def test_opcheck(self):
        for options in ({}, {"layout": "parts", "x_dtype": torch.float64}):
            arguments = inputs(2, 3, 5, 4, dtype=torch.float32, **options)
            torch.library.opcheck(torch.ops.terrazzo.attentive_conv.default, (*arguments, "portable"))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gradcheck(self, backend):
        arguments = inputs(2, 2, 4, 3)
        assert torch.autograd.gradcheck(lambda *tensors: attentive_conv(*tensors, backend=backend), arguments)

    @pytest.mark.long
    def test_compiles_without_a_break(self):
        compiled = torch.compile(attentive_conv, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in ((1, 4, 9, 7), (2, 4, 6, 11)):
            arguments = inputs(*shape, dtype=torch.float32)
            options = dict(backend="portable")
            torch.testing.assert_close(compiled(*arguments, **options), attentive_conv(*arguments, **options))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_does_not_round_means_and_kernels(self, dtype):
        """As in a model, x and the weights are float32, and the value comes from a convolution in half precision."""
        arguments = inputs(1, 8, 40, 36, dtype=torch.float32)
        arguments[1] = arguments[1].detach().to(dtype).requires_grad_()
        wanted = run(arguments, "portable")
        with torch.autocast("cpu", dtype):
            found = run(arguments, "portable")
        assert [x.dtype for x in found] == [dtype, torch.float32, dtype, *[torch.float32] * 5]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))

    def test_flop_formula(self):
        from torch.utils.flop_counter import FlopCounterMode

        arguments = [x.detach().to("meta").requires_grad_() for x in inputs(2, 6, 5, 4)]
        with FlopCounterMode(display=False) as counter:
            out = attentive_conv(*arguments)
        forward = 2 * 2 * (5 * 4 * 6 * 9 + 9 * 6 * 6 + 6 * 9 * 9)
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * forward


class TestBackends:
    @pytest.fixture(autouse=True)
    def without_numba(self, monkeypatch):
        """On every machine, the portable form is the fastest without Numba."""
        monkeypatch.setattr(machine, "has_numba", lambda: False)

    def test_a_named_backend_that_cannot_run_says_why(self):
        arguments = inputs(1, 4, 5, 5, dtype=torch.float32)
        with pytest.raises(BackendError, match=r"attentive_conv: backend 'fused'.*needs the package numba"):
            attentive_conv(*arguments, backend="fused")
        with use_backend("fused"), pytest.raises(BackendError, match="use_backend"):
            attentive_conv(*arguments)

    def test_precedence(self):
        why, arguments = importlib.import_module(f"{FOLDER}.op").OPERATOR.why, inputs(1, 4, 5, 5)
        assert why("auto", *arguments).name == "portable"
        assert "fused" in why("auto", *arguments).reasons
        with use_backend("reference"):
            assert why("auto", *arguments).name == "reference"
            assert why("portable", *arguments).name == "portable"


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": (4, 5, 5)}, r"one shape \(B, C, H, W\), got \(4, 5, 5\)"),
            ({"value": (1, 4, 5, 6)}, r"got \(1, 4, 5, 5\) and \(1, 4, 5, 6\)"),
            ({"weight": (4, 3)}, r"weight must have shape \(4, 4\), got \(4, 3\)"),
            ({"bias": (5,)}, r"bias must have shape \(4,\)"),
            ({"mixing": (8, 8)}, "for each tap of a kernel .*, got 8"),
            ({"mixing": (16, 16)}, "got 16"),
            ({"mixing": (9, 8)}, r"mixing must have shape \(9, 9\)"),
            ({"mixing_bias": (8,)}, r"mixing_bias must have shape \(9,\)"),
            ({"inhibition": (1,)}, r"inhibition must have shape \(4,\)"),
        ],
    )
    def test_shapes(self, changes, message):
        arguments = dict(zip(NAMES[1:], inputs(1, 4, 5, 5)))
        with pytest.raises(InputError, match=message):
            attentive_conv(**arguments | {name: torch.zeros(shape) for name, shape in changes.items()})

    def test_dtypes_and_names(self):
        x, value, *weights = inputs(1, 4, 5, 5)
        with pytest.raises(InputError, match="value must be real numbers, got int64"):
            attentive_conv(x, value.long(), *weights)
        with pytest.raises(InputError, match="'cuda' is not one of"):
            attentive_conv(x, value, *weights, backend="cuda")

    def test_nothing(self):
        with pytest.raises(InputError, match=r"at least one channel and one position, got \(2, 4, 0, 5\)"):
            attentive_conv(*inputs(2, 4, 0, 5))


class TestMutations:
    """Break a piece of the portable form on purpose: the comparisons above must fail."""

    def mismatch(self, changes):
        arguments = inputs(2, 5, 7, 6)
        wanted = run(arguments, "reference")
        with replaced(FOLDER, changes):
            found = run(arguments, "portable")
        return max((a - b).abs().max().item() for a, b in zip(found, wanted))

    def test_unbroken(self):
        assert self.mismatch({}) < 1e-12

    def test_bins_that_share_no_position(self):
        def apart(length, count):
            return [(number * length // count, (number + 1) * length // count) for number in range(count)]

        assert self.mismatch({"portable.bins": apart}) > 1e-3

    def test_kernels_of_another_image(self):
        groups = portable._as_groups
        assert self.mismatch({"portable._as_groups": lambda value, kernels: groups(value, kernels.flip(0))}) > 1e-2

    def test_mirrored_kernels(self):
        groups = portable._as_groups
        assert self.mismatch({"portable._as_groups": lambda value, kernels: groups(value, kernels.flip(1))}) > 1e-2

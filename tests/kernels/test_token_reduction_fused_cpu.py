"""Token reduction's CPU kernels against the definition in float64, with memory poisoned by NaN."""

import importlib
import math

import numpy as np
import pytest
import torch
from support import triton_reduction
from support.triton_common import check
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import token_reduction as reduction
from terrazzo.kernels import use_backend
from terrazzo.kernels.numba_host import machine, threads
from terrazzo.kernels.triton_host import machine as triton_machine

numba = pytest.importorskip("numba", reason="needs the extra 'cpu'")
kernels = importlib.import_module("terrazzo.kernels.token_reduction.fused_cpu_kernels")
match = importlib.import_module("terrazzo.kernels.token_reduction.fused_cpu_match")
fused_cpu_plan = importlib.import_module("terrazzo.kernels.token_reduction.fused_cpu_plan")
fused_cpu_parts = importlib.import_module("terrazzo.kernels.token_reduction.fused_cpu_parts")
fused_cpu = importlib.import_module("terrazzo.kernels.token_reduction.fused_cpu")
portable = importlib.import_module("terrazzo.kernels.token_reduction.portable")
op = importlib.import_module("terrazzo.kernels.token_reduction.op")

pytestmark = pytest.mark.skipif(triton_machine.interpreting(), reason="Triton interprets in this process")

# Whatever rounds how, the map is one: see `triton_reduction.inputs`.
EXACT = dict(exact=True, judge="portable")
BOTH = dict(size=True, importance=True)


@pytest.fixture
def divided(monkeypatch):
    """Every call is divided among threads, however small."""
    monkeypatch.setattr(fused_cpu_parts, "_ALONE", 0)


class TestPlan:
    @pytest.fixture(params=[False, True], ids=["whole", "tiles"], autouse=True)
    def tiled(self, request, monkeypatch, divided):
        """All products of an image at once, or those of a few sources at a time."""
        if request.param:
            monkeypatch.setattr(fused_cpu_plan, "_WHOLE", 0)
            monkeypatch.setattr(fused_cpu_plan, "_TILE", 100)
            monkeypatch.setattr(fused_cpu_plan, "_FEWEST", 3)

    @pytest.mark.parametrize(
        ("count", "r", "about"), [(9, 3, {}), (67, 31, dict(EXACT, dim=16)), (198, 40, dict(EXACT, dim=64))], ids=str
    )
    def test_even_and_odd(self, count, r, about):
        """Few random tokens against the reference, and many whose attractions are equal or far from it."""
        cases = [
            dict(count=count, protect=protect, r=r, bidirectional=both, **about, **extras)
            for both in (False, True)
            for protect, extras in ((0, {}), (1, BOTH), (2, dict(importance=True)))
        ]
        assert triton_reduction.plans(cases) == [0] * len(cases)

    def test_cells_and_windows(self):
        cases = [
            dict(count=h * w + protect, protect=protect, r=r, partition="cell2x2", grid=(h, w), batch=1, **extras)
            for h, w in ((4, 4), (5, 3), (4, 5), (7, 9), (2, 2), (3, 2))
            for protect, r, extras in ((0, 3, {}), (1, 2 * (h // 2) * (w // 2), BOTH))
        ]
        cases += [dict(count=33, r=5, window=4, grid=(8, 4), partition=p, size=True) for p in ("even_odd", "cell2x2")]
        assert triton_reduction.plans(cases) == [0] * len(cases)

    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
    def test_criteria_padding_and_dtypes(self, dtype):
        cases = [
            dict(count=40, r=12, bidirectional=True, dim=64, criteria=criteria, dtype=dtype, **EXACT, **extras)
            for criteria in ((1, 20, 40), (2, 1, 1), (0, 1, 2), (1, 0, 0))
            for extras in (BOTH, dict(BOTH, padding=9))
        ]
        assert triton_reduction.plans(cases) == [0] * len(cases)

    def test_ties_go_to_the_lowest_index(self):
        assert triton_reduction.ties(False) == [0, 2, 2, 3, 2, 4, 2, 5, 2, 6, 1]
        assert triton_reduction.ties(True) == [0, 1, 1, 1, 1, 4, 1, 5, 2, 6, 3]

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_a_number_is_what_it_is_to_pytorch(self, value, bidirectional):
        """It attracts most, and the lowest index comes first."""
        x, size, importance = triton_reduction.inputs(40, batch=4)
        x[0] = value
        x[1, ::3] = value
        x[2, 5, 1] = value
        importance[3, 7] = value
        maps = [
            reduction.plan(x, r=12, size=size, importance=importance, bidirectional=bidirectional, backend=name).map
            for name in ("fused", "portable")
        ]
        assert torch.equal(*maps)

    def test_layouts(self):
        """Tokens, sizes and importances that are parts of other tensors."""
        x, size, importance = triton_reduction.inputs(40, dim=16, exact=True)
        wanted = reduction.plan(x, r=9, size=size, importance=importance, backend="fused").map
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        size, importance = torch.stack([size, importance], -1).unbind(-1)
        assert torch.equal(reduction.plan(x, r=9, size=size, importance=importance, backend="fused").map, wanted)


class TestPool:
    @pytest.mark.parametrize(
        ("tokens", "groups", "channels", "options"),
        [
            (1, 1, 1, {}),
            (63, 16, 130, {}),
            (70, 17, 5, dict(kind="first")),
            (40, 30, 8, dict(padding=25)),
            (90, 50, 24, dict(dtype="bfloat16")),
        ],
        ids=str,
    )
    def test_sizes(self, tokens, groups, channels, options):
        check(triton_reduction.pool_errors(tokens, groups, channels, **options))

    def test_divided_by_channels(self, divided):
        check(triton_reduction.pool_errors(33, 9, 2 * fused_cpu._CHANNELS + 3))

    def test_as_the_portable_form_in_float64(self):
        """Also groups without tokens, tensors of any strides, and numbers that are none."""
        x, size, weight = triton_reduction.inputs(30, dtype="float64")
        x[0, 3, 2], weight[1, 4] = math.nan, math.inf
        found = reduction.Plan(torch.arange(30).remainder(7).flip(0).expand(2, -1), 9)
        x, weight, size = x.flip(2), weight.double()[:1].expand(2, -1), size.double()
        ours, wanted = (reduction.merge(x, found, weight, size, backend=name) for name in ("fused", "portable"))
        torch.testing.assert_close(ours, wanted, rtol=1e-14, atol=1e-14, equal_nan=True)

    def test_a_map_with_groups_that_are_not_there(self):
        x = torch.zeros(1, 3, 2, requires_grad=True)
        for wrong in (-1, 2):
            with pytest.raises(InputError, match="the map must have numbers from 0 to 1"):
                reduction.merge(x, reduction.Plan(torch.tensor([[0, 1, wrong]]), 2), backend="fused")

    def test_gradients_of_gradients(self):
        x, size, _ = triton_reduction.inputs(9, dtype="float64")
        found = reduction.plan(x, r=3)

        def merged(x):
            return reduction.merge(x, found, size.double(), backend="fused")[0]

        assert gradcheck(merged, (x.requires_grad_(),))
        assert gradgradcheck(lambda x: merged(x) ** 2, (x,))


class TestImportance:
    @pytest.mark.parametrize(
        ("count", "options"),
        [
            (1, {}),
            (33, dict(bias="sizes")),
            (70, dict(bias="padded")),
            (70, dict(scale=300.0)),
            (130, dict(dim=32, bias="sizes", dtype="bfloat16")),
            (197, dict(heads=3, dim=24, layout="packed")),
        ],
        ids=str,
    )
    def test_column_mean(self, count, options):
        check(triton_reduction.column_errors(count, **options))

    def test_a_tile_at_a_time(self, monkeypatch):
        monkeypatch.setattr(portable, "_WHOLE", 0)
        monkeypatch.setattr(portable, "_TILE", 1 << 9)
        monkeypatch.setattr(portable, "_FEWEST", 1)
        check(triton_reduction.column_errors(40, bias="sizes"))
        assert triton_reduction.attends() < 1e-5

    @pytest.mark.parametrize("few", [0, 1 << 30])
    def test_attention(self, few, monkeypatch):
        """With products image by image, and of all images at once."""
        monkeypatch.setattr(fused_cpu, "_FEW", few)
        assert triton_reduction.attends() < 1e-5

    @pytest.mark.long
    def test_gradients_of_gradients(self):
        query, key, value = torch.randn(3, 2, 2, 5, 3, dtype=torch.float64).requires_grad_().unbind()
        bias = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

        def attended(query, key, bias, value):
            return reduction.attention(query, key, bias)[1](value)

        inputs = [x.detach().requires_grad_() for x in (query, key, bias, value)]
        assert gradcheck(attended, inputs)
        assert gradgradcheck(attended, inputs)

    def test_what_is_not_a_number(self):
        """As softmax has it: a row without a finite largest score is NaN."""
        query, key, bias = torch.randn(3, 1, 6, 4), torch.randn(3, 1, 6, 4), torch.zeros(3, 6)
        query[0, 0, 2, 1], key[1, 0, 3] = math.nan, math.inf
        bias[2] = -math.inf
        found, wanted = ([], [])
        for name, out in (("fused", found), ("portable", wanted)):
            with use_backend(name):
                mean, attend = reduction.attention(query, key, bias)
            out += [mean, attend(torch.eye(6).expand(3, 1, 6, 6))]
        torch.testing.assert_close(found, wanted, equal_nan=True)
        assert found[0].isnan().any(1).all()


class TestMutations:
    """Break the kernels' arithmetic on purpose: the comparisons must notice."""

    @pytest.mark.parametrize("helper", ["", "list_tokens", "attract", "weaken", "ranks", "share", "highest", "exp"])
    def test_a_broken_piece_shows(self, monkeypatch, helper):
        for name in ("pool", "spread", "softmax"):
            monkeypatch.setattr(kernels, name, getattr(kernels, name).py_func)  # with pieces that can be replaced
        for name in ("prepare", "draw", "choose_targets", "choose_sources", "stay", "write", "plan"):
            monkeypatch.setattr(match, name, getattr(match, name).py_func)
        for module in (kernels, match):
            monkeypatch.setattr(module, "highest", lambda row: row[0] if helper == "highest" else row.max())
        monkeypatch.setattr(kernels, "exp", lambda x: np.exp(x) * (1 if x > -0.5 or helper != "exp" else 0.9))
        if helper in ("list_tokens", "attract", "weaken", "ranks"):
            original = getattr(match, helper)

            def broken(*arguments):
                original(*arguments)
                changed = arguments[{"list_tokens": 4, "attract": 0, "weaken": 2, "ranks": 1}[helper]]
                changed[:] = changed[::-1].copy()

            monkeypatch.setattr(match, helper, broken)
        if helper == "share":
            monkeypatch.setattr(kernels, "share", lambda weight, total, tiny: 0.9 * weight / max(total, tiny))
        case = dict(count=21, r=8, bidirectional=True, batch=1, criteria=(1, 2, 2), **BOTH)
        with np.errstate(all="ignore"):
            found = triton_reduction.plans([case, dict(case, count=13, r=4, bidirectional=False)])
            errors = triton_reduction.pool_errors(12, 7, 3) | triton_reduction.column_errors(9)
        broken = any(found) or any(not error <= 2 * allowed for error, allowed in errors.values())
        assert broken == bool(helper)


class TestMaths:
    @pytest.mark.long
    def test_exp_of_what_is_not_above_0(self):
        """Within 2 units in the last place, and 0 below e^-87."""
        exp = importlib.import_module("terrazzo.kernels.numba_host.fused_maths").exp

        @numba.njit
        def run(x, out):
            for i in range(len(x)):
                out[i] = exp(x[i])

        x = np.concatenate([np.linspace(-87, 0, 500_003), np.linspace(-1, 0, 100_001)]).astype(np.float32)
        out = np.empty_like(x)
        run(x, out)
        exact = np.exp(x.astype(np.float64))
        assert (np.abs(out - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()
        special = np.array([np.nan, -np.inf, -1e30, -87.1, 0], np.float32)
        out = np.empty_like(special)
        run(special, out)
        assert np.array_equal(out, np.array([np.nan, 0, 0, 0, 1], np.float32), equal_nan=True)

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_the_largest_number(self, dtype):
        highest = importlib.import_module("terrazzo.kernels.numba_host.fused_maths").highest
        run = numba.njit(lambda row: highest(row))
        for row in ([-2.5], [-3, -0.5, -8], [0, -1, 7e30, 2], [-math.inf, -1e30], [-math.inf], [1, math.inf, 3]):
            assert run(np.array(row, dtype)) == dtype(max(row))


class TestThreads:
    def test_the_number_of_threads_changes_no_bit(self, divided):
        before = torch.get_num_threads()
        x, size, weight = triton_reduction.inputs(130, batch=5, dim=300)
        x.requires_grad_()
        query, key = torch.randn(2, 2, 3, 70, 8).unbind()
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found = reduction.plan(x, r=40, size=size, importance=weight, backend="fused")
                pooled = triton_reduction._pooled(x, found, weight, size, "fused")
                few = triton_reduction._pooled(x[:1], reduction.Plan(found.map[:1], found.M), weight[:1], None, "fused")
                mean, attend = reduction.attention(query, key)
                results.append([found.map, *pooled, *few, mean, attend(key)])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_a_small_call_wakes_no_thread(self, monkeypatch):
        """197 tokens of DeiT-S, the most that one image has at 224 pixels."""
        before = torch.get_num_threads()
        monkeypatch.setattr(threads, "_pool", lambda process: pytest.fail("a thread was asked for"))
        torch.set_num_threads(2)
        try:
            x, size, weight = triton_reduction.inputs(197, batch=1, dim=384)
            found = reduction.plan(x, r=16, size=size, importance=weight, backend="fused")
            reduction.merge(x, found, weight, size, backend="fused")
            heads = x.unflatten(2, (6, 64)).transpose(1, 2)
            reduction.attention(heads, heads, size)
        finally:
            torch.set_num_threads(before)


class TestOperator:
    def test_auto_takes_it(self):
        x = torch.zeros(1, 9, 4)
        assert op.OPERATOR.why("auto", x).name == "fused"
        assert op.ATTENTION.why("auto", torch.zeros(1, 1, 9, 136)).name == "fused"

    def test_without_numba_everything_works(self, monkeypatch):
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        x, size, weight = triton_reduction.inputs(9)
        auto, portable = (reduction.plan(x, r=3, backend=name) for name in ("auto", "portable"))
        assert torch.equal(auto.map, portable.map)
        assert reduction.merge(x, auto, weight, size)[0].isfinite().all()
        reduction.attention(x.unsqueeze(1), x.unsqueeze(1))
        with use_backend("fused"), pytest.raises(BackendError, match=r"needs the package numba.*\[cpu\]"):
            reduction.plan(x, r=3)

    def test_nothing_to_do(self):
        assert triton_reduction.empty() == [(0, 9), (0, 7, 5), (0, 7), (0, 9)]

    def test_same_bits_every_time(self):
        assert triton_reduction.repeats()

    @pytest.mark.long
    def test_opcheck(self):
        triton_reduction.opcheck()
        query = torch.randn(1, 2, 5, 3, requires_grad=True)
        torch.library.opcheck(torch.ops.terrazzo.token_reduction_weights.default, (query, query.detach(), None))
        weights = torch.rand(1, 2, 5, 5, requires_grad=True)
        torch.library.opcheck(torch.ops.terrazzo.token_reduction_attended.default, (weights, query))

    @pytest.mark.long
    def test_compiles_without_a_break(self):
        torch._dynamo.reset()
        assert triton_reduction.compiled() == 0

    def test_whole_model(self):
        assert triton_reduction.model() < 1e-5

    def test_flops_are_those_of_the_portable_form(self):
        x, size, weight = triton_reduction.inputs(21, dim=8)
        heads, found = x.unflatten(2, (2, 4)).transpose(1, 2), []
        for name in ("fused", "portable"):
            with use_backend(name), FlopCounterMode(display=False) as counter:
                reduction.plan(x, r=6, size=size, importance=weight, bidirectional=True)
                reduction.attention(heads, heads, size)[1](heads)
                reduction.column_mean(heads, heads)
            found.append(counter.get_total_flops())
        assert found[0] == found[1] > 0

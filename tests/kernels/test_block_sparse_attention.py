"""Block-sparse attention: dense attention with masks checks the definition, and the definition the portable form."""

import dataclasses
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from support.block_sparse_plans import KINDS, Plan, Segment, inputs, kinds, lists, plan_to_mask, run
from support.triton_block_sparse import judged
from support.triton_common import check, poisoned

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import block_sparse_attention
from terrazzo.kernels.numba_host import machine

op = importlib.import_module("terrazzo.kernels.block_sparse_attention.op")
portable = importlib.import_module("terrazzo.kernels.block_sparse_attention.portable")
BACKENDS = ("reference", "portable")
both = pytest.mark.parametrize("backend", BACKENDS)
every_kind = pytest.mark.parametrize("kind", KINDS)

# Batch, heads, queries, keys, dim, width of the values, query tile, key tile.
SHAPES = [
    (1, 2, 64, 64, 16, 16, 8, 8),
    (2, 3, 37, 41, 8, 8, 8, 8),
    (1, 1, 5, 37, 4, 6, 8, 12),
    (2, 1, 33, 30, 24, 8, 16, 4),
    (1, 2, 9, 9, 1, 3, 1, 1),
]


def assert_all_close(found, wanted, **tolerance):
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda text, n=number: f"result {n}: {text}", **tolerance)


def everything(query, key, query_tile, key_tile):
    """Plans that list every key exactly once."""
    tiles, blocks = -(-query.shape[2] // query_tile), -(-key.shape[2] // key_tile)
    every = torch.arange(blocks).flip(0)
    half = blocks // 2
    one = every.view(1, 1, 1, -1)
    return {
        "all": [Segment("all")],
        "blocks": [Segment("block", one.expand(1, query.shape[1], tiles, -1))],
        "one list": [Segment("block", one.int())],
        "tokens": [Segment("token", torch.arange(key.shape[2]).view(1, 1, 1, -1).expand(1, 1, tiles, -1))],
        "parts": [Segment("block", one[..., :half]), Segment("block", one[..., half:].expand(1, 1, tiles, -1))],
    }


@both
class TestDefinition:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
    def test_everything_is_dense_attention(self, backend, shape, dtype, tolerance):
        *sizes, query_tile, key_tile = shape
        query, key, value = (x.detach() for x in inputs(*sizes, dtype=dtype))
        wanted = F.scaled_dot_product_attention(query, key, value)
        lse = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).logsumexp(-1)
        for segments in everything(query, key, query_tile, key_tile).values():
            plan = Plan(segments, query_tile, key_tile)
            found = block_sparse_attention(query, key, value, plan, backend=backend)
            assert_all_close(found, (wanted, lse), rtol=tolerance, atol=4 * tolerance)
            assert plan.density(query, key) == pytest.approx(1)

    @every_kind
    def test_masked_dense_attention(self, backend, kind):
        """The output and the lse of PyTorch's operations with `plan_to_mask`, the keys one segment after another."""
        query, key, value = (x.detach() for x in inputs())
        plan = kinds(query, key)[kind][0]
        if plan.merge == "mean":
            pytest.skip("several outputs of a query are not one attention")
        out, lse = block_sparse_attention(query, key, value, plan, backend=backend)
        keys = [(key, value) if x.key is None else (x.key, x.value) for x in plan.segments]
        mask, (keys, values) = plan_to_mask(plan, query, key), (torch.cat(x, 2) for x in zip(*keys))
        bias = []
        for x in plan.segments:
            length = 37 if x.key is None else 6
            own = x.key_bias(length, 8, torch.float64)
            own = torch.zeros(1, 1, length, dtype=torch.float64) if own is None else own
            bias.append((own + x.shift()).expand(2, 3, -1))
        bias = torch.cat(bias, -1).detach().unsqueeze(2)
        logit = (query @ keys.transpose(-1, -2) / math.sqrt(8) + bias).masked_fill(~mask, -torch.inf)
        some = mask.any(-1)
        assert some.any()
        torch.testing.assert_close(lse, logit.logsumexp(-1))
        additive = bias.masked_fill(~mask, -torch.inf)
        wanted = F.scaled_dot_product_attention(query, keys, values, attn_mask=additive)
        torch.testing.assert_close(out[some], wanted[some])
        assert not out[~some].any()

    def test_by_hand(self, backend):
        """LLSA's example: two tokens of a chosen block and two means that count twice, all logits 0: 20 / 6."""
        value = torch.tensor([1.0, 3, 5, 7]).view(1, 1, 4, 1)
        zero, pooled = torch.zeros(1, 1, 4, 1), value.view(1, 1, 2, 2).mean(-1, keepdim=True)
        chosen = Segment("block", torch.zeros(1, 1, 1, 1, dtype=torch.int32))
        means = Segment("all", key=zero[:, :, :2], value=pooled, bias=math.log(2))
        out, lse = block_sparse_attention(zero, zero, value, Plan([chosen, means], 2, 2), backend=backend)
        torch.testing.assert_close(out, torch.full_like(out, 20 / 6))
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(6)))

    def test_a_key_that_is_listed_twice_counts_twice(self, backend):
        query, key, value = (x.detach() for x in inputs(1, 1, 4, 4))
        twice = torch.tensor([[[[0, 1, 1]]]])
        bias = torch.tensor([0.0, 0, math.log(2), math.log(2)], dtype=torch.float64).view(1, 1, 4)
        found = block_sparse_attention(query, key, value, Plan([Segment("block", twice)], 4, 2), backend=backend)
        wanted = block_sparse_attention(query, key, value, Plan([Segment("all", bias=bias)], 4, 2), backend=backend)
        assert_all_close(found, wanted)

    def test_permuting_queries_in_a_tile_and_keys_in_a_block(self, backend):
        query, key, value = (x.detach() for x in inputs(1, 2, 32, 32))
        plan = Plan([Segment("block", lists(1, 2, 4, 4, 2))], 8, 8)
        order = torch.cat([8 * i + torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(4)])
        out, lse = block_sparse_attention(query, key, value, plan, backend=backend)
        found = block_sparse_attention(query[:, :, order], key, value, plan, backend=backend)
        assert_all_close(found, (out[:, :, order], lse[:, :, order]))
        found = block_sparse_attention(query, key[:, :, order], value[:, :, order], plan, backend=backend)
        assert_all_close(found, (out, lse))

    def test_rows_without_keys(self, backend):
        """Output 0, lse -inf, and all gradients 0, also those of keys that nobody lists."""
        arguments = inputs(1, 1, 12, 12)
        index = torch.tensor([0, -1, 1]).view(1, 1, 3, 1)
        plan = Plan([Segment("block", index), Segment("block", index.clone(), bias=1.0)], 4, 4)
        out, lse = block_sparse_attention(*arguments, plan, backend=backend)
        assert not out[:, :, 4:8].any()
        assert lse[:, :, 4:8].isneginf().all()
        results = run(arguments, plan, backend=backend)
        assert all(x.isfinite().all() for x in results)
        _, _, grad_query, grad_key, grad_value = results
        assert not grad_query[:, :, 4:8].any()
        assert not grad_key[:, :, 8:].any()
        assert not grad_value[:, :, 8:].any()

    def test_nothing_listed_at_all(self, backend):
        arguments = inputs(1, 2, 9, 9)
        for segment in (
            Segment("block", torch.zeros(1, 1, 3, 0, dtype=torch.int32)),
            Segment("block", torch.full((1, 1, 1, 2), -1)),
            Segment("all", key_mask=torch.zeros(1, 9, dtype=torch.bool)),
        ):
            out, lse = block_sparse_attention(*arguments, Plan([segment], 3, 3), backend=backend)
            assert not out.any()
            assert lse.isneginf().all()
            assert not any(x.any() for x in run(arguments, Plan([segment], 3, 3), backend=backend))

    def test_one_key(self, backend):
        query, key, value = (x.detach() for x in inputs(2, 2, 5, 1))
        for segment in (Segment("all"), Segment("block", torch.zeros(1, 1, 3, 1, dtype=torch.int64))):
            out, _ = block_sparse_attention(query, key, value, Plan([segment], 2, 64), backend=backend)
            torch.testing.assert_close(out, value.expand_as(out))

    def test_a_query_in_several_tiles(self, backend):
        """The mean of the tiles' outputs, the lse over the keys of both. A query in no tile is a row without keys."""
        query, key, value = (x.detach() for x in inputs(1, 1, 3, 8))
        order, index = torch.tensor([0, 1, 1, -1]).view(1, 1, 4), torch.tensor([0, 1]).view(1, 1, 2, 1)
        plan = Plan([Segment("block", index)], 2, 4, order, "mean")
        out, lse = block_sparse_attention(query, key, value, plan, backend=backend)
        halves = [F.scaled_dot_product_attention(query, key[:, :, i : i + 4], value[:, :, i : i + 4]) for i in (0, 4)]
        torch.testing.assert_close(out[:, :, 0], halves[0][:, :, 0])
        torch.testing.assert_close(out[:, :, 1], (halves[0] + halves[1])[:, :, 1] / 2)
        torch.testing.assert_close(lse[0, 0, 1], (query @ key.transpose(-1, -2) / math.sqrt(8)).logsumexp(-1)[0, 0, 1])
        assert not out[:, :, 2].any()
        assert lse[0, 0, 2] == -math.inf

    @every_kind
    def test_gradcheck(self, backend, kind):
        arguments = inputs(1, 2, 9, 10, 3)
        plan, more = kinds(*arguments[:2], query_tile=3, key_tile=3)[kind]

        def call(query, key, value, *others):
            out, lse = block_sparse_attention(query, key, value, plan, backend=backend)
            return out, lse.masked_fill(lse.isneginf(), 0)

        assert torch.autograd.gradcheck(call, (*arguments, *more), fast_mode=True)


@pytest.fixture
def gathering(monkeypatch):
    """The rule would prefer a mask for most calls as small as these."""
    monkeypatch.setattr(portable._Call, "prefers_a_mask", lambda call: False)


class TestPortable:
    @every_kind
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_float64(self, gathering, kind, shape):
        *sizes, query_tile, key_tile = shape
        arguments = inputs(*sizes)
        plan, more = kinds(*arguments[:2], query_tile, key_tile, sizes[-1])[kind]
        with poisoned():
            found = run(arguments, plan, more)
        assert_all_close(found, run(arguments, plan, more, "reference"), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("kind", ["ragged blocks", "one list", "segments", "all"])
    @pytest.mark.parametrize("piece", [1, 100, 1000, 10**9])
    def test_pieces(self, monkeypatch, gathering, kind, piece):
        """Pieces of a tile's queries, single tiles and several tiles give the same numbers."""
        arguments = inputs()
        plan, more = kinds(*arguments[:2])[kind]
        wanted = run(arguments, plan, more, "reference")
        monkeypatch.setattr(portable, "_LOGITS", piece)
        monkeypatch.setattr(portable, "_KEYS", piece)
        with poisoned():
            found = run(arguments, plan, more)
        assert_all_close(found, wanted, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", ["ragged blocks", "segments", "mean order"])
    def test_error_is_no_worse_than_plain_pytorch(self, gathering, dtype, kind):
        """The error is at most twice the definition's error in the same dtype."""
        arguments = inputs(2, 3, 130, 130, 32, dtype=dtype)
        plan, more = kinds(*arguments[:2], 16, 16)[kind]
        double = [x.detach().double().requires_grad_() for x in arguments]
        twin, twin_more = kinds(*double[:2], 16, 16)[kind]
        with torch.no_grad():
            for x, y in zip(twin_more, more):
                x.copy_(y)
        exact = run(double, twin, twin_more, "reference")
        plain, found = run(arguments, plan, more, "reference"), run(arguments, plan, more)
        check(judged(found, plain, exact, 2 * 130, {dtype: 3}))

    @pytest.mark.parametrize("kind", ["ragged blocks", "a bias of blocks", "lists of keys", "a bias of keys"])
    @pytest.mark.parametrize("mask", [1, 10**9])
    def test_gathered_and_masked(self, monkeypatch, kind, mask):
        """Both give the same numbers, whichever the rule prefers."""
        arguments = inputs()
        plan, more = kinds(*arguments[:2])[kind]
        monkeypatch.setattr(portable, "_MASK", mask)
        results = []
        for preferred in (False, True):
            monkeypatch.setattr(portable._Call, "prefers_a_mask", lambda call, preferred=preferred: preferred)
            with poisoned():
                results.append(run(arguments, plan, more))
        assert_all_close(*results, rtol=1e-10, atol=1e-10)

    def test_the_rule_for_masks(self):
        """Dense lists of small tiles are masked, sparse lists, one list for all queries and all keys are gathered."""
        query, key, value = (x.detach() for x in inputs(1, 1, 256, 256))

        def prefers(entries, tile, one=False):
            index = torch.arange(entries).expand(1, 1, 1 if one else 256 // tile, -1)
            return portable._Call(query, key, value, index, None, tile, tile).prefers_a_mask()

        assert prefers(8, 16)
        assert not prefers(2, 16)
        assert not prefers(2, 64)
        assert not prefers(16, 16, one=True)
        assert not portable._Call(query, key, value, None, None, 16, 16).prefers_a_mask()

    def test_strides(self):
        """Views of a packed projection, keys and values of another memory format."""
        packed = torch.randn(2, 37, 3, 3, 8, dtype=torch.float64)
        arguments = [x.requires_grad_() for x in packed.permute(2, 0, 3, 1, 4).unbind(0)]
        plan, _ = kinds(*arguments[:2])["ragged blocks"]
        assert_all_close(run(arguments, plan), run(arguments, plan, backend="reference"))

    def test_large_logits_stay_finite(self):
        arguments = [x.detach().mul(1e4).requires_grad_() for x in inputs(dtype=torch.float32)]
        plan, more = kinds(*arguments[:2])["segments"]
        assert all(x.isfinite().all() for x in run(arguments, plan, more))

    def test_same_bits_every_time(self):
        arguments = inputs(dtype=torch.float32)
        plan, more = kinds(*arguments[:2])["segments"]
        first, second = (run(arguments, plan, more) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))

    def test_autocast(self):
        """Queries of a norm are float32, values of a projection bfloat16: as in PyTorch's attention."""
        query, key, value = (x.detach() for x in inputs(1, 2, 16, 16, dtype=torch.float32))
        plan = Plan([Segment("all"), Segment("all", key=key, value=value)], 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out, lse = block_sparse_attention(query, key, value.bfloat16(), plan)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        wanted = F.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2)

    def test_mutation(self, monkeypatch):
        """If the last entry of a list is lost, the comparisons above must fail."""
        arguments = inputs()
        plan, _ = kinds(*arguments[:2])["blocks"]
        broken = dataclasses.replace(plan, segments=[Segment("block", plan.segments[0].index[..., :-1])])
        wanted = run(arguments, plan, backend="reference")
        assert all(not torch.allclose(a, b) for a, b in zip(run(arguments, broken), wanted))


class TestPlan:
    @every_kind
    def test_density_counts_the_pairs_of_the_mask(self, kind):
        query, key, _ = inputs()
        plan = kinds(query, key)[kind][0]
        pairs = plan_to_mask(plan, query, key).sum().item() / (2 * 3)
        if kind == "mean order":  # pairs that two tiles list count twice
            assert plan.density(query, key) >= pairs / 37**2
        else:
            assert plan.density(query, key) == pytest.approx(pairs / 37**2)

    def segment(self, **change):
        return Segment(**{"unit": "block", "index": torch.zeros(1, 1, 1, 2, dtype=torch.int32), **change})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"unit": "row"}, r"unit 'row' of segments\[0\] is not one of block, token, all"),
            ({"index": None}, "must have an index"),
            ({"unit": "all"}, "must have an index, unless its unit is"),
            ({"index": torch.zeros(1, 1, 1, 2)}, r"index of segments\[0\] must be \(1 or 1, 2 or 1, 3 or 1, any\)"),
            ({"index": torch.zeros(1, 3, 1, 2).int()}, r"index of segments\[0\] must be"),
            ({"index": torch.zeros(1, 1, 4, 2).int()}, r"index of segments\[0\] must be"),
            ({"index": torch.full((1, 1, 1, 2), 3)}, "must be from -1 to 2, the last of the 3 blocks; got 3 to 3"),
            ({"index": torch.full((1, 1, 1, 2), -2)}, "got -2 to -2"),
            ({"unit": "token", "index": torch.full((1, 1, 1, 2), 9)}, "the last of the 9 keys"),
            ({"count": torch.zeros(1, 1, 2).int()}, "count of segments"),
            ({"unit": "all", "index": None, "count": torch.zeros(1, 1, 1).int()}, "no index that it could shorten"),
            (
                {"bias": torch.zeros(9)},
                r"bias of segments\[0\] must be a number or \(1 or 1, 2 or 1, 9 keys or 3 blocks\)",
            ),
            ({"bias": torch.zeros(1, 2, 4)}, "9 keys or 3 blocks"),
            ({"bias": math.nan}, "must be a finite number, got nan"),
            ({"key_mask": torch.ones(1, 9)}, r"key_mask of segments\[0\] must be \(1 or 1, 9\) bool"),
            ({"key": torch.zeros(1, 2, 9, 8)}, "a key or a value, but not both"),
            (
                {"key": torch.zeros(1, 2, 9, 4), "value": torch.zeros(1, 2, 9, 8)},
                r"segments\[0\]: key and query must agree",
            ),
        ],
    )
    def test_errors_of_segments(self, change, message):
        query, key, value = torch.zeros(3, 1, 2, 9, 8)
        with pytest.raises(InputError, match=message):
            block_sparse_attention(query, key, value, Plan([self.segment(**change)], 4, 3))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"segments": []}, "at least 1 segment"),
            ({"query_tile": 0}, "query_tile must be at least 1, got 0"),
            ({"key_tile": 1.5}, "key_tile must be an int"),
            ({"merge": "sum"}, "merge 'sum' is not one of unique, mean"),
            ({"query_order": torch.zeros(1, 9)}, "query_order must be"),
            ({"query_order": torch.full((1, 1, 9), 9)}, "the last of the 9 queries"),
        ],
    )
    def test_errors_of_plans(self, change, message):
        query, key, value = torch.zeros(3, 1, 2, 9, 8)
        plan = Plan(**{"segments": [self.segment()], "query_tile": 4, "key_tile": 3, **change})
        with pytest.raises(InputError, match=message):
            block_sparse_attention(query, key, value, plan)

    def test_other_errors(self):
        query, key, value = torch.zeros(3, 1, 2, 9, 8)
        plan = Plan([Segment("all")])
        with pytest.raises(InputError, match="plan must be a Plan, got list"):
            block_sparse_attention(query, key, value, [])
        with pytest.raises(InputError, match="the call has none either"):
            block_sparse_attention(query, None, None, plan)
        with pytest.raises(InputError, match="key must be a tensor, got NoneType"):
            block_sparse_attention(query, None, value, plan)
        narrow = Plan([Segment("all"), Segment("all", key=key, value=value[..., :4])])
        with pytest.raises(InputError, match="all values must have one last axis"):
            block_sparse_attention(query, key, value, narrow)
        with pytest.raises(InputError, match="not one of"):
            block_sparse_attention(query, key, value, plan, backend="cuda")
        with pytest.raises(InputError, match="scale must be a finite number"):
            block_sparse_attention(query, key, value, plan, scale=math.inf)

    def test_keys_of_the_plan_alone(self):
        query, key, value = (x.detach() for x in inputs())
        plan = Plan([Segment("all", key=key, value=value)])
        found = block_sparse_attention(query, None, None, plan)
        assert_all_close(found, block_sparse_attention(query, key, value, Plan([Segment("all")])))


class TestOperator:
    @pytest.mark.parametrize("kind", ["a bias of keys", pytest.param("all", marks=pytest.mark.slow)])
    def test_opcheck(self, kind):
        arguments = inputs(1, 2, 20, 20)
        plan = kinds(*arguments[:2])[kind][0]
        keys = op.lowering.lower(plan, *arguments[1:], torch.float64)[0]
        tensors = (arguments[0], keys.key, keys.value, keys.index, keys.bias)
        torch.library.opcheck(torch.ops.terrazzo.block_sparse_attention.default, (*tensors, 8, 8, 0.3, "portable"))

    @pytest.mark.long
    @pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_compiles_without_a_break(self, dynamic):
        """A selector and the operator in one graph: the plan is made inside."""

        def attend(query, key, value):
            means = key.unflatten(2, (-1, 4)).mean(3)
            index = (query.unflatten(2, (-1, 4)).mean(3) @ means.transpose(-1, -2)).topk(2).indices
            pooled = Segment("all", key=means, value=value.unflatten(2, (-1, 4)).mean(3), bias=math.log(4))
            return block_sparse_attention(query, key, value, Plan([Segment("block", index), pooled], 4, 4))

        torch._dynamo.reset()
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for length in (16, 24):
            arguments = inputs(2, 2, length, length)
            found, wanted = (function(*arguments) for function in (compiled, attend))
            assert_all_close(found, wanted)
            grads = [torch.autograd.grad(x[0].square().sum() + x[1].sum(), arguments) for x in (found, wanted)]
            assert_all_close(*grads)

    def test_flop_formula_counts_listed_pairs(self):
        from torch.utils.flop_counter import FlopCounterMode

        query, key, value = (torch.zeros(2, 3, 64, dim, device="meta", requires_grad=True) for dim in (8, 8, 16))
        plan = Plan([Segment("block", torch.zeros(1, 1, 8, 3, dtype=torch.int32, device="meta"))], 8, 4)
        pairs = 2 * 3 * 64 * 12
        with FlopCounterMode(display=False) as counter:
            out, _ = block_sparse_attention(query, key, value, plan)
        assert counter.get_total_flops() == 2 * pairs * (8 + 16)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * pairs * (3 * 8 + 2 * 16)

    def test_describe(self):
        query, key, value = inputs(1, 2, 32, 32)
        index = torch.zeros(1, 1, 4, 2, dtype=torch.int32)
        call = op.OPERATOR.describe(query, key, value, index, None, 8, 4, 1.0, "portable")
        assert call.parameters == {"tiles": "8x4", "density": "0.25"}
        assert call.shape["keys"] == 32

    def test_backends(self, monkeypatch):
        query, key, value = (x.detach().float() for x in inputs(1, 1, 8, 8))
        assert op.OPERATOR.why("auto", query, key, value).name == "fused"
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        with pytest.raises(BackendError, match=r"block_sparse_attention: backend 'fused'.*needs the package numba"):
            block_sparse_attention(query, key, value, Plan([Segment("all")]), backend="fused")
        assert op.OPERATOR.why("auto", query, key, value).name == "portable"


class Selecting(torch.nn.Module):
    """A selector and the operator: the best blocks by their means, and all means, or a list of keys for all queries."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, query, key, value):
        means, averages = (x.unflatten(2, (-1, 4)).mean(3) for x in (key, value))
        own = Segment("all", key=means, value=averages, bias=math.log(4))
        if self.kind == "blocks":
            index = (query.unflatten(2, (-1, 8)).mean(3) @ means.transpose(-1, -2)).topk(3).indices
            return block_sparse_attention(query, key, value, Plan([Segment("block", index), own], 8, 4))
        if self.kind == "keys":
            index = key.mean(-1).topk(9).indices
            tokens = Segment("token", index.unsqueeze(2), bias=key.mean(-1))
            return block_sparse_attention(query, key, value, Plan([tokens]))
        order = (query @ means[:, :, :3].transpose(-1, -2)).topk(16, 2).indices.transpose(2, 3).flatten(2)
        clusters = Segment("block", torch.arange(3).view(1, 1, 3, 1))
        return block_sparse_attention(query, key, value, Plan([clusters], 16, 16, order, "mean"))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["blocks", pytest.param("keys", marks=pytest.mark.slow), "clusters"])
def test_onnx(kind, tmp_path):
    """ONNX Runtime gives the same numbers, from standard operations."""
    onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    arguments = [x.detach() for x in inputs(2, 2, 48, 48, dtype=torch.float32)]
    module, path = Selecting(kind).eval(), tmp_path / "attention.onnx"
    torch.onnx.export(module, tuple(arguments), dynamo=True, verbose=False).save(path)
    operations = {node.op_type for node in onnx.load(path).graph.node}
    assert {"Gather", "MatMul", "Softmax"} <= operations
    assert not {"Scan", "Loop"} & operations
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, arguments)})
    assert_all_close([torch.from_numpy(x) for x in found], module(*arguments), rtol=1e-4, atol=1e-5)

"""Token reduction: its algebra, its forms compared with the definition, ties, windows, padding, export."""

import importlib
import math

import pytest
import torch

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import token_reduction as reduction
from terrazzo.kernels import use_backend
from terrazzo.kernels.numba_host import machine
from terrazzo.kernels.token_reduction import (
    attention,
    column_mean,
    compose,
    merge,
    ordered,
    pair,
    pairing,
    plan,
    plan_of,
    portable,
    prop_bias,
    prune,
    prune_packed,
    row_mean,
    unmerge,
)

BACKENDS = ("portable", "reference")


def inputs(count, batch=3, dim=5, seed=0, dtype=torch.float64):
    """Tokens, sizes of 1 to 5, importances that add up to 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, count, dim, generator=generator, dtype=dtype)
    size = torch.randint(1, 6, (batch, count), generator=generator).to(dtype)
    importance = torch.randn(batch, count, generator=generator, dtype=dtype).softmax(-1)
    return x, size, importance


CASES = [
    dict(count=count, protect=protect, r=r, bidirectional=bidirectional)
    for count in (9, 12, 13)
    for protect in (0, 1, 2)
    for bidirectional in (False, True)
    for r in (0, 3, "max")
] + [
    dict(count=h * w + protect, protect=protect, r=r, partition="cell2x2", grid=(h, w))
    for h, w in ((4, 4), (5, 3))
    for protect in (0, 1)
    for r in (4, "max")
]


def planned(case, size=None, importance=None, x=None, **kwargs):
    case = dict(case)
    count, r = case.pop("count"), case.pop("r")
    if r == "max":
        r = reduction.limit(
            count,
            case["protect"],
            case.get("partition", "even_odd"),
            case.get("grid"),
            case.get("bidirectional", False),
        )
    return plan(inputs(count)[0] if x is None else x, r=r, size=size, importance=importance, **case, **kwargs)


class TestPlan:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_forms_agree(self, case):
        x, size, importance = inputs(case["count"])
        for extras in ({}, {"importance": importance}, {"size": size, "importance": importance}):
            found, wanted = (planned(case, x=x, backend=backend, **extras) for backend in BACKENDS)
            assert found.M == wanted.M
            assert torch.equal(found.map, wanted.map)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_invariants(self, case):
        """The map is onto [0, M), protected tokens stay alone in their places, and the sum of sizes is unchanged."""
        x, size, importance = inputs(case["count"])
        found = planned(case, size, importance, x)
        for row in found.map:
            assert row.unique().tolist() == list(range(found.M))
            assert row[: case["protect"]].tolist() == list(range(case["protect"]))
        tokens, sizes, _ = merge(x, found, size=size)
        assert torch.equal(sizes.sum(1), size.sum(1))
        assert torch.equal(tokens[:, : case["protect"]], x[:, : case["protect"]])

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        ("options", "wanted"),
        [
            ({"bidirectional": True}, [0, 3, 1, 1, 2, 2]),
            ({}, [0, 1, 2, 2, 3, 3]),
            ({"bidirectional": True, "importance": (0.1, 0.1, 0.1, 0.1, 0.3, 0.3)}, [0, 3, 2, 2, 1, 1]),
            ({"bidirectional": True, "size": (1.0, 1.0, 1.0, 1.0, 4.0, 4.0)}, [0, 3, 2, 2, 1, 1]),
        ],
    )
    def test_by_hand(self, backend, options, wanted):
        x = torch.tensor([[[1, 0], [1, 0.2], [0, 1], [0.1, 1], [1, 1.2], [1, 1]]], dtype=torch.float64)
        uniform = torch.full((1, 6), 1 / 6, dtype=torch.float64)
        options = {key: torch.tensor([value]) if isinstance(value, tuple) else value for key, value in options.items()}
        found = plan(x, r=2, **{"importance": uniform, **options}, backend=backend)
        assert found.map.tolist() == [wanted]
        if options == {"bidirectional": True}:
            tokens, sizes, _ = merge(x, found)
            assert sizes.tolist() == [[1, 2, 2, 1]]
            wanted = torch.tensor([[[1, 0], [0.05, 1], [1, 1.1], [1, 0.2]]], dtype=torch.float64)
            torch.testing.assert_close(tokens, wanted)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_ties_go_to_the_lowest_index(self, backend, bidirectional):
        """On a constant image, the first sources are merged, all into the first destination."""
        found = plan(torch.ones(2, 11, 3), r=4, bidirectional=bidirectional, backend=backend)
        #             0  1  2  3  4  5  6  7  8  9 10   sources 2 4 6 8 10, destinations 1 3 5 7 9
        one_way = [0, 2, 2, 3, 2, 4, 2, 5, 2, 6, 1]
        two_way = [0, 1, 1, 1, 1, 4, 1, 5, 2, 6, 3]  # 2 and 4 into 1; then 1 and 3 into 6
        assert found.map.tolist() == [two_way if bidirectional else one_way] * 2

    def test_exported_ranks_are_the_same(self, monkeypatch):
        score = torch.tensor([[1.0, 3, 3, -1, 1, -1], [0, 0, 0, 0, 0, 0]])
        wanted = portable.rank(score)
        assert wanted.tolist() == [[2, 0, 1, 4, 3, 5], [0, 1, 2, 3, 4, 5]]
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        assert torch.equal(portable.rank(score), wanted)

    def test_cells_keep_a_token(self):
        """If all sources are merged, each cell keeps one token; cells of an odd last row do, too."""
        found = planned(dict(count=16, protect=1, r="max", partition="cell2x2", grid=(5, 3)))
        assert found.M == 1 + 2 * 1
        assert found.map[0, [1, 7]].tolist() == [1, 2]

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("partition", ["even_odd", "cell2x2"])
    def test_windows_are_not_crossed(self, backend, partition):
        x, size, _ = inputs(1 + 8 * 4)
        found = plan(x, r=5, size=size, window=4, grid=(8, 4), partition=partition, backend=backend)
        assert found.M == 1 + 2 * (16 - 5)
        window = torch.arange(32).view(8, 4) // 16
        assert torch.equal((found.map[:, 1:] - 1) // 11, window.flatten().expand(3, -1))
        for row in found.map:
            assert row.unique().tolist() == list(range(found.M))

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_padding_changes_nothing(self, backend, bidirectional):
        """Tokens of size 0 after a sequence do not change how other tokens are merged."""
        x, size, importance = inputs(13)
        padded = [torch.cat([t, t[:, :4]], 1) for t in (x, size, importance)]
        padded[1][:, 13:] = 0
        arguments = dict(r=4, bidirectional=bidirectional, backend=backend)
        alone = plan(x, size=size, importance=importance, **arguments)
        found = plan(padded[0], size=padded[1], importance=padded[2], **arguments)
        tokens, sizes, _ = merge(padded[0], found, size=padded[1])
        assert torch.equal(sizes.sum(1), size.sum(1))
        assert tokens.isfinite().all()
        for i in range(3):
            groups = [
                {tuple((row == k).nonzero().flatten().tolist()) for k in row.unique()}
                for row in (alone.map[i], found.map[i, :13])
            ]
            assert groups[0] == groups[1]

    def test_half_precision_is_compared_in_float32(self):
        x = inputs(40, dtype=torch.float32)[0].bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            found = plan(x, r=12)
        assert torch.equal(found.map, plan(x.float(), r=12).map)

    def test_mutation(self, monkeypatch):
        """Factors that are not inverted favour important tokens: the comparisons must fail."""
        monkeypatch.setattr(portable, "_factor", lambda values, tau: (values / values.amax(-1, True)) ** (1 / tau))
        x, size, importance = inputs(13)
        found, wanted = (
            plan(x, r=4, size=size, importance=importance, criteria=(1, 1, 1), backend=name) for name in BACKENDS
        )
        assert not torch.equal(found.map, wanted.map)


class TestPair:
    SOURCES, DESTINATIONS = torch.tensor([[5, 1, 3], [0, 2, 4]]), torch.tensor([[6, 2], [6, 1]])

    def test_by_hand(self):
        """Tokens of neither list come first; sources join the most similar destination, or the r most similar do."""
        metric = torch.tensor([[0, 1], [2, 1], [3, 0], [0, 2], [1, 1], [1, 4], [0, 3]]).double().expand(2, -1, -1)
        one = slice(0, 1)
        found = pair(metric[one], self.SOURCES[one], self.DESTINATIONS[one])
        assert (found.map.tolist(), found.M) == ([[0, 3, 3, 2, 1, 2, 2]], 4)
        found = pair(metric[one], self.SOURCES[one], self.DESTINATIONS[one], r=1)
        assert (found.map.tolist(), found.M) == ([[0, 3, 5, 4, 1, 2, 4]], 6)
        found = pair(metric[one], self.SOURCES[one], self.DESTINATIONS[one], r=0)
        assert found.map.tolist() == [[0, 3, 6, 4, 1, 2, 5]]

    def test_images_have_their_own_lists(self):
        metric = inputs(7, batch=2)[0]
        both = pair(metric, self.SOURCES, self.DESTINATIONS, r=2).map
        for b in range(2):
            alone = pair(metric[b : b + 1], self.SOURCES[b : b + 1], self.DESTINATIONS[b : b + 1], r=2).map
            assert torch.equal(both[b : b + 1], alone)

    def test_padding_attracts_nothing(self):
        metric = torch.ones(1, 4, 2)
        size = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
        sources, destinations = torch.tensor([[1, 0]]), torch.tensor([[2, 3]])
        assert pair(metric, sources, destinations, 1, size).map.tolist() == [[2, 0, 1, 2]]

    def test_exported_ranks_are_the_same(self, monkeypatch):
        metric = inputs(7, batch=2)[0]
        wanted = pair(metric, self.SOURCES, self.DESTINATIONS, r=2).map
        monkeypatch.setattr(portable, "is_exporting", lambda: True)
        assert torch.equal(pair(metric, self.SOURCES, self.DESTINATIONS, r=2).map, wanted)

    def test_order(self, monkeypatch):
        """Descending, the lowest index first among equals; exported without a sort, and equal."""
        score = torch.tensor([[1.0, 3.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, -1.0, 5.0]])
        wanted = [[1, 4, 3, 0, 2], [4, 0, 1, 2, 3]]
        assert ordered(score).tolist() == wanted
        for module in (portable, pairing):
            monkeypatch.setattr(module, "is_exporting", lambda: True)
        graph = torch.fx.experimental.proxy_tensor.make_fx(ordered)(score)
        assert "sort" not in graph.code
        assert graph(score).tolist() == wanted

    def test_any_map(self):
        assert plan_of(torch.tensor([[0, 2, 1, 0]]), 3).M == 3
        for wrong, message in (
            ([[0, 3, 1]], "a map must lead to tokens 0 to 2, got 3"),
            ([[0, -1, 1]], "a map must lead to tokens 0 to 2, got -1"),
            ([[0, 2, 2]], "a map to 3 tokens must reach each of them, got none for token 1"),
            ([0, 1, 2], r"a map must be \(B, N\) of int64, got \(3,\)"),
        ):
            with pytest.raises(InputError, match=message):
                plan_of(torch.tensor(wrong), 3)

    @pytest.mark.parametrize(
        ("lists", "r", "message"),
        [
            ((torch.tensor([[0, 1]]), torch.tensor([[2]])), 3, "r must be 0 to the 2 sources"),
            (
                (torch.tensor([[0, 1]]), torch.empty(1, 0, dtype=torch.int64)),
                None,
                "destinations, got 2 and 0",
            ),
            ((torch.tensor([[0], [1]]), torch.tensor([[2], [2]])), None, r"metric must be \(B, N, D\)"),
        ],
    )
    def test_errors(self, lists, r, message):
        with pytest.raises(InputError, match=message):
            pair(torch.randn(1, 4, 3), *lists, r)


class TestAlgebra:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_projector(self, case):
        x, size, importance = inputs(case["count"])
        weight = size * importance
        found = planned(case, size, importance, x)
        for backend in BACKENDS:

            def pooled(value, backend=backend):
                return merge(value, found, weight, size, backend=backend)[0]

            z = pooled(x)
            torch.testing.assert_close(pooled(unmerge(z, found.map)), z, rtol=0, atol=1e-12)
            back = unmerge(z, found.map)
            torch.testing.assert_close(pooled(x - back), torch.zeros_like(z), rtol=0, atol=1e-12)
            n = torch.zeros(z.shape[:2], dtype=z.dtype).scatter_add(1, found.map, weight)
            total = (n.unsqueeze(-1) * z).sum(1)
            torch.testing.assert_close(total, (weight.unsqueeze(-1) * x).sum(1), rtol=0, atol=1e-12)
        torch.testing.assert_close(merge(x, found, weight)[0], z, rtol=0, atol=1e-12)

    def test_gradients(self):
        x, size, _ = inputs(9)
        x.requires_grad_()
        found = plan(x, r=3)
        for backend in BACKENDS:
            assert torch.autograd.gradcheck(lambda t, b=backend: merge(t, found, size, backend=b)[0], (x,))
        z = torch.randn(3, found.M, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: unmerge(t, found.map), (z,))
        (grad,) = torch.autograd.grad(merge(x, found, size)[0].sum(), x)
        n = torch.zeros(3, found.M, dtype=torch.float64).scatter_add(1, found.map, size)
        torch.testing.assert_close(grad, (size / n.gather(1, found.map)).unsqueeze(-1).expand_as(x))

    def test_composed_map(self):
        x, _, _ = inputs(17)
        first = plan(x, r=5)
        y, size, _ = merge(x, first)
        second = plan(y, r=4, size=size, bidirectional=True)
        z, size, _ = merge(y, second, size=size)
        assert torch.equal(unmerge(z, compose(second.map, first.map)), unmerge(unmerge(z, second.map), first.map))
        assert torch.equal(size.sum(1), torch.full((3,), 17.0, dtype=torch.float64))

    @pytest.mark.parametrize("proportional", [True, False])
    def test_attention_of_merged_duplicates(self, proportional):
        """A merged key counts as often as its equal tokens; without the bias it counts once."""
        z, _, _ = inputs(5)
        assignment = torch.stack([torch.arange(5).repeat_interleave(torch.tensor([3, 1, 2, 1, 2]))] * 3)
        x = unmerge(z, assignment)
        tokens, sizes, _ = merge(x, reduction.Plan(assignment, 5))
        torch.testing.assert_close(tokens, z)

        def attend(values, bias):
            heads = values.unsqueeze(1)
            return torch.nn.functional.scaled_dot_product_attention(
                heads, heads, heads, None if bias is None else bias[:, None, None]
            ).squeeze(1)

        found = unmerge(attend(tokens, prop_bias(sizes) if proportional else None), assignment)
        assert torch.allclose(found, attend(x, None), rtol=0, atol=1e-12) == proportional


class TestPrune:
    def test_by_k(self):
        x, _, score = inputs(9)
        tokens, assignment, parked = prune(x, score, k=3)
        assert tokens.shape == (3, 4, 5)
        for i in range(3):
            wanted = sorted([0, *sorted(range(1, 9), key=lambda j: (-score[i, j], j))[:3]])
            assert torch.equal(tokens[i], x[i, wanted])
            assert parked[i].tolist() == [j for j in range(9) if j not in wanted]
            assert [j for j in range(9) if assignment[i, j] >= 0] == wanted
        assert torch.equal(unmerge(tokens, assignment, x), x)
        kept = unmerge(tokens, assignment, torch.zeros(()))
        assert torch.equal(kept.abs().sum(-1) == 0, assignment < 0)
        later = plan(tokens, r=1)
        composed = compose(later.map, assignment)
        assert torch.equal(composed < 0, assignment < 0)

    def test_by_threshold(self):
        x, _, score = inputs(9)
        wanted = []
        for i in range(3):
            tokens, _, parked = prune(x[i : i + 1], score[i : i + 1], threshold=0.1)
            keep = score[i] > 0.1
            keep[0] = True
            assert torch.equal(tokens[0], x[i, keep])
            assert parked.tolist() == [(~keep).nonzero().flatten().tolist()]
            wanted.append(tokens[0])
        offsets = torch.tensor([0, 9, 18, 27], dtype=torch.int32)
        packed, found, index = prune_packed(x.flatten(0, 1), score.flatten(), 0.1, offsets)
        assert torch.equal(packed, torch.cat(wanted))
        assert found.tolist() == [0, *torch.tensor([len(t) for t in wanted]).cumsum(0).tolist()]
        assert found.dtype == torch.int32
        assert torch.equal(x.flatten(0, 1)[index], packed)

    @pytest.mark.parametrize("protect", [0, 2])
    def test_by_threshold_behind_other_tokens_in_front(self, protect):
        """Images have different lengths: one has no token, and one has fewer tokens than are protected."""
        x, _, score = (t[0] for t in inputs(9))
        lengths = [3, 0, 1, 5]
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        packed, found, _ = prune_packed(x, score, 0.1, offsets, protect)
        images = zip(x.split(lengths), score.split(lengths))
        wanted = [t[(s > 0.1) | (torch.arange(len(t)) < protect)] for t, s in images]
        assert torch.equal(packed, torch.cat(wanted))
        assert found.diff().tolist() == [len(t) for t in wanted]

    def test_all_may_go(self):
        x, _, score = inputs(9, batch=1)
        tokens, assignment, _ = prune(x, score, threshold=2.0)
        assert torch.equal(tokens, x[:, :1])
        assert assignment.tolist() == [[0, *[-1] * 8]]


class TestImportance:
    def test_row_mean(self):
        """Rows of the attention matrix, averaged; gradients flow."""
        query, key = (inputs(9, batch=6, dim=4, seed=seed)[0].unflatten(0, (2, 3)).requires_grad_() for seed in (0, 1))
        bias = torch.randn(2, 9, dtype=torch.float64)
        wanted = (query @ key.transpose(-1, -2) / 2 + bias[:, None, None]).softmax(-1)
        torch.testing.assert_close(row_mean(query, key, bias), wanted[:, :, 0].mean(1))
        torch.testing.assert_close(row_mean(query, key, bias, rows=2), wanted[:, :, :2].mean((1, 2)))
        row_mean(query, key).square().sum().backward()
        assert query.grad.abs().sum() > 0
        assert row_mean(query.half(), key.half()).dtype == torch.float32
        with pytest.raises(InputError, match="rows must be 1 to the 9 tokens, got 10"):
            row_mean(query, key, rows=10)

    @pytest.mark.parametrize(("whole", "tile"), [(1 << 24, 40), (0, 200), (0, 100), (0, 40), (0, 1)])
    @pytest.mark.parametrize("biased", [False, True])
    def test_column_mean(self, whole, tile, biased, monkeypatch):
        """All at once, or by two images, one image, two queries, one query. Weights add up to 1 for each query."""
        monkeypatch.setattr(portable, "_WHOLE", whole)
        monkeypatch.setattr(portable, "_TILE", tile)
        monkeypatch.setattr(portable, "_FEWEST", 1)
        q, k, v = torch.randn(3, 3, 2, 7, 4, dtype=torch.float64, requires_grad=True).unbind()
        bias = torch.rand(3, 7, dtype=torch.float64) if biased else None
        wanted = column_mean(q, k, bias, backend="reference")
        torch.testing.assert_close(column_mean(q, k, bias, backend="portable"), wanted, rtol=0, atol=1e-14)
        torch.testing.assert_close(wanted.sum(1), torch.ones(3, dtype=torch.float64))
        with use_backend("portable"):
            found, attend = attention(q, k, bias)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
        assert not found.requires_grad
        score = q @ k.mT / math.sqrt(4)
        whole = (score if bias is None else score + bias[:, None, None]).softmax(-1) @ v
        torch.testing.assert_close(attend(v), whole, rtol=0, atol=1e-12)

    def test_no_more_than_a_tile_is_held(self, monkeypatch):
        monkeypatch.setattr(portable, "_WHOLE", 0)
        monkeypatch.setattr(portable, "_TILE", 1 << 12)
        monkeypatch.setattr(portable, "_FEWEST", 1)
        held = []
        scores = portable.attention_weights
        monkeypatch.setattr(portable, "attention_weights", lambda *a: held.append(out := scores(*a)) or out)
        q = torch.randn(1, 2, 200, 4)
        column_mean(q, q, backend="portable")
        assert len(held) > 1
        assert max(x.numel() for x in held) <= 1 << 12


class Reduce(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x, importance):
        found = plan(x, r=6, importance=importance, **self.options)
        tokens, size, _ = merge(x, found, importance)
        later = plan(tokens, r=3, size=size)
        tokens, size, _ = merge(tokens, later, size=size)
        return tokens, size, unmerge(tokens, compose(later.map, found.map))


class TestOperator:
    @pytest.mark.long
    @pytest.mark.parametrize(
        "options",
        [
            dict(bidirectional=True),
            pytest.param(dict(partition="cell2x2", grid=(5, 4), protect=1), marks=pytest.mark.slow),
        ],
        ids=str,
    )
    def test_onnx(self, options, tmp_path):
        """The file has static shapes and any batch, and no reducing scatter and no loop."""
        onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
        x, _, importance = inputs(21, batch=2, dtype=torch.float32)
        batch = torch.export.Dim("batch", min=1, max=64)
        path = tmp_path / "reduce.onnx"
        program = torch.onnx.export(
            Reduce(**options), (x, importance), dynamo=True, dynamic_shapes=({0: batch}, {0: batch}), verbose=False
        )
        program.save(path)
        found = {node.op_type for node in onnx.load(path).graph.node}
        assert not found & {"ScatterElements", "ScatterND", "Loop", "Scan", "If", "NonZero"}
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        x, _, importance = inputs(21, batch=5, seed=3, dtype=torch.float32)
        got = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), (x, importance))})
        for ours, wanted in zip(got, Reduce(**options)(x, importance)):
            torch.testing.assert_close(torch.from_numpy(ours), wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.slow
    def test_compiles_without_a_break(self):
        compiled = torch.compile(Reduce(bidirectional=True), fullgraph=True, backend="aot_eager", dynamic=True)
        for count in (21, 34):
            x, _, importance = inputs(count)
            for found, wanted in zip(compiled(x, importance), Reduce(bidirectional=True)(x, importance)):
                torch.testing.assert_close(found, wanted)

    def test_backends(self, monkeypatch):
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        x = inputs(9)[0]
        with pytest.raises(BackendError, match="token_reduction: backend 'fused'"):
            plan(x, r=1, backend="fused")
        operator = importlib.import_module("terrazzo.kernels.token_reduction.op").OPERATOR
        assert operator.why("auto", x).name == "portable"
        assert "fused" in operator.why("auto", x).reasons
        described = operator.describe(x, 2, None, None, 1, (1.0, 20.0, 40.0), True, ())
        assert described.shape == {"B": 3, "tokens": 9, "merged": 2, "channels": 5}
        assert described.parameters == {"partition": "even_odd", "ways": "2"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"metric": torch.zeros(9, 5)}, r"metric must be floating \(B, N, D\)"),
            ({"size": torch.ones(3, 8)}, r"size must be \(3, 9\)"),
            ({"importance": torch.ones(3, 8)}, r"importance must be \(3, 9\)"),
            ({"r": 5}, "r must be 0 to 4 for 9 tokens, 1 of them protected, got 5"),
            ({"r": -1}, "r must be 0 to 4"),
            ({"partition": "odd"}, "partition must be"),
            ({"protect": 10}, "protect must be 0 to the 9 tokens"),
            ({"criteria": (1, 2)}, "criteria must be three numbers"),
            ({"partition": "cell2x2"}, "need the grid of the 8 unprotected tokens"),
            ({"partition": "cell2x2", "grid": (2, 4), "bidirectional": True}, "one way only"),
            ({"window": 3, "grid": (2, 4)}, "2 x 4 does not divide into windows of 3 x 3"),
            ({"window": 2, "grid": (2, 4), "r": 3}, "r must be 0 to 2 for 4 tokens"),
            ({"backend": "cuda"}, "not one of"),
        ],
    )
    def test_errors(self, change, message):
        with pytest.raises(InputError, match=message):
            plan(**{"metric": inputs(9)[0], "r": 2, **change})

    def test_errors_of_merge_and_prune(self):
        x, _, score = inputs(9)
        with pytest.raises(InputError, match=r"x must begin with \(3, 9\)"):
            merge(x[:, :8], plan(x, r=2))
        with pytest.raises(InputError, match="either k or a threshold"):
            prune(x, score)
        with pytest.raises(InputError, match="batch of 3: pack them"):
            prune(x, score, threshold=0.1)
        with pytest.raises(InputError, match="k must be 0 to 8"):
            prune(x, score, k=9)

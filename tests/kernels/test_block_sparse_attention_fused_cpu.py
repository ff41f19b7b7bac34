"""Block-sparse attention's CPU kernel is compared with the definition in float64, in memory poisoned with NaN."""

import importlib
import itertools
import math

import pytest
import torch
from support import triton_block_sparse
from support.block_sparse_plans import KINDS, Plan, Segment, inputs, kinds, lists, run
from support.triton_common import check, poisoned

from terrazzo.errors import BackendError
from terrazzo.kernels import block_sparse_attention, use_backend
from terrazzo.kernels.numba_host import machine
from terrazzo.kernels.triton_host import machine as triton_machine

numba = pytest.importorskip("numba", reason="needs the extra 'cpu'")
kernels = importlib.import_module("terrazzo.kernels.block_sparse_attention.fused_cpu_kernels")
fused_cpu = importlib.import_module("terrazzo.kernels.block_sparse_attention.fused_cpu")
portable = importlib.import_module("terrazzo.kernels.block_sparse_attention.portable")
op = importlib.import_module("terrazzo.kernels.block_sparse_attention.op")

pytestmark = pytest.mark.skipif(triton_machine.interpreting(), reason="Triton interprets in this process")


class TestKernels:
    @pytest.mark.parametrize("kind", KINDS)
    def test_plans(self, kind):
        check(triton_block_sparse.errors(kind, batch=2))

    @pytest.mark.parametrize(
        ("queries", "keys", "query_tile", "key_tile"),
        [
            (5, 9, 1, 1),
            (15, 40, 16, 3),
            (64, 64, 64, 64),
            (130, 70, 64, 8),
            (150, 150, 130, 33),  # tiles of several units, blocks that do not divide a piece
            (200, 333, 128, 100),
        ],
    )
    @pytest.mark.parametrize("kind", ["ragged blocks", "lists of keys"])
    def test_tiles(self, kind, queries, keys, query_tile, key_tile):
        check(triton_block_sparse.errors(kind, queries, keys, 16, None, query_tile, key_tile))

    @pytest.mark.parametrize(("dim", "width"), [(1, 1), (7, 5), (8, 24), (33, 16), (64, 64), (136, 72)])
    def test_widths(self, dim, width):
        check(triton_block_sparse.errors("ragged blocks", 37, 41, dim, width))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, dtype):
        check(triton_block_sparse.errors("segments", 70, 64, 32, dtype=dtype))

    @pytest.mark.parametrize("layout", ["packed", "turned"])
    def test_layouts(self, layout):
        check(triton_block_sparse.errors("a bias of keys", 35, 35, 24, layout=layout, batch=2))

    @pytest.mark.parametrize("kind", KINDS)
    def test_float64(self, kind):
        arguments = inputs(2, 3, 77, 90, 12, 9)
        plan, more = kinds(*arguments[:2], 16, 12, 9)[kind]
        with poisoned():
            found = run(arguments, plan, more, "fused")
        for a, b in zip(found, run(arguments, plan, more, "reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("magnitude", [1e-4, 30])
    def test_a_maximum_that_moves(self, magnitude):
        """Logits that grow from piece to piece: what was added up before is shrunk."""
        query, key, value = (x.detach().float() for x in inputs(1, 2, 40, 300, 16))
        key = key * torch.linspace(0, magnitude, 300).view(-1, 1)
        plan = Plan([Segment("block", torch.arange(300 // 20).expand(1, 1, 5, -1))], 8, 20)
        found, wanted = (
            block_sparse_attention(*given, plan, backend=backend)[0]
            for backend, given in (
                ("fused", (query, key, value)),
                ("reference", (query.double(), key.double(), value.double())),
            )
        )
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_what_is_not_finite_stays_so(self, monkeypatch, place, value):
        """Where products of gathered keys have a finite number, infinity or none, the kernel has the same.

        In the definition, zero times an infinite value that no list has is not a number.
        """
        monkeypatch.setattr(portable._Call, "prefers_a_mask", lambda call: False)
        arguments = [x.detach().float() for x in inputs(2, 2, 20, 90, 9)]
        arguments[place][1, 1, 3, 2] = value
        plan = Plan([Segment("block", lists(2, 2, 3, 12, 9))], 8, 8)
        found, wanted = (block_sparse_attention(*arguments, plan, backend=x)[0] for x in ("fused", "portable"))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)

    @pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 8, 8), (2, 8, 8)])
    def test_nothing_to_do(self, batch, queries, keys):
        index = torch.zeros(1, 1, 1, 1 if keys else 0, dtype=torch.int32)
        arguments = inputs(batch, 2, queries, keys)
        found, wanted = (
            run(arguments, Plan([Segment("block", index)], 8, 8), backend=x) for x in ("fused", "portable")
        )
        assert [x.shape for x in found] == [x.shape for x in wanted]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


class TestMutations:
    """Break the kernel's arithmetic on purpose: the comparison must fail."""

    @pytest.mark.parametrize(
        "helper", ["", "_turned", "_copied", "_weigh", "_add", "_of_keys", "_to_queries", "falling", "larger"]
    )
    def test_a_broken_piece_shows(self, monkeypatch, helper):
        # The kernel's body runs in Python, so its parts can be replaced.
        monkeypatch.setattr(kernels, "forward", kernels.forward.py_func)
        monkeypatch.setattr(fused_cpu, "PIECE", 8)
        monkeypatch.setattr(kernels, "PIECE", 8)
        whole = getattr(kernels, helper, None)
        if helper == "falling":  # small weights are lost
            monkeypatch.setattr(kernels, helper, lambda x: whole(x) * (x > -1))
        elif helper == "larger":  # the maximum of the first key only
            monkeypatch.setattr(kernels, helper, lambda a, b: a if (a > -math.inf).all() else b - 200)
        elif helper == "_copied":  # the last channel is lost
            monkeypatch.setattr(kernels, helper, lambda *given: whole(*given[:-1], given[-1] - 1))
        elif helper == "_add":  # the sums are not shrunk

            def unshrunk(sums, rows, wide, shrink, *rest):
                whole(sums, rows, wide, shrink * 0 + 1, *rest)

            monkeypatch.setattr(kernels, helper, unshrunk)
        elif helper:
            monkeypatch.setattr(kernels, helper, lambda *given: None)
        arguments = [x.detach().float() for x in inputs(1, 1, 19, 40, 8)]
        plan = Plan([Segment("block", lists(1, 1, 3, 10, 6))], 8, 4)
        wanted, _ = block_sparse_attention(*arguments, plan, backend="reference")
        found, _ = block_sparse_attention(*arguments, plan, backend="fused")
        near = bool((found - wanted).norm() <= 1e-5 * wanted.norm())
        assert near == (not helper)


class TestOperator:
    def test_auto_takes_it(self):
        query, key, value = (x.detach().float() for x in inputs(1, 1, 8, 8))
        assert op.OPERATOR.why("auto", query, key, value).name == "fused"

    def test_without_numba_everything_works(self, monkeypatch):
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        arguments = inputs(1, 2, 20, 20, dtype=torch.float32)
        plan, more = kinds(*arguments[:2])["segments"]
        auto, portable = (run(arguments, plan, more, name) for name in ("auto", "portable"))
        assert all(torch.equal(a, b) for a, b in zip(auto, portable))
        with use_backend("fused"), pytest.raises(BackendError, match=r"needs the package numba.*\[cpu\]"):
            block_sparse_attention(*arguments, plan)

    def test_the_number_of_threads_changes_no_bit(self, monkeypatch):
        monkeypatch.setattr(fused_cpu, "_WORK", 1)
        before, results = torch.get_num_threads(), []
        arguments = inputs(2, 3, 200, 90, 16, dtype=torch.float32)
        plan, _ = kinds(*arguments[:2], 16, 8)["ragged blocks"]
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(run(arguments, plan, backend="fused"))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))

    @pytest.mark.parametrize("kind", ["ragged blocks", "segments", "mean order"])
    def test_gradcheck(self, kind):
        arguments = inputs(1, 2, 9, 10, 3)
        plan, more = kinds(*arguments[:2], query_tile=3, key_tile=3)[kind]

        def call(query, key, value, *others):
            out, lse = block_sparse_attention(query, key, value, plan, backend="fused")
            return out, lse.masked_fill(lse.isneginf(), 0)

        assert torch.autograd.gradcheck(call, (*arguments, *more), fast_mode=True)

    def test_opcheck(self):
        arguments = inputs(1, 2, 20, 20)
        plan = kinds(*arguments[:2])["a bias of keys"][0]
        keys = op.lowering.lower(plan, *arguments[1:], torch.float64)[0]
        tensors = (arguments[0], keys.key, keys.value, keys.index, keys.bias)
        torch.library.opcheck(torch.ops.terrazzo.block_sparse_attention.default, (*tensors, 8, 8, 0.3, "fused"))

    @pytest.mark.parametrize(("heads", "images"), itertools.product((1, 2), repeat=2))
    def test_lists_that_heads_and_images_share(self, heads, images):
        arguments = inputs(2, 2, 24, 24)
        plan = Plan([Segment("block", lists(images, heads, 3, 6, 4))], 8, 4)
        for a, b in zip(run(arguments, plan, backend="fused"), run(arguments, plan, backend="reference")):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

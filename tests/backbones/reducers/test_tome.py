"""ToMe against the algorithm as the paper gives it."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.reducer_contract import ReducerContract, host, picture

import terrazzo
from terrazzo.backbones.reducers._counts import DEIT_SMALL
from terrazzo.backbones.reducers.tome import ToMe
from terrazzo.errors import InputError
from terrazzo.kernels.token_reduction import merge, plan


def published(keys, x, size, r):
    """Bipartite soft matching of (B, N, D) keys, and means of x (B, N, C): appendix D of arXiv 2210.09461, in words.

    Even tokens are a, odd tokens b, and the class token (the first of a) matches nothing. Each of a has its best of b;
    the r best edges are merged, and means are weighted by size. The rest of a comes first, then b.
    """
    keys = keys / keys.norm(dim=-1, keepdim=True)
    scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    scores[:, 0] = -math.inf
    best, into = scores.max(-1)
    edges = best.argsort(-1, descending=True)
    merged, unmerged = edges[:, :r], edges[:, r:].sort(-1).values
    out = []
    for b in range(len(x)):
        weighted = x[b] * size[b, :, None]
        even, odd, even_size, odd_size = weighted[::2], weighted[1::2].clone(), size[b, ::2], size[b, 1::2].clone()
        for token in merged[b].tolist():
            odd[into[b, token]] += even[token]
            odd_size[into[b, token]] += even_size[token]
        sizes = torch.cat([even_size[unmerged[b]], odd_size])
        out.append((torch.cat([even[unmerged[b]], odd]) / sizes[:, None], sizes))
    return tuple(torch.stack(part) for part in zip(*out))


class TestToMe(ReducerContract):
    method = "tome"
    options = dict(r=8)
    nothing = dict(r=0)
    left = 49 - 3 * 8

    @pytest.mark.long
    @pytest.mark.parametrize("count", [17, 24])
    def test_is_as_published(self, count):
        """Indices and means equal the paper's algorithm; the plan is MCTF's with its other criteria off."""
        torch.manual_seed(0)
        keys, x = torch.randn(3, count, 6, dtype=torch.float64), torch.randn(3, count, 5, dtype=torch.float64)
        size = torch.randint(1, 5, (3, count)).double()
        wanted, sizes = published(keys, x, size, r=6)
        found = merge(x, plan(keys, r=6, protect=1, criteria=(1, 0, 0)), size=size)
        torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-12)
        assert torch.equal(found[1], sizes)

    @torch.no_grad()
    def test_block(self):
        """A block is: attention, with ln(size) on keys; merging by its keys; the MLP."""
        vit = terrazzo.reduce(host().double(), method="tome", r=10, blocks=(1, 2))
        x, state = vit._begin(picture(vit).double(), maps=False)
        x = vit.blocks[0](x, state)
        size = torch.ones(2, 50, dtype=torch.float64)
        for block in vit.blocks[1:]:
            qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
            attention = F.softmax(qkv[0] @ qkv[1].transpose(-1, -2) / 4 + size.log()[:, None, None], -1)
            wanted = x + block.attn.proj((attention @ qkv[2]).transpose(1, 2).flatten(2))
            wanted, size = published(qkv[1].mean(1), wanted, size, 10)
            wanted = wanted + block.mlp(block.norm2(wanted))
            x = block(x, state)
            torch.testing.assert_close(x, wanted, rtol=0, atol=1e-10)
        assert torch.equal(state.size, size)

    @torch.no_grad()
    def test_counts(self):
        """A part, a number for each block, and at most half of the patches."""
        for r, left in ((0.2, 49 - 9 - 8 - 6), ((3, 0, 5), 41), (1000, 49 - 24 - 12 - 6)):
            vit = terrazzo.reduce(host(), method="tome", r=r)
            assert vit.forward_features(picture(vit)).shape[1] == 1 + left

    def test_schedule_of_diffrate(self):
        """Blocks leave the parts that DiffRate's leave, at most half at once."""
        reducer = ToMe(range(12), r="diffrate")
        state = reducer.begin((14, 14), 1, 0, False)
        left, counts = 197, []
        for place in range(12):
            left -= reducer.count(left, place, state)
            counts.append(left)
        assert counts == pytest.approx([merged for _, merged in DEIT_SMALL[:-1]] + [16], abs=3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(r=-1), "r must be a part below 1, or a whole number of tokens, got -1"),
            (dict(r=2.5), "r must be a part below 1"),
            (dict(r=(1, 2)), r"r must be a number, or hold one for each of 3 blocks, got \(1, 2\)"),
            (dict(r="many"), "r must be a finite number, got 'many'"),
            (dict(keep=0.5), "options of 'tome' are r, got keep"),
            (dict(blocks=(3,)), r"blocks must be some of 0 to 2, got \(3,\)"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            terrazzo.reduce(host(), method="tome", **options)

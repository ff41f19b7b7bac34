"""DiffRate: the published schedule, and a block by its definition."""

import pytest
import torch
import torch.nn.functional as F
from support.reducer_contract import ReducerContract, host, picture, walked

import terrazzo
from terrazzo.backbones.reducers._counts import DEIT_SMALL, schedule
from terrazzo.backbones.reducers.diffrate import DiffRate
from terrazzo.errors import InputError


class TestDiffRate(ReducerContract):
    method = "diffrate"
    options = dict(keep=((50, 45), (40, 40), (36, 30)))
    nothing = dict(keep=((1, 1),) * 3)
    merges = False

    def tokens(self, prefix):
        return 30

    @pytest.mark.long
    @torch.no_grad()
    def test_block(self):
        """Attention with ln(size); the least attended patches go, the next ones merge; then the MLP."""
        vit = terrazzo.reduce(host().double(), method="diffrate", **self.options)
        x, state = vit._begin(picture(vit).double(), maps=False)
        size = torch.ones(2, 50, dtype=torch.float64)
        for block, (first, second) in zip(vit.blocks, self.options["keep"]):
            qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
            weights = F.softmax(qkv[0] @ qkv[1].transpose(-1, -2) / 4 + size.log()[:, None, None], -1)
            wanted = x + block.attn.proj((weights @ qkv[2]).transpose(1, 2).flatten(2))
            images, sizes = [], []
            for image, old, score in zip(wanted, size, weights[:, :, 0].mean(1)):
                order = [0, *(1 + score[1:].argsort(descending=True)).tolist()]
                kept, merging = order[:second], order[second:first]
                groups, found = {i: [image[i]] for i in kept}, {i: old[i].clone() for i in kept}
                for i in merging:
                    cosine = F.cosine_similarity(image[i], image[kept[1:]])
                    target = kept[1 + cosine.argmax().item()]
                    groups[target].append(image[i])
                    found[target] += old[i] * cosine.max().clamp(min=0)
                images.append({tuple(image[i].tolist()): torch.stack(groups[i]).mean(0) for i in kept}.values())
                sizes.append(torch.stack([found[i] for i in kept]))
            wanted = torch.stack([torch.stack(list(image)) for image in images])
            wanted, wanted_size = wanted + block.mlp(block.norm2(wanted)), torch.stack(sizes)
            x = block(x, state)
            size = torch.ones(2, 50, dtype=torch.float64) if state.size is None else state.size
            assert x.shape[1] == second
            for b in range(2):  # the order of tokens means nothing
                mine, theirs = x[b, :, 0].argsort(), wanted[b, :, 0].argsort()
                torch.testing.assert_close(x[b, mine], wanted[b, theirs], rtol=0, atol=1e-10)
                torch.testing.assert_close(size[b, mine], wanted_size[b, theirs], rtol=0, atol=1e-10)

    def test_size_by_hand(self):
        """A merged patch of similarity .5 adds .5 to the size of 1; one of negative similarity adds nothing."""
        reducer = DiffRate(blocks=(0,), keep=((1, 1),))
        state = reducer.begin((1, 3), 1, 0, True)
        x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.5, 0.75**0.5], [-1.0, 0.0]]])
        found = reducer._merged(x, torch.tensor([[0.0, 3.0, 2.0, 1.0]]), 1, state)
        torch.testing.assert_close(state.size, torch.tensor([[1.0, 1.5]]))
        torch.testing.assert_close(found[0, 1], x[0, 1:].mean(0))

    @torch.no_grad()
    def test_published_schedule(self):
        """Twelve blocks and 197 tokens have the authors' counts."""
        reducer = DiffRate(blocks=range(12))
        state = reducer.begin((14, 14), 1, 0, False)
        counts = [reducer.counts(197, place, state) for place in range(12)]
        assert [(first + 1, second + 1) for first, second in counts] == list(DEIT_SMALL)
        assert len(schedule(24)) == 24
        assert schedule(1) == ((1.0, 1.0),)
        assert schedule(12, 0.0) == ((1.0, 1.0),) * 12
        assert schedule(12, 0.5)[5] == pytest.approx(((1 + 105 / 197) / 2, (1 + 98 / 197) / 2))
        last = [first for first, _ in schedule(30)]
        assert last == sorted(last, reverse=True)

    @torch.no_grad()
    def test_maps_keep_a_quarter(self):
        """The schedule's last counts are too few for maps."""
        vit = terrazzo.reduce(host(), method="diffrate", keep=((50, 50), (40, 30), (3, 3)))
        assert walked(vit, picture(vit), maps=False)[0].shape[1] == 3
        assert walked(vit, picture(vit), maps=True)[0].shape[1] == 1 + 12

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(keep=0.5), "keep must hold two numbers for each of 3 blocks, got 0.5"),
            (dict(keep=((0.5, 0.5),)), "keep must hold two numbers for each of 3 blocks"),
            (dict(keep=((0.5, 0.5, 0.1),) * 3), "keep must hold two positive numbers for each block"),
            (dict(keep=((0.5, 0),) * 3), "keep must hold two positive numbers for each block"),
            (dict(keep=((20.5, 20),) * 3), "keep must hold two positive numbers for each block"),
            (dict(rate=-1), "rate must be at least 0"),
            (dict(keep=((1, 1),) * 3, rate=0.5), "so not beside keep, got 0.5"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            terrazzo.reduce(host(), method="diffrate", **options)

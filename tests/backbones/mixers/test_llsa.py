"""The mixer `llsa`."""

import numpy as np
import pytest
import torch
from support.mixer_contract import MixerPack, packs, place_of
from support.selector_contract import SelectorContract

from terrazzo.backbones.mixers._selector import Tokens
from terrazzo.backbones.mixers._tiles import Tiles, nested_tile_order
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import block_sparse_attention

MAPS = [name for name in packs("llsa") if name.startswith("map")]


class _LLSA(SelectorContract):
    mixer = "llsa"

    def from_pack(self, pack):
        meta, (_, heads, _, dim) = pack.meta, pack["q"].shape
        given = dict(level=meta["level"], topk=meta["topk1"], topk2=meta["topk2"] or 1, edge=meta["tile_edge"])
        return self.make(heads=heads, head_dim=dim, **given)


class TestLevel1(_LLSA):
    options = dict(level=1, topk=3, edge=4, part=None, exclusive=False, dense_up_to=0)
    everything = dict(topk=1000, exclusive=True)

    @pytest.mark.parametrize("name", MAPS)
    def test_golden(self, name):
        pack = MixerPack("llsa", name)
        q, k, v = (pack[key].requires_grad_() for key in "qkv")
        mixer = self.from_pack(pack)
        place = place_of((pack.meta["height"], pack.meta["width"]), 0, q, k)
        tokens = mixer.tokens(q, k, v, place)
        plan = mixer.plan(tokens)
        real = tokens.tiles.counts(mixer.edge)
        real = slice(None) if real is None else real > 0
        torch.testing.assert_close(plan.segments[-1].index[:, :, real].int(), pack["index1"][:, :, real])
        out, lse = block_sparse_attention(tokens.query, tokens.key, tokens.value, plan)
        out = tokens.tiles.restore(out)
        torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
        torch.testing.assert_close(tokens.tiles.restore(lse.unsqueeze(-1)).squeeze(-1), pack["lse"], rtol=0, atol=1e-9)
        out.backward(pack["grad"])
        for found, key in ((q, "dq"), (k, "dk"), (v, "dv")):
            torch.testing.assert_close(found.grad, pack[key], rtol=0, atol=1e-6 * float(pack[key].abs().max()))

    @torch.no_grad()
    def test_official(self):
        """The official kernels at a size at which they drop nothing; tokens stand in the order of tiles."""
        pack = MixerPack("llsa", "l2_16384_d16_k4_k4")
        seed, shape = pack.meta["seed"], (1, 1, 16384, 16)
        q, k, v = (
            torch.from_numpy(np.random.RandomState(seed + i).standard_normal(shape).astype(np.float32)).double()
            for i in range(3)
        )
        torch.testing.assert_close(q.flatten()[:8], pack["q_head"][:8])
        mixer = self.make(heads=1, head_dim=16, level=2, topk=4, topk2=4)
        front = q[:, :, :0]
        plan = mixer.plan(Tokens(q, k, v, front, front, Tiles((128, 128), (16, 4))))
        middle, fine = plan.segments[1:]
        torch.testing.assert_close(fine.index.sort().values, pack["index1"].long())
        torch.testing.assert_close(middle.index[:, :, ::16].sort().values, pack["index2"].long())
        out, _ = block_sparse_attention(q, k, v, plan)
        torch.testing.assert_close(out[0, 0, pack["rows"].long()], pack["out"], rtol=0, atol=5e-6)

    @torch.no_grad()
    def test_equal_patches_in_each_tile(self):
        """If patches of a tile are equal and all tiles are chosen, a tile counts twice, which softmax does not see."""
        q, k, v, place = self.given((8, 12), 0)
        mixer = self.make(topk=6)
        tiles = mixer.tokens(q, k, v, place).tiles
        k, v = (tiles.restore(tiles.arrange(t)[:, :, ::16].repeat_interleave(16, 2)) for t in (k, v))
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(mixer(q, k, v, place), wanted)

    @torch.no_grad()
    def test_by_hand(self):
        """A tile of 4 with values 1, 3, 5, 7 beside a tile of values 9: q = 0, and the first tile is chosen."""
        zero = torch.zeros(1, 1, 8, 1, dtype=torch.float64)
        v = torch.tensor([1.0, 3, 9, 9, 5, 7, 9, 9], dtype=torch.float64).view(1, 1, 8, 1)
        mixer = self.make(topk=1, edge=2, heads=1, head_dim=1)
        found = mixer(zero, zero, v, place_of((2, 4), 0, zero, zero))
        torch.testing.assert_close(found, torch.full_like(v, (16 + 4 * 4 + 4 * 9) / 12))

    @torch.no_grad()
    def test_keys_of_a_query(self):
        """Keys per query at the paper's sizes."""
        for side, level, keys in ((64, 1, 384), (128, 1, 1152), (128, 2, 320), (256, 2, 512)):
            mixer = self.make(level=level, topk=8)
            q = torch.zeros(1, 1, side * side, 1)
            assert round(mixer.density(q, q, q, place_of((side, side), 0, q, q)) * side * side) == keys

    def test_a_token_of_a_tile_that_is_not_chosen_has_a_gradient(self):
        q, k, v, place = self.given((8, 8), 0, batch=1)
        mixer = self.make(topk=1)
        chosen = mixer.plan(mixer.tokens(q, k, v, place)).segments[-1].index
        rows = (chosen == 0).any(-1)[0, 0]
        tiles = mixer.tokens(q, k, v, place).tiles
        k.requires_grad_()
        out = tiles.arrange(mixer(q, k, v, place))[0, 0].unflatten(0, (-1, 16))
        out[~rows].sum().backward()
        assert not rows.all()
        assert k.grad[0, 0, 0].abs().sum() > 0

    def test_order_of_tiles(self):
        """Nested squares of 2 are the Morton order of a map of 4 x 4."""
        assert nested_tile_order(4, 4, (2, 1)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
        assert nested_tile_order(1, 3, (2,)).tolist() == [0, 1, -1, -1, 2, -1, -1, -1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(level=3), "level must be 1, 2 or 'auto', got 3"),
            (dict(topk=0), "topk must be at least 1, got 0"),
            (dict(edge=1), "edge must be at least 2, got 1"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)


class TestLevel2(_LLSA):
    options = dict(level=2, topk=3, topk2=2, edge=2, part=None, exclusive=False, dense_up_to=0)
    everything = dict(topk=1000, topk2=1000, exclusive=True)
    edge = 2

    @pytest.mark.long
    @torch.no_grad()
    def test_compiles(self):
        self.compiled()

    @torch.no_grad()
    def test_level_by_size(self):
        mixer = self.make(level="auto", edge=4)
        assert mixer.edges((127, 129)) == (4,)
        assert mixer.edges((128, 128)) == (16, 4)
        assert self.make(level="auto", edge=8).edges((128, 128)) == (8,)


class TestParts(_LLSA):
    """Our form: means of parts of tiles stand for the tiles that are not chosen, and choose."""

    options = dict(topk=3, edge=4, part=2, dense_up_to=0)
    everything = dict(topk=1000)

    @torch.no_grad()
    def test_equal_patches_in_each_part(self):
        """If the patches of each part are equal, means lose nothing."""
        q, k, v, place = self.given((9, 14), 1)
        tiles = Tiles((9, 14), (2,))
        k, v = (
            torch.cat([t[:, :, :1], tiles.restore(tiles.arrange(t[:, :, 1:])[:, :, ::4].repeat_interleave(4, 2))], 2)
            for t in (k, v)
        )
        mixer = self.make(topk=1)
        assert mixer.density(q, k, v, place) < 0.6
        torch.testing.assert_close(mixer(q, k, v, place), torch.nn.functional.scaled_dot_product_attention(q, k, v))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(part=3), "part must divide edge, 4, and be smaller, or be None, got 3"),
            (dict(level=2), "part=2 is for level 1 and exclusive=True: set part=None"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)

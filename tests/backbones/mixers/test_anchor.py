"""The mixer `anchor`."""

import pytest
import torch
from support.mixer_contract import MixerPack, packs, place_of
from support.selector_contract import SelectorContract

from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import block_sparse_attention


class TestAnchor(SelectorContract):
    mixer = "anchor"
    options = dict(theta=1.0, edge=4, group=2, dense_up_to=0)
    everything = dict(theta=1e4)

    @pytest.mark.parametrize("name", [name for name in packs("anchor") if name.startswith("vision")])
    @torch.no_grad()
    def test_golden(self, name):
        """Patches in packs stand tile by tile, behind the tokens in front."""
        pack = MixerPack("anchor", name)
        meta, (q, k, v) = pack.meta, (pack[key] for key in "qkv")
        prefix, grid = meta["prefix_tokens"], (meta["height"], meta["width"])
        mixer = self.make(
            heads=q.shape[1], head_dim=q.shape[3], theta=meta["theta"], edge=meta["tile"], group=meta["group"]
        )
        tiles = mixer.tokens(q, k, v, place_of(grid, prefix, q, k)).tiles

        def raster(x):
            return torch.cat([x[:, :, :prefix], tiles.restore(x[:, :, prefix:])], 2)

        q, k, v, out = (raster(x) for x in (q, k, v, pack["out"]))
        place = place_of(grid, prefix, q, k)
        tokens = mixer.tokens(q, k, v, place)
        kept = mixer.kept(tokens, tiles.neighbours())
        assert torch.equal(kept, pack["keep"][..., prefix:])
        torch.testing.assert_close(mixer(q, k, v, place), out, rtol=0, atol=1e-9)

    @torch.no_grad()
    def test_only_the_anchor(self):
        """Without a bound no further key is kept, and a tile attends to its 3 x 3 tiles."""
        q, k, v, place = self.given((16, 20), 0)
        out = self.make(theta=-1e4)(q, k, v, place)
        rows, cols = (x.flatten() // 4 for x in torch.meshgrid(torch.arange(16), torch.arange(20), indexing="ij"))
        mask = ((rows[:, None] - rows).abs() <= 1) & ((cols[:, None] - cols).abs() <= 1)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(out, wanted)

    @torch.no_grad()
    def test_more_theta_keeps_more(self):
        given = self.given((13, 18), 1)
        before = None
        for theta in (-2.0, 0.0, 1.0, 3.0):
            mixer = self.make(theta=theta)
            tokens = mixer.tokens(*given)
            kept = mixer.kept(tokens, tokens.tiles.neighbours())
            assert before is None or (kept >= before).all()
            before = kept

    @torch.no_grad()
    @pytest.mark.parametrize("start", [-1.0, 12.0])
    def test_calibrate_reaches_the_recall(self, start):
        """It begins anywhere, and selects no more than it needs."""
        given = self.given((16, 24), 1)
        mixer = self.make(theta=start)
        mixer.calibrate(*given, recall=0.6)
        tokens = mixer.tokens(*given)
        _, lse = block_sparse_attention(*tokens[:3], mixer.plan(tokens))
        key = torch.cat([tokens.key, tokens.front_key], 2)
        whole = (tokens.query @ key.transpose(-1, -2) * tokens.query.shape[-1] ** -0.5).logsumexp(-1)
        assert ((lse - whole).exp().mean((0, 2)) >= 0.6).all()
        assert mixer.density(*given) < 0.9
        found = mixer.theta.clone()
        mixer.calibrate(*given, recall=0.3)
        assert torch.equal(mixer.theta, found)  # one more batch never undoes what an earlier batch needs
        mixer.reset()
        assert (mixer.theta == start).all()
        with pytest.raises(InputError, match=r"recall must be between 0 and 1, got 1\.5"):
            mixer.calibrate(*given, recall=1.5)

"""The mixer `tca`."""

import pytest
import torch
from support.mixer_contract import MixerPack, packs, place_of
from support.selector_contract import SelectorContract

from terrazzo.backbones.mixers.tca import kept_keys, profile
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import block_sparse_attention


class TestTCA(SelectorContract):
    mixer = "tca"
    options = dict(dense_up_to=0)
    everything = dict(mu=4.0, sigma=0.01)

    @pytest.mark.parametrize("name", packs("tca"))
    @torch.no_grad()
    def test_golden(self, name):
        """Blocks of packs stand one after another."""
        pack = MixerPack("tca", name)
        meta, (q, k, v) = pack.meta, (pack[key] for key in "qkv")
        profiles = torch.tensor(meta["profile"], dtype=torch.float64).expand(q.shape[1], -1)
        rank, budget = kept_keys(k, meta["block"], profiles)
        assert torch.equal(budget.int(), pack["counts"])
        assert torch.equal((rank < budget.unsqueeze(-1)).flatten(2), pack["keep"])
        assert profile(meta["mu"], meta["sigma"], len(meta["budgets"])) == pytest.approx(meta["profile"])
        if meta["block"] not in (4, 16):  # no square
            return
        mixer = self.make(
            heads=q.shape[1],
            head_dim=q.shape[3],
            edge=round(meta["block"] ** 0.5),
            mass=meta["mass"],
            mu=meta["mu"],
            sigma=meta["sigma"],
        )
        place = place_of((mixer.edge, q.shape[2] // mixer.edge), 0, q, k)
        tokens = mixer.tokens(q, k, v, place)._replace(query=q, key=k, value=v)
        out, _ = block_sparse_attention(q, k, v, mixer.plan(tokens))
        torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
        assert mixer.density(q, tokens.tiles.restore(k), v, place) == pytest.approx(meta["density"])

    @torch.no_grad()
    def test_equal_keys_in_each_block(self):
        """With equal keys and values in each block, one key with the block's mass stands for the block."""
        q, k, v, place = self.given((9, 14), 0)
        mixer = self.make(mu=0.0, sigma=0.01)
        tiles = mixer.tokens(q, k, v, place).tiles
        k, v = (tiles.restore(tiles.arrange(t)[:, :, ::16].repeat_interleave(16, 2)) for t in (k, v))
        assert mixer.density(q, k, v, place) == pytest.approx(12 / (9 * 14))
        torch.testing.assert_close(mixer(q, k, v, place), torch.nn.functional.scaled_dot_product_attention(q, k, v))

    def test_profiles(self):
        assert sum(profile(1.3, 0.7, 5)) == pytest.approx(1)
        assert profile(4, 0.01, 5) == pytest.approx([0, 0, 0, 0, 1])

    @torch.no_grad()
    def test_calibrate(self):
        q, k, v, place = self.given((12, 16), 1)
        mixer = self.make(mu=0.0, sigma=0.25)
        mixer.calibrate(q, k, v, place, error=0.9)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, :, 1:]
        error = (mixer(q, k, v, place)[:, :, 1:] - wanted).pow(2).sum((0, 2, 3)) / wanted.pow(2).sum((0, 2, 3))
        assert (error.sqrt() <= 0.9).all()
        assert mixer.density(q, k, v, place) < 1
        mixer.calibrate(q, k, v, place, error=1e-3)
        assert mixer.density(q, k, v, place) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [(dict(edge=3), "edge must be a power of two, got 3"), (dict(sigma=0), "sigma must be above 0, got 0")],
    )
    def test_options(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)

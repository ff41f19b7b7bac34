"""The mixer `sale`."""

import pytest
import torch
from support.mixer_contract import MixerPack, packs
from support.selector_contract import SelectorContract

from terrazzo.backbones.mixers.sale import centred, kept_tiles, quantised
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import Plan, Segment, block_sparse_attention


class TestSALE(SelectorContract):
    mixer = "sale"
    options = dict(tau=0.05, edge=4, dense_up_to=0)
    everything = dict(tau=0.0)

    @pytest.mark.parametrize("name", [name for name in packs("sale") if not name.startswith("official")])
    @torch.no_grad()
    def test_golden(self, name):
        pack = MixerPack("sale", name)
        meta, (q, k, v) = pack.meta, (pack[key] for key in "qkv")
        number = torch.arange(pack["always"].shape[1])
        always = torch.where(pack["always"], number, -1)
        tau = torch.full((q.shape[1],), meta["tau"], dtype=torch.float64)
        kept = kept_tiles(q, k, always, tau, meta["query_tile"], meta["key_tile"])
        assert torch.equal(kept, pack["keep"])
        plan = Plan([Segment("block", torch.where(kept, number, -1))], meta["query_tile"], meta["key_tile"])
        torch.testing.assert_close(block_sparse_attention(q, k, v, plan)[0], pack["out"], rtol=0, atol=1e-9)

    @torch.no_grad()
    def test_official_integers(self):
        pack = MixerPack("sale", "official_quant_64")
        (query, mean), (key, _) = centred(pack["q"]), centred(pack["k"])
        for x, name in ((query, "q"), (key, "k")):
            integers, scale = quantised(x)
            assert torch.equal(integers, pack[f"{name}4"].double())
            torch.testing.assert_close(scale.squeeze(-1), pack[f"{name}_scale"], rtol=0, atol=2e-6)
            half = scale / 2
            assert ((integers * scale - x).abs() <= half * (1 + 1e-9)).all()
        torch.testing.assert_close(key, pack["out"], rtol=0, atol=2e-6)
        torch.testing.assert_close((mean @ key.mT).squeeze(2), pack["q_mean_k"], rtol=0, atol=1e-5)

    def test_a_row_of_zeros(self):
        integers, scale = quantised(torch.zeros(2, 3))
        assert not integers.any()
        assert not scale.any()

    @torch.no_grad()
    def test_less_tau_keeps_more(self):
        given = self.given((13, 18), 1)
        before = None
        for tau in (0.5, 0.1, 0.02, 0.0):
            mixer = self.make(tau=tau)
            tokens = mixer.tokens(*given)
            around = tokens.tiles.neighbours()
            kept = kept_tiles(tokens.query, tokens.key, around, mixer.tau, 16, 16, tokens.real(), tokens.front_key)
            assert before is None or (kept >= before).all()
            before = kept
        assert kept.all()

    @torch.no_grad()
    def test_sink(self):
        """With `sink`, every tile attends to the first tile."""
        tokens = self.make().tokens(*self.given((20, 20), 0))
        for sink in (False, True):
            (segment,) = self.make(tau=0.9, sink=sink).plan(tokens).segments
            assert (segment.index == 0).any(-1).all() == sink

    @torch.no_grad()
    def test_calibrate(self):
        q, k, v, place = self.given((16, 24), 1)
        mixer = self.make(tau=0.5)
        mixer.calibrate(q, k, v, place, error=0.8)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        error = (mixer(q, k, v, place) - wanted)[:, :, 1:].abs().sum(3).mean((0, 2))
        assert (error < 0.8).all()
        assert (mixer.tau > 0).any()
        mixer.calibrate(q, k, v, place, error=1e-6)
        assert mixer.density(q, k, v, place) == pytest.approx(1)
        mixer.reset()
        assert (mixer.tau == 0.5).all()

    def test_options(self):
        with pytest.raises(InputError, match="tau must be from 0 to below 1, got 1"):
            self.make(tau=1)

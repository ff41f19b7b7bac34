"""The mixer `dma`."""

import pytest
import torch
from support.mixer_contract import MixerPack, packs
from support.selector_contract import SelectorContract

from terrazzo.backbones.mixers._selector import Tokens
from terrazzo.backbones.mixers._tiles import Tiles
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import block_sparse_attention, plan_to_mask


class TestDMA(SelectorContract):
    mixer = "dma"
    options = dict(keep=0.4)
    everything = dict(keep=10**6)
    edge = 1

    def make(self, *args, **options):
        mixer = super().make(*args, **options)
        if options.get("keep") == 10**6:  # without a bias, all keys are softmax attention
            torch.nn.init.zeros_(mixer.factor)
        return mixer

    @pytest.mark.parametrize("name", packs("dma"))
    def test_golden(self, name):
        """Query heads that share keys are queries of one head here."""
        pack = MixerPack("dma", name)
        meta, (q, k, v) = pack.meta, (pack[key].requires_grad_() for key in "qkv")
        heads, keys, dim = k.shape[1:]
        mixer = self.make(heads=heads, head_dim=dim, keep=meta["window"], block=meta["block_size"])
        with torch.no_grad():
            mixer.factor.copy_(pack["A"])
            mixer.delta.weight.copy_(pack["dt_weight"])
            if "dt_bias" in pack.arrays:
                mixer.delta.bias = torch.nn.Parameter(pack["dt_bias"])
        rows = q.unflatten(1, (heads, -1)).flatten(2, 3)
        tokens = Tokens(rows, k, v, k[:, :, :0], v[:, :, :0], Tiles((keys, 1), (1,)))
        plan = mixer.plan(tokens)
        kept = plan_to_mask(plan, rows, k)
        assert torch.equal(kept, pack["mask"].expand_as(kept))
        torch.testing.assert_close(plan.segments[-1].bias, pack["bias"].squeeze(2), rtol=0, atol=1e-9)
        out, _ = block_sparse_attention(rows, k, v, plan)
        out = out.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
        torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
        out.backward(pack["grad"])
        pairs = {"dq": q, "dk": k, "dv": v, "dA": mixer.factor, "ddt_weight": mixer.delta.weight}
        if "ddt_bias" in pack.arrays:
            pairs["ddt_bias"] = mixer.delta.bias
        for key, leaf in pairs.items():
            torch.testing.assert_close(leaf.grad, pack[key], rtol=0, atol=1e-9)

    @torch.no_grad()
    def test_equal_biases_keep_the_first_patches(self):
        q, k, v, place = self.given((6, 6), 1)
        mixer = self.make(keep=10)
        torch.nn.init.zeros_(mixer.factor)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :11], v[:, :, :11])
        torch.testing.assert_close(mixer(q, k, v, place)[:, :, 1:], wanted[:, :, 1:])

    @pytest.mark.parametrize("keep", [0, -1, 1.5, "x"])
    def test_options(self, keep):
        with pytest.raises(InputError, match="keep must be"):
            self.make(keep=keep)

"""The mixer `hedgehog`."""

import pytest
import torch
from support.mixer_contract import MixerContract, MixerPack, packs, place_of


class TestHedgehog(MixerContract):
    mixer = "hedgehog"
    permutes = True
    refused = None

    @pytest.mark.parametrize("name", packs("hedgehog"))
    def test_golden(self, name):
        pack = MixerPack("hedgehog", name)
        q, k, v = (pack[key].requires_grad_() for key in "qkv")
        mixer = self.make(heads=q.shape[1], head_dim=q.shape[3])
        with torch.no_grad():
            mixer.query_map.copy_(pack["Wq"])
            mixer.key_map.copy_(pack["Wk"])
        out = mixer(q, k, v, place_of((q.shape[2], 1), 0, q, k))
        torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
        out.backward(pack["grad"])
        for found, key in ((q, "dq"), (k, "dk"), (v, "dv"), (mixer.query_map, "dWq"), (mixer.key_map, "dWk")):
            torch.testing.assert_close(found.grad, pack[key], rtol=0, atol=1e-9)

    def test_imitates_softmax_at_the_start(self):
        """Rows of the matrix are distributions, so equal queries and keys give the mean of the values."""
        q, k, v, place = self.given((8, 8), 0)
        found = self.make()(q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k), v, place)
        torch.testing.assert_close(found, v.mean(2, keepdim=True).expand_as(v))

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

    @torch.no_grad()
    def test_matrix_by_its_definition(self):
        """Rows of the matrix of all pairs sum to 1, also with large keys, and the mixer is its product with values."""

        def feature_map(x, weight):
            mapped = x / x.shape[-1] ** 0.25 @ weight
            return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1)

        for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
            q, k, v, place = self.given((7, 11), 1, dtype, head_dim=64)
            q, k, mixer = 4 * q, 4 * k, self.make(dtype, head_dim=64)
            mixer.query_map.add_(torch.randn(mixer.query_map.shape, dtype=dtype) / 8)
            pairs = feature_map(q, mixer.query_map) @ feature_map(k, mixer.key_map).transpose(2, 3)
            matrix = pairs / pairs.sum(3, keepdim=True)
            eye = torch.eye(78, dtype=dtype).expand(2, 2, 78, 78)
            torch.testing.assert_close(mixer(q, k, eye, place), matrix, rtol=0, atol=limit)
            rows = mixer(q, k, eye, place).sum(3)
            torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=limit)
            if dtype == torch.float64:
                torch.testing.assert_close(mixer(q, k, v, place), matrix @ v, rtol=0, atol=limit)

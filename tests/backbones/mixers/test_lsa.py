"""The mixer `lsa`."""

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract, MixerPack, packs, place_of

from terrazzo.errors import InputError

LOCAL = [name for name in packs("rgt_mixers") if name.startswith("lsa")]


class TestLsa(MixerContract):
    mixer = "lsa"
    options = dict(split=(2, 4))

    @pytest.mark.parametrize("name", LOCAL)
    def test_golden(self, name):
        """As in the authors' module: zeros beyond the border take part in the softmax."""
        pack = MixerPack("rgt_mixers", name)
        meta, x = pack.meta, pack["x"].requires_grad_()
        weights = {key[2:]: pack[key] for key in pack.arrays if key.startswith("w.")}
        head_dim = x.shape[2] // meta["heads"]
        options = dict(split=meta["split_size"], shifted=meta["shifted"], masked=False)
        mixer = self.make(heads=meta["heads"], head_dim=head_dim, **options)
        own = {key: value for key, value in mixer.state_dict().items() if key.endswith("rpe_biases")}
        mixer.load_state_dict(
            own | {key: value for key, value in weights.items() if not key.startswith(("qkv", "proj"))}
        )
        every = F.linear(x, weights["qkv.weight"], weights["qkv.bias"])
        q, k, v = every.unflatten(2, (3, meta["heads"], head_dim)).permute(2, 0, 3, 1, 4)
        out = mixer(q, k, v, place_of((meta["height"], meta["width"]), 0, x, k)).transpose(1, 2).flatten(2)
        out = F.linear(out, weights["proj.weight"], weights["proj.bias"])
        torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
        out.backward(pack["grad"])
        torch.testing.assert_close(x.grad, pack["dx"], rtol=0, atol=1e-9)
        for key, parameter in mixer.named_parameters():
            limit = 1e-6 if meta["arrays"][f"dw.{key}"][1] == "float32" else 1e-9
            limit *= max(1, pack[f"dw.{key}"].abs().max().item())
            torch.testing.assert_close(parameter.grad, pack[f"dw.{key}"], rtol=0, atol=limit)

    @pytest.mark.parametrize("layer", [0, 2])
    @torch.no_grad()
    def test_what_patches_attend_to(self, layer):
        """The tokens in front, and the window's patches that are there; the tokens in front attend to everything."""
        grid, prefix = (6, 7), 2
        q, k, v, place = self.given(grid, prefix)
        mixer = self.make(layer=layer)
        assert mixer.shifted == (layer == 2)
        found = mixer.matrix(q, k, v, place)
        torch.testing.assert_close(found.sum(3), torch.ones_like(found[..., 0]))
        logits = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
        for head, window in enumerate(((2, 4), (4, 2))):
            # A shifted map is rolled: a part beyond the last window joins no other part.
            step = tuple(side // 2 if layer == 2 else 0 for side in window)
            rows, columns = (
                (torch.arange(extent) + side - shift).div(side, rounding_mode="floor")
                for extent, side, shift in zip(grid, window, step)
            )
            part = torch.cat([torch.full((prefix,), -1), (100 * rows[:, None] + columns).flatten()])
            seen = (part[:, None] == part) | (part[:, None] < 0) | (part < 0)
            wanted = logits[:, head].masked_fill(~seen, -torch.inf).softmax(-1)
            torch.testing.assert_close(found[:, head], wanted)

    @torch.no_grad()
    def test_parameters_begin_without_effect(self):
        """The bias and the convolution are zero at first, and act later."""
        q, k, v, place = self.given((8, 8), 1)
        mixer = self.make()
        wanted = mixer.matrix(q, k, v, place) @ v
        torch.testing.assert_close(mixer(q, k, v, place), wanted)
        mixer.get_v.weight.fill_(0.1)
        assert not torch.allclose(mixer(q, k, v, place), wanted)

    @torch.no_grad()
    def test_layers_alternate_in_pairs(self):
        assert [self.make(layer=layer).shifted for layer in range(6)] == [False, False, True, True, False, False]

    @torch.no_grad()
    def test_numbers_of_heads(self):
        for heads, parts in ((1, [1]), (3, [2, 1])):
            mixer = self.make(heads=heads)
            assert mixer.heads == parts
            q, k, v, place = self.given((8, 8), 1, heads=heads)
            assert mixer(q, k, v, place).shape == v.shape

    @pytest.mark.parametrize("split", [(3, 4), (1, 4), (4,)])
    def test_refused_options(self, split):
        with pytest.raises(InputError, match="split must be two sides of which one divides the other"):
            self.make(split=split)

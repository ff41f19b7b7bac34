"""The mixer `rgsa`."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract, MixerPack, packs, place_of
from support.seeded import build, image

import terrazzo
from terrazzo.errors import InputError

GLOBAL = [name for name in packs("rgt_mixers") if name.startswith("rgsa")]


class TestRgsa(MixerContract):
    mixer = "rgsa"
    options = dict(recursions=1)
    averages = False

    def place(self, grid, prefix, x, key):
        """With projections: keys and values of a token are parts of it."""
        heads, head_dim = key.shape[1], key.shape[3]

        def projected(tokens):
            tokens = tokens.unflatten(2, (heads, head_dim)).transpose(1, 2).to(key.dtype)
            return tokens, tokens.flip(3)

        return place_of(grid, prefix, x, key, projected=projected)

    @pytest.mark.parametrize("name", GLOBAL)
    def test_golden(self, name):
        """The authors' module has half as many channels for queries and keys.

        A norm does not mind that each channel comes twice. So with every channel of the small map twice, of which the
        projections read the first, and with queries and keys filled with zeros, the mixer is their module.
        """
        pack = MixerPack("rgt_mixers", name)
        meta, x = pack.meta, pack["x"].requires_grad_()
        weights = {key[2:]: pack[key] for key in pack.arrays if key.startswith("w.")}
        heads, channels = meta["heads"], x.shape[2]

        def linear(part, x):
            return F.linear(x, weights[f"{part}.weight"], weights[f"{part}.bias"])

        def in_heads(x):
            return x.unflatten(2, (heads, -1)).transpose(1, 2)

        def filled(x):
            return F.pad(in_heads(x), (0, channels // heads - x.shape[2] // heads))

        def projected(z):
            z = z[:, :, : channels // 2]
            return filled(linear("k", z)), in_heads(linear("v", z))

        twice = ("conv.", "norm_act.")
        summary = {
            f"generalization.{key}": torch.cat([value, value]) if key.startswith(twice) else value
            for key, value in weights.items()
            if key.startswith((*twice, "reduction1.", "dwconv."))
        }
        mixer = self.make(heads=heads, head_dim=channels // heads, recursions=meta["recursions"])
        mixer.load_state_dict(summary | {key: value for key, value in weights.items() if key.startswith("cpe.")})
        query = filled(linear("q", x)) * 2**0.5  # the authors' scale is that of the narrow heads
        place = place_of((meta["height"], meta["width"]), 0, x, query, projected=projected)
        out = linear("proj", mixer(query, query, query, place).transpose(1, 2).flatten(2))
        rounded = meta["arrays"]["out"][1] == "float32"
        torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-6 if rounded else 1e-9)
        if "grad" in pack.arrays:
            out.backward(pack["grad"])
            torch.testing.assert_close(x.grad, pack["dx"], rtol=0, atol=1e-9)

    @torch.no_grad()
    def test_number_of_recursions(self):
        """The authors' rule of evaluation, in training, too, as far as the map allows; small maps have softmax."""
        for grid, recursions, small in (
            ((14, 14), None, 9),
            ((16, 40), None, 2),
            ((5, 40), None, 10),
            ((16, 40), 1, 40),
            ((16, 40), 3, 2),
        ):
            mixer = self.make(recursions=recursions)
            q, k, v, place = self.given(grid, 0)
            projected = Mock(side_effect=place.projected)
            place = place._replace(projected=projected)
            assert torch.equal(mixer.train()(q, k, v, place), mixer.eval()(q, k, v, place))
            assert projected.call_args.args[0].shape == (2, small, 16)
        q, k, v, place = self.given((3, 20), 1)
        assert mixer.dense((3, 20), 1) == "a side of the map is less than 4 patches"
        torch.testing.assert_close(mixer(q, k, v, place), F.scaled_dot_product_attention(q, k, v))

    @torch.no_grad()
    def test_keys(self):
        """Tokens in front and means of cells; rotary positions are those of the middles of cells."""
        q, k, v, place = self.given((8, 13), 2)
        seen = []
        place = place._replace(keyed=lambda key, positions: seen.append(positions) or key)
        mixer = self.make()
        found = mixer(q, k, v, place)
        assert seen[0].tolist() == [2 * 13 + 2, 2 * 13 + 6, 2 * 13 + 10, 6 * 13 + 2, 6 * 13 + 6, 6 * 13 + 10]
        cells = F.avg_pool2d(place.x[:, 2:].unflatten(1, (8, 13)).permute(0, 3, 1, 2), 4).flatten(2).transpose(1, 2)
        keys, values = place.projected(F.gelu(F.layer_norm(cells, (16,))))
        keys, values = torch.cat([k[:, :, :2], keys], 2), torch.cat([v[:, :, :2], values], 2)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, keys, values))

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
    def test_hosts_project_the_small_map(self, name):
        """In a ViT and in an Eva with rotary positions; the keys of patches themselves are not read."""
        patch = 14 if "eva" in name else 16
        vit = build(name, embed_dim=48, num_heads=3, depth=1, img_size=8 * patch, dynamic_img_size=True)
        terrazzo.convert_attention(vit, "rgsa")
        attention, x, seen = vit.blocks[0].attn, image((8 * patch, 8 * patch)), []
        hook = attention.mixer.register_forward_hook(lambda _, given, out: seen.append((given, out)))
        wanted = vit.forward_features(x)
        hook.remove()
        (query, key, value, place), out = seen[0]
        key, value = key.clone(), value.clone()
        key[:, :, place.prefix :], value[:, :, place.prefix :] = torch.nan, torch.nan
        torch.testing.assert_close(attention.mixer(query, key, value, place), out)
        attention.mixer.generalization.reduction1.weight.mul_(-1)
        assert not torch.allclose(vit.forward_features(x), wanted, atol=1e-4)

    @pytest.mark.parametrize("recursions", [0, 1.5])
    def test_refused_options(self, recursions):
        with pytest.raises(InputError, match="recursions must be"):
            self.make(recursions=recursions)

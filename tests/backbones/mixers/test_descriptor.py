"""The mixer `descriptor`."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract, MixerPack, packs
from support.seeded import build, image

import terrazzo
from terrazzo.backbones._place import Place
from terrazzo.errors import InputError


class TestDescriptor(MixerContract):
    mixer = "descriptor"

    @pytest.mark.parametrize("name", packs("flashvggt"))
    def test_golden(self, name):
        """The authors' layer: our mixer between its projections gives its output and its gradients."""
        pack = MixerPack("flashvggt", name)
        meta = pack.meta
        weights = {key[2:]: pack[key].requires_grad_() for key in pack.arrays if key.startswith("w.")}
        x = pack["x"].requires_grad_()

        def project(y):
            qkv = F.linear(y, weights["qkv.weight"], weights["qkv.bias"])
            return qkv.unflatten(2, (3, meta["heads"], -1)).permute(2, 0, 3, 1, 4)

        q, raw_key, v = project(x)

        def norm(y, which):
            if not meta["qk_norm"]:
                return y
            return F.layer_norm(y, y.shape[-1:], weights[f"{which}.weight"], weights[f"{which}.bias"])

        place = Place(
            (meta["height"], meta["width"]),
            meta["prefix_tokens"],
            x=x,
            raw_key=raw_key,
            keyed=lambda y, positions: norm(y, "k_norm"),
            projected=lambda y: tuple(project(y)[1:]),
        )
        mixer = self.make(
            heads=meta["heads"], head_dim=q.shape[-1], ratio=meta["factor"], compressor=meta["compressor"]
        )
        if mixer.cells is not None:
            mixer.cells.weight.data.copy_(weights["spatial_compressor.compressor.weight"])
            weights["spatial_compressor.compressor.weight"] = mixer.cells.weight
        out = mixer(norm(q, "q_norm"), norm(raw_key, "k_norm"), v, place).transpose(1, 2).flatten(2)
        out = F.linear(out, weights["proj.weight"], weights["proj.bias"])
        torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
        out.backward(pack["grad"])
        for key, found in {"dx": x, **{f"dw.{key}": weight for key, weight in weights.items()}}.items():
            wanted = pack[key]
            rounded = meta["arrays"][key][1] == "float32"
            tolerance = max(1e-9, 1e-6 * wanted.abs().max().item() * rounded)
            torch.testing.assert_close(found.grad, wanted, rtol=0, atol=tolerance)

    @torch.no_grad()
    @pytest.mark.parametrize("compressor", ["bilinear", "area", "nearest"])
    def test_ratio_of_one_is_softmax_attention(self, compressor):
        q, k, v, place = self.given((7, 11), 1)
        found = self.make(ratio=1, compressor=compressor, counted=True)(q, k, v, place)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))

    @torch.no_grad()
    @pytest.mark.parametrize("compressor", ["bilinear", "area", "nearest"])
    def test_constant_map(self, compressor):
        """On a constant map every ratio gives the value of its tokens, and counted descriptors softmax attention."""
        for ratio in (2, 3, 4, 99):
            q, k, v, place = self.given((7, 11), 1)
            k[:, :, 1:], v[:, :, 1:] = k[:, :, 1:2], v[:, :, 1:2]
            place = place._replace(raw_key=k)
            found = self.make(ratio=ratio, compressor=compressor, counted=True)(q, k, v, place)
            torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))
            alone = [x[:, :, 1:] for x in (q, k, v)]
            place = place._replace(prefix=0, raw_key=alone[1])
            torch.testing.assert_close(self.make(ratio=ratio, compressor=compressor)(*alone, place), alone[2])

    @torch.no_grad()
    def test_what_compressors_read(self):
        """Bilinear reads the 2 x 2 pixels in the centre of a 4 x 4 cell, area all of them, nearest the first."""
        q, v = torch.zeros(1, 1, 64, 64, dtype=torch.float64), torch.eye(64, dtype=torch.float64)[None, None]
        place = Place((8, 8), x=q, raw_key=q, keyed=lambda key, positions: key)
        y, x = torch.arange(64) // 8 % 4, torch.arange(64) % 4
        for compressor, read in {
            "bilinear": (y % 3 > 0) & (x % 3 > 0),
            "area": y >= 0,
            "nearest": (y == 0) & (x == 0),
        }.items():
            found = self.make(ratio=4, compressor=compressor, heads=1, head_dim=64)(q, q, v, place)
            torch.testing.assert_close(found[0, 0], (read / read.sum()).to(v).expand(64, 64))

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
    def test_area_is_the_start_of_the_depthwise_convolution(self, name):
        """In a ViT and in an Eva with rotary positions; the convolution reads the input of the host's projections."""
        patch = 14 if "eva" in name else 16
        vit = build(name, embed_dim=48, num_heads=3, depth=2, img_size=8 * patch, dynamic_img_size=True)
        x = image((8 * patch, 8 * patch))
        wanted = terrazzo.convert_attention(vit, "descriptor", compressor="area").forward_features(x)
        terrazzo.convert_attention(vit, "descriptor", compressor="dwconv")
        torch.testing.assert_close(vit.forward_features(x), wanted, rtol=0, atol=1e-5)
        vit.blocks[0].attn.mixer.cells.weight.mul_(0.5)
        assert not torch.allclose(vit.forward_features(x), wanted, atol=1e-3)

    @torch.no_grad()
    def test_a_map_smaller_than_a_cell_of_the_convolution(self):
        q, k, v, place = self.given((3, 9), 1)
        mixer = self.make(compressor="dwconv")
        assert mixer.dense((3, 9), 1) == "the map is smaller than a cell of 4 x 4 patches"
        torch.testing.assert_close(mixer(q, k, v, place), F.scaled_dot_product_attention(q, k, v))

    @torch.no_grad()
    def test_positions(self):
        """Rotary positions are resized to the nearest, over the whole map."""
        q, k, v, place = self.given((7, 9), 1)
        seen = []
        place = place._replace(keyed=lambda key, positions: seen.append(positions) or key)
        self.make(ratio=3)(q, k, v, place)
        wanted = F.interpolate(torch.arange(63.0).view(1, 1, 7, 9), (2, 3), mode="nearest").long()
        assert torch.equal(seen[0], wanted.flatten())

    @torch.no_grad()
    def test_counted(self):
        """A descriptor counts as its patches: the same as if each descriptor were there so often."""
        q, k, v, place = self.given((6, 8), 1)
        found = self.make(ratio=2, compressor="nearest", counted=True)(q, k, v, place)
        cells = 1 + torch.arange(48).view(6, 8)[::2, ::2].flatten().repeat(4)
        taken = torch.cat([torch.zeros(1, dtype=torch.long), cells])
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k[:, :, taken], v[:, :, taken]))

    @torch.no_grad()
    @pytest.mark.parametrize("prefix", [0, 2])
    def test_local(self, prefix, monkeypatch):
        """One softmax over a tile's patches, the other tiles' descriptors and the tokens in front."""
        q, k, v, place = self.given((7, 12), prefix)
        wanted = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(self.make(local=12)(q, k, v, place), wanted)
        mixer = self.make(local=4, ratio=2, compressor="nearest", counted=True)
        found = mixer(q, k, v, place)
        torch.testing.assert_close(found[:, :, :prefix], wanted[:, :, :prefix])
        # Descriptors stand for rows 0, 2, 4, or nearest to them, and for each second column.
        rows, columns = torch.tensor([0, 2, 4]), torch.arange(0, 12, 2)
        taken = prefix + (rows[:, None] * 12 + columns).flatten()
        tile = torch.tensor([0, 0, 1])[:, None] * 3 + columns // 4
        for y, x in ((0, 0), (3, 7), (4, 4), (6, 11)):
            own = y // 4 * 3 + x // 4
            near = prefix + (torch.arange(7)[:, None] * 12 + torch.arange(12))[y // 4 * 4 :][:4][:, x // 4 * 4 :][:, :4]
            far = taken[tile.flatten() != own]
            at = torch.cat([torch.arange(prefix), near.flatten(), far])
            bias = torch.zeros(len(at), dtype=q.dtype)
            bias[len(at) - len(far) :] = math.log(7 * 12 / 18)
            i = prefix + y * 12 + x
            wanted = F.scaled_dot_product_attention(q[:, :, [i]], k[:, :, at], v[:, :, at], attn_mask=bias[None])
            torch.testing.assert_close(found[:, :, [i]], wanted)
        monkeypatch.setattr("terrazzo.backbones.mixers.descriptor._PART", 1)
        torch.testing.assert_close(mixer(q, k, v, place), found)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(ratio=0), "ratio must be at least 1, got 0"),
            (dict(ratio=1.5), "ratio must be an int, got 1.5"),
            (dict(local=0), "local must be at least 1, got 0"),
            (dict(compressor="max"), "compressor must be one of bilinear, area, nearest, dwconv, got 'max'"),
        ],
    )
    def test_refused_options(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)


class TestLocal(MixerContract):
    mixer = "descriptor"
    options = dict(ratio=2, compressor="area", counted=True, local=4)

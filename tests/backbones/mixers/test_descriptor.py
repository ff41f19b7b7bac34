"""The mixer `descriptor`."""

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract, MixerPack, packs

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
        qkv = F.linear(x, weights["qkv.weight"], weights["qkv.bias"])
        q, raw_key, v = qkv.unflatten(2, (3, meta["heads"], -1)).permute(2, 0, 3, 1, 4)

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
        )
        mixer = self.make(
            heads=meta["heads"], head_dim=q.shape[-1], ratio=meta["factor"], compressor=meta["compressor"]
        )
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
    def test_area_is_the_start_of_the_depthwise_convolution(self):
        _, k, _, _ = self.given((8, 12), 0)
        found = self.make(compressor="area")._resized(k, (8, 12), (2, 3))
        wanted = F.avg_pool2d(k.transpose(2, 3).flatten(0, 1).unflatten(2, (8, 12)), 4)
        torch.testing.assert_close(found.transpose(2, 3).flatten(0, 1), wanted.flatten(2))

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

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(ratio=0), "ratio must be at least 1, got 0"),
            (dict(ratio=1.5), "ratio must be an int, got 1.5"),
            (dict(compressor="max"), "compressor must be one of bilinear, area, nearest, got 'max'"),
        ],
    )
    def test_refused_options(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)

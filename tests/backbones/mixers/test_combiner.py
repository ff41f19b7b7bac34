"""The mixer `combiner`."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract, MixerPack, packs

from terrazzo.backbones._place import Place
from terrazzo.errors import InputError


class TestCombiner(MixerContract):
    mixer = "combiner"

    @torch.no_grad()
    @pytest.mark.parametrize("name", packs("combiner"))
    def test_golden(self, name):
        pack = MixerPack("combiner", name)
        q, k, v = (pack[key] for key in "qkv")
        options = {key: pack.meta[key] for key in ("pattern", "pool", "size_bias")}
        mixer = self.make(heads=q.shape[1], head_dim=q.shape[3], tile=pack.meta["tile_edge"], **options)
        place = Place((pack.meta["height"], pack.meta["width"]))
        torch.testing.assert_close(mixer(q, k, v, place), pack["out"], rtol=0, atol=1e-9)
        # The effective matrix: the response to one value at a time. It is stored in float32.
        matrix = mixer(q, k, torch.eye(v.shape[2], dtype=v.dtype).expand(*v.shape[:3], -1), place)
        torch.testing.assert_close(matrix, pack["probability"], rtol=0, atol=1e-7)

    @torch.no_grad()
    @pytest.mark.parametrize("prefix", [0, 1, 5])
    def test_single_tokens_and_a_single_group(self, prefix):
        """Groups of one token, and a group of all tokens, give softmax attention."""
        q, k, v, place = self.given((7, 11), prefix)
        wanted = F.scaled_dot_product_attention(q, k, v)
        for tile in (1, 11, 99):
            torch.testing.assert_close(self.make(tile=tile)(q, k, v, place), wanted)
        q, k, v, place = self.given((7, 1), prefix)
        torch.testing.assert_close(self.make(pattern="axial")(q, k, v, place), F.scaled_dot_product_attention(q, k, v))

    @torch.no_grad()
    @pytest.mark.parametrize("pool", ["max", "mean"])
    def test_equal_keys_in_each_group(self, pool):
        """With the size's logarithm this is softmax attention, also where tiles are cut short; without it is not."""
        q, k, v, place = self.given((7, 11), 1)
        rows, columns = torch.arange(7)[:, None] // 3, torch.arange(11) // 3
        k[:, :, 1:] = k[:, :, 1 + (rows * 4 + columns).flatten()]
        wanted = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(self.make(tile=3, pool=pool, size_bias=True)(q, k, v, place), wanted)
        found = self.make(tile=3, pool=pool)(q, k, v, place)
        assert (found - wanted)[:, :, 1:].abs().max() > 1e-2
        torch.testing.assert_close(found[:, :, :1], wanted[:, :, :1])

    @torch.no_grad()
    def test_weight_of_a_group_of_equal_keys(self):
        """A group of equal keys has the weight of one key."""
        q, k, v, _ = self.given((2, 4), 0)
        k[:, :, [2, 3, 6, 7]] = k[:, :, [2]]
        v = torch.zeros_like(v)
        v[:, :, [2, 3, 6, 7]] = 1
        logits = q[:, :, 0, None] @ k.transpose(2, 3) / math.sqrt(8)
        own, other = logits[..., [0, 1, 4, 5]].exp().sum(-1), logits[..., 2].exp()
        found = self.make(tile=2)(q, k, v, Place((2, 4)))[:, :, 0]
        torch.testing.assert_close(found, (other / (own + other)).expand_as(found))

    def test_tile_of_about_the_fourth_root(self):
        assert self.make()._tiling((48, 64)).tile == (7, 7)
        assert self.make()._tiling((3, 400)).tile == (3, 6)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(pattern="log"), "pattern must be one of tile, axial, got 'log'"),
            (dict(pool="min"), "pool must be one of max, mean, got 'min'"),
            (dict(tile=0), "tile must be at least 1, got 0"),
            (dict(tile=2.5), "tile must be an int, got 2.5"),
            (
                dict(tile=4, pattern="axial"),
                "tile is for pattern 'tile' only, got tile=4 with 'axial'",
            ),
        ],
    )
    def test_refused_options(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)


class TestAxial(MixerContract):
    mixer = "combiner"
    options = dict(pattern="axial", pool="mean", size_bias=True)

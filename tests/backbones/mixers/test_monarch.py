"""The mixer `monarch`."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract, MixerPack, packs, place_of

from terrazzo.errors import InputError


class TestMonarch(MixerContract):
    mixer = "monarch"

    @pytest.mark.parametrize("name", packs("monarch"))
    def test_golden(self, name):
        pack = MixerPack("monarch", name)
        q, k, v = (pack[key].requires_grad_() for key in "qkv")
        meta = pack.meta
        # Frames, which are tiles of their own or rows of one tile, stand below each other.
        tiles = meta["frames"] // meta["f_tied"] * meta["h_reduce"], meta["w_reduce"]
        mixer = self.make(heads=q.shape[1], head_dim=q.shape[3], steps=meta["iters"], tiles=tiles)
        out = mixer(q, k, v, place_of((meta["frames"] * meta["height"], meta["width"]), 0, q, k))
        torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
        out.backward(pack["grad"])
        for found, key in ((q, "dq"), (k, "dk"), (v, "dv")):
            torch.testing.assert_close(found.grad, pack[key], rtol=0, atol=1e-9)

    @torch.no_grad()
    @pytest.mark.parametrize("prefix", [0, 1, 5])
    def test_where_it_is_softmax_attention(self, prefix):
        """On one row, on one column, and where keys are equal along each row."""
        for steps in (1, 3):
            mixer = self.make(steps=steps)
            for grid in ((1, 17), (17, 1), (6, 7)):
                q, k, v, place = self.given(grid, prefix)
                if grid == (6, 7):
                    k[:, :, prefix:] = k[:, :, prefix::7][:, :, :6].repeat_interleave(7, 2)
                # The guard of more than one step changes logits by about 1e-6 of themselves.
                tolerance = dict(rtol=0, atol=1e-12 if steps == 1 else 1e-5)
                torch.testing.assert_close(mixer(q, k, v, place), F.scaled_dot_product_attention(q, k, v), **tolerance)

    @torch.no_grad()
    @pytest.mark.parametrize("prefix", [0, 2])
    def test_bound(self, prefix):
        """Rows of the matrix are distributions; logits and entropy stay below softmax's, and do not fall with steps."""
        q, k, _, place = self.given((4, 5), prefix)
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        best = logits.logsumexp(-1)
        eye = torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:3], -1)
        totals = []
        for steps in (1, 2, 3, 5):
            matrix = self.make(steps=steps)(q, k, eye, place)
            torch.testing.assert_close(matrix.sum(-1), torch.ones_like(best))
            reached = (matrix * logits - torch.xlogy(matrix, matrix)).sum(-1)
            assert (reached <= best + 1e-9).all()
            torch.testing.assert_close(reached[:, :, :prefix], best[:, :, :prefix])
            totals.append(reached.sum())
        assert all(a < b + 1e-4 for a, b in itertools.pairwise(totals)), totals
        assert totals[0] < totals[-1] < best.sum()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(steps=0), "steps must be at least 1, got 0"),
            (dict(steps=None), "steps must be an int, got None"),
            (dict(tiles=2), "tiles must be a sequence of numbers"),
            (dict(tiles=(2, 0)), "tiles must be 2 numbers of at least 1, the rows and columns of tiles"),
        ],
    )
    def test_refused_options(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)

    @torch.no_grad()
    @pytest.mark.parametrize("prefix", [0, 1])
    def test_tiles(self, prefix):
        """Tiles of one column are softmax attention, also if tiles are cut short; rows of the matrix sum to 1."""
        q, k, v, place = self.given((7, 11), prefix)
        wanted = F.scaled_dot_product_attention(q, k, v)
        for rows in (1, 2, 3):
            torch.testing.assert_close(self.make(tiles=(rows, 11))(q, k, v, place), wanted)
            torch.testing.assert_close(self.make(tiles=(rows, 99), steps=2)(q, k, v, place), wanted, rtol=0, atol=1e-5)
        distances = []
        for tiles in ((1, 1), (2, 2), (3, 5)):
            found = self.make(tiles=tiles, steps=2)(q, k, v, place)
            distances.append((found - wanted).norm())
        assert distances == sorted(distances, reverse=True)

    @torch.no_grad()
    @pytest.mark.parametrize("steps", [1, 3])
    def test_parts(self, steps, monkeypatch):
        """Large maps are computed in parts, which do not depend on each other."""
        given = self.given((10, 13), 1)
        mixer = self.make(tiles=(2, 3), steps=steps)
        wanted = mixer(*given)
        monkeypatch.setattr("terrazzo.backbones.mixers.monarch._PART", 5000)
        torch.testing.assert_close(mixer(*given), wanted)


class TestMonarchWithTiles(MixerContract):
    mixer = "monarch"
    options = dict(tiles=(2, 3), steps=2)

"""Uniform pooling of 2x2 cells."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.reducer_contract import ReducerContract, host
from support.seeded import build, image

import terrazzo
from terrazzo.backbones.reducers.pool import cells, pooled
from terrazzo.errors import InputError


class TestPooling(ReducerContract):
    method = "pool"
    options = dict(blocks=(1, 2), part=(0.5, 1.0))
    nothing = dict(part=0.0)
    left = 49 - 27

    @torch.no_grad()
    def test_is_average_pooling(self):
        """Of an even grid, in one go or in two, the tokens are means of 2x2 cells, in raster order."""
        vit = build("vit_tiny_patch16_224", embed_dim=48, num_heads=3, depth=3, img_size=(96, 128)).double()
        x = image((96, 128)).double()
        for options in (dict(blocks=(0,)), dict(blocks=(0, 1), part=(0.4, 1.0))):
            for block in terrazzo.reduce(vit, method="pool", **options).blocks:
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.zero_()
                    layer.bias.zero_()
            tokens, state = vit._begin(x, maps=False)
            wanted = F.avg_pool2d(tokens[:, 1:].transpose(1, 2).unflatten(2, (6, 8)), 2).flatten(2).transpose(1, 2)
            for block in vit.blocks:
                tokens = block(tokens, state)
            torch.testing.assert_close(tokens[:, 1:], wanted, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("grid", [(6, 8), (7, 5), (1, 4)])
    @pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
    def test_cells(self, grid, part):
        """Pooled cells have 4 patches that are neighbours; each token knows its first patch."""
        found, first = pooled(grid, part)
        assert found.unique().tolist() == list(range(grid[0] * grid[1] - 3 * cells(grid, part)))
        assert torch.equal(found[first], torch.arange(len(first)))
        counts = found.bincount()
        assert (counts == 4).sum() == cells(grid, part)
        assert set(counts.tolist()) <= {1, 4}
        for token in (counts == 4).nonzero():
            rows, columns = (found.view(grid) == token).nonzero().unbind(1)
            assert rows.max() - rows.min() == columns.max() - columns.min() == 1

    def test_larger_parts_have_the_same_cells(self):
        owners = [pooled((12, 10), part)[0] for part in (0.1, 0.3, 0.6, 0.9, 1.0)]
        for small, large in itertools.pairwise(owners):
            together = small[:, None] == small
            assert ((large[:, None] == large) | ~together).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(part=1.5), "part must be 0 to 1, got 1.5"),
            (dict(blocks=(1, 2), part=(1.0, 0.5)), "blocks and part must not fall"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            terrazzo.reduce(host(), method="pool", **options)

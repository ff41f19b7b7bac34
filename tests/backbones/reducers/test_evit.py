"""EViT and Top-K: hand cases, and the tokens that are kept."""

import pytest
import torch
import torch.nn.functional as F
from support.reducer_contract import ReducerContract, host, picture, walked

import terrazzo
from terrazzo.backbones.reducers import evit
from terrazzo.errors import InputError


class TestEViT(ReducerContract):
    method = "evit"
    options = dict(blocks=(0, 2), keep=(0.7, 0.4))
    nothing = dict(keep=1.0)
    left = 19 + 1

    def test_by_hand(self, monkeypatch):
        """With attention (.5, .3, .2) to three patches and one kept, the fused token is .3 x2 + .2 x3."""
        attention = torch.tensor([[0.0, 0.5, 0.3, 0.2], [0.0, 0.2, 0.5, 0.3]])
        monkeypatch.setattr(evit, "row_mean", lambda *_, **__: attention)
        x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
        reducer = evit.EViT(blocks=(0,), keep=(0.34,))
        state = reducer.begin((1, 3), 1, 0, True)
        found = reducer.fewer(x, None, None, 0, state)
        kept = torch.stack([x[0, 1], x[1, 2]])
        fused = torch.stack([0.3 * x[0, 2] + 0.2 * x[0, 3], 0.2 * x[1, 1] + 0.3 * x[1, 3]])
        torch.testing.assert_close(found, torch.stack([x[:, 0], kept, fused], 1))
        assert state.levels[0].map.tolist() == [[0, 1, 2, 2], [0, 2, 1, 2]]
        assert state.size.tolist() == [[1, 1, 2]] * 2

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
    def test_block(self, name):
        """A block is: attention without sizes; its class attention (two rows of a distilled model) chooses; the MLP."""
        vit = terrazzo.reduce(host(name).double(), method="evit", **self.options)
        prefix = vit.num_prefix_tokens
        x, state = vit._begin(picture(vit).double(), maps=False)
        for i, block in enumerate(vit.blocks):
            qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
            weights = F.softmax(qkv[0] @ qkv[1].transpose(-1, -2) / 4, -1)
            wanted = x + block.attn.proj((weights @ qkv[2]).transpose(1, 2).flatten(2))
            if i in (0, 2):
                score = weights[:, :, :prefix].mean((1, 2))[:, prefix:]
                best = score.argsort(1, descending=True).tolist()
                count, images = {0: 34, 2: 19}[i], []
                for image, order, weight in zip(wanted, best, score):
                    kept, others = sorted(order[:count]), order[count:]
                    fused = sum(weight[j] * image[prefix + j] for j in others)
                    images.append(torch.cat([image[:prefix], image[[prefix + j for j in kept]], fused[None]]))
                wanted = torch.stack(images)
            wanted = wanted + block.mlp(block.norm2(wanted))
            x = block(x, state)
            torch.testing.assert_close(x, wanted, rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_parts(self):
        """One number is for the first stage, and its powers for the later stages."""
        vit = terrazzo.reduce(host(), method="evit", blocks=(0, 1, 2), keep=0.5)
        assert vit.reducer.keep == (0.5, 0.25, 0.125)
        assert vit.forward_features(picture(vit)).shape[1] == 1 + 6 + 1
        assert evit.EViT.default_blocks(12) == (3, 6, 9)

    def test_the_fused_token_has_a_gradient(self):
        """Also through the attention that weights it."""
        vit = terrazzo.reduce(host(), method="evit", blocks=(2,), keep=0.2)
        for block in vit.blocks[:2]:
            block.requires_grad_(False)
        tokens, _ = walked(vit, picture(vit), maps=False)
        tokens[:, -1].square().sum().backward()
        query = vit.blocks[2].attn.qkv.weight.grad[:48]
        assert query.abs().sum() > 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(keep=0), "keep must be more than 0, at most 1, got 0"),
            (dict(keep=(0.5,)), r"keep must be a number, or hold one for each of 3 blocks, got \(0.5,\)"),
            (dict(fuse="no"), "fuse must be True or False, got 'no'"),
            (dict(window=4), "so there can be no windows"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            terrazzo.reduce(host(), method="evit", **options)


class TestTopK(ReducerContract):
    """EViT without the fused token."""

    method = "evit"
    options = dict(blocks=(0, 2), keep=(0.7, 0.4), fuse=False)
    nothing = dict(keep=1.0, fuse=False)
    left = 19
    merges = False

    @torch.no_grad()
    def test_dropped_patches_in_maps(self):
        """With "copy" they keep their features; by default they get the updates of the most similar kept patch."""
        vit = terrazzo.reduce(host(), method="evit", blocks=(1,), keep=0.5, fuse=False, full_last=0)
        x, state = walked(vit, picture(vit))
        (level,) = state.levels
        place = vit.reducer.assignment(state)[0]
        assert (place < 0).sum() == 25
        assert torch.equal(level.dropped[0], place < 0)
        parked = vit.reducer.restored(x, state, "copy")[0]
        updated = vit.reducer.restored(x, state, "delta")[0]
        unit = F.normalize(level.left[0], dim=-1)
        for patch in (place < 0).nonzero().flatten().tolist():
            torch.testing.assert_close(parked[patch], level.left[0, patch])
            kept = [j for j in range(1, 50) if place[j] >= 0]
            near = place[max(kept, key=lambda j: (unit[patch] @ unit[j]).item())]
            torch.testing.assert_close(updated[patch], level.left[0, patch] + x[0, near] - level.merged[0, near])

    @torch.no_grad()
    def test_rotary_positions_are_those_of_kept_patches(self):
        vit = terrazzo.reduce(host("vit_small_patch16_dinov3"), method="evit", blocks=(0, 1), keep=0.6, fuse=False)
        _, state = walked(vit, picture(vit))
        state.depth = 2
        kept = vit.reducer.assignment(state)[:, vit.num_prefix_tokens :] >= 0
        rope = state.ropes[2]
        for image in range(2):
            torch.testing.assert_close(state.rope[image, 0], rope[kept[image]])

    @torch.no_grad()
    def test_last_block_sees_every_position(self):
        assert terrazzo.reduce(host(), method="evit", fuse=False).full_last == 1
        assert terrazzo.reduce(host(), method="evit").full_last == 0

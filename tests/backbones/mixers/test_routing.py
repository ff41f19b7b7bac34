"""The mixer `routing`."""

import pytest
import torch
from support.mixer_contract import MixerPack, packs
from support.selector_contract import SelectorContract

from terrazzo.backbones.mixers._selector import Tokens
from terrazzo.backbones.mixers._tiles import Tiles
from terrazzo.backbones.mixers.routing import nearest, nearest_means, routes
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import block_sparse_attention

SAME = [name for name in packs("routing") if not name.startswith(("context", "memory"))]


class TestRouting(SelectorContract):
    mixer = "routing"
    options = dict(clusters=3, local=1, edge=4, decay=1.0)
    everything = dict(clusters=1, local=0)
    averages = False  # a query in no cluster has output 0
    edge = 1
    one_softmax = False  # a query in several clusters has the mean of their outputs

    @pytest.mark.parametrize("name", SAME)
    def test_golden(self, name):
        """The official code divides by a query's clusters + 1e-5."""
        pack = MixerPack("routing", name)
        meta, (q, k, v) = pack.meta, (pack[key].requires_grad_() for key in "qkv")
        mixer = self.make(heads=q.shape[1], head_dim=q.shape[3], clusters=meta["clusters"], local=0)
        mixer.decay = meta["ema_decay"]
        mixer.centroids.copy_(pack["means"])
        if -(-q.shape[2] // meta["clusters"]) != meta["window"]:
            for x, key in ((q, "q_index"), (k, "k_index")):
                found = routes(x, mixer.centroids, meta["window"]).sort().values
                torch.testing.assert_close(found.int(), pack[key])
            return
        tokens = Tokens(q, k, v, k[:, :, :0], v[:, :, :0], Tiles((q.shape[2], 1), (1,)))
        plan = mixer.plan(tokens)
        found = plan.query_order.unflatten(2, (meta["clusters"], -1)).sort().values
        torch.testing.assert_close(found.int(), pack["q_index"])
        out, _ = block_sparse_attention(q, k, v, plan)
        count = pack["q_count"].double().unsqueeze(-1)
        factor = count.clamp(min=1) / (count + 1e-5)
        torch.testing.assert_close(out * factor, pack["out"], rtol=0, atol=1e-9)
        (out * factor).backward(pack["grad"])
        for leaf, key in ((q, "dq"), (k, "dk"), (v, "dv")):
            torch.testing.assert_close(leaf.grad, pack[key], rtol=0, atol=1e-9)
        loss = mixer.commitment(q, k) * meta["commitment"]
        torch.testing.assert_close(loss.item(), meta["aux_loss"], rtol=1e-9, atol=0)
        if meta["training"]:
            both = torch.nn.functional.normalize(torch.cat([q, k], 2), dim=-1)
            assert torch.equal(nearest(both, mixer.centroids).int(), pack["buckets"])
            torch.testing.assert_close(nearest_means(both, mixer.centroids), pack["new_means"], rtol=0, atol=1e-9)
            mixer.step(tokens)
            torch.testing.assert_close(mixer.centroids, pack["means_after_update"], rtol=0, atol=1e-9)

    @torch.no_grad()
    def test_two_groups(self):
        """Two orthogonal groups with their centroids: attention inside the groups."""
        q, k, v, place = self.given((4, 6), 0)
        mixer = self.make(clusters=2, local=0)
        mixer.centroids.copy_(torch.eye(8, dtype=torch.float64)[:2].expand(2, -1, -1))
        group = torch.arange(24) % 2
        for x in (q, k):
            x[..., 0], x[..., 1] = 10.0 * (group == 0), 10.0 * (group == 1)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=group[:, None] == group)
        torch.testing.assert_close(mixer(q, k, v, place), wanted)

    @torch.no_grad()
    def test_training_moves_centroids(self):
        given = self.given((6, 6), 1)
        mixer = self.make(decay=0.5)
        before = mixer.centroids.clone()
        mixer.eval()(*given)
        assert torch.equal(mixer.centroids, before)
        mixer.train()(*given)
        assert not torch.equal(mixer.centroids, before)

    @torch.no_grad()
    def test_calibrate(self):
        """Calibrated centroids are nearer to the tokens."""
        q, k, v, place = self.given((8, 8), 1)
        mixer = self.make()
        before = mixer.commitment(q[:, 1:], k[:, 1:])
        mixer.calibrate(q, k, v, place)
        assert mixer.commitment(q[:, 1:], k[:, 1:]) < before

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(local=2), "local must be below the number of heads, 2, got 2"),
            (dict(decay=2), "decay must be from 0 to 1, got 2"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)

"""The mixer `ssd`."""

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract


def matrix(query, key, step, skip):
    """The scan's matrix (B, heads, N, N): C_t . B_s times all decays after s, up to t, and the skip on the diagonal."""
    decay = -F.softplus(step).transpose(1, 2).cumsum(2)
    between = (decay[..., :, None] - decay[..., None, :]).exp()
    scores = (query @ key.transpose(2, 3)) * query.shape[3] ** -0.5 * between
    return scores.tril() + torch.diag_embed(skip[:, None].expand(-1, query.shape[2]))


def order(grid, prefix, layer):
    """Tokens in the order of the scan."""
    patches = prefix + torch.arange(grid[0] * grid[1]).view(grid)
    return torch.cat([torch.arange(prefix), (patches.T if layer % 2 else patches).flatten()])


def randomised(mixer):
    """A mixer whose steps, gates and mixing weights depend on the input."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in mixer.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * drawn.to(parameter.dtype))
    return mixer


def scan_alone(mixer):
    """A mixer with random steps, but with neither convolution, gate nor skip."""
    start = mixer.state_dict()
    keep = {key: value.clone() for key, value in start.items() if "a_" not in key}
    randomised(mixer).load_state_dict(keep, strict=False)
    return mixer


class TestSSD(MixerContract):
    mixer = "ssd"
    averages = False

    @pytest.mark.parametrize("layer", [0, 1])
    @torch.no_grad()
    def test_matrix(self, layer):
        """Without convolution and gate: M forward plus the strict lower part of M backward, in the scan's order."""
        q, k, v, place = self.given((7, 11), 2)
        mixer = scan_alone(self.make(layer=layer))
        mixer.fwd.D.copy_(torch.tensor([0.3, -0.5]))
        steps = mixer.a_proj(place.x)
        line = order((7, 11), 2, layer)
        back = line.flip(0)
        forward = matrix(q[:, :, line], k[:, :, line], (steps + mixer.fwd.a_bias)[:, line], mixer.fwd.D)
        backward = matrix(q[:, :, back], k[:, :, back], (steps + mixer.bwd.a_bias)[:, back], mixer.bwd.D)
        wanted = forward @ v[:, :, line] + (backward.tril(-1) @ v[:, :, back]).flip(2)
        # silu(1.2784645) is 1 to 7 digits only.
        gate = F.silu(mixer.z_proj.bias)[0]
        torch.testing.assert_close(mixer(q, k, v, place)[:, :, line], gate * wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_without_decay(self):
        """If no step forgets, it is linear attention without a normaliser: every pair counts once."""
        q, k, v, place = self.given((6, 5), 1)
        mixer = self.make()
        mixer.fwd.a_bias.fill_(-60)
        mixer.bwd.a_bias.fill_(-60)
        wanted = q * 8**-0.5 @ (k.transpose(2, 3) @ v)
        torch.testing.assert_close(mixer(q, k, v, place), wanted, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_start(self):
        """The convolution is the identity, nothing depends on the host's input, and decays are 0.982."""
        q, k, v, place = self.given((6, 5), 1)
        mixer = self.make()
        wanted = mixer(q, k, v, place)
        torch.testing.assert_close(mixer(q, k, v, place._replace(x=7 * place.x)), wanted)
        distance = (torch.arange(31)[:, None] - torch.arange(31)).abs()
        decays = torch.tensor(-4.0, dtype=torch.float64).neg().sigmoid() ** distance
        torch.testing.assert_close(wanted, (q @ k.transpose(2, 3) * 8**-0.5 * decays) @ v, rtol=1e-5, atol=1e-5)
        assert decays[0, 1].item() == pytest.approx(0.982, abs=1e-4)

    @torch.no_grad()
    def test_review_tokens(self):
        """They come first in both directions, by the map's cells, and only on large maps."""
        q, k, v, place = self.given((9, 5), 1)
        mixer = scan_alone(self.make(review=True))

        def pooled(x):
            maps = x[:, :, 1:].transpose(2, 3).flatten(1, 2).unflatten(2, (9, 5))
            return F.adaptive_avg_pool2d(maps, (2, 1)).flatten(2).unflatten(1, (x.shape[1], -1)).transpose(2, 3)

        steps = mixer.a_proj(place.x).transpose(1, 2)[..., None]
        found = mixer(q, k, v, place) - self.make_like(mixer, review=False)(q, k, v, place)
        wanted = 0
        for direction in (mixer.fwd, mixer.bwd):
            parts = [x if direction is mixer.fwd else x.flip(2) for x in (q, k, v, steps)]
            parts = [torch.cat([pooled(x), part], 2) for x, part in zip((q, k, v, steps), parts)]
            step = parts[3].squeeze(3).transpose(1, 2) + direction.a_bias
            added = (matrix(parts[0], parts[1], step, 0 * direction.D)[:, :, 2:, :2]) @ parts[2][:, :, :2]
            wanted = wanted + (added if direction is mixer.fwd else added.flip(2))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        small = self.make_like(mixer, review=None)
        assert torch.equal(small(q, k, v, place), self.make_like(mixer, review=False)(q, k, v, place))

    def make_like(self, mixer, **options):
        made = self.make(**options)
        made.load_state_dict(mixer.state_dict())
        return made

    @torch.no_grad()
    def test_large_maps_have_review_tokens(self):
        q, k, v, place = self.given((32, 32), 1, batch=1)
        found, with_review = (self.make(review=review)(q, k, v, place) for review in (None, True))
        assert torch.equal(found, with_review)
        assert not torch.allclose(found, self.make(review=False)(q, k, v, place))

    @torch.no_grad()
    def test_convolution_is_causal(self):
        """Forward taps reach 3 tokens back, and backward taps reach 3 tokens ahead."""
        q, k, v, place = self.given((1, 12), 0)
        mixer = self.make()
        for direction in (mixer.fwd, mixer.bwd):
            direction.a_bias.fill_(60)  # forgets at once, so that only the convolution and the skip look around
            direction.D.fill_(1)
            direction.conv.weight[:, :, :] = 0.5
        changed = v.clone()
        changed[:, :, 5] += 1
        seen = (mixer(q, k, changed, place) - mixer(q, k, v, place)).abs().amax((0, 1, 3)) > 1e-9
        assert seen.nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7, 8]

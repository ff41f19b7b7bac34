"""The mixer `mate`."""

import pytest
import torch
from support.mixer_contract import MixerContract

from terrazzo.backbones.mixers import Host, create_mixer
from terrazzo.errors import InputError


def swin(q, k, v, grid, window, shift, table):
    """Swin's attention of patches (B, heads, N, D), by its definition: a mask and a bias for all pairs."""
    rows, columns = torch.arange(grid[0] * grid[1]) // grid[1], torch.arange(grid[0] * grid[1]) % grid[1]
    same = torch.ones(len(rows), len(rows), dtype=torch.bool)
    for places, side in ((rows, grid[0]), (columns, grid[1])):
        moved = (places + window - shift) // window if side > window else torch.zeros_like(places)
        same &= moved[:, None] == moved
    down, right = (x[:, None] - x + window - 1 for x in (rows, columns))
    inside = (down * (2 * window - 1) + right) * same
    logits = q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + table[inside].permute(2, 0, 1)
    return logits.masked_fill(~same, -torch.inf).softmax(3) @ v


class TestMate(MixerContract):
    mixer = "mate"
    options = dict(window=4)
    averages = False

    @pytest.mark.parametrize("layer", [0, 1])
    @pytest.mark.parametrize("grid", [(12, 8), (7, 11), (3, 9), (4, 2)])
    @torch.no_grad()
    def test_window_branch(self, grid, layer):
        """With weight 0 for the scan, patches have Swin's attention, with shifted windows in odd layers."""
        q, k, v, place = self.given(grid, 2)
        mixer = self.make(layer=layer)
        mixer.relative_position_bias_table.copy_(torch.randn(49, 2, generator=torch.Generator().manual_seed(3)))
        mixer.mix_proj.bias.fill_(-1e4)
        wanted = swin(*(x[:, :, 2:] for x in (q, k, v)), grid, 4, 2 * layer, mixer.relative_position_bias_table)
        torch.testing.assert_close(mixer(q, k, v, place)[:, :, 2:], wanted)

    @torch.no_grad()
    def test_scan_branch(self):
        """With weight 1 for the scan, the mixer is `ssd`; tokens in front always are."""
        q, k, v, place = self.given((7, 11), 2)
        mixer = self.make(layer=1)
        ssd = create_mixer("ssd", Host(16, 2, 8, 1, 4), dtype=torch.float64)
        assert set(ssd.state_dict()) < set(mixer.state_dict())
        wanted = ssd(q, k, v, place)
        torch.testing.assert_close(mixer(q, k, v, place)[:, :, :2], wanted[:, :, :2])
        mixer.mix_proj.bias.fill_(1e4)
        torch.testing.assert_close(mixer(q, k, v, place), wanted)

    @torch.no_grad()
    def test_start(self):
        """At the start, both branches have weight 1/2 for every patch."""
        q, k, v, place = self.given((7, 11), 1)
        mixer = self.make()
        wanted = mixer.scanned(q, k, v, place)[:, :, 1:]
        wanted = wanted + swin(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], (7, 11), 4, 0, torch.zeros(49, 2))
        torch.testing.assert_close(mixer(q, k, v, place)[:, :, 1:], wanted / 2)

    def test_parameters(self):
        """The block's parameters, without the projections that the host has."""
        mixer = create_mixer("mate", Host(192, 6, 32), window=7)
        projections = 2 * (192 * 3 * 192 + 3 * 192) + 2 * (192 * 192 + 192)
        assert sum(p.numel() for p in mixer.parameters()) + projections == 342_618

    def test_errors(self):
        with pytest.raises(InputError, match="window must be at least 1, got 0"):
            self.make(window=0)

"""The mixer `axial`."""

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract
from torch.utils.flop_counter import FlopCounterMode

from terrazzo.clips import TrajectoryAttention


class TestAxial(MixerContract):
    mixer = "axial"

    @torch.no_grad()
    @pytest.mark.parametrize("prefix", [0, 1, 5])
    def test_a_line_and_equal_keys(self, prefix):
        """A single line, whose other axis has one patch, is softmax attention where no tokens stand in front."""
        for grid in ((1, 17), (17, 1)):
            q, k, v, place = self.given(grid, prefix)
            wanted, found = F.scaled_dot_product_attention(q, k, v), self.make()(q, k, v, place)
            torch.testing.assert_close(found[:, :, :prefix], wanted[:, :, :prefix])
            if prefix == 0:
                torch.testing.assert_close(found, wanted)

    @torch.no_grad()
    def test_columns_then_rows(self):
        """As a loop over the lines of a map."""
        q, k, v, place = self.given((3, 5), 0)
        maps = [x.unflatten(2, (3, 5)) for x in (q, k, v)]

        def attended(query, key, value):
            return (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) @ value

        query, key, mixed = maps
        columns = [attended(query[:, :, :, i], key[:, :, :, i], mixed[:, :, :, i]) for i in range(5)]
        mixed = torch.stack(columns, 3)
        rows = [attended(query[:, :, i], key[:, :, i], mixed[:, :, i]) for i in range(3)]
        torch.testing.assert_close(self.make()(q, k, v, place), torch.stack(rows, 2).flatten(2, 3))

    @torch.no_grad()
    def test_trajectory_attention_of_one_frame(self):
        """Along a column, and with projections that change nothing, it is Axial-VS's attention of one frame."""
        q, k, v, place = self.given((7, 1), 0, heads=1)
        layer = TrajectoryAttention(8, 1, dtype=torch.float64)
        for linear in (layer.q, layer.k, layer.v, layer.proj_q, layer.proj):
            torch.nn.init.eye_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
        layer.proj_kv.weight.copy_(torch.eye(8, dtype=torch.float64).repeat(2, 1))
        layer.proj_kv.bias.zero_()
        torch.testing.assert_close(self.make(heads=1)(q, k, v, place)[:, 0], layer(q[:, 0], k[:, 0], v[:, 0]))

    @torch.no_grad()
    def test_one_change_reaches_all(self):
        """Each patch reads each patch, by way of its own row."""
        q, k, v, place = self.given((4, 6), 1)
        matrix = self.make().matrix(q, k, v, place)
        assert (matrix > 0).all()
        torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))

    def test_cost(self):
        """2 N (H + W) D multiply-adds, and no square matrix of N."""
        with torch.device("meta"):
            q, k, v, place = self.given((32, 48), 0, torch.float32, batch=1)
            mixer = self.make(torch.float32)
        with FlopCounterMode(display=False) as counter:
            mixer(q, k, v, place)
        assert counter.get_total_flops() == 2 * 2 * 32 * 48 * (32 + 48) * 16

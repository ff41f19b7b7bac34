"""PiToMe against its definition, token by token."""

import math

import pytest
import torch
from support.reducer_contract import ReducerContract, host, picture

import terrazzo
from terrazzo.backbones.reducers.pitome import energy
from terrazzo.errors import InputError
from terrazzo.kernels.token_reduction import merge, ordered, pair


def defined(metric, r, margin):
    """The map of one image without tokens in front: section 3.2 of arXiv 2405.16148."""
    count = len(metric)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    cosine = (unit @ unit.T).tolist()
    high = [sum(c - margin if c > margin else math.exp(c - margin) - 1 for c in row) / count for row in cosine]
    order = sorted(range(count), key=lambda i: (-high[i], i))
    sources, destinations = order[: 2 * r : 2], order[1 : 2 * r : 2]
    protected = [i for i in range(count) if i not in order[: 2 * r]]
    found = {token: place for place, token in enumerate([*protected, *destinations])}
    for source in sources:
        found[source] = found[max(destinations, key=lambda j: cosine[source][j])]
    return [found[i] for i in range(count)]


class TestPiToMe(ReducerContract):
    method = "pitome"
    options = dict(ratio=0.8)
    nothing = dict(ratio=1.0)
    left = 49 - 9 - 8 - 6

    @pytest.mark.parametrize("margin", [0.5, 0.0])
    def test_is_as_defined(self, margin):
        torch.manual_seed(0)
        metric = torch.randn(3, 14, 4, dtype=torch.float64)
        order = ordered(energy(metric, margin))[:, :10]
        found = pair(metric, order[:, ::2], order[:, 1::2])
        assert found.M == 9
        assert found.map.tolist() == [defined(image, 5, margin) for image in metric]

    def test_two_equal_pairs(self):
        """Of four tokens, two equal pairs, each pair merges."""
        tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        for order in ([0, 0, 1, 1], [0, 1, 1, 0]):
            metric = tokens[order].unsqueeze(0)
            ranked = ordered(energy(metric, 0.5))
            # All energies tie, so ranks are positions, and each pair has a source and a destination.
            found = pair(metric, ranked[:, ::2], ranked[:, 1::2]).map[0]
            assert (found[:, None] == found).tolist() == [[a == b for a in order] for b in order]
        # Energies that differ a little put each pair side by side.
        metric = torch.tensor([[1.0, 0.0], [0.1, 1.0], [1.0, 0.0], [0.1, 1.0], [0.0, -1.0]]).unsqueeze(0)
        ranked = ordered(energy(metric, 0.5))[:, :4]
        _, size, found = merge(metric, pair(metric, ranked[:, ::2], ranked[:, 1::2]))
        assert size.sort().values.tolist() == [[1, 2, 2]]
        assert found[0, 0] == found[0, 2] != found[0, 1] == found[0, 3]

    def test_equal_tokens_tie_by_position(self):
        """In a flat image all energies are equal, and the order is the positions'."""
        flat = torch.ones(2, 9, 3)
        assert ordered(energy(flat, 0.5)).tolist() == [list(range(9))] * 2

    def test_padding_has_no_energy(self):
        torch.manual_seed(0)
        metric = torch.randn(1, 8, 4, dtype=torch.float64)
        padded = torch.cat([metric, torch.zeros(1, 3, 4, dtype=torch.float64)], 1)
        size = torch.tensor([[1.0] * 8 + [0.0] * 3])
        found = energy(padded, 0.5, size)
        torch.testing.assert_close(found[:, :8], energy(metric, 0.5))
        assert found[0, 8:].tolist() == [-math.inf] * 3

    @torch.no_grad()
    def test_all_patches_in_some_blocks(self):
        """In a bipartite block the r best pairs of all patches merge, so the least similar sources stay."""
        vit = terrazzo.reduce(host(), method="pitome", ratio=0.8, blocks=(1,), bipartite=(1,))
        other = terrazzo.reduce(host(), method="pitome", ratio=0.8, blocks=(1,))
        x = picture(vit)
        assert vit.forward_features(x).shape == other.forward_features(x).shape == (2, 1 + 40, 48)
        assert not torch.allclose(vit(x), other(x))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(ratio=0.4), "ratio must be 0.5 to 1, got 0.4"),
            (dict(margin=2), "margin must be a cosine, -1 to 1, got 2"),
            (dict(bipartite=(7,)), r"bipartite must be some of the blocks \(0, 1, 2\), got \(7,\)"),
            (dict(ratio=(0.9, 0.9)), r"ratio must be a number, or hold one for each of 3 blocks"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            terrazzo.reduce(host(), method="pitome", **options)

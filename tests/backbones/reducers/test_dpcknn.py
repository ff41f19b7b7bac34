"""DPC-KNN: blobs, the definition token by token, padding."""

import math

import pytest
import torch
from support.reducer_contract import ReducerContract, host

import terrazzo
from terrazzo.backbones.reducers.dpcknn import DPCKNN, clusters
from terrazzo.errors import InputError


def defined(x, count, k):
    """The clusters of one image (N, C): section 3.2 of arXiv 2204.08680."""
    tokens = range(len(x))
    apart = [[(x[i] - x[j]).norm().item() / math.sqrt(x.shape[1]) for j in tokens] for i in tokens]
    density = [math.exp(-sum(sorted(d * d for d in row)[:k]) / k) for row in apart]
    score = []
    for i in tokens:
        denser = [apart[i][j] for j in tokens if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score.append(density[i] * (min(denser) if denser else max(map(max, apart))))
    centres = sorted(sorted(tokens, key=lambda i: (-score[i], i))[:count])
    return [centres.index(i) if i in centres else min(range(count), key=lambda c: apart[i][centres[c]]) for i in tokens]


class TestDPCKNN(ReducerContract):
    method = "dpcknn"
    options = dict(blocks=(0, 2), keep=(0.7, 0.4))
    nothing = dict(keep=1.0)
    left = 19

    def test_is_as_defined(self):
        x = torch.randn(3, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert clusters(x, 6, 5).tolist() == [defined(image, 6, 5) for image in x]

    def test_blobs(self):
        """Three blobs are three clusters, in any order of the tokens."""
        generator = torch.Generator().manual_seed(0)
        blobs = torch.arange(18) % 3
        x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])[blobs] + 0.1 * torch.randn(18, 2, generator=generator)
        for _ in range(5):
            order = torch.randperm(18, generator=generator)
            found = clusters(x[order].unsqueeze(0), 3, 5)[0]
            same = blobs[order][:, None] == blobs[order]
            assert torch.equal(found[:, None] == found, same)

    def test_equal_tokens(self):
        """Of a flat image the first tokens are centres, and every cluster has a token."""
        assert clusters(torch.ones(1, 6, 3), 3, 5).tolist() == [[0, 1, 2, 0, 0, 0]]

    def test_padding_changes_nothing(self):
        x = torch.randn(1, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        padded = torch.cat([x, torch.zeros(1, 4, 4, dtype=torch.float64)], 1)
        size = torch.tensor([[1.0] * 12 + [0.0] * 4])
        assert torch.equal(clusters(padded, 5, 5, size)[:, :12], clusters(x, 5, 5))

    def test_half_precision_is_compared_in_float32(self):
        x = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0)).half()
        assert torch.equal(clusters(x, 6, 5), clusters(x.float(), 6, 5))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(keep=1.5), "keep must be more than 0, at most 1, got 1.5"),
            (dict(neighbours=1), "neighbours must be 2 or more, the token itself included, got 1"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            terrazzo.reduce(host(), method="dpcknn", **options)

    def test_defaults(self):
        assert DPCKNN.default_blocks(12) == (3, 6, 9)

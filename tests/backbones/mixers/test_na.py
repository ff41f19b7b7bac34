"""The mixer `na`."""

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract, place_of
from support.neighborhood_shapes import QUICK

from terrazzo.errors import InputError
from terrazzo.kernels import use_backend
from terrazzo.kernels.neighborhood_attention.reference import axis_neighbors


def allowed(grid, kernel, dilation, prefix):
    """(N, N), whether a token attends to another, by the operator's definition."""
    axes = []
    for length, edge, step in zip(grid, kernel, dilation):
        neighbors, _ = axis_neighbors(length, edge, step)
        axes.append(torch.zeros(length, length, dtype=torch.bool).scatter_(1, neighbors, True))
    rows, columns = axes
    inside = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return F.pad(inside, (prefix, 0, prefix, 0), value=True)


@pytest.fixture(autouse=True)
def portable():
    """The operator's own tests compare its forms; here each size would cost the compilation of a kernel."""
    with use_backend("portable"):
        yield


class TestNeighborhood(MixerContract):
    mixer = "na"
    options = dict(kernel=3)

    @torch.no_grad()
    @pytest.mark.parametrize("prefix", [0, 2])
    def test_definition(self, prefix):
        """One softmax over a window and the tokens in front."""
        for grid, kernel, dilation in QUICK:
            if isinstance(kernel, tuple) or isinstance(dilation, tuple):
                continue
            q, k, v, place = self.given(grid, prefix, batch=1)
            mask = allowed(grid, (kernel, kernel), (dilation, dilation), prefix)
            found = self.make(kernel=kernel, dilation=dilation)(q, k, v, place)
            torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    @torch.no_grad()
    @pytest.mark.parametrize("prefix", [0, 1])
    def test_short_sides(self, prefix):
        """A short side has a window of the whole side, or a smaller dilation."""
        for grid, dilation, axes in (
            ((1, 30), 2, ((1, 5), (1, 2))),
            ((3, 30), 2, ((3, 5), (1, 2))),
            ((30, 14), 3, ((5, 5), (3, 2))),
        ):
            q, k, v, place = self.given(grid, prefix)
            wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed(grid, *axes, prefix))
            for bias in (False, True):
                found = self.make(kernel=5, dilation=dilation, bias=bias)(q, k, v, place)
                torch.testing.assert_close(found, wanted)

    @torch.no_grad()
    @pytest.mark.parametrize("prefix", [0, 5])
    def test_softmax_attention_on_small_maps(self, prefix):
        """Windows that reach both sides are the whole map, with any dilation; the model says so."""
        q, k, v, place = self.given((7, 11), prefix)
        for options in (dict(), dict(dilation=2), dict(bias=True)):
            found = self.make(kernel=11, **options)(q, k, v, place)
            torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))
        assert self.make(kernel=11).dense((7, 11), prefix) == "windows of 11 reach both sides of the map"
        assert self.make(kernel=10).dense((7, 11), prefix) is None

    def test_bias(self):
        """The same bias with and without tokens in front, if these have no weight, and the same gradient."""
        torch.manual_seed(0)
        for grid, kernel in (((9, 19), 3), ((3, 19), 5)):
            mixer = self.make(kernel=kernel, dilation=2, bias=True)
            torch.nn.init.normal_(mixer.rpb)
            q, k, v, place = self.given(grid, 0)
            wanted = mixer(q, k, v, place)
            (grad,) = torch.autograd.grad(wanted.square().sum(), mixer.rpb)
            q, k, v = (torch.cat([x[:, :, :1], x], 2) for x in (q, k, v))
            q, k, v = (F.pad(x, (0, 8)) for x in (q, k, v))  # 8 further channels, in which the front key is far away
            q[..., 8], k[:, :, 0, 8] = 1, -1e6
            found = mixer(q * 2**0.5, k, v, place_of(grid, 1, q, k))[:, :, 1:, :8]
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(torch.autograd.grad(found.square().sum(), mixer.rpb)[0], grad)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(kernel=1), "kernel must be at least 2, got 1"),
            (dict(kernel=(3, 3)), "kernel must be an int"),
            (dict(dilation=0), "dilation must be at least 1, got 0"),
        ],
    )
    def test_refused_options(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)


class TestNeighborhoodWithBias(MixerContract):
    mixer = "na"
    options = dict(kernel=4, dilation=2, bias=True)

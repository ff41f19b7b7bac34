"""The peers compute neighborhood attention: FlexAttention's mask and blocks, and the dense mask, are right."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from terrazzo.kernels import neighborhood_attention
from terrazzo.tools.bench.neighborhood import peers

# Non-square maps, odd and even windows, map = kernel x dilation, and axes with remainders of 0, 1 and dilation - 1.
WINDOWS = [
    peers.Window((13, 17), (5, 3), (2, 3)),
    peers.Window((17, 13), (3, 5), (4, 1)),
    peers.Window((9, 20), (4, 6), (2, 3)),
    peers.Window((14, 21), (7, 7), (2, 3)),
    peers.Window((11, 7), (7, 7), (1, 1)),
    peers.Window((11, 14), (3, 2), (3, 5)),
]
exact = dict(rtol=1e-11, atol=1e-11)


def inputs(window, heads=2):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, *window.size, heads, 8, dtype=torch.float64)
    return query, key, value, torch.randn(heads, *(2 * k - 1 for k in window.kernel), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore::UserWarning")  # FlexAttention is not compiled
@pytest.mark.parametrize(("window", "bias"), [*((window, True) for window in WINDOWS), (WINDOWS[0], False)], ids=str)
def test_flex_attention(window, bias):
    query, key, value, rpb = inputs(window)
    blocks = peers.flex_blocks(window, query.device)
    score_mod = peers.flex_bias(window, rpb) if bias else None
    found = peers.flex(query, key, value, flex_attention, blocks, score_mod)
    rpb = rpb if bias else None
    wanted = neighborhood_attention(query, key, value, window.kernel, window.dilation, rpb, backend="reference")
    torch.testing.assert_close(found, wanted, **exact)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradients_through_flex_attentions_functions(window):
    """FlexAttention has no gradients on a CPU, so the test applies its functions to all pairs."""
    arguments = [x.requires_grad_() for x in inputs(window)]
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in arguments[:3])
    head = torch.arange(2)[:, None, None]
    tokens = torch.arange(window.tokens)
    pairs = (None, head, tokens[:, None], tokens[None])
    score = peers.flex_bias(window, arguments[3])(query @ key.transpose(-1, -2) * 8**-0.5, *pairs)
    score = score.masked_fill(~peers.flex_mask(window)(*pairs), float("-inf"))
    found = (score.softmax(-1) @ value).transpose(1, 2).reshape(arguments[0].shape)
    wanted = neighborhood_attention(*arguments[:3], window.kernel, window.dilation, arguments[3], backend="reference")
    grad = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(out, arguments, grad) for out in (found, wanted))):
        torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_blocks_are_those_of_all_pairs(window, block):
    found = peers.flex_blocks(window, torch.device("cpu"), block)
    tokens = window.tokens
    wanted = create_block_mask(peers.flex_mask(window), None, None, tokens, tokens, device="cpu", BLOCK_SIZE=block)
    assert found.shape == wanted.shape
    assert torch.equal(found.to_dense(), wanted.to_dense())


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_dense(window):
    query, key, value, rpb = inputs(window)
    found = peers.dense(query, key, value, peers.dense_mask(rpb, window, query.dtype))
    wanted = neighborhood_attention(query, key, value, window.kernel, window.dilation, rpb, backend="reference")
    torch.testing.assert_close(found, wanted, **exact)


def test_natten_is_called_as_its_releases_want(monkeypatch):
    import sys
    import types

    def na2d(query, key, value, kernel_size, stride=1, dilation=1, *, backend, torch_compile):
        assert stride == 1
        assert torch_compile == (backend == "flex-fna")
        return neighborhood_attention(query, key, value, kernel_size, dilation)

    monkeypatch.setitem(sys.modules, "natten", types.SimpleNamespace(na2d=na2d))
    query, key, value, _ = inputs(WINDOWS[0])
    for backend in peers.NATTEN:
        found = peers.natten(query, key, value, WINDOWS[0], backend)
        assert found.shape == query.shape

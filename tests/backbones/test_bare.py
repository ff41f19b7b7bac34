"""A layer is called if something watches its calls; with or without a call, results are equal."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from terrazzo.backbones import _bare


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


def hooked_before(layer):
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


def hooked_backward(layer):
    layer.register_full_backward_hook(lambda *_: None)
    return layer


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


def replaced(layer):
    layer.forward = layer.forward  # as accelerate does
    return layer


def of_another_class(layer):
    layer.__class__ = type("Own", (type(layer),), {})
    return layer


def with_odd_weights(layer):
    layer.weight = nn.Parameter(layer.weight.as_subclass(type("Packed", (torch.Tensor,), {})))
    return layer


WATCHED = [hooked, hooked_before, hooked_backward, parametrized, replaced, of_another_class, with_odd_weights]


def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 9).double()


def conv(**kwargs):
    torch.manual_seed(0)
    return nn.Conv1d(6, 6, 3, groups=6, **kwargs).double()


def test_bare():
    assert _bare.is_bare(linear(), conv())


@pytest.mark.parametrize("watched", WATCHED)
def test_watched(watched):
    assert not _bare.is_bare(watched(linear()))
    assert not _bare.is_bare(linear(), watched(conv()))


def test_hooks_of_all_modules():
    """Global hooks count as watchers, except the hooks of PyTorch's flop counter."""
    with FlopCounterMode(display=False):
        assert _bare.is_bare(linear())
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not _bare.is_bare(linear())
    finally:
        hook.remove()
    assert _bare.is_bare(linear())


@pytest.mark.parametrize("watched", WATCHED)
def test_both_ways_are_the_same(watched):
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = slice(2, -3)
    torch.testing.assert_close(_bare.rows_of(watched(linear()), x, rows), _bare.rows_of(linear(), x, rows))
    for times in (1, 2):
        delta, bias = _bare.step_sizes(linear(), x, times)
        found, rest = _bare.step_sizes(watched(linear()), x, times)
        torch.testing.assert_close(found + rest, delta + bias)
        torch.testing.assert_close(delta + bias, linear()(x) + (times - 1) * linear().bias)
    for options in (dict(), dict(padding=1, bias=False)):
        wide = torch.cat([x, x.flip(1)], -1)
        wanted = _bare.on_sequences(wide, conv(**options), conv(**options))
        torch.testing.assert_close(_bare.on_sequences(wide, watched(conv(**options)), conv(**options)), wanted)
        torch.testing.assert_close(wanted[..., :6], conv(**options)(x.mT).mT)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (6, 7)])
def test_a_convolution_of_few_positions_is_a_product(monkeypatch, memory_format, bias, size):
    """The layer is not called without gradients, and gives the same result; with hooks or gradients it is called."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 40, 3, stride=2, padding=1, bias=bias).double().to(memory_format=memory_format)
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    wanted = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(_bare.on_few_positions(layer, x), wanted)
    calls = []
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(_bare.on_few_positions(layer, x), wanted)
        assert calls == [1]
        hook.remove()
        monkeypatch.setattr(layer, "_conv_forward", None)  # a call would fail
        torch.testing.assert_close(_bare.on_few_positions(layer, x), wanted)
        many = torch.randn(2, 9, 10, 4, dtype=torch.float64)
        with pytest.raises(TypeError):
            _bare.on_few_positions(layer, many)
